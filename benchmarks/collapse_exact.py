"""The program behind reward collapse, solved: max over 1 >= r_1 >= ... >= r_n >= 0 of the mean over i < j of U(r_i - r_j).

Song et al. 2023, eq. 3 [song2023collapse]. Whatever the prompt, its solution is what training with a rank utility gives to n
ranked completions. As n grows, the rewards' distribution goes to one that U alone decides; for powers it has a closed form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from losses.rank_utility import Utility, parse_utility

Array = NDArray[np.float64]

_TO_BOUNDARY = 0.99  # share of the way to the nearest zero gap that a step may go
_CENTRING = 0.2  # each step aims at a barrier this many times lower
_QUANTILES = (np.arange(10_000) + 0.5) / 10_000
_END = 0.01


@dataclass(frozen=True)
class Optimum:
    """The solved program.

    Args:
        rewards: [n], from r_1 = 1 down to r_n = 0.
        value: the mean of U over the pairs.
        gap: the first-order conditions' upper bound on how far `value` is from the highest one.
        steps: Newton steps taken.
    """

    rewards: Array
    value: float
    gap: float
    steps: int


def solve(utility: str, n: int, *, offset: float = 0.0, tolerance: float = 1e-12, limit: int = 100) -> Optimum:
    """The optimal rewards of `n` ranked completions, by a primal-dual interior-point method on the gaps between neighbours.

    The gaps d_k = r_k - r_{k+1} >= 0 add up to 1, since U increases, and the objective is concave in them: so no gaps can
    gain more than max_k slope_k - slope @ d, which is 0 at the optimum.

    Args:
        utility: as `rank_utility_loss` takes one; with `linear` and n odd the optimum is not unique, the middle one is found.
        n: completions, at least 2.
        offset: of `rank_utility_loss`; 0 is the utility itself.
        tolerance: of the gap, relative to slope @ d.
        limit: of steps.

    Raises:
        ValueError: fewer than two completions, or no convergence within `limit` steps.
    """
    if n < 2:
        raise ValueError(f"solve: n is {n}; expected at least 2 completions, or there is no pair.")
    function = parse_utility(utility)
    # The arcsine law's spacing: nearer to every optimum than even gaps.
    gaps = np.sin(np.pi * (np.arange(n - 1) + 0.5) / (n - 1))
    gaps /= gaps.sum()
    objective = _Objective(function, offset, gaps)
    multiplier = objective.slope.max()
    prices = np.maximum(multiplier - objective.slope, multiplier / 100)  # of the constraints d >= 0
    for step in range(limit):
        bound = float(objective.slope.max() - objective.slope @ gaps)
        if bound <= tolerance * abs(objective.slope @ gaps):
            return Optimum(_rewards(gaps) / gaps.sum(), objective.value, bound, step)
        barrier = _CENTRING * float(prices @ gaps) / (n - 1)
        # slope - multiplier + prices = 0, gaps * prices = barrier, sum of gaps = 1, linearised; prices are eliminated.
        system = np.diag(prices / gaps) - objective.curvature
        residual = objective.slope - multiplier + barrier / gaps
        by_residual, by_multiplier = np.linalg.solve(system, np.stack([residual, np.ones(n - 1)], axis=1)).T
        change = (by_residual.sum() - (1 - gaps.sum())) / by_multiplier.sum()
        direction = by_residual - change * by_multiplier
        new_prices = (barrier - prices * direction) / gaps
        prices = prices + _step_length(prices, new_prices - prices) * (new_prices - prices)
        multiplier += change
        gaps, objective = _search(function, offset, objective, gaps, direction, barrier)
        prices = np.clip(prices, barrier / gaps / 1e4, barrier / gaps * 1e4)
    raise ValueError(f"solve: {utility!r} with n = {n} has not converged in {limit} steps: the bound is still {bound:.3g}.")


class _Objective:
    """Mean of U over the pairs at gaps [n-1]: value, slope [n-1] and curvature [n-1, n-1] by the gaps."""

    def __init__(self, function: Utility, offset: float, gaps: Array) -> None:
        n = len(gaps) + 1
        rewards = _rewards(gaps)
        better, worse = np.triu_indices(n, 1)
        x = torch.tensor(rewards[better] - rewards[worse], requires_grad=True)
        values = function(x, offset)
        (slopes,) = torch.autograd.grad(values.sum(), x, create_graph=True)
        # `linear` has a slope that does not depend on x.
        curves = torch.autograd.grad(slopes.sum(), x)[0] if slopes.requires_grad else torch.zeros_like(x)
        pair_slope, pair_curve = np.zeros((2, n, n))
        pair_slope[better, worse] = slopes.detach().numpy() / len(x)
        pair_curve[better, worse] = pair_curve[worse, better] = curves.detach().numpy() / len(x)
        self.value = values.mean().item()
        # Widening gap k lifts rewards 1 to k: derivatives by rewards add up to those by gaps.
        self.slope: Array = np.cumsum(pair_slope.sum(1) - pair_slope.sum(0))[:-1]
        by_rewards = np.diag(pair_curve.sum(1)) - pair_curve
        self.curvature: Array = by_rewards.cumsum(0).cumsum(1)[:-1, :-1]


def _search(
    function: Utility, offset: float, now: _Objective, gaps: Array, direction: Array, barrier: float
) -> tuple[Array, _Objective]:
    """The gaps after a step that raises objective + barrier * sum log gaps enough, and the objective there."""
    height = now.value + barrier * np.log(gaps).sum()
    promised = now.slope @ direction + barrier * (direction / gaps).sum()
    length = _step_length(gaps, direction)
    while True:
        tried = gaps + length * direction
        found = _Objective(function, offset, tried)
        # Near the optimum a gain drowns in rounding; then the step is right as it is.
        if found.value + barrier * np.log(tried).sum() >= height + 1e-4 * length * promised - 1e-12 * abs(height):
            return tried, found
        length /= 2


def _step_length(values: Array, direction: Array) -> float:
    """The longest step up to 1 that keeps positive values positive."""
    falling = direction < 0
    return float(min(1.0, _TO_BOUNDARY * (-values[falling] / direction[falling]).min(initial=np.inf)))


def _rewards(gaps: Array) -> Array:
    return np.append(np.cumsum(gaps[::-1])[::-1], 0.0)


def closed_form(utility: str) -> Any:
    """The limit distribution of rewards as n grows, frozen (scipy.stats); None where none is known.

    U' = x^(p-1) gives Beta((1-p)/2, (1-p)/2) for -1 <= p < 1: the arcsine law for log x, the uniform law for -1/x. U = x, the
    limit of p = 1, gives half of the rewards to each end (Song et al. 2023, section 3 [song2023collapse]).
    """
    exponent = parse_utility(utility).exponent
    if exponent is None or exponent < -1:
        return None
    return stats.randint(0, 2) if exponent == 1 else stats.beta((1 - exponent) / 2, (1 - exponent) / 2)


def ks_distance(rewards: Array, law: Any) -> float:
    """Kolmogorov-Smirnov distance of rewards [n] to a continuous distribution."""
    return float(stats.kstest(rewards, law.cdf).statistic)


def w1_distance(rewards: Array, law: Any) -> float:
    """Wasserstein-1 distance of rewards [n] to a distribution, or to other rewards."""
    other = law if isinstance(law, np.ndarray) else law.ppf(_QUANTILES)
    return float(stats.wasserstein_distance(rewards, other))


def asymmetry(rewards: Array) -> float:
    """Largest |r_i + r_{n+1-i} - 1|."""
    return float(np.abs(rewards + rewards[::-1] - 1).max())


def end_mass(rewards: Array) -> float:
    """Share of rewards within 0.01 of an end."""
    return float((np.minimum(rewards, 1 - rewards) < _END).mean())
