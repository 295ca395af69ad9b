"""The contrastive term of CPO: DPO's loss without a reference. P pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from losses.ops import logistic_loss, reward_metrics
from losses.registry import register
from losses.types import LossOutput


@register("cpo_preference")
def cpo_preference_loss(
    policy_chosen_logps: Tensor,  # [P]
    policy_rejected_logps: Tensor,  # [P]
    soft_labels: Tensor | None = None,  # [P]
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """L = -log sigma(beta*(log pi(y_w) - log pi(y_l))).

    Xu et al. 2024, eq. 3 [xu2024cpo]: DPO with a reference that is constant over completions. Soft labels and label smoothing
    as in `dpo`.

    Args:
        beta: scale of the log-probs; raising it saturates pairs at smaller differences.
        label_smoothing: assumed share of flipped labels, in [0, 0.5).

    Raises:
        ValueError: `label_smoothing` outside [0, 0.5).
    """
    chosen_rewards, rejected_rewards = beta * policy_chosen_logps, beta * policy_rejected_logps
    margin = chosen_rewards - rejected_rewards
    loss = logistic_loss(margin, soft_labels, label_smoothing=label_smoothing, owner="cpo_preference_loss")
    return LossOutput(loss, torch.ones_like(loss), reward_metrics(chosen_rewards, rejected_rewards))
