"""PPO's clipped policy loss. N sequences, T tokens."""

from __future__ import annotations

from torch import Tensor

from losses._surrogate import LengthNorm, clipped_tokens, normalise, token_log_ratio
from losses.advantages import discounted_returns
from losses.registry import register
from losses.types import LossOutput


@register("ppo_policy", advantage=discounted_returns)
def ppo_policy_loss(
    policy_token_logps: Tensor,  # [N, T]
    old_token_logps: Tensor,  # [N, T]
    advantages: Tensor,  # [N, T]
    mask: Tensor,  # [N, T]
    max_completion_length: Tensor | None = None,  # []
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    length_norm: LengthNorm = "token",
) -> LossOutput:
    """L_t = max(-A_t rho_t, -A_t clip(rho_t, 1 - clip_low, 1 + clip_high)), rho_t = pi(a_t | s_t) / old(a_t | s_t).

    Schulman et al. 2017, eq. 7 [schulman2017ppo]; dual clip: Ye et al. 2019 [ye2019dualclip]. At rho = 1 the gradient is
    REINFORCE's. It is zero where A > 0 and rho > 1 + clip_high, where A < 0 and rho < 1 - clip_low, and, since exponents are
    cut at 20, where log rho > 20. By itself it trains on rewards to go, without a value head; `ppo` adds that.

    Args:
        clip_low: how far the ratio of a bad action may fall below 1 and still be pushed.
        clip_high: how far the ratio of a good action may rise above 1 and still be pushed.
        dual_clip: for A < 0 the loss is at most -dual_clip*A, so actions that became much likelier stop counting.
        length_norm: "token": sum / all tokens of the step; "seq_mean": mean over sequences of their token means;
            "seq_sum": mean over sequences of their sums; "constant": sum / (sequences * max_completion_length).

    Raises:
        ValueError: an option out of range, or "constant" without `max_completion_length`.
    """
    token_loss, metrics = clipped_tokens(
        token_log_ratio(policy_token_logps, old_token_logps, mask),
        advantages,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        owner="ppo_policy_loss",
    )
    return normalise(
        token_loss, mask, length_norm, metrics, max_completion_length=max_completion_length, owner="ppo_policy_loss"
    )
