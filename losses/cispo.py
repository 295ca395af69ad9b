"""Clipped importance-sampling policy optimization. N sequences, T tokens."""

from __future__ import annotations

from torch import Tensor

from losses._surrogate import normalise, ratio_metrics, token_log_ratio
from losses.advantages import group_baseline
from losses.ops import ratio_of
from losses.registry import register
from losses.types import LossOutput


@register("cispo", advantage=group_baseline)
def cispo_loss(
    policy_token_logps: Tensor,  # [N, T]
    old_token_logps: Tensor,  # [N, T]
    advantages: Tensor,  # [N, T]
    mask: Tensor,  # [N, T]
    *,
    max_ratio: float = 5.0,
) -> LossOutput:
    """REINFORCE with a cut importance weight instead of a clipped ratio: L_t = -sg[min(rho_t, max_ratio)] A log pi(a_t | s_t).

    MiniMax 2025, eq. 4 and 5 [minimax2025m1]; sg stops the gradient. Every token keeps a gradient, where GRPO's clip drops
    those that moved far. One mean over all tokens of the step; no KL in the loss. The paper leaves the lower clip off, as here.

    Args:
        max_ratio: the largest weight of a token; TRL's `epsilon_high` is this number, the paper's 1 + epsilon.

    Raises:
        ValueError: `max_ratio` is not positive.
    """
    if max_ratio <= 0:
        raise ValueError(f"cispo_loss: max_ratio must be positive, got {max_ratio}.")
    log_ratio = token_log_ratio(policy_token_logps, old_token_logps, mask).detach()
    ratio = ratio_of(log_ratio)
    token_loss = -ratio.clamp(max=max_ratio) * advantages.detach() * policy_token_logps
    cut = (ratio > max_ratio).to(token_loss.dtype)
    metrics = {"clip_frac": (cut, mask.to(token_loss.dtype)), **ratio_metrics(log_ratio, mask)}
    return normalise(token_loss, mask, "token", metrics, owner="cispo_loss")
