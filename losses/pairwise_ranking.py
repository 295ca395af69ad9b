"""Reward modelling from all pairs of ranked lists. G prompts, K completions of each."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from losses._ranking import list_metrics, mean_over_pairs, pair_differences
from losses.registry import register
from losses.types import LossOutput


@register("pairwise_ranking")
def pairwise_ranking_loss(
    group_rewards: Tensor,  # [G, K]
    ranks: Tensor,  # [G, K]
    group_mask: Tensor,  # [G, K]
) -> LossOutput:
    """L = -mean_{i better than j} log sigma(r_i - r_j), the mean of a prompt's pairs, then of the prompts.

    Ouyang et al. 2022, eq. 1 [ouyang2022instructgpt]: all K(K-1)/2 comparisons of a prompt in one element of the batch, so
    that it weighs as much as any other prompt. With K = 2 it is Bradley-Terry. Ties are in no pair; a prompt without a pair
    does not count.
    """
    difference, better = pair_differences(group_rewards, ranks, group_mask)
    loss, weight = mean_over_pairs(-F.logsigmoid(difference), better)
    return LossOutput(loss, weight, list_metrics(group_rewards, ranks, group_mask))
