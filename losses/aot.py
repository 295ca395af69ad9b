"""Alignment by optimal transport: the sorted log-ratios of a batch against each other. P pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from losses.ops import logistic_loss, reward_metrics
from losses.registry import register
from losses.types import LossOutput


@register("aot", coupled=True)
def aot_loss(
    policy_chosen_logps: Tensor,  # [P]
    policy_rejected_logps: Tensor,  # [P]
    reference_chosen_logps: Tensor,  # [P]
    reference_rejected_logps: Tensor,  # [P]
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """L_i = -log sigma(beta*delta_i), delta = sort(log pi(y_w)/pi(y_l)) - sort(log ref(y_w)/ref(y_l)) over the batch.

    Melnyk et al. 2024, eq. 9 [melnyk2024aot]: the distribution of the policy's margins shall dominate that of the reference's.
    The rows interact through the sort, so the batch is the whole step; with one pair it is DPO.

    Args:
        beta: strength against the reference; raising it keeps the policy nearer to it.
        label_smoothing: assumed share of flipped labels, in [0, 0.5); the optimum then has sigma(beta*delta) = 1 - e.

    Raises:
        ValueError: `label_smoothing` outside [0, 0.5).
    """
    policy, reference = policy_chosen_logps - policy_rejected_logps, reference_chosen_logps - reference_rejected_logps
    delta = policy.sort().values - reference.sort().values
    loss = logistic_loss(beta * delta, label_smoothing=label_smoothing, owner="aot_loss")
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    return LossOutput(loss, torch.ones_like(loss), reward_metrics(chosen_rewards, rejected_rewards))


@register("aot_unpaired", coupled=True)
def aot_unpaired_loss(
    policy_chosen_logps: Tensor,  # [P]
    policy_rejected_logps: Tensor,  # [P]
    reference_chosen_logps: Tensor,  # [P]
    reference_rejected_logps: Tensor,  # [P]
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """L_i = -log sigma(beta*delta_i), delta = sort(log pi/ref(y_w)) - sort(log pi/ref(y_l)) over the batch.

    Melnyk et al. 2024, eq. 10 [melnyk2024aot]: as `aot`, without use of which completions were compared: the i-th best chosen
    completion of the step against its i-th best rejected one.

    Args:
        beta: strength against the reference; raising it keeps the policy nearer to it.
        label_smoothing: assumed share of flipped labels, in [0, 0.5); the optimum then has sigma(beta*delta) = 1 - e.

    Raises:
        ValueError: `label_smoothing` outside [0, 0.5).
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    margin = chosen_rewards.sort().values - rejected_rewards.sort().values
    loss = logistic_loss(margin, label_smoothing=label_smoothing, owner="aot_unpaired_loss")
    return LossOutput(loss, torch.ones_like(loss), reward_metrics(chosen_rewards, rejected_rewards))
