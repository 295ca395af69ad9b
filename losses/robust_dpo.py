"""DPO that is right in expectation under flipped labels. P pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.ops import check_smoothing, reward_metrics
from losses.registry import register
from losses.types import LossOutput


@register("robust_dpo")
def robust_dpo_loss(
    policy_chosen_logps: Tensor,  # [P]
    policy_rejected_logps: Tensor,  # [P]
    reference_chosen_logps: Tensor,  # [P]
    reference_rejected_logps: Tensor,  # [P]
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> LossOutput:
    """L = [-(1-e) log sigma(m) + e log sigma(-m)] / (1-2e), m = beta*(log pi/ref(y_w) - log pi/ref(y_l)).

    Chowdhury et al. 2024, eq. 12 [chowdhury2024rdpo]. If a share e of the labels is flipped, its expectation over the flips is
    DPO's loss on clean labels: (1-e) L(m) + e L(-m) = -log sigma(m). It is not bounded below: for e > 0 it falls with slope
    -e/(1-2e) in m as m grows, so long training on noisy pairs can run away.

    Args:
        beta: strength against the reference; raising it keeps the policy nearer to it.
        label_smoothing: assumed share e of flipped labels, in [0, 0.5); raising it amplifies every pair by 1/(1-2e).

    Raises:
        ValueError: `label_smoothing` outside [0, 0.5).
    """
    check_smoothing(label_smoothing, "robust_dpo_loss")
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    margin = chosen_rewards - rejected_rewards
    loss = -(1 - label_smoothing) * F.logsigmoid(margin) + label_smoothing * F.logsigmoid(-margin)
    loss = loss / (1 - 2 * label_smoothing)
    return LossOutput(loss, torch.ones_like(loss), reward_metrics(chosen_rewards, rejected_rewards))
