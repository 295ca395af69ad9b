"""The clipped surrogate that the PPO losses share. N sequences, T tokens."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from losses.ops import kl_k3, masked_mean, masked_sum, ratio_of
from losses.types import LossOutput, Max, Metric

LengthNorm = Literal["token", "seq_mean", "seq_sum", "constant"]


def clipped_surrogate(
    token_logps: Tensor,
    old_token_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    max_completion_length: Tensor | None,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    length_norm: LengthNorm,
    owner: str,
) -> LossOutput:
    """max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high)) on [N, T], normalised over length.

    Returns:
        loss [N, T] with weight `mask` for "token", else loss [N] with weight 1 for each sequence that has tokens.
        Metrics clip_frac (share of tokens where the clip decides), ratio/max, approx_kl (k3 of KL(old || policy)).

    Raises:
        ValueError: an option out of range, or "constant" without `max_completion_length`.
    """
    if clip_low < 0 or clip_high < 0:
        raise ValueError(f"{owner}: clip_low and clip_high must be at least 0, got {clip_low} and {clip_high}.")
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"{owner}: dual_clip must exceed 1, got {dual_clip}; None turns it off.")
    advantages = advantages.detach()
    log_ratio = torch.where(mask.bool(), token_logps - old_token_logps.detach(), torch.zeros_like(token_logps))
    ratio = ratio_of(log_ratio)
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    token_loss = torch.maximum(free, clipped)
    if dual_clip is not None:
        token_loss = torch.where(advantages < 0, torch.minimum(token_loss, -dual_clip * advantages), token_loss)
    loss, weight = _normalise(token_loss, mask, max_completion_length, length_norm, owner)
    tokens = mask.to(loss.dtype)
    metrics: dict[str, Metric] = {
        "clip_frac": ((token_loss != free).to(loss.dtype), tokens),
        "ratio/max": Max(torch.where(mask.bool(), ratio.detach(), torch.zeros_like(ratio))),
        "approx_kl": (kl_k3(torch.zeros_like(log_ratio), log_ratio.detach()), tokens),
    }
    return LossOutput(loss, weight, metrics)


def _normalise(
    token_loss: Tensor, mask: Tensor, max_completion_length: Tensor | None, length_norm: LengthNorm, owner: str
) -> tuple[Tensor, Tensor]:
    """Loss and weight such that (loss*weight).sum() / weight.sum() is the named normalisation over any split of the rows."""
    if length_norm == "token":
        return token_loss, mask.to(token_loss.dtype)
    weight = mask.bool().any(-1).to(token_loss.dtype)
    if length_norm == "seq_mean":
        return masked_mean(token_loss, mask, dim=-1), weight
    total = masked_sum(token_loss, mask, dim=-1)
    if length_norm == "seq_sum":
        return total, weight
    if length_norm == "constant":
        if max_completion_length is None:
            raise ValueError(f"{owner}: length_norm='constant' divides by max_completion_length, which was not given; pass it.")
        return total / max_completion_length, weight
    raise ValueError(f"{owner}: unknown length_norm {length_norm!r}; expected one of {', '.join(get_args(LengthNorm))}.")
