"""Self-play preference optimization with hard labels. P pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from losses.ops import reward_metrics
from losses.registry import register
from losses.types import LossOutput


@register("sppo")
def sppo_loss(
    policy_chosen_logps: Tensor,  # [P]
    policy_rejected_logps: Tensor,  # [P]
    reference_chosen_logps: Tensor,  # [P]
    reference_rejected_logps: Tensor,  # [P]
    *,
    beta: float = 1e-3,
) -> LossOutput:
    """L = (log pi/ref(y_w) - 1/(2 beta))^2 + (log pi/ref(y_l) + 1/(2 beta))^2.

    Wu et al. 2024, eq. 4.7 [wu2024sppo] with eta = 1/beta and win probabilities 1 and 0. Its minimum has each log-ratio at its
    own target, where IPO fixes their difference only. The default is the paper's eta of 1000: targets of 500 nats, so every
    pair is pushed with nearly constant force; TRL's 0.1 has targets of 5.

    Args:
        beta: strength against the reference; raising it moves the targets nearer to it.
    """
    target = 1 / (2 * beta)
    chosen_log_ratio = policy_chosen_logps - reference_chosen_logps
    rejected_log_ratio = policy_rejected_logps - reference_rejected_logps
    loss = (chosen_log_ratio - target).square() + (rejected_log_ratio + target).square()
    return LossOutput(loss, torch.ones_like(loss), reward_metrics(beta * chosen_log_ratio, beta * rejected_log_ratio))
