"""Soft adaptive policy optimization. N sequences, T tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from losses._surrogate import normalise, ratio_metrics, token_log_ratio
from losses.advantages import group_baseline
from losses.ops import ratio_of
from losses.registry import register
from losses.types import LossOutput


@register("sapo", advantage=group_baseline)
def sapo_loss(
    policy_token_logps: Tensor,  # [N, T]
    old_token_logps: Tensor,  # [N, T]
    advantages: Tensor,  # [N, T]
    mask: Tensor,  # [N, T]
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
) -> LossOutput:
    """GRPO with a sigmoid gate instead of a clip: L_t = -(4/tau) sigma(tau*(rho_t - 1)) A, tau by the sign of A.

    Gao et al. 2025, eq. 5 and 6 [gao2025sapo]: the gradient fades smoothly as rho leaves 1, and has GRPO's size at rho = 1.
    The mean over sequences of their token means; exponents are cut at 20 and the gradient is zero
    beyond. No KL in the loss.

    Args:
        tau_positive: steepness for A > 0; raising it fades sooner.
        tau_negative: steepness for A <= 0; larger by default, since pushing tokens down is less stable.

    Raises:
        ValueError: a `tau` is not positive.
    """
    if tau_positive <= 0 or tau_negative <= 0:
        raise ValueError(f"sapo_loss: tau_positive and tau_negative must be positive, got {tau_positive} and {tau_negative}.")
    log_ratio = token_log_ratio(policy_token_logps, old_token_logps, mask)
    advantages = advantages.detach()
    tau = torch.full_like(log_ratio, tau_negative).masked_fill(advantages > 0, tau_positive)
    token_loss = -4 / tau * torch.sigmoid(tau * (ratio_of(log_ratio) - 1)) * advantages
    return normalise(token_loss, mask, "seq_mean", ratio_metrics(log_ratio, mask), owner="sapo_loss")
