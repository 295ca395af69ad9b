"""Anchored preference optimization, on pairs and on labelled completions. P pairs, N sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from losses.ops import reward_metrics, unpaired_reward_metrics
from losses.registry import register
from losses.types import LossOutput


@register("apo_zero")
def apo_zero_loss(
    policy_chosen_logps: Tensor,  # [P]
    policy_rejected_logps: Tensor,  # [P]
    reference_chosen_logps: Tensor,  # [P]
    reference_rejected_logps: Tensor,  # [P]
    *,
    beta: float = 0.1,
) -> LossOutput:
    """L = 1 - sigma(r_w) + sigma(r_l), r = beta log pi/ref(y).

    D'Oosterlinck et al. 2024, eq. 5 [doosterlinck2024apo]: chosen completions become likelier, rejected ones less likely; for
    data whose chosen completions are better than the policy's own. In (0, 2); the gradient vanishes on either side of the
    reference.

    Args:
        beta: strength against the reference; raising it saturates both sides nearer to it.

    Differences: rlhf-book leaves out the constant 1; TRL has it.
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    loss = torch.sigmoid(-chosen_rewards) + torch.sigmoid(rejected_rewards)
    return LossOutput(loss, torch.ones_like(loss), reward_metrics(chosen_rewards, rejected_rewards))


@register("apo_down")
def apo_down_loss(
    policy_chosen_logps: Tensor,  # [P]
    policy_rejected_logps: Tensor,  # [P]
    reference_chosen_logps: Tensor,  # [P]
    reference_rejected_logps: Tensor,  # [P]
    *,
    beta: float = 0.1,
) -> LossOutput:
    """L = sigma(r_w) + 1 - sigma(r_w - r_l), r = beta log pi/ref(y).

    D'Oosterlinck et al. 2024, eq. 6 [doosterlinck2024apo]: both completions become less likely, rejected ones more so; for data
    whose chosen completions are worse than the policy's own. In (0, 2).

    Args:
        beta: strength against the reference; raising it saturates both parts nearer to it.
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    loss = torch.sigmoid(chosen_rewards) + torch.sigmoid(rejected_rewards - chosen_rewards)
    return LossOutput(loss, torch.ones_like(loss), reward_metrics(chosen_rewards, rejected_rewards))


@register("apo_zero_unpaired")
def apo_zero_unpaired_loss(
    policy_logps: Tensor,  # [N]
    reference_logps: Tensor,  # [N]
    desirable: Tensor,  # [N]
    *,
    beta: float = 0.1,
) -> LossOutput:
    """L = 1 - sigma(r) if desirable, else sigma(r), r = beta log pi/ref(y).

    The two halves of `apo_zero` (D'Oosterlinck et al. 2024, eq. 5 [doosterlinck2024apo]) on completions of their own; KTO with
    a baseline of 0.

    Args:
        beta: strength against the reference; raising it saturates nearer to it.
    """
    rewards = beta * (policy_logps - reference_logps)
    sign = 2 * desirable.to(rewards.dtype) - 1
    loss = torch.sigmoid(-sign * rewards)
    return LossOutput(loss, torch.ones_like(loss), unpaired_reward_metrics(rewards, desirable))
