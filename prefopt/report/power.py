"""What a number of seeds, or of prompts, can show: the power of two-sided t tests, and the seeds that a difference needs.

A difference d between two algorithms, paired by seed, with standard deviation s over n seeds has t' ~ noncentral t with n - 1
degrees of freedom and noncentrality d sqrt(n) / s. Everything here needs scipy (extra `stats`).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from functools import lru_cache
from typing import Any

from prefopt.report.schema import MINIMUM_SEEDS

LEVEL = 0.95
POWER = 0.8
MOST_SEEDS = 200
"""Beyond this many seeds nobody runs a study; the answer is "more than 200"."""


def power_of(difference: float, deviation: float, n: int, level: float = LEVEL) -> float:
    """The probability that a two-sided t test of n differences finds a true mean difference.

    Args:
        difference: the true mean difference, in the metric's unit.
        deviation: standard deviation of the differences over seeds, in the same unit.
        n: differences, one a seed; at least 2.
        level: 1 - the probability of finding what is not there.
    """
    if deviation == 0:
        return 1.0 if difference else 1 - level
    return reached(abs(difference) * math.sqrt(n) / deviation, n - 1, level)


def seeds_needed(
    deviation: float, difference: float, *, power: float = POWER, level: float = LEVEL, most: int = MOST_SEEDS
) -> int | None:
    """The fewest seeds, from 3 on, whose test finds the difference with probability `power`; None for more than `most`."""
    if not math.isfinite(deviation) or not difference or power_of(difference, deviation, most, level) < power:
        return None
    counts = range(MINIMUM_SEEDS, most + 1)
    return counts[bisect_left(counts, power, key=lambda n: power_of(difference, deviation, n, level))]


def detectable_over_seeds(deviation: float, n: int, power: float = POWER, level: float = LEVEL) -> float:
    """The true mean difference that n seeds find with probability `power`."""
    return noncentrality(n - 1, power, level) * deviation / math.sqrt(n)


def detectable_over_prompts(deviation: float, prompts: int, power: float = POWER, level: float = LEVEL) -> float:
    """(z_{(1+level)/2} + z_power) s / sqrt(prompts): what prompts resolve; a win rate of one half has s = 1/2.

    332 prompts resolve 7.7 points of win rate.
    """
    from scipy import stats

    return float(stats.norm.ppf((1 + level) / 2) + stats.norm.ppf(power)) * deviation / math.sqrt(prompts)


@lru_cache(maxsize=64)
def noncentrality(degrees: int, power: float, level: float) -> float:
    """d with P(|Z + d| > t_{(1+level)/2} S) = power, Z normal and S^2 = chi^2 / degrees."""
    from scipy import optimize, stats

    # At 3 critical values the power is above 0.99 for every degree of freedom >= 2, so the root is bracketed.
    edge = 3 * float(stats.t.ppf((1 + level) / 2, degrees))
    return float(optimize.brentq(lambda d: reached(d, degrees, level) - power, 0.0, edge))


def reached(d: float, degrees: int, level: float) -> float:
    """P(|Z + d| > t_{(1+level)/2} S).

    Integrated over quantiles of S by Gauss-Legendre: scipy's own noncentral t is NaN from d of about 10 on, which is where
    three seeds need it.
    """
    from scipy import stats

    threshold, weights = _threshold(degrees, level)
    return float(weights @ (stats.norm.sf(threshold - d) + stats.norm.cdf(-threshold - d))) / 2


@lru_cache(maxsize=512)
def _threshold(degrees: int, level: float) -> tuple[Any, Any]:
    """t_{(1+level)/2} S at the nodes of the quadrature, and its weights; [400] each."""
    import numpy as np
    from scipy import stats

    nodes, weights = np.polynomial.legendre.leggauss(400)
    critical = stats.t.ppf((1 + level) / 2, degrees)
    return critical * np.sqrt(stats.chi2.ppf((nodes + 1) / 2, degrees) / degrees), weights
