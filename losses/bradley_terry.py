"""Reward modelling from preferences. P pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.ops import expected_over_labels, reward_metrics
from losses.registry import register
from losses.types import LossOutput


@register("bradley_terry")
def bradley_terry_loss(
    chosen_rewards: Tensor,  # [P]
    rejected_rewards: Tensor,  # [P]
    margins: Tensor | None = None,  # [P]
    soft_labels: Tensor | None = None,  # [P]
    *,
    center_coef: float = 0.0,
) -> LossOutput:
    """L = -log sigma(r_w - r_l - m) + center_coef*(r_w + r_l)^2.

    Bradley and Terry 1952 [bradley1952rank] as in Ouyang et al. 2022, eq. 1 [ouyang2022instructgpt]; margin m: Touvron et
    al. 2023, eq. 2 [touvron2023llama2]; centring: Eisenstein et al. 2023 [eisenstein2023helping]. Both parts are means over
    pairs, so the sum keeps one denominator. With soft labels p the first part is -p log sigma(r_w - r_l - m)
    - (1-p) log sigma(r_l - r_w - m): what labels drawn with probability p give in expectation.

    Args:
        center_coef: 0 leaves the rewards free up to a constant; 0.01 pulls r_w + r_l to 0 and fixes it.
    """
    margin = chosen_rewards - rejected_rewards
    required = torch.zeros_like(margin) if margins is None else margins
    loss = expected_over_labels(-F.logsigmoid(margin - required), -F.logsigmoid(-margin - required), soft_labels)
    if center_coef != 0:
        loss = loss + center_coef * (chosen_rewards + rejected_rewards).square()
    return LossOutput(loss, torch.ones_like(loss), reward_metrics(chosen_rewards, rejected_rewards))
