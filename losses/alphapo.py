"""SimPO with another shape of reward. P pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from losses.ops import MAX_LOG_RATIO, logistic_loss, per_token, reward_metrics
from losses.registry import register
from losses.types import LossOutput


@register("alphapo")
def alphapo_loss(
    policy_chosen_logps: Tensor,  # [P]
    policy_rejected_logps: Tensor,  # [P]
    chosen_lengths: Tensor,  # [P]
    rejected_lengths: Tensor,  # [P]
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
    alpha: float = 0.25,
) -> LossOutput:
    """L = -log sigma(beta*(r_w - r_l) - gamma), r = (1 - p^-alpha)/alpha, p = exp(log pi(y)/|y|).

    Gupta et al. 2025, eq. 7 [gupta2025alphapo]: SimPO's reward log p is the limit alpha to 0; alpha > 0 punishes unlikely
    completions harder, alpha < 0 more softly. The exponent -alpha log p is cut at 20 and the gradient is zero beyond.

    Args:
        beta: scale of the reward; raising it saturates pairs at smaller differences.
        gamma: the margin that a pair should reach, after beta, as in `simpo`.
        alpha: shape of the reward; 0 is SimPO.
    """
    chosen_rewards = beta * _shaped(per_token(policy_chosen_logps, chosen_lengths), alpha)
    rejected_rewards = beta * _shaped(per_token(policy_rejected_logps, rejected_lengths), alpha)
    loss = logistic_loss(chosen_rewards - rejected_rewards - gamma, owner="alphapo_loss")
    return LossOutput(loss, torch.ones_like(loss), reward_metrics(chosen_rewards, rejected_rewards))


def _shaped(mean_logps: Tensor, alpha: float) -> Tensor:
    """(1 - exp(-alpha*logp))/alpha [P], log-probs themselves at alpha = 0."""
    return mean_logps if alpha == 0 else -torch.expm1((-alpha * mean_logps).clamp(max=MAX_LOG_RATIO)) / alpha
