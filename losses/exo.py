"""Efficient exact optimization on pairs. P pairs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.ops import check_smoothing, reward_metrics
from losses.registry import register
from losses.types import LossOutput


@register("exo")
def exo_loss(
    policy_chosen_logps: Tensor,  # [P]
    policy_rejected_logps: Tensor,  # [P]
    reference_chosen_logps: Tensor,  # [P]
    reference_rejected_logps: Tensor,  # [P]
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
) -> LossOutput:
    """L = KL(q || [1-e, e]), q = [sigma(m), sigma(-m)], m = beta*(log pi/ref(y_w) - log pi/ref(y_l)).

    Ji et al. 2024, eq. 17 [ji2024exo]: the reverse KL from the policy's preference to the label's, where DPO with label
    smoothing takes the forward one. Its minimum 0 is at sigma(m) = 1 - e. It is not convex and bounded by -log e: the gradient
    of a pair that is far on the wrong side vanishes.

    Args:
        beta: strength against the reference; raising it keeps the policy nearer to it.
        label_smoothing: e, in (0, 0.5); without it the KL would be infinite. Raising it lowers the target log((1-e)/e)/beta.

    Raises:
        ValueError: `label_smoothing` outside (0, 0.5).
    """
    check_smoothing(label_smoothing, "exo_loss", positive=True)
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    margin = chosen_rewards - rejected_rewards
    right = torch.sigmoid(margin) * (F.logsigmoid(margin) - math.log1p(-label_smoothing))
    wrong = torch.sigmoid(-margin) * (F.logsigmoid(-margin) - math.log(label_smoothing))
    loss = right + wrong
    return LossOutput(loss, torch.ones_like(loss), reward_metrics(chosen_rewards, rejected_rewards))
