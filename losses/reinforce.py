"""REINFORCE. N sequences, T tokens."""

from __future__ import annotations

from torch import Tensor

from losses._surrogate import LengthNorm, normalise
from losses.advantages import discounted_returns
from losses.registry import register
from losses.types import LossOutput, Metric


@register("reinforce", advantage=discounted_returns)
def reinforce_loss(
    policy_token_logps: Tensor,  # [N, T]
    advantages: Tensor,  # [N, T]
    mask: Tensor,  # [N, T]
    max_completion_length: Tensor | None = None,  # []
    *,
    length_norm: LengthNorm = "token",
) -> LossOutput:
    """L_t = -A_t log pi(a_t | s_t), without a ratio: PPO's gradient at rho = 1.

    Williams 1992 [williams1992reinforce]. It is right for samples of the present policy only, so more than one pass over the
    same rollouts (`ppo_epochs`) biases it.

    Args:
        length_norm: as in `ppo_policy`. "token" and "seq_sum" differ by a number for the whole step.

    Raises:
        ValueError: an unknown `length_norm`, or "constant" without `max_completion_length`.
    """
    token_loss = -advantages.detach() * policy_token_logps
    metrics: dict[str, Metric] = {"nll": (-policy_token_logps.detach(), mask.to(token_loss.dtype))}
    return normalise(
        token_loss, mask, length_norm, metrics, max_completion_length=max_completion_length, owner="reinforce_loss"
    )
