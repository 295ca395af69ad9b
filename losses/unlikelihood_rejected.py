"""The unlikelihood term on rejected completions. P pairs, T tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from losses.ops import log1mexp
from losses.registry import register
from losses.types import LossOutput


@register("unlikelihood_rejected")
def unlikelihood_rejected_loss(
    policy_rejected_token_logps: Tensor,  # [P, T]
    rejected_mask: Tensor,  # [P, T]
) -> LossOutput:
    """L = -sum_t log(1 - pi(y_t | x, y_<t)) / number of rejected tokens, a mean over all rejected tokens of the step.

    Welleck et al. 2019, eq. 4 [welleck2019unlikelihood]. Never negative; log-probs are cut at -1e-6, with gradient zero above.
    """
    # Padding has log-prob 0, a probability of 1: it must not reach log(1 - p).
    loss = -log1mexp(torch.where(rejected_mask.bool(), policy_rejected_token_logps, -1.0))
    weight = rejected_mask.to(loss.dtype)
    return LossOutput(loss, weight, {"unlikelihood": (loss.detach(), weight)})
