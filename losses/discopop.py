"""The preference loss that a language model found: log-ratio modulated loss. P pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.ops import ratio_of, reward_metrics
from losses.registry import register
from losses.types import LossOutput


@register("discopop")
def discopop_loss(
    policy_chosen_logps: Tensor,  # [P]
    policy_rejected_logps: Tensor,  # [P]
    reference_chosen_logps: Tensor,  # [P]
    reference_rejected_logps: Tensor,  # [P]
    *,
    beta: float = 0.1,
    tau: float = 0.05,
) -> LossOutput:
    """L = (1 - w)(-log sigma(m)) + w exp(-m), w = sigma(m/tau), m = beta*(log pi/ref(y_w) - log pi/ref(y_l)).

    Lu et al. 2024, eq. 8 [lu2024discopop]: logistic below a margin of 0, exponential above it, blended by w. Not convex near 0.
    w exp(-m) is computed as one exponential, since exp(-m) alone overflows while w underflows; its exponent is cut at 20, with
    gradient zero beyond, which only a tau above 1 can reach.

    Args:
        beta: strength against the reference; raising it keeps the policy nearer to it.
        tau: width of the blend; raising it mixes the two losses over more margins.

    Raises:
        ValueError: `tau` is not positive.
    """
    if tau <= 0:
        raise ValueError(f"discopop_loss: tau is {tau}, expected a positive width.")
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    margin = chosen_rewards - rejected_rewards
    logistic = -torch.sigmoid(-margin / tau) * F.logsigmoid(margin)
    exponential = ratio_of(F.logsigmoid(margin / tau) - margin)
    loss = logistic + exponential
    return LossOutput(loss, torch.ones_like(loss), reward_metrics(chosen_rewards, rejected_rewards))
