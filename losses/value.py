"""PPO's value loss. N sequences, T tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from losses.advantages import gae
from losses.registry import register
from losses.types import LossOutput


@register("value", advantage=gae)
def value_loss(
    values: Tensor,  # [N, T]
    old_values: Tensor,  # [N, T]
    returns: Tensor,  # [N, T]
    mask: Tensor,  # [N, T]
    *,
    value_clip: float | None = 0.2,
) -> LossOutput:
    """L_t = 0.5 max((V_t - G_t)^2, (clip(V_t, V_old - c, V_old + c) - G_t)^2), a mean over tokens.

    The squared error of Schulman et al. 2017, eq. 9 [schulman2017ppo], with the clip of their code (Engstrom et al. 2020,
    section 3 [engstrom2020matters]). Where the clip decides, the gradient is zero: the value has moved far enough.

    Args:
        value_clip: how far from its old value a value may move in one rollout's updates; None for the plain error.

    Raises:
        ValueError: a negative `value_clip`.
    """
    if value_clip is not None and value_clip < 0:
        raise ValueError(f"value_loss: value_clip must be at least 0, got {value_clip}; None turns the clip off.")
    old_values, returns = old_values.detach(), returns.detach()
    error = (values - returns).square()
    loss = error
    if value_clip is not None:
        clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
        loss = torch.maximum(error, (clipped - returns).square())
    weight = mask.to(loss.dtype)
    metrics = {
        "value/clip_frac": ((loss != error).to(loss.dtype), weight),
        "value/mean": (values.detach(), weight),
        "value/error": (error.detach(), weight),
    }
    return LossOutput(0.5 * loss, weight, metrics)
