"""REINFORCE with a leave-one-out baseline. N sequences, T tokens."""

from __future__ import annotations

from torch import Tensor

from losses._surrogate import clipped_tokens, normalise, sequence_log_ratio, token_log_ratio
from losses.advantages import leave_one_out
from losses.registry import register
from losses.types import LossOutput


@register("rloo", advantage=leave_one_out)
def rloo_loss(
    policy_token_logps: Tensor,  # [N, T]
    old_token_logps: Tensor,  # [N, T]
    advantages: Tensor,  # [N, T]
    mask: Tensor,  # [N, T]
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> LossOutput:
    """PPO's clip with one ratio a sequence, rho = exp(sum_t log pi/old): L = clip(rho, A), and A = r_i - mean_{j != i} r_j.

    Ahmadian et al. 2024, section 3.2 [ahmadian2024rloo], who treat the completion as one action; at rho = 1 its gradient is
    theirs. The clip is that of TRL, for several passes over the same rollouts. A mean over sequences; exponents are cut at 20
    and the gradient is zero beyond.

    Args:
        clip_low: how far the ratio of a bad completion may fall below 1 and still be pushed.
        clip_high: how far the ratio of a good completion may rise above 1 and still be pushed.

    Raises:
        ValueError: an option out of range.
    """
    log_ratio = sequence_log_ratio(token_log_ratio(policy_token_logps, old_token_logps, mask), mask, average=False)
    token_loss, metrics = clipped_tokens(log_ratio, advantages, mask, clip_low=clip_low, clip_high=clip_high, owner="rloo_loss")
    return normalise(token_loss, mask, "seq_mean", metrics, owner="rloo_loss")
