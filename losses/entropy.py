"""The entropy bonus as a loss. N sequences, T tokens."""

from __future__ import annotations

from torch import Tensor

from losses.registry import register
from losses.types import LossOutput


@register("entropy")
def entropy_loss(
    entropies: Tensor,  # [N, T]
    mask: Tensor,  # [N, T]
) -> LossOutput:
    """L_t = -H(pi(. | s_t)), a mean over tokens: minimising it keeps the policy random.

    Williams 1992 [williams1992reinforce]; the S term of Schulman et al. 2017, eq. 9 [schulman2017ppo].
    """
    weight = mask.to(entropies.dtype)
    return LossOutput(-entropies, weight, {"entropy": (entropies.detach(), weight)})
