"""Equal tuning before a study (protocol, rule 3): every algorithm gets the same number of trials over a declared space.

A trial is a cell like any other, on rows, worlds and seeds that the study never uses. The first is the setting as it is given,
the others are quasi-random points (a scrambled Halton sequence, so that a longer tuning begins like a shorter one). The
criterion is one for all: the primary metric, at the end or, where the study names KL targets, at its best within the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from losses.suggestions import suggest_option
from prefopt.errors import ConfigError
from prefopt.optimization import Optimization
from prefopt.options import GRIDWORLD, Options, TuningOptions
from prefopt.report.matched import reward_at
from prefopt.report.schema import Cell, Metric, Results, Timings, Tuning
from prefopt.study import Entry, Study, typed, value_part

LEARNING_RATE = "learning_rate"
# How far around its value the learning rate is tuned where the study does not say.
_AROUND = 10.0
# Tuning's seeds and worlds, far from those of any study.
_SEEDS_FROM, _WORLDS_FROM = 10_000, 10_000
# Chosen values this close to the end of their range, in hundredths of its logarithm, are at the border.
_BORDER = 0.05


@dataclass(frozen=True)
class Dimension:
    """One number that is tuned.

    Args:
        name: of a hyper-parameter, or of an option of reward or optimizer.
        low, high: of a range that is searched on a logarithmic scale; 0 and 0 with `values`.
        values: to choose from.
    """

    name: str
    low: float = 0.0
    high: float = 0.0
    values: tuple[Any, ...] = ()

    @property
    def words(self) -> str:
        """The space as the report states it."""
        return f"{self.low:g} to {self.high:g}, logarithmic" if self.high else " or ".join(map(str, self.values))

    def at(self, u: float) -> Any:
        """The value at a point of [0, 1)."""
        if not self.high:
            return self.values[int(u * len(self.values))]
        return float(f"{self.low * (self.high / self.low) ** u:.3g}")

    def at_border(self, value: Any) -> bool:
        """Whether a better value may lie outside."""
        if not self.high:
            numbers = sorted(v for v in self.values if isinstance(v, int | float) and not isinstance(v, bool))
            return len(numbers) > 1 and value in (numbers[0], numbers[-1])
        place = math.log(value / self.low) / math.log(self.high / self.low)
        return not _BORDER <= place <= 1 - _BORDER


def space(study: Study, entry: Entry) -> tuple[Dimension, ...]:
    """What is tuned of one algorithm; the learning rate is always among it.

    Raises:
        ConfigError: a line of the space that cannot be read, or names what the algorithm does not have.
    """
    found: dict[str, Dimension] = {}
    for line in study.tuning.space:
        owner, name, text = _parse(line)
        if owner and owner not in {each.algorithm for each in study.entries}:
            known = sorted({each.algorithm for each in study.entries})
            raise ConfigError(f"space {line}: {owner!r} is not compared{suggest_option(owner, known)}.")
        if owner == entry.algorithm or (not owner and _takes(entry, name)):
            found[name] = _dimension(entry.algorithm, name, text, line)
    if LEARNING_RATE not in found:
        rate = entry.options(study.options).optimization.learning_rate
        found[LEARNING_RATE] = Dimension(LEARNING_RATE, rate / _AROUND, rate * _AROUND)
    return tuple(found[name] for name in sorted(found))


def _parse(line: str) -> tuple[str, str, str]:
    where, equals, text = line.partition("=")
    owner, _, name = where.rpartition(".")
    if not (equals and name and text):
        raise ConfigError(
            f"space {line}: expected NAME=LOW:HIGH or NAME=A,B,C, with ALGORITHM. before NAME if it is of one alone."
        )
    return owner, name.replace("-", "_"), text


def _takes(entry: Entry, name: str) -> bool:
    """A line without an algorithm is of all that have such an option."""
    try:
        value_part(entry.algorithm, name)
    except ConfigError:
        return False
    return True


def _dimension(algorithm: str, name: str, text: str, line: str) -> Dimension:
    low, colon, high = text.partition(":")
    if not colon:
        return Dimension(name, values=tuple(typed(algorithm, name, value) for value in text.split(",")))
    ends = typed(algorithm, name, low), typed(algorithm, name, high)
    if not 0 < ends[0] < ends[1]:
        raise ConfigError(f"space {line}: a range is LOW:HIGH with 0 < LOW < HIGH.")
    return Dimension(name, float(ends[0]), float(ends[1]))


def families(study: Study) -> dict[str, list[Entry]]:
    """The entries of a study by what their strengths have in common."""
    found: dict[str, list[Entry]] = {}
    for entry in study.entries:
        found.setdefault(entry.family, []).append(entry)
    return found


def trials(study: Study, members: Sequence[Entry]) -> list[Entry]:
    """The trials of one algorithm, at its middle strength: as it is given, then points of its space.

    Raises:
        ConfigError: a number is both a grid of strengths and tuned.
    """
    middle, dimensions = members[len(members) // 2], space(study, members[0])
    for dimension in dimensions:
        if len({str(each.values.get(dimension.name)) for each in members}) > 1:
            raise ConfigError(f"{members[0].family}: {dimension.name} has a grid of strengths, so it cannot be tuned as well.")
    points = _points(len(dimensions), study.tuning.trials - 1)
    drawn = [{}, *({d.name: d.at(float(u)) for d, u in zip(dimensions, point, strict=True)} for point in points)]
    return [
        replace(middle.changed(values), name=f"{middle.family}, trial {number}", group="")
        for number, values in enumerate(drawn, start=1)
    ]


def _points(dimensions: int, count: int) -> np.ndarray:
    """[count, dimensions] of [0, 1), the same for all algorithms with as many dimensions."""
    if not count:
        return np.empty((0, dimensions))
    try:
        from scipy.stats import qmc
    except ImportError as error:
        raise ConfigError("tuning needs scipy: install the extra: pip install 'prefopt[stats]'.") from error
    return np.asarray(qmc.Halton(dimensions, scramble=True, seed=0).random(count))


def tuning_study(study: Study) -> Study:
    """All trials as a study on tuning rows (another world, where the world is drawn) and seeds of its own."""
    for line in study.tuning.space:
        owner, name, _ = _parse(line)
        if not owner and not any(_takes(entry, name) for entry in study.entries):
            raise ConfigError(f"space {line}: no algorithm of the study has an option {name!r}.")
    first = max(_SEEDS_FROM, *(seed + 1 for seed in study.seeds))
    entries = [trial for members in families(study).values() for trial in trials(study, members)]
    return replace(
        study, entries=entries, seeds=tuple(range(first, first + study.tuning.tuning_seeds)), options=_elsewhere(study.options),
        tuning=TuningOptions(), title=f"{study.title}: tuning",
    )  # fmt: skip


def _elsewhere(options: Options) -> Options:
    if options.data.exact or options.data.source == GRIDWORLD:
        return replace(options, data=replace(options.data, world=options.data.world + _WORLDS_FROM))
    return replace(options, evaluation=replace(options.evaluation, eval_rows="tuning"))


def criterion_words(metric: Metric, targets: Sequence[float]) -> str:
    """What trials are compared by, in words."""
    if not targets:
        return f"{metric.label} at the end of training"
    return f"best {metric.label} on the path within {targets[0]:g} nats"


def criterion(cell: Cell, metric: Metric, targets: Sequence[float], reference: float) -> float:
    """The number itself, NaN where the cell failed."""
    if cell.status != "ok":
        return math.nan
    if not targets:
        return cell.final.get(metric.key, math.nan)
    start = {"kl": 0.0, metric.key: reference}
    points = [(point["kl"], point[metric.key]) for point in (start, *cell.path)]
    # A path that ends before the target is judged by all of it.
    within = min(targets[0], max(kl for kl, _ in points))
    best = reward_at(points, within, metric.better or "up")
    return math.nan if best is None else best


def chosen(study: Study, results: Results, timings: Timings) -> tuple[Tuning, ...]:
    """What tuning found for every algorithm: the trial of the best criterion, which is the mean over tuning seeds.

    Args:
        results, timings: of `tuning_study`.

    Raises:
        ConfigError: there is nothing to choose by, or every trial of an algorithm failed.
    """
    metric = results.primary
    if metric is None or metric.better is None:
        raise ConfigError("tuning needs a primary metric with a direction, and this data declares none.")
    sign = 1.0 if metric.better == "up" else -1.0
    reference = results.reference.get(metric.key, math.nan)
    made = []
    for family, members in families(study).items():
        rows = []
        for trial in trials(study, members):
            cells = [cell for cell in results.cells if cell.label == trial.label]
            found = [criterion(cell, metric, study.kl_targets, reference) for cell in cells]
            value = math.fsum(found) / len(found)
            seconds = math.fsum(t.seconds for t in timings.cells if t.label == trial.label)
            rows.append((value, {d.name: _value(study, trial, d.name) for d in space(study, members[0])}, seconds))
        finite = [row for row in rows if math.isfinite(row[0])]
        if not finite:
            error = next(c.error_line for c in results.cells if c.label == trials(study, members)[0].label)
            raise ConfigError(f"tuning {family}: every trial failed; the first: {error}")
        best = max(finite, key=lambda row: sign * row[0])
        dimensions = space(study, members[0])
        made.append(
            Tuning(
                family, criterion_words(metric, study.kl_targets), metric.better, {d.name: d.words for d in dimensions},
                tuple({**values, "criterion": value if math.isfinite(value) else None} for value, values, _ in rows), best[1],
                best[0], tuple(d.name for d in dimensions if d.at_border(best[1][d.name])), tuple(results.seeds),
            )
        )  # fmt: skip
    return tuple(made)


def _value(study: Study, entry: Entry, name: str) -> Any:
    """A number of an entry, set or not."""
    if name in entry.values:
        return entry.values[name]
    if name in {item.name for item in fields(Optimization)}:
        return getattr(study.options.optimization, name)
    return entry.setting().hyper.get(name, getattr(study.options.reward, name, None))


def tuned(study: Study, records: Sequence[Tuning]) -> Study:
    """The study with the chosen numbers; labels stay what they were, so that a family keeps its name."""
    by_family = {record.group: record for record in records}
    entries = [replace(entry.changed(by_family[entry.family].chosen), name=entry.label, tuned=True) for entry in study.entries]
    return replace(study, entries=entries, tuning=TuningOptions())
