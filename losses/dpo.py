"""Direct preference optimization. P pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from losses.ops import logistic_loss, reward_metrics
from losses.registry import register
from losses.types import LossOutput


@register("dpo")
def dpo_loss(
    policy_chosen_logps: Tensor,  # [P]
    policy_rejected_logps: Tensor,  # [P]
    reference_chosen_logps: Tensor,  # [P]
    reference_rejected_logps: Tensor,  # [P]
    soft_labels: Tensor | None = None,  # [P]
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """L = -log sigma(beta*(log pi/ref(y_w) - log pi/ref(y_l))).

    Rafailov et al. 2023, eq. 7 [rafailov2023dpo]; label smoothing is cDPO (Mitchell 2023 [mitchell2023cdpo]). The log-ratios
    are sums over the completion's tokens. With soft labels p the loss is -p log sigma(m) - (1-p) log sigma(-m): what labels
    drawn with probability p give in expectation. Label smoothing e is the constant soft label 1 - e; both together flip the
    drawn label with probability e, that is p(1-e) + (1-p)e.

    Args:
        beta: strength against the reference; raising it keeps the policy nearer to it.
        label_smoothing: assumed share of flipped labels, in [0, 0.5); the optimum then has sigma(margin) = 1 - e.

    Raises:
        ValueError: `label_smoothing` outside [0, 0.5).
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    margin = chosen_rewards - rejected_rewards
    loss = logistic_loss(margin, soft_labels, label_smoothing=label_smoothing, owner="dpo_loss")
    return LossOutput(loss, torch.ones_like(loss), reward_metrics(chosen_rewards, rejected_rewards))
