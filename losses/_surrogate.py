"""The clipped surrogate that the policy-gradient losses share. N sequences, T tokens.

Each variant is a ratio (`token_log_ratio`, `sequence_log_ratio`), `clipped_tokens`, and a `normalise` by name.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from losses.ops import kl_k3, masked_mean, masked_sum, ratio_of
from losses.types import LossOutput, Max, Metric

LengthNorm = Literal["token", "seq_mean", "seq_sum", "constant"]


def token_log_ratio(token_logps: Tensor, old_token_logps: Tensor, mask: Tensor) -> Tensor:
    """log pi/old of each token [N, T], 0 where the mask is 0."""
    return torch.where(mask.bool(), token_logps - old_token_logps.detach(), torch.zeros_like(token_logps))


def sequence_log_ratio(log_ratio: Tensor, mask: Tensor, *, average: bool) -> Tensor:
    """Every token's log-ratio replaced by its sequence's mean (`average`) or sum [N, T]."""
    reduce = masked_mean if average else masked_sum
    return reduce(log_ratio, mask, -1)[:, None].expand_as(log_ratio)


def clipped_tokens(
    log_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    owner: str,
) -> tuple[Tensor, dict[str, Metric]]:
    """max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high)) [N, T].

    Returns:
        The loss of each token, and the metrics clip_frac (share of tokens where the clip decides), ratio/max and approx_kl
        (k3 of KL(old || policy)).

    Raises:
        ValueError: an option out of range.
    """
    if clip_low < 0 or clip_high < 0:
        raise ValueError(f"{owner}: clip_low and clip_high must be at least 0, got {clip_low} and {clip_high}.")
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"{owner}: dual_clip must exceed 1, got {dual_clip}; None turns it off.")
    advantages = advantages.detach()
    ratio = ratio_of(log_ratio)
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    token_loss = torch.maximum(free, clipped)
    if dual_clip is not None:
        token_loss = torch.where(advantages < 0, torch.minimum(token_loss, -dual_clip * advantages), token_loss)
    clip_frac = ((token_loss != free).to(token_loss.dtype), mask.to(token_loss.dtype))
    return token_loss, {"clip_frac": clip_frac, **ratio_metrics(log_ratio, mask)}


def ratio_metrics(log_ratio: Tensor, mask: Tensor) -> dict[str, Metric]:
    """ratio/max over the tokens, and approx_kl: k3 of KL(old || policy)."""
    log_ratio = log_ratio.detach()
    return {
        "ratio/max": Max(torch.where(mask.bool(), ratio_of(log_ratio), torch.zeros_like(log_ratio))),
        "approx_kl": (kl_k3(torch.zeros_like(log_ratio), log_ratio), mask.to(log_ratio.dtype)),
    }


def normalise(
    token_loss: Tensor, mask: Tensor, length_norm: LengthNorm, metrics: dict[str, Metric], *,
    max_completion_length: Tensor | None = None, owner: str,
) -> LossOutput:  # fmt: skip
    """A token loss [N, T] such that (loss*weight).sum() / weight.sum() is the named normalisation over any split of the rows.

    Returns:
        loss [N, T] with weight `mask` for "token", else loss [N] with weight 1 for each sequence that has tokens.

    Raises:
        ValueError: an unknown name, or "constant" without `max_completion_length`.
    """
    if length_norm == "token":
        return LossOutput(token_loss, mask.to(token_loss.dtype), metrics)
    weight = mask.bool().any(-1).to(token_loss.dtype)
    if length_norm == "seq_mean":
        return LossOutput(masked_mean(token_loss, mask, dim=-1), weight, metrics)
    total = masked_sum(token_loss, mask, dim=-1)
    if length_norm == "seq_sum":
        return LossOutput(total, weight, metrics)
    if length_norm == "constant":
        if max_completion_length is None:
            raise ValueError(f"{owner}: length_norm='constant' divides by max_completion_length, which was not given; pass it.")
        return LossOutput(total / max_completion_length, weight, metrics)
    raise ValueError(f"{owner}: unknown length_norm {length_norm!r}; expected one of {', '.join(get_args(LengthNorm))}.")
