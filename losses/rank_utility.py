"""Reward modelling by utilities of reward differences, the setting of reward collapse. G prompts, K completions of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from losses._ranking import list_metrics, mean_over_pairs, pair_differences
from losses.registry import register
from losses.types import LossOutput

_EXPONENTS: Mapping[str, float] = {"linear": 1.0, "log": 0.0, "inverse": -1.0}
"""The powers that have a name of their own; U'(x) = |p| x^(p-1), and 1/x for p = 0."""

UTILITIES = (*_EXPONENTS, "log_sigmoid[:k]", "power:g", "inverse_power:s")
"""What `utility` may be: x, log x, -1/x, log sigma(kx) with k = 1 unless given, x^g with 0 < g <= 1, and -x^-s with s > 0."""


@register("rank_utility")
def rank_utility_loss(
    group_rewards: Tensor,  # [G, K]
    ranks: Tensor,  # [G, K]
    group_mask: Tensor,  # [G, K]
    utility_ids: Tensor | None = None,  # [G]
    *,
    utility: str = "log",
    offset: float = 0.1,
    bounded: bool = True,
) -> LossOutput:
    """L = -mean_{i better than j} U(R_i - R_j), R = sigma(r) in (0, 1), the mean of a prompt's pairs, then of the prompts.

    Song et al. 2023, eq. 2 [song2023collapse]. With one concave U for all prompts the optimum is the same set of rewards for
    every prompt, whatever the prompt (reward collapse); with U by prompt, "linear" pulls rewards to 0 and 1 and "inverse"
    spreads them evenly. As in the authors' code, U(x) is U(x + offset) - U(offset), and goes on as its tangent where a pair is
    in the wrong order; log_sigmoid needs neither.

    Args:
        utility: linear, log, inverse, log_sigmoid, log_sigmoid:k, power:g or inverse_power:s; or several with commas, of
            which `utility_ids` picks one by prompt.
        offset: keeps slopes finite at ties; the smaller, the nearer the optimum is to the one of U itself.
        bounded: rewards pass through a sigmoid, as in the paper; without it, log_sigmoid is `pairwise_ranking`.

    Raises:
        ValueError: an unknown utility, several without `utility_ids` that pick among them, or an offset that is not positive.
    """
    names = utility.split(",")
    if not offset > 0:
        raise ValueError(f"rank_utility_loss: offset is {offset}; expected > 0, or slopes at ties are infinite.")
    utilities = [parse_utility(name) for name in names]
    if len(names) > 1 and utility_ids is None:
        raise ValueError(f"rank_utility_loss: utility {utility!r} names {len(names)}; give utility_ids, or name one.")
    if len(names) > 1 and utility_ids is not None and int(utility_ids.max()) >= len(names):
        raise ValueError(
            f"rank_utility_loss: utility_ids go up to {int(utility_ids.max())}, but utility {utility!r} names {len(names)}."
        )
    rewards = torch.sigmoid(group_rewards) if bounded else group_rewards
    difference, better = pair_differences(rewards, ranks, group_mask)
    values = utilities[0](difference, offset)
    for number, one in enumerate(utilities[1:], start=1):
        assert utility_ids is not None
        values = torch.where((utility_ids == number)[:, None, None], one(difference, offset), values)
    loss, weight = mean_over_pairs(-values, better)
    return LossOutput(loss, weight, list_metrics(rewards, ranks, group_mask))


@dataclass(frozen=True)
class Utility:
    """U of reward differences.

    Args:
        exponent: p of U'(x) = |p| x^(p-1), which is 1/x for p = 0; None for log sigma(kx).
        scale: k of log sigma(kx).
    """

    exponent: float | None
    scale: float = 1.0

    def __call__(self, x: Tensor, offset: float = 0.0) -> Tensor:
        """U(x + offset) - U(offset), below 0 its tangent there; without offset U itself, for x > 0. Any shape."""
        if self.exponent is None:
            return F.logsigmoid(self.scale * x)
        if not offset:
            return _power(x, self.exponent)
        slope = (abs(self.exponent) or 1.0) * offset ** (self.exponent - 1)
        # The argument is cut before the function, or the branch not taken would send NaN into the gradient.
        above = _power(x.clamp(min=0) + offset, self.exponent) - _power(x.new_full((), offset), self.exponent)
        return torch.where(x > 0, above, slope * x)


def parse_utility(name: str) -> Utility:
    """One of `UTILITIES` by name.

    Raises:
        ValueError: an unknown one, or a parameter that is missing, not a number or out of range.
    """
    family, _, parameter = name.partition(":")
    if name in _EXPONENTS:
        return Utility(_EXPONENTS[name])
    if family == "power":
        return Utility(_parameter(name, parameter, 1.0))
    if family == "inverse_power":
        return Utility(-_parameter(name, parameter, math.inf))
    if family == "log_sigmoid":
        return Utility(None, _parameter(name, parameter, math.inf) if parameter else 1.0)
    raise ValueError(f"rank_utility_loss: unknown utility {name!r}; expected {', '.join(UTILITIES)}.")


def _power(x: Tensor, exponent: float) -> Tensor:
    """x^p made increasing: -x^p for p < 0, and log x for p = 0."""
    return torch.log(x) if exponent == 0 else math.copysign(1.0, exponent) * x**exponent


def _parameter(name: str, text: str, highest: float) -> float:
    """The number behind a utility's colon, in (0, highest].

    Raises:
        ValueError: it is anything else.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= highest or math.isinf(value):
        limit = "> 0" if math.isinf(highest) else f"in (0, {highest:g}]"
        raise ValueError(f"rank_utility_loss: utility {name!r} needs a number {limit} behind its colon, as in power:0.5.")
    return value
