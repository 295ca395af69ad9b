"""Token-level DPO. P pairs, T tokens."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from losses.ops import logistic_loss, masked_sum, reward_metrics
from losses.registry import register
from losses.types import LossOutput


@register("tdpo")
def tdpo_loss(
    policy_chosen_logps: Tensor,  # [P]
    policy_rejected_logps: Tensor,  # [P]
    reference_chosen_logps: Tensor,  # [P]
    reference_rejected_logps: Tensor,  # [P]
    chosen_token_kls: Tensor,  # [P, T]
    rejected_token_kls: Tensor,  # [P, T]
    chosen_mask: Tensor,  # [P, T]
    rejected_mask: Tensor,  # [P, T]
    *,
    beta: float = 0.1,
    alpha: float = 0.5,
    version: Literal[1, 2] = 2,
) -> LossOutput:
    """L = -log sigma(beta*(log pi/ref(y_w) - log pi/ref(y_l) - alpha*(K_l - sg[K_w]))), K = sum_t KL(ref || pi) at each prefix.

    Zeng et al. 2024, eq. 16 and 17 [zeng2024tdpo]; sg stops the gradient. Version 1 is eq. 15: alpha is 1 and the gradient
    flows through both KLs. At policy = reference it is log 2.

    Args:
        beta: strength against the reference; raising it keeps the policy nearer to it.
        alpha: weight of the KLs in version 2; raising it holds the rejected side's distributions nearer to the reference's.
        version: 1 or 2 (TDPO-1, TDPO-2 of the paper).

    Raises:
        ValueError: another version.
    """
    if version not in (1, 2):
        raise ValueError(f"tdpo_loss: version is {version}, expected 1 or 2.")
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    chosen_kl = masked_sum(chosen_token_kls, chosen_mask, dim=-1)
    rejected_kl = masked_sum(rejected_token_kls, rejected_mask, dim=-1)
    kl_margin = rejected_kl - chosen_kl if version == 1 else alpha * (rejected_kl - chosen_kl.detach())
    loss = logistic_loss(chosen_rewards - rejected_rewards - beta * kl_margin, owner="tdpo_loss")
    ones = torch.ones_like(loss)
    kls = {"kl/chosen": (chosen_kl.detach(), ones), "kl/rejected": (rejected_kl.detach(), ones)}
    return LossOutput(loss, ones, {**reward_metrics(chosen_rewards, rejected_rewards), **kls})
