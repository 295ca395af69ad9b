"""Statistics over seeds: t intervals, paired t tests, Holm's correction, the smallest detectable difference.

Seeds are the unit. A percentile bootstrap over 3 or 5 seeds rejects true nulls 25% and 17% of the time, so intervals and
tests are Student's. Under `MINIMUM_SEEDS` values, or without scipy (extra `stats`), there is no interval and no test; the
result says which of the two it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import combinations

from prefopt.report.schema import MINIMUM_SEEDS, PromptRow, Results

LEVEL = 0.95
POWER = 0.8
NO_SCIPY = "no intervals and no tests: scipy is not installed (the extra `stats` has it)"


@dataclass(frozen=True)
class Interval:
    """A mean over seeds. `half_width` is None without an interval; `missing` then says why."""

    mean: float
    n: int
    half_width: float | None
    missing: str = ""


@dataclass(frozen=True)
class Comparison:
    """The mean difference left - right of the primary metric over the seeds that both have, and its t test.

    `p` and `half_width` are None when there is no test; `missing` then says why. `p_holm` is corrected over the family.
    `detectable` is the difference that a test at this spread finds with probability 0.8.
    """

    left: str
    right: str
    n: int
    difference: float
    half_width: float | None
    p: float | None
    p_holm: float | None
    detectable: float | None
    missing: str = ""


def scipy_installed() -> bool:
    """Whether intervals and tests can be had."""
    return find_spec("scipy") is not None


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Mean and half-width of Student's interval: t_{(1+level)/2, n-1} * s / sqrt(n), s with n - 1 in the denominator."""
    n = len(values)
    if n == 0:
        return Interval(math.nan, 0, None, "no values")
    mean = math.fsum(values) / n
    missing = _missing(n)
    if missing:
        return Interval(mean, n, None, missing)
    return Interval(mean, n, _quantile((1 + level) / 2, n - 1) * _deviation(values) / math.sqrt(n))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction (Holm 1979): p_(i) becomes the running maximum of (m - i + 1) p_(i), at most 1.

    A test that could not be made (None) stays None and still counts in m.
    """
    m = len(p_values)
    corrected: list[float | None] = [None] * m
    running = 0.0
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    for position, (p, index) in enumerate(known):
        running = max(running, min(1.0, (m - position) * p))
        corrected[index] = running
    return corrected


def smallest_detectable_difference(deviation: float, n: int, power: float = POWER, level: float = LEVEL) -> float | None:
    """The true mean difference that a two-sided t test of n differences with this standard deviation finds with
    probability `power`: the noncentrality d with P(|t'_{n-1}(d)| > t_{(1+level)/2}) = power, times deviation / sqrt(n).

    None under `MINIMUM_SEEDS` values or without scipy. One test, without Holm's correction.
    """
    if _missing(n):
        return None
    return _noncentrality(n - 1, power, level) * deviation / math.sqrt(n)


def against_reference(results: Results) -> tuple[Comparison, ...]:
    """Each setting against the reference policy, whose value is one known number; one family for Holm."""
    metric = results.primary
    if metric is None or not math.isfinite(results.reference.get(metric.key, math.nan)):
        return ()
    base = results.reference[metric.key]
    made = []
    for setting in results.settings:
        values = results.values(setting.label, metric.key)
        made.append(paired(setting.label, "reference", [value - base for value in values.values()]))
    return corrected(made)


def between_settings(results: Results) -> tuple[Comparison, ...]:
    """Every pair of settings, paired by seed over the seeds that both finished; one family for Holm."""
    metric = results.primary
    if metric is None:
        return ()
    made = []
    for left, right in combinations([setting.label for setting in results.settings], 2):
        first, second = results.values(left, metric.key), results.values(right, metric.key)
        made.append(
            paired(left, right, [first[seed] - second[seed] for seed in results.seeds if seed in first and seed in second])
        )
    return corrected(made)


@dataclass(frozen=True)
class PromptSummary:
    """A judge's scores of one setting: `prompts` distinct prompts, the mean score over them (seeds averaged first), the
    standard deviation over prompts, and the difference between two settings that this many prompts can show."""

    label: str
    judge: str
    prompts: int
    score: float
    deviation: float
    detectable: float


def summarise_prompts(rows: Sequence[PromptRow]) -> tuple[PromptSummary, ...]:
    """Per setting and judge: how far the number of prompts alone can resolve.

    The detectable difference is (z_0.975 + z_0.8) s / sqrt(prompts), s over prompts of the seed-averaged score: for a
    win rate of one half and one seed, 332 prompts give 7.7 points.
    """
    scores: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        if row.judge is not None and math.isfinite(row.score):
            scores.setdefault((row.label, row.judge), {}).setdefault(row.prompt_id, []).append(row.score)
    made = []
    for (label, judge), by_prompt in scores.items():
        means = [math.fsum(values) / len(values) for values in by_prompt.values()]
        deviation = _deviation(means) if len(means) > 1 else math.nan
        made.append(
            PromptSummary(
                label, judge, len(means), math.fsum(means) / len(means), deviation, _normal_detectable(deviation, len(means))
            )
        )
    return tuple(made)


# z_0.975 + z_0.8 of the standard normal distribution.
_NORMAL_SUM = 1.959963984540054 + 0.8416212335729143


def _normal_detectable(deviation: float, n: int) -> float:
    return _NORMAL_SUM * deviation / math.sqrt(n)


def paired(left: str, right: str, differences: Sequence[float]) -> Comparison:
    """A t test of differences left - right, one for each seed (or block); `p_holm` is left to `corrected`."""
    interval = mean_interval(differences)
    if interval.half_width is None:
        return Comparison(left, right, interval.n, interval.mean, None, None, None, None, interval.missing)
    deviation = _deviation(differences)
    if deviation <= 1e-12 * max(abs(value) for value in differences):
        # t is 0/0 or infinite: seeds that agree to the last digit are one run, not a sample.
        return Comparison(left, right, interval.n, interval.mean, None, None, None, None, "all seeds are equal")
    from scipy import stats

    t = interval.mean / (deviation / math.sqrt(interval.n))
    p = float(2 * stats.t.sf(abs(t), interval.n - 1))
    detectable = smallest_detectable_difference(deviation, interval.n)
    return Comparison(left, right, interval.n, interval.mean, interval.half_width, p, None, detectable)


def corrected(made: Sequence[Comparison]) -> tuple[Comparison, ...]:
    """The tests of one family, with Holm's p values."""
    values = holm([item.p for item in made])
    return tuple(
        Comparison(c.left, c.right, c.n, c.difference, c.half_width, c.p, p_holm, c.detectable, c.missing)
        for c, p_holm in zip(made, values, strict=True)
    )


@lru_cache(maxsize=64)
def _noncentrality(degrees: int, power: float, level: float) -> float:
    """d with P(|Z + d| > t_{(1+level)/2} S) = power, Z normal and S^2 = chi^2 / degrees.

    Integrated over quantiles of S by Gauss-Legendre: scipy's own noncentral t is NaN from d of about 10 on, which is where
    three seeds need it.
    """
    import numpy as np
    from scipy import optimize, stats

    critical = _quantile((1 + level) / 2, degrees)
    nodes, weights = np.polynomial.legendre.leggauss(400)
    threshold = critical * np.sqrt(stats.chi2.ppf((nodes + 1) / 2, degrees) / degrees)

    def shortfall(d: float) -> float:
        reached = stats.norm.sf(threshold - d) + stats.norm.cdf(-threshold - d)
        return float(weights @ reached) / 2 - power

    # At 3 critical values the power is above 0.99 for every degree of freedom >= 2, so the root is bracketed.
    return float(optimize.brentq(shortfall, 0.0, 3 * critical))


def _missing(n: int) -> str:
    if n < MINIMUM_SEEDS:
        return f"under {MINIMUM_SEEDS} seeds"
    return "" if scipy_installed() else NO_SCIPY


def _quantile(probability: float, degrees: int) -> float:
    from scipy import stats

    return float(stats.t.ppf(probability, degrees))


def _deviation(values: Sequence[float]) -> float:
    """The standard deviation with n - 1 in the denominator; [n] -> scalar."""
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
