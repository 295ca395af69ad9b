"""Statistics over seeds: t intervals, paired t tests, Holm's correction, the smallest detectable difference.

Seeds are the unit. A percentile bootstrap over 3 or 5 seeds rejects true nulls 25% and 17% of the time, so intervals and
tests are Student's. Under `MINIMUM_SEEDS` values, or without scipy (extra `stats`), there is no interval and no test; the
result says which of the two it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import combinations

from prefopt.report.power import LEVEL, POWER, detectable_over_prompts, detectable_over_seeds
from prefopt.report.schema import MINIMUM_SEEDS, PromptRow, Results

Values = Mapping[str, Mapping[int, float]]
"""Of each setting or family, one number a seed."""
SIGNIFICANT = 0.05
"""A pair is told apart where its p value, after Holm's correction, is under this."""
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

    `p` and `half_width` are None when there is no test; `missing` then says why. `p_holm` is corrected over the `tests` of its
    family. `deviation` is that of the differences over seeds; `detectable` is the difference that a test at this spread finds
    with probability 0.8. `format` is the metric's.
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
    deviation: float | None = None
    tests: int = 1
    format: str = ".3g"

    @property
    def told_apart(self) -> bool:
        """Whether the corrected test finds a difference."""
        return self.p_holm is not None and self.p_holm < SIGNIFICANT

    @property
    def turned(self) -> Comparison:
        """The same comparison, right - left."""
        return replace(self, left=self.right, right=self.left, difference=-self.difference)

    @property
    def sentence(self) -> str:
        """The comparison in plain words."""
        from prefopt.report.sentences import in_words

        return in_words(self)


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
    probability `power`.

    None under `MINIMUM_SEEDS` values or without scipy. One test, without Holm's correction.
    """
    return None if _missing(n) else detectable_over_seeds(deviation, n, power, level)


def against_reference(results: Results) -> tuple[Comparison, ...]:
    """Each setting's final value against the reference policy, whose value is one known number; one family for Holm."""
    metric = results.primary
    if metric is None:
        return ()
    return against(_final(results, metric.key), results.reference.get(metric.key, math.nan), metric.format)


def between_settings(results: Results) -> tuple[Comparison, ...]:
    """Every pair of settings at the end, paired by seed over the seeds that both finished; one family for Holm."""
    metric = results.primary
    return () if metric is None else between(_final(results, metric.key), metric.format)


def against(values: Values, base: float, spec: str = ".3g") -> tuple[Comparison, ...]:
    """Each name's values against one known number; one family for Holm; empty where the number is not finite."""
    if not math.isfinite(base):
        return ()
    return corrected(
        [paired(name, "reference", [value - base for value in own.values()], spec) for name, own in values.items()]
    )


def between(values: Values, spec: str = ".3g") -> tuple[Comparison, ...]:
    """Every pair of names, paired by seed over the seeds that both have; one family for Holm."""
    made = []
    for (left, first), (right, second) in combinations(values.items(), 2):
        made.append(paired(left, right, [first[seed] - second[seed] for seed in first if seed in second], spec))
    return corrected(made)


def _final(results: Results, key: str) -> Values:
    return {setting.label: results.values(setting.label, key) for setting in results.settings}


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
        prompts, deviation = len(means), _deviation(means) if len(means) > 1 else math.nan
        detectable = detectable_over_prompts(deviation, prompts)
        made.append(PromptSummary(label, judge, prompts, math.fsum(means) / prompts, deviation, detectable))
    return tuple(made)


def paired(left: str, right: str, differences: Sequence[float], spec: str = ".3g") -> Comparison:
    """A t test of differences left - right, one for each seed (or block); `p_holm` is left to `corrected`."""
    interval = mean_interval(differences)
    untested = Comparison(left, right, interval.n, interval.mean, None, None, None, None, interval.missing, format=spec)
    if interval.half_width is None:
        return untested
    deviation = _deviation(differences)
    if deviation <= 1e-12 * max(abs(value) for value in differences):
        # t is 0/0 or infinite: seeds that agree to the last digit are one run, not a sample.
        return replace(untested, missing="all seeds are equal")
    from scipy import stats

    t = interval.mean / (deviation / math.sqrt(interval.n))
    return replace(
        untested,
        half_width=interval.half_width,
        p=float(2 * stats.t.sf(abs(t), interval.n - 1)),
        detectable=detectable_over_seeds(deviation, interval.n),
        deviation=deviation,
    )


def corrected(made: Sequence[Comparison]) -> tuple[Comparison, ...]:
    """The tests of one family, with Holm's p values."""
    values = holm([item.p for item in made])
    return tuple(replace(item, p_holm=p_holm, tests=len(made)) for item, p_holm in zip(made, values, strict=True))


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
