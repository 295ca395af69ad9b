"""Simple preference optimization. P pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from losses.ops import logistic_loss, per_token, reward_metrics
from losses.registry import register
from losses.types import LossOutput


@register("simpo")
def simpo_loss(
    policy_chosen_logps: Tensor,  # [P]
    policy_rejected_logps: Tensor,  # [P]
    chosen_lengths: Tensor,  # [P]
    rejected_lengths: Tensor,  # [P]
    *,
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """L = -log sigma(beta*(log pi(y_w)/|y_w| - log pi(y_l)/|y_l|) - gamma).

    Meng et al. 2024, eq. 6 [meng2024simpo]: the reward is the mean log-prob of a token, as generation ranks completions; there
    is no reference, so nothing but early stopping holds the policy near where it started.

    Args:
        beta: scale of the reward; raising it saturates pairs at smaller differences.
        gamma: the margin that a pair should reach, after beta. The authors' code and HALOs name the ratio gamma/beta, and
            rlhf-book calls that ratio gamma; TRL and Liger name this number.
        label_smoothing: assumed share of flipped labels, in [0, 0.5), as TRL's.

    Raises:
        ValueError: `label_smoothing` outside [0, 0.5).
    """
    chosen_rewards = beta * per_token(policy_chosen_logps, chosen_lengths)
    rejected_rewards = beta * per_token(policy_rejected_logps, rejected_lengths)
    margin = chosen_rewards - rejected_rewards - gamma
    loss = logistic_loss(margin, label_smoothing=label_smoothing, owner="simpo_loss")
    return LossOutput(loss, torch.ones_like(loss), reward_metrics(chosen_rewards, rejected_rewards))
