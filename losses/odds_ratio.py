"""The odds-ratio term of ORPO. P pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.ops import MIN_NEGATIVE, log1mexp, per_token, reward_metrics
from losses.registry import register
from losses.types import LossOutput


@register("odds_ratio")
def odds_ratio_loss(
    policy_chosen_logps: Tensor,  # [P]
    policy_rejected_logps: Tensor,  # [P]
    chosen_lengths: Tensor,  # [P]
    rejected_lengths: Tensor,  # [P]
) -> LossOutput:
    """L = -log sigma(log odds(y_w) - log odds(y_l)), odds = p/(1-p), p = exp(log pi(y)/|y|).

    Hong et al. 2024, eq. 6 and 7 [hong2024orpo]. The mean log-prob is cut at -1e-6, where the odds are a million to one: value
    constant and gradient zero above it.
    """
    chosen_odds = _log_odds(per_token(policy_chosen_logps, chosen_lengths))
    rejected_odds = _log_odds(per_token(policy_rejected_logps, rejected_lengths))
    loss = -F.logsigmoid(chosen_odds - rejected_odds)
    return LossOutput(loss, torch.ones_like(loss), reward_metrics(chosen_odds, rejected_odds))


def _log_odds(mean_logps: Tensor) -> Tensor:
    """log(p/(1-p)) [P] of log p."""
    mean_logps = mean_logps.clamp(max=-MIN_NEGATIVE)
    return mean_logps - log1mexp(mean_logps)
