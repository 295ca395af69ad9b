"""Length-desensitised DPO. P pairs, T tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from losses.ops import logistic_loss, masked_sum, reward_metrics, step_index
from losses.registry import register
from losses.types import LossOutput


@register("ld_dpo")
def ld_dpo_loss(
    policy_chosen_token_logps: Tensor,  # [P, T]
    policy_rejected_token_logps: Tensor,  # [P, T]
    reference_chosen_token_logps: Tensor,  # [P, T]
    reference_rejected_token_logps: Tensor,  # [P, T]
    chosen_mask: Tensor,  # [P, T]
    rejected_mask: Tensor,  # [P, T]
    *,
    beta: float = 0.1,
    ld_alpha: float = 0.5,
) -> LossOutput:
    """L = -log sigma(beta*(s_w - s_l)), s = (sum_{t<n} + ld_alpha*sum_{t>=n}) log pi/ref(y_t), n = min(|y_w|, |y_l|).

    Liu et al. 2024, eq. 11 [liu2024lddpo]: tokens beyond the shorter completion's length count less, so the longer one gains
    less by being longer. Equal lengths give DPO.

    Args:
        beta: strength against the reference; raising it keeps the policy nearer to it.
        ld_alpha: weight of the tokens beyond the common length, in [0, 1]; 1 is DPO, 0 cuts both to the shorter one.

    Raises:
        ValueError: `ld_alpha` outside [0, 1].
    """
    if not 0 <= ld_alpha <= 1:
        raise ValueError(f"ld_dpo_loss: ld_alpha is {ld_alpha}, expected a weight in [0, 1].")
    common = torch.minimum(chosen_mask.sum(-1), rejected_mask.sum(-1))[:, None]

    def reward(policy: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
        weight = torch.full_like(policy, ld_alpha).masked_fill(step_index(mask) < common, 1.0)
        return beta * masked_sum(weight * (policy - reference), mask, dim=-1)

    chosen_rewards = reward(policy_chosen_token_logps, reference_chosen_token_logps, chosen_mask)
    rejected_rewards = reward(policy_rejected_token_logps, reference_rejected_token_logps, rejected_mask)
    loss = logistic_loss(chosen_rewards - rejected_rewards, owner="ld_dpo_loss")
    return LossOutput(loss, torch.ones_like(loss), reward_metrics(chosen_rewards, rejected_rewards))
