"""Kahneman-Tversky optimization. N labelled sequences, M prompts with another prompt's completion."""

from __future__ import annotations

import torch
from torch import Tensor

from losses.ops import unpaired_reward_metrics
from losses.registry import register
from losses.types import LossOutput


@register("kto", coupled=True)
def kto_loss(
    policy_logps: Tensor,  # [N]
    reference_logps: Tensor,  # [N]
    policy_mismatched_logps: Tensor,  # [M]
    reference_mismatched_logps: Tensor,  # [M]
    desirable: Tensor,  # [N]
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossOutput:
    """L = w_D sigma(beta*(z - r)) if desirable, else w_U sigma(beta*(r - z)), r = log pi/ref(y), z = max(0, mean r').

    Ethayarajh et al. 2024, eq. 7 and 8 [ethayarajh2024kto]. z estimates KL(pi || ref) from the log-ratios r' of prompts with
    another prompt's completion; it carries no gradient and is cut at 0 after averaging over the whole step, so the rows
    interact. A completion far from z on either side has no gradient.

    Args:
        beta: strength against the reference; raising it saturates nearer to it.
        desirable_weight: w_D; the paper keeps w_D n_D / (w_U n_U) in [1, 4/3] for unequal numbers of labels.
        undesirable_weight: w_U; raising it pushes harder against undesirable completions.

    Differences: z is a mean over all mismatched completions of the step; TRL averages per-rank means, and rlhf-book takes the
    mean log-ratio of the rejected completions for z and adds the means of both classes, twice a mean over all rows.
    """
    log_ratio = policy_logps - reference_logps
    baseline = (policy_mismatched_logps - reference_mismatched_logps).mean().clamp(min=0).detach()
    good = desirable.bool()
    sign = torch.where(good, 1.0, -1.0).to(log_ratio.dtype)
    importance = torch.full_like(log_ratio, undesirable_weight).masked_fill(good, desirable_weight)
    loss = importance * torch.sigmoid(-beta * sign * (log_ratio - baseline))
    metrics = unpaired_reward_metrics(beta * log_ratio, good)
    return LossOutput(
        loss, torch.ones_like(loss), {**metrics, "kl/mismatched": (baseline[None], torch.ones_like(baseline[None]))}
    )
