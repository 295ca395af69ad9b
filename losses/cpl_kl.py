"""Contrastive preference learning on log-ratios. P pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.ops import expected_over_labels, reward_metrics
from losses.registry import register
from losses.types import LossOutput


@register("cpl_kl")
def cpl_kl_loss(
    policy_chosen_logps: Tensor,  # [P]
    policy_rejected_logps: Tensor,  # [P]
    reference_chosen_logps: Tensor,  # [P]
    reference_rejected_logps: Tensor,  # [P]
    soft_labels: Tensor | None = None,  # [P]
    *,
    alpha: float = 0.1,
    bias: float = 0.5,
) -> LossOutput:
    """L = -log sigma(S_w - bias*S_l), S = alpha log pi/ref(y).

    Hejna et al. 2023, appendix on KL-constrained CPL [hejna2023cpl] (`cpl_kl` of their code, where the reference is the policy
    after behaviour cloning). With bias 1 it is DPO with beta = alpha. With soft labels p the loss is p L + (1-p) L with the
    completions swapped.

    Args:
        alpha: strength against the reference; raising it keeps the policy nearer to it.
        bias: in (0, 1]; below 1 the loss falls when both completions become likelier.
    """
    chosen_rewards = alpha * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = alpha * (policy_rejected_logps - reference_rejected_logps)
    loss = expected_over_labels(
        -F.logsigmoid(chosen_rewards - bias * rejected_rewards),
        -F.logsigmoid(rejected_rewards - bias * chosen_rewards),
        soft_labels,
    )
    return LossOutput(loss, torch.ones_like(loss), reward_metrics(chosen_rewards, rejected_rewards))
