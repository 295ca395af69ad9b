"""DPO-Positive. P pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from losses.ops import logistic_loss, reward_metrics
from losses.registry import register
from losses.types import LossOutput


@register("dpop")
def dpop_loss(
    policy_chosen_logps: Tensor,  # [P]
    policy_rejected_logps: Tensor,  # [P]
    reference_chosen_logps: Tensor,  # [P]
    reference_rejected_logps: Tensor,  # [P]
    *,
    beta: float = 0.3,
    penalty: float = 50.0,
) -> LossOutput:
    """L = -log sigma(beta*(log pi/ref(y_w) - log pi/ref(y_l) - penalty*max(0, -log pi/ref(y_w)))).

    Pal et al. 2024, eq. 3 [pal2024dpop]: DPO while the chosen completion is at least as likely as under the reference; below
    that, its gradient is 1 + penalty times DPO's, so it is pulled back.

    Args:
        beta: strength against the reference; raising it keeps the policy nearer to it.
        penalty: price of a nat of chosen log-prob lost; 0 is DPO.
    """
    chosen_log_ratio = policy_chosen_logps - reference_chosen_logps
    rejected_log_ratio = policy_rejected_logps - reference_rejected_logps
    lost = torch.relu(-chosen_log_ratio)
    loss = logistic_loss(beta * (chosen_log_ratio - rejected_log_ratio - penalty * lost), owner="dpop_loss")
    return LossOutput(loss, torch.ones_like(loss), reward_metrics(beta * chosen_log_ratio, beta * rejected_log_ratio))
