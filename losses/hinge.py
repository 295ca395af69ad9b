"""The hinge on log-ratios. P pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from losses.ops import expected_over_labels, reward_metrics
from losses.registry import register
from losses.types import LossOutput


@register("hinge")
def hinge_loss(
    policy_chosen_logps: Tensor,  # [P]
    policy_rejected_logps: Tensor,  # [P]
    reference_chosen_logps: Tensor,  # [P]
    reference_rejected_logps: Tensor,  # [P]
    soft_labels: Tensor | None = None,  # [P]
    *,
    beta: float = 0.1,
) -> LossOutput:
    """L = max(0, 1 - beta*(log pi/ref(y_w) - log pi/ref(y_l))).

    Liu et al. 2023, eq. 11 [liu2023rso], the margin of SLiC-HF (Zhao et al. 2023 [zhao2023slic]) on log-ratios. A pair whose
    margin has reached 1/beta nats is done: loss and gradient are zero there. With soft labels p the loss is the expectation
    p max(0, 1 - m) + (1-p) max(0, 1 + m), whose minimum is at m = 1 for p > 1/2 whatever p is.

    Args:
        beta: strength against the reference; raising it reaches the margin of 1 nearer to the reference.
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    margin = chosen_rewards - rejected_rewards
    loss = expected_over_labels(torch.relu(1 - margin), torch.relu(1 + margin), soft_labels)
    return LossOutput(loss, torch.ones_like(loss), reward_metrics(chosen_rewards, rejected_rewards))
