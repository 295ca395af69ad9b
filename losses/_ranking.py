"""What losses on ranked lists share. G prompts, K completions of each; rank 0 is best."""

from __future__ import annotations

import torch
from torch import Tensor

# Stands for "not there" among scores: finite, so that no 0 * inf arises in a gradient.
_ABSENT = -1e30


def plackett_luce_nll(scores: Tensor, ranks: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """-log P(ranking) [G] under the Plackett-Luce model, and its weight: 1 for lists with two valid items or more, else 0.

    sum_k [ logsumexp_{j: rank_j >= rank_k} s_j - s_k ]: each item is chosen among those that are not better. Tied items are all
    in each other's sum (Breslow's approximation).

    Args:
        scores: [G, K]; what stands at invalid items does not matter.
        ranks: [G, K], 0 = best, any increasing numbers.
        mask: [G, K], 1 on valid items.
    """
    valid = mask.bool()
    scores = torch.where(valid, scores, torch.zeros_like(scores))
    rivals = (ranks[:, None, :] >= ranks[:, :, None]) & valid[:, None, :]  # [G, K, K]: row k holds k's rivals and k itself
    log_total = torch.where(rivals, scores[:, None, :], _ABSENT).logsumexp(-1)
    nll = torch.where(valid, log_total - scores, torch.zeros_like(scores)).sum(-1)
    return nll, (valid.sum(-1) >= 2).to(nll.dtype)


def pair_differences(scores: Tensor, ranks: Tensor, mask: Tensor, bias: float = 1.0) -> tuple[Tensor, Tensor]:
    """s_i - bias*s_j [G, K, K] for every i and j, and the mask of the pairs in which i is better than j.

    Ties and invalid items are in no pair.
    """
    valid = mask.bool()
    scores = torch.where(valid, scores, torch.zeros_like(scores))
    better = (ranks[:, :, None] < ranks[:, None, :]) & valid[:, :, None] & valid[:, None, :]
    return scores[:, :, None] - bias * scores[:, None, :], better


def mean_over_pairs(values: Tensor, better: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [G] of [G, K, K] values over each list's ordered pairs, and its weight: 1 where there is a pair, else 0."""
    count = better.sum((-2, -1))
    total = torch.where(better, values, torch.zeros_like(values)).sum((-2, -1))
    return total / count.clamp(min=1), (count > 0).to(values.dtype)


def list_metrics(scores: Tensor, ranks: Tensor, mask: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Share of ordered pairs that the scores order as the ranks do (a tie counts as half right) and their mean difference."""
    difference, better = pair_differences(scores.detach(), ranks, mask)
    right = (difference > 0).to(scores.dtype) + (difference == 0).to(scores.dtype) / 2
    weight = better.to(scores.dtype)
    return {"rewards/accuracies": (right, weight), "rewards/margins": (difference, weight)}
