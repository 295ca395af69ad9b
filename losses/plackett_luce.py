"""Reward modelling from ranked lists. G prompts, K completions of each."""

from __future__ import annotations

from torch import Tensor

from losses._ranking import list_metrics, plackett_luce_nll
from losses.registry import register
from losses.types import LossOutput


@register("plackett_luce")
def plackett_luce_loss(
    group_rewards: Tensor,  # [G, K]
    ranks: Tensor,  # [G, K]
    group_mask: Tensor,  # [G, K]
) -> LossOutput:
    """L = -sum_{k<K} [ r_k - log sum_{j>=k} exp(r_j) ], items from best to worst.

    Luce 1959 [luce1959choice], Plackett 1975 [plackett1975permutations]; for reward models Zhu et al. 2023, eq. 6
    [zhu2023principled]. With K = 2 it is Bradley-Terry. One mean over prompts, not divided by K-1; ties as in `pl_dpo`.
    """
    loss, weight = plackett_luce_nll(group_rewards, ranks, group_mask)
    return LossOutput(loss, weight, list_metrics(group_rewards, ranks, group_mask))
