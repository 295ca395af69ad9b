"""Reward modelling by utilities of reward differences, the setting of reward collapse. G prompts, K completions of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from losses._ranking import list_metrics, mean_over_pairs, pair_differences
from losses.registry import register
from losses.types import LossOutput

EPSILON = 0.1
"""Offset that keeps `log` and `inverse` finite at ties; below 0 a utility goes on as its tangent at 0."""

_UTILITIES: Mapping[str, tuple[Callable[[Tensor], Tensor], float]] = {
    # U on x >= 0, and its slope at 0
    "linear": (lambda x: x, 1.0),
    "log": (lambda x: torch.log(x + EPSILON) - torch.log(torch.full_like(x, EPSILON)), 1 / EPSILON),
    "inverse": (lambda x: 1 / EPSILON - 1 / (x + EPSILON), 1 / EPSILON**2),
}
UTILITIES = (*_UTILITIES, "log_sigmoid")
"""Names that `utility` knows."""


@register("rank_utility")
def rank_utility_loss(
    group_rewards: Tensor,  # [G, K]
    ranks: Tensor,  # [G, K]
    group_mask: Tensor,  # [G, K]
    utility_ids: Tensor | None = None,  # [G]
    *,
    utility: str = "log",
    bounded: bool = True,
) -> LossOutput:
    """L = -mean_{i better than j} U(R_i - R_j), R = sigma(r) in (0, 1), the mean of a prompt's pairs, then of the prompts.

    Song et al. 2023, eq. 2 [song2023collapse]. With one concave U for all prompts the optimum is the same set of rewards for
    every prompt, whatever the prompt (reward collapse); with U by prompt, "linear" pulls rewards to 0 and 1 and "inverse"
    spreads them evenly. `log` and `inverse` are offset by 0.1 and go on as their tangent where a pair is in the wrong order.

    Args:
        utility: linear, log, inverse or log_sigmoid; or several with commas, of which `utility_ids` picks one by prompt.
        bounded: rewards pass through a sigmoid, as in the paper; without it, log_sigmoid is `pairwise_ranking`.

    Raises:
        ValueError: an unknown utility, or several without `utility_ids` that pick among them.
    """
    chosen = utility.split(",")
    unknown = [name for name in chosen if name not in UTILITIES]
    if unknown:
        raise ValueError(f"rank_utility_loss: unknown utility {unknown[0]!r}; expected {', '.join(UTILITIES)}.")
    if len(chosen) > 1 and utility_ids is None:
        raise ValueError(f"rank_utility_loss: utility {utility!r} names {len(chosen)}; give utility_ids, or name one.")
    if len(chosen) > 1 and utility_ids is not None and int(utility_ids.max()) >= len(chosen):
        raise ValueError(
            f"rank_utility_loss: utility_ids go up to {int(utility_ids.max())}, but utility {utility!r} names {len(chosen)}."
        )
    rewards = torch.sigmoid(group_rewards) if bounded else group_rewards
    difference, better = pair_differences(rewards, ranks, group_mask)
    values = _utility(chosen[0], difference)
    for number, name in enumerate(chosen[1:], start=1):
        assert utility_ids is not None
        values = torch.where((utility_ids == number)[:, None, None], _utility(name, difference), values)
    loss, weight = mean_over_pairs(-values, better)
    return LossOutput(loss, weight, list_metrics(rewards, ranks, group_mask))


def _utility(name: str, difference: Tensor) -> Tensor:
    """U of any shape."""
    if name == "log_sigmoid":
        return F.logsigmoid(difference)
    function, slope = _UTILITIES[name]
    # The argument is cut before the function, or the branch not taken would send NaN into the gradient.
    return torch.where(difference > 0, function(difference.clamp(min=0)), slope * difference)
