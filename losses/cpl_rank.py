"""Contrastive preference learning on ranked lists. G prompts, K segments of each."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from losses._ranking import list_metrics, pair_differences
from losses.registry import register
from losses.types import LossOutput


@register("cpl_rank")
def cpl_rank_loss(
    policy_group_logps: Tensor,  # [G, K]
    ranks: Tensor,  # [G, K]
    group_mask: Tensor,  # [G, K]
    *,
    alpha: float = 0.1,
    bias: float = 0.5,
) -> LossOutput:
    """L_ij = -log sigma(S_i - bias*S_j) for every i ranked above j, S = alpha log pi(y), a mean over all such pairs.

    Hejna et al. 2023, appendix on rankings [hejna2023cpl]. With K = 2 it is CPL with gamma 1.

    Args:
        alpha: temperature of the regret model; raising it saturates pairs at smaller differences of log-probs.
        bias: in (0, 1]; below 1 the loss falls when both segments become likelier.

    Differences from the authors' code: (1) ties are left out, where it orders them by chance; (2) pairs are counted by their
    ranks, where it counts those whose loss is not 0 and so changes its denominator as training goes.
    """
    scores = alpha * policy_group_logps
    difference, better = pair_differences(scores, ranks, group_mask, bias)
    loss = -F.logsigmoid(difference)
    return LossOutput(loss, better.to(loss.dtype), list_metrics(scores, ranks, group_mask))
