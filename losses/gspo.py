"""Group sequence policy optimization, and its length-unbiased form. N sequences, T tokens."""

from __future__ import annotations

from torch import Tensor

from losses._surrogate import clipped_tokens, normalise, sequence_log_ratio, token_log_ratio
from losses.advantages import group_baseline
from losses.registry import register
from losses.types import LossOutput


@register("gspo", advantage=group_baseline)
def gspo_loss(
    policy_token_logps: Tensor,  # [N, T]
    old_token_logps: Tensor,  # [N, T]
    advantages: Tensor,  # [N, T]
    mask: Tensor,  # [N, T]
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> LossOutput:
    """GRPO with one ratio a sequence, rho = exp(mean_t log pi/old): L = clip(rho, A), the mean over sequences.

    Zheng et al. 2025, eq. 5 to 7 [zheng2025gspo]: the ratio is that of the reward's unit, the completion; its logarithm is
    divided by the length, so one clip range fits all lengths, and a small one. At rho = 1 it has GRPO's value. No KL in the
    loss; exponents are cut at 20 and the gradient is zero beyond.

    Args:
        clip_low: how far the ratio of a bad completion may fall below 1 and still be pushed.
        clip_high: how far the ratio of a good completion may rise above 1 and still be pushed.

    Raises:
        ValueError: an option out of range.
    """
    log_ratio = sequence_log_ratio(token_log_ratio(policy_token_logps, old_token_logps, mask), mask, average=True)
    token_loss, metrics = clipped_tokens(log_ratio, advantages, mask, clip_low=clip_low, clip_high=clip_high, owner="gspo_loss")
    return normalise(token_loss, mask, "seq_mean", metrics, owner="gspo_loss")


@register("luspo", advantage=group_baseline)
def luspo_loss(
    policy_token_logps: Tensor,  # [N, T]
    old_token_logps: Tensor,  # [N, T]
    advantages: Tensor,  # [N, T]
    mask: Tensor,  # [N, T]
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> LossOutput:
    """GSPO with each sequence weighed by its length: L = |y| clip(rho, A), the mean over sequences.

    Liu et al. 2026 [liu2026luspo]: the length cancels the one in rho's gradient, so a token counts the same in long and
    in short completions. No KL in the loss; exponents are cut at 20 and the gradient is zero beyond.

    Args:
        clip_low: how far the ratio of a bad completion may fall below 1 and still be pushed.
        clip_high: how far the ratio of a good completion may rise above 1 and still be pushed.

    Raises:
        ValueError: an option out of range.
    """
    log_ratio = sequence_log_ratio(token_log_ratio(policy_token_logps, old_token_logps, mask), mask, average=True)
    token_loss, metrics = clipped_tokens(
        log_ratio, advantages, mask, clip_low=clip_low, clip_high=clip_high, owner="luspo_loss"
    )
    return normalise(token_loss, mask, "seq_sum", metrics, owner="luspo_loss")
