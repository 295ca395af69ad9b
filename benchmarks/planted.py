"""A planted defect for benchmarks.trust: DPO with a small term whose sign is wrong, as a slip in a user's loss would be."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.ops import reward_metrics
from losses.registry import register
from losses.types import LossOutput


@register("dpo_with_a_slip")
def dpo_with_a_slip_loss(
    policy_chosen_logps: Tensor,  # [P]
    policy_rejected_logps: Tensor,  # [P]
    reference_chosen_logps: Tensor,  # [P]
    reference_rejected_logps: Tensor,  # [P]
    *,
    beta: float = 0.1,
    slip: float = 0.1,
) -> LossOutput:
    """L = -log sigma(beta (h_w - h_l)) + slip * log pi(y_w), h = log pi/ref.

    RPO adds -nll_coef * log pi(y_w) to DPO (Pang et al. 2024 [pang2024irpo]); here its sign is wrong.

    Args:
        beta: strength against the reference.
        slip: weight of the wrong-signed term, small beside the rest.
    """
    chosen = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected = beta * (policy_rejected_logps - reference_rejected_logps)
    loss = -F.logsigmoid(chosen - rejected) + slip * policy_chosen_logps
    return LossOutput(loss, torch.ones_like(loss), reward_metrics(chosen, rejected))
