"""Weighted preference optimization. P pairs, T tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from losses.ops import logistic_loss, masked_mean, masked_sum, ratio_of, reward_metrics
from losses.registry import register
from losses.types import LossOutput


@register("wpo")
def wpo_loss(
    policy_chosen_token_logps: Tensor,  # [P, T]
    policy_rejected_token_logps: Tensor,  # [P, T]
    reference_chosen_logps: Tensor,  # [P]
    reference_rejected_logps: Tensor,  # [P]
    chosen_token_log_sum_sq: Tensor,  # [P, T]
    rejected_token_log_sum_sq: Tensor,  # [P, T]
    chosen_mask: Tensor,  # [P, T]
    rejected_mask: Tensor,  # [P, T]
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    aligned: bool = True,
) -> LossOutput:
    """L = w(y_w) w(y_l) DPO(y_w, y_l), w(y) = exp(mean_t[log pi(y_t) - log sum_v pi(v)^2]), without gradient.

    Zhou et al. 2024, eq. 4 and 6 [zhou2024wpo]: pairs that the policy would sample itself count more, which brings off-policy
    data nearer to on-policy. The sum of squares is the expected probability of a token that the policy draws; with it a
    weight can exceed 1. Weights multiply the loss and are no denominator: pairs are averaged by their number. The exponent
    of a weight is cut at 20.

    Args:
        beta: strength against the reference; raising it keeps the policy nearer to it.
        label_smoothing: assumed share of flipped labels, in [0, 0.5).
        aligned: divide by the expected probability (the paper's sampled alignment, and TRL's); False weighs by
            exp(mean log-prob) alone.

    Raises:
        ValueError: `label_smoothing` outside [0, 0.5).
    """

    def side(token_logps: Tensor, log_sum_sq: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Log-prob and log-weight, [P]."""
        relative = token_logps - log_sum_sq if aligned else token_logps
        return masked_sum(token_logps, mask, dim=-1), masked_mean(relative.detach(), mask, dim=-1)

    chosen_logps, chosen_weight = side(policy_chosen_token_logps, chosen_token_log_sum_sq, chosen_mask)
    rejected_logps, rejected_weight = side(policy_rejected_token_logps, rejected_token_log_sum_sq, rejected_mask)
    chosen_rewards = beta * (chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (rejected_logps - reference_rejected_logps)
    weight = ratio_of(chosen_weight + rejected_weight)
    pair = logistic_loss(chosen_rewards - rejected_rewards, label_smoothing=label_smoothing, owner="wpo_loss")
    ones = torch.ones_like(pair)
    metrics = {**reward_metrics(chosen_rewards, rejected_rewards), "wpo/weight": (weight, ones)}
    return LossOutput(weight * pair, ones, metrics)
