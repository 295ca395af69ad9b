"""Advantage functions: from a rollout's rewards to `advantages` and `returns`.

Shapes: N sequences, T tokens. A loss names its advantage function by `@register(..., advantage=gae)`; positional
parameters are tensors of the vocabulary, keyword-only ones hyper-parameters, as for losses. Nothing here carries gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from losses.ops import whiten


@torch.no_grad()
def gae(
    rewards: Tensor,  # [N, T]
    old_values: Tensor,  # [N, T]
    mask: Tensor,  # [N, T]
    *,
    discount: float = 1.0,
    gae_lambda: float = 0.95,
    whiten_advantages: bool = True,
) -> dict[str, Tensor]:
    """A_t = delta_t + discount*lambda*A_{t+1}, delta_t = r_t + discount*V_{t+1} - V_t; returns = A + V.

    Schulman et al. 2015, eq. 16 [schulman2015gae]. After the last unmasked token the value is 0: a completion ends there.
    Masked positions are stepped over, wherever they are; their rewards and values do not matter.

    Args:
        rewards: reward of each token, KL penalty included.
        old_values: the value head before each token, when the rollout was sampled.
        mask: 1 on scored tokens.
        discount: 1 weighs late rewards as much as early ones.
        gae_lambda: 1 is return minus value (unbiased, noisy), 0 the one-step error (biased by the value head).
        whiten_advantages: shift and scale the advantages to mean 0 and variance 1 over all unmasked tokens; returns are
            never whitened.

    Returns:
        `advantages` and `returns`, [N, T], 0 where the mask is 0.
    """
    kept = mask.bool()
    zero = torch.zeros_like(old_values)
    advantages = zero.clone()
    next_advantage = next_value = zero[:, 0]
    for t in reversed(range(rewards.shape[-1])):
        here, value = kept[:, t], old_values[:, t]
        delta = rewards[:, t] + discount * next_value - value
        # The carry passes over masked positions, so padding on either side changes nothing.
        next_advantage = torch.where(here, delta + discount * gae_lambda * next_advantage, next_advantage)
        next_value = torch.where(here, value, next_value)
        advantages[:, t] = torch.where(here, next_advantage, zero[:, t])
    returns = torch.where(kept, advantages + old_values, zero)
    return {"advantages": whiten(advantages, mask) if whiten_advantages else advantages, "returns": returns}


@torch.no_grad()
def discounted_returns(
    rewards: Tensor,  # [N, T]
    mask: Tensor,  # [N, T]
    *,
    discount: float = 1.0,
    whiten_advantages: bool = False,
) -> dict[str, Tensor]:
    """G_t = r_t + discount*G_{t+1}: the reward to go, without a value head.

    Williams 1992 [williams1992reinforce].

    Args:
        rewards: reward of each token, KL penalty included.
        mask: 1 on scored tokens; masked positions are stepped over.
        discount: 1 weighs late rewards as much as early ones.
        whiten_advantages: shift and scale the advantages to mean 0 and variance 1 over all unmasked tokens.

    Returns:
        `advantages` and `returns`, [N, T], 0 where the mask is 0; equal unless whitened.
    """
    no_values = torch.zeros_like(rewards)
    returns = gae(rewards, no_values, mask, discount=discount, gae_lambda=1.0, whiten_advantages=False)["returns"]
    return {"advantages": whiten(returns, mask) if whiten_advantages else returns, "returns": returns}
