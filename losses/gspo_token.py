"""GSPO with an advantage for each token. N sequences, T tokens."""

from __future__ import annotations

from torch import Tensor

from losses._surrogate import clipped_tokens, normalise, sequence_log_ratio, token_log_ratio
from losses.advantages import group_baseline
from losses.registry import register
from losses.types import LossOutput


@register("gspo_token", advantage=group_baseline)
def gspo_token_loss(
    policy_token_logps: Tensor,  # [N, T]
    old_token_logps: Tensor,  # [N, T]
    advantages: Tensor,  # [N, T]
    mask: Tensor,  # [N, T]
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> LossOutput:
    """GSPO with token advantages: L_t = clip(rho_t, A_t), rho_t = sg[exp(mean_t log pi/old)] pi/sg[pi](a_t | s_t).

    Zheng et al. 2025, section 4.3 [zheng2025gspo]; sg stops the gradient. A token is clipped by its sequence's ratio, and its
    gradient is that of its own log-prob, so tokens may have advantages of their own; with one advantage a sequence, value and
    gradient are GSPO's. The mean over sequences of their token means; no KL in the loss; exponents are cut at 20 and the
    gradient is zero beyond.

    Args:
        clip_low: how far the sequence's ratio may fall below 1 and its bad tokens still be pushed.
        clip_high: how far the sequence's ratio may rise above 1 and its good tokens still be pushed.

    Raises:
        ValueError: an option out of range.
    """
    own = token_log_ratio(policy_token_logps, old_token_logps, mask)
    shared = sequence_log_ratio(own, mask, average=True).detach()
    # The value is the sequence's, the derivative 1 in the token's own log-prob.
    log_ratio = shared + (own - own.detach())
    token_loss, metrics = clipped_tokens(
        log_ratio, advantages, mask, clip_low=clip_low, clip_high=clip_high, owner="gspo_token_loss"
    )
    return normalise(token_loss, mask, "seq_mean", metrics, owner="gspo_token_loss")
