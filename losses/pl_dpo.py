"""DPO on ranked lists. G prompts, K completions of each."""

from __future__ import annotations

from torch import Tensor

from losses._ranking import list_metrics, plackett_luce_nll
from losses.registry import register
from losses.types import LossOutput


@register("pl_dpo")
def pl_dpo_loss(
    policy_group_logps: Tensor,  # [G, K]
    reference_group_logps: Tensor,  # [G, K]
    ranks: Tensor,  # [G, K]
    group_mask: Tensor,  # [G, K]
    *,
    beta: float = 0.1,
) -> LossOutput:
    """L = -sum_{k<K} [ r_k - log sum_{j>=k} exp(r_j) ], r = beta log pi/ref(y), items from best to worst.

    Rafailov et al. 2023, eq. 20 [rafailov2023dpo], the likelihood of the ranking under Plackett and Luce. With K = 2 it is DPO.
    One mean over prompts: a list of K items weighs as much as the K-1 choices it holds, and is not divided by them. Tied
    items are all in each other's sum (Breslow's approximation); lists with one valid item do not count.

    Args:
        beta: strength against the reference; raising it keeps the policy nearer to it.
    """
    rewards = beta * (policy_group_logps - reference_group_logps)
    loss, weight = plackett_luce_nll(rewards, ranks, group_mask)
    return LossOutput(loss, weight, list_metrics(rewards, ranks, group_mask))
