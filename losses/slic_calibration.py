"""The rank calibration term of SLiC-HF. P pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from losses.ops import reward_metrics
from losses.registry import register
from losses.types import LossOutput


@register("slic_calibration")
def slic_calibration_loss(
    policy_chosen_logps: Tensor,  # [P]
    policy_rejected_logps: Tensor,  # [P]
    *,
    delta: float = 1.0,
) -> LossOutput:
    """L = max(0, delta - log pi(y_w) + log pi(y_l)).

    Zhao et al. 2023, eq. 1 [zhao2023slic]: a pair is done once the chosen completion leads by delta nats.

    Args:
        delta: the lead that a pair should reach, in nats; raising it keeps pairs in training for longer.
    """
    loss = torch.relu(delta - policy_chosen_logps + policy_rejected_logps)
    return LossOutput(loss, torch.ones_like(loss), reward_metrics(policy_chosen_logps, policy_rejected_logps))
