"""Noise contrastive alignment on pairs. P pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.ops import reward_metrics
from losses.registry import register
from losses.types import LossOutput


@register("nca")
def nca_loss(
    policy_chosen_logps: Tensor,  # [P]
    policy_rejected_logps: Tensor,  # [P]
    reference_chosen_logps: Tensor,  # [P]
    reference_rejected_logps: Tensor,  # [P]
    *,
    beta: float = 0.1,
) -> LossOutput:
    """L = -log sigma(r_w) - 0.5 log sigma(-r_w) - 0.5 log sigma(-r_l), r = beta log pi/ref(y).

    Chen et al. 2024, eq. 11 with K = 2 [chen2024nca]: each completion is told apart from noise by itself, so absolute
    likelihoods are held and not only their difference. The optimum has r_w = log 2, while r_l falls without bound.

    Args:
        beta: strength against the reference; raising it reaches r_w = log 2 nearer to it.
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    loss = -F.logsigmoid(chosen_rewards) - 0.5 * F.logsigmoid(-chosen_rewards) - 0.5 * F.logsigmoid(-rejected_rewards)
    return LossOutput(loss, torch.ones_like(loss), reward_metrics(chosen_rewards, rejected_rewards))
