"""Advantage functions: from a rollout's rewards to `advantages` and `returns`.

Shapes: N sequences, T tokens. A loss names its advantage function by `@register(..., advantage=gae)`; positional
parameters are tensors of the vocabulary, keyword-only ones hyper-parameters, as for losses. Nothing here carries gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from losses.ops import masked_sum, whiten

STD_OFFSET = 1e-4
"""Added to a standard deviation of rewards, as GRPO's authors do: equal rewards give advantages of 0."""


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


@torch.no_grad()
def group_baseline(
    rewards: Tensor,  # [N, T]
    mask: Tensor,  # [N, T]
    group_ids: Tensor,  # [N]
    *,
    scale: Literal["group", "batch", "none"] = "group",
) -> dict[str, Tensor]:
    """A = (r - mean of the prompt's rewards) / (std + 1e-4), r the sum of a sequence's rewards; the same for all its tokens.

    Shao et al. 2024, section 4.1.2 [shao2024grpo]. Standard deviations are unbiased (n - 1).

    Args:
        rewards: reward of each token, KL penalty included.
        mask: 1 on scored tokens.
        group_ids: which prompt a sequence belongs to.
        scale: "group": by the std of the prompt's rewards; "batch": by that of all rewards; "none": not at all (Dr. GRPO,
            Liu et al. 2025 [liu2025drgrpo]).

    Returns:
        `advantages`, [N, T], 0 where the mask is 0. A prompt with one sample has advantage 0.

    Raises:
        ValueError: an unknown scale.
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"group_baseline: unknown scale {scale!r}; expected 'group', 'batch' or 'none'.")
    total = masked_sum(rewards, mask, dim=-1)
    count, mean = _group_means(total, group_ids)
    centred = total - mean
    if scale == "group":
        squares = count * _group_means(centred.square(), group_ids)[1]
        centred = centred / ((squares / (count - 1).clamp(min=1)).sqrt() + STD_OFFSET)
    elif scale == "batch":
        centred = centred / (_std(total) + STD_OFFSET)
    return {"advantages": _on_tokens(centred, mask)}


@torch.no_grad()
def leave_one_out(
    rewards: Tensor,  # [N, T]
    mask: Tensor,  # [N, T]
    group_ids: Tensor,  # [N]
    *,
    normalise: bool = False,
) -> dict[str, Tensor]:
    """A_i = r_i - mean_{j != i} r_j over the prompt's other samples, r the sum of a sequence's rewards.

    Ahmadian et al. 2024, eq. 8 [ahmadian2024rloo]. It is K/(K-1) times the reward minus the group's mean, and sums to 0 in a
    group.

    Args:
        rewards: reward of each token, KL penalty included.
        mask: 1 on scored tokens.
        group_ids: which prompt a sequence belongs to.
        normalise: scale the advantages of all sequences to standard deviation 1, as TRL's option.

    Returns:
        `advantages`, [N, T], 0 where the mask is 0.

    Raises:
        ValueError: a prompt with one sample, which leaves no other.
    """
    total = masked_sum(rewards, mask, dim=-1)
    count, mean = _group_means(total, group_ids)
    if (count < 2).any():
        raise ValueError("leave_one_out: a prompt has 1 sample, expected 2 or more; raise samples_per_prompt.")
    advantages = count / (count - 1) * (total - mean)
    if normalise:
        advantages = advantages / (_std(advantages) + STD_OFFSET)  # their mean is 0 already
    return {"advantages": _on_tokens(advantages, mask)}


def _group_means(values: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Size and mean [N] of each row's group."""
    groups, index = group_ids.unique(return_inverse=True)
    empty = values.new_zeros(len(groups))
    count = empty.index_add(0, index, torch.ones_like(values))
    return count[index], (empty.index_add(0, index, values) / count)[index]


def _std(values: Tensor) -> Tensor:
    """Unbiased standard deviation of [N], 0 for a single value."""
    return values.std() if len(values) > 1 else torch.zeros_like(values[0])


def _on_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """[N] on every unmasked token, [N, T]."""
    return torch.where(mask.bool(), values[:, None], torch.zeros_like(values)[:, None])
