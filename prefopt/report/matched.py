"""Reward at equal KL (protocol, rule 5): two curves that are never mixed, read for each seed at targets fixed before the run.

A *path* is one run over its checkpoints; the *frontier* of a family is the ends of its runs over strengths. Both begin at the
reference, which has KL 0, and both are straight in the square root of KL between neighbours: near the reference KL is quadratic
in a step and reward linear.

A curve is read where it first reaches a target. No maximum is taken over what was measured: the best of several noisy numbers
lies above the truth, the more the more there are, and a policy that fell below the reference would read as the reference.
`reward_at`, the most reward at a KL of at most the target, does take it; it serves the hypervolume, which is exploratory, and
worlds whose rewards are exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np

from prefopt.errors import ConfigError
from prefopt.report.schema import Metric, Results, Setting
from prefopt.report.statistics import Comparison, Values, against, between

Point = tuple[float, float]
"""KL in nats, value of a metric."""
Better = Literal["up", "down"] | None
_AREA_POINTS = 200


@dataclass(frozen=True)
class Curves:
    """Lines of the primary metric over KL by name (a setting of paths, a family of frontiers) and seed, from the reference on.

    Seeds on which a run failed are absent. `kind` says which of the two curves it is.
    """

    kind: Literal["path", "frontier"]
    lines: Mapping[str, Mapping[int, tuple[Point, ...]]]


@dataclass(frozen=True)
class Reading:
    """One name at the end point: a value a seed, or none and why.

    `kl` is the least over seeds of the largest KL that the curve has, in nats; NaN where nothing was measured.
    """

    name: str
    values: Mapping[int, float]
    kl: float = math.nan
    missing: str = ""


@dataclass(frozen=True)
class Endpoint:
    """The one primary end point: the primary metric at a KL (`target`, nats) on one kind of curve, or at the end of training.

    `readings` are in the order of the settings; only those with values are compared.
    """

    metric: Metric
    reference: float
    readings: tuple[Reading, ...]
    target: float | None = None
    curve: Literal["path", "frontier"] | None = None
    against: tuple[Comparison, ...] = ()
    pairs: tuple[Comparison, ...] = ()

    @property
    def place(self) -> str:
        """Where it is read, as a sentence begins."""
        return "at the end of training" if self.target is None else f"at {self.target:g} nats"

    @property
    def how(self) -> str:
        """Which curve was read, for captions; empty at the end of training."""
        if self.curve is None:
            return ""
        what = {"path": "each run's path over its checkpoints", "frontier": "each family's frontier over its strengths"}
        return (
            f"Read on {what[self.curve]}, for each seed where it first reaches the KL, between neighbours on a straight "
            "line in the square root of KL; no maximum is taken over what was measured."
        )

    @property
    def compared(self) -> tuple[Reading, ...]:
        return tuple(reading for reading in self.readings if reading.values)

    @property
    def left_out(self) -> tuple[Reading, ...]:
        return tuple(reading for reading in self.readings if not reading.values)


def endpoint(results: Results, kl: float | None = None) -> Endpoint | None:
    """The primary end point with its tests; None where the comparison declares no primary metric.

    Args:
        results: their first KL target is read, or final values where there is none.
        kl: another KL in nats; what is said there is exploratory.

    Raises:
        ConfigError: a KL that is not above 0.
    """
    metric = results.primary
    if metric is None:
        return None
    target = kl if kl is not None else next(iter(results.kl_targets), None)
    reference = results.reference.get(metric.key, math.nan)
    if target is None:
        readings = tuple(_final_reading(results, setting.label, metric) for setting in results.settings)
        return _tested(Endpoint(metric, reference, readings))
    found = curves(results)
    return _tested(Endpoint(metric, reference, read(results, found, target), target, found.kind))


def compare(results: Results, left: str, right: str, kl: float | None = None) -> Comparison:
    """One pair at the end point, its p value corrected over all pairs there; `right` may be "reference".

    Raises:
        ConfigError: no primary metric, an unknown name, or one that has no value at this KL.
    """
    end = endpoint(results, kl)
    if end is None:
        raise ConfigError("the comparison declares no primary metric, so nothing is tested; mark one Metric as primary.")
    known = {reading.name: reading for reading in end.readings}
    for name in (left, right):
        if name != "reference" and name not in known:
            raise ConfigError(f"{name!r} was not compared {end.place}; there are {', '.join(known)} and reference.")
        if name != "reference" and known[name].missing:
            raise ConfigError(f"{name!r} has no value {end.place}: {known[name].missing}.")
    for pair in (*end.pairs, *end.against):
        if (pair.left, pair.right) == (left, right):
            return pair
        if (pair.right, pair.left) == (left, right):
            return pair.turned
    raise ConfigError(f"{left!r} and {right!r} make no pair: name two different settings, or one that has a reference value.")


def curves(results: Results) -> Curves:
    """The frontiers where more than half of the families have several strengths, else the paths: the study's plan decides."""
    sizes = [len(members) for members in families(results).values()]
    return frontiers(results) if 2 * sum(size > 1 for size in sizes) > len(sizes) else paths(results)


def paths(results: Results) -> Curves:
    """Each finished run over its checkpoints, in their order."""
    made: dict[str, dict[int, tuple[Point, ...]]] = {}
    for setting in results.settings:
        cells = {cell.seed: _points(results, cell.path) for cell in results.cells_of(setting.label)}
        made[setting.label] = {seed: (*_start(results), *line) for seed, line in cells.items() if line}
    return Curves("path", made)


def frontiers(results: Results) -> Curves:
    """The ends of the runs of each family by KL, only on seeds where every strength finished; one strength is no frontier."""
    made: dict[str, dict[int, tuple[Point, ...]]] = {}
    for family, members in families(results).items():
        ends = [{cell.seed: cell.final for cell in results.cells_of(member.label)} for member in members]
        shared = [seed for seed in results.seeds if len(members) > 1 and all(seed in own for own in ends)]
        lines = {seed: _points(results, [own[seed] for own in ends]) for seed in shared}
        made[family] = {seed: (*_start(results), *sorted(line)) for seed, line in lines.items() if len(line) == len(members)}
    return Curves("frontier", made)


def families(results: Results) -> dict[str, tuple[Setting, ...]]:
    """Settings by family, in the order of the settings."""
    found: dict[str, tuple[Setting, ...]] = {}
    for setting in results.settings:
        found[setting.family] = (*found.get(setting.family, ()), setting)
    return found


def read(results: Results, found: Curves, target: float) -> tuple[Reading, ...]:
    """Every curve at a KL; a name that does not reach it on every finished seed has no values.

    Raises:
        ConfigError: a target that is not above 0.
    """
    if not target > 0:
        raise ConfigError(f"a KL target is {target!r} nats; expected a number above 0: at 0 there is only the reference.")
    return tuple(_reading(lines, name, _absence(results, name, found.kind), target) for name, lines in found.lines.items())


def value_at(points: Sequence[Point], target: float) -> float | None:
    """The value where a curve first reaches a KL of `target` nats, on the line in sqrt(KL) between the neighbours.

    None where it never does, or begins beyond.
    """
    first = next((index for index, (kl, _) in enumerate(points) if kl >= target), None)
    if first is None:
        return None
    if first == 0:
        return points[0][1] if points[0][0] == target else None
    return _between(points[first - 1], points[first], math.sqrt(target))


def reward_at(points: Sequence[Point], target: float, better: Better = "up") -> float | None:
    """The most reward on a curve at a KL of at most `target` nats; None if the curve never gets that far.

    As the KL that is allowed grows, this value never falls. Of noisy estimates it is a maximum, and lies above the truth.

    Args:
        points: at the reference and at each checkpoint, in order; linear in sqrt(KL) between neighbours, so that a line never
            leaves the two values it joins.
        target: nats.
        better: "down" takes the least instead.
    """
    if max(kl for kl, _ in points) < target:
        return None
    edge = math.sqrt(target)
    within = [value for kl, value in points if _root(kl) <= edge]
    for near, far in pairwise(points):
        if (_root(near[0]) - edge) * (_root(far[0]) - edge) < 0:
            within.append(_between(near, far, edge))
    return None if not within else min(within) if better == "down" else max(within)


def hypervolume(points: Sequence[Point], reference: float, limit: float, better: Better = "up") -> float | None:
    """The area between the reference's value and the monotone curve (`reward_at`) over KL from 0 to `limit`.

    Its reference point is (KL `limit`, the reference's value): Zitzler and Thiele's measure for KL to be small and reward to be
    large. Unit: the metric's times nats. None where the curve does not reach the limit, or does not begin at the reference.

    Args:
        points: KL in nats and value, from the reference on.
        reference: the reference's value.
        limit: nats.
        better: the metric's direction; the area is positive where the curve is better than the reference.
    """
    if not points or points[0][0] > 0 or reward_at(points, limit, better) is None:
        return None
    roots = np.linspace(0, math.sqrt(limit), _AREA_POINTS)  # the curve is smooth in sqrt(KL), not in KL
    found = [reward_at(points, float(root) ** 2 if root < roots[-1] else limit, better) for root in roots]
    gain = np.array(found, dtype=float) - reference
    area = float(np.trapezoid(2 * roots * gain, roots))
    return -area if better == "down" else area


def hypervolumes(results: Results) -> Values:
    """Of each curve that reaches the largest target on every finished seed, the hypervolume a seed; empty without targets."""
    metric = results.primary
    if metric is None or not results.kl_targets:
        return {}
    base, limit = results.reference.get(metric.key, math.nan), max(results.kl_targets)
    made = {}
    for name, lines in curves(results).lines.items():
        areas = {seed: hypervolume(line, base, limit, metric.better) for seed, line in lines.items()}
        whole = {seed: area for seed, area in areas.items() if area is not None and math.isfinite(area)}
        if whole and len(whole) == len(areas):
            made[name] = whole
    return made


def _tested(end: Endpoint) -> Endpoint:
    values = {reading.name: reading.values for reading in end.compared}
    spec = end.metric.format
    return replace(end, against=against(values, end.reference, spec), pairs=between(values, spec))


def _final_reading(results: Results, label: str, metric: Metric) -> Reading:
    values = results.values(label, metric.key)
    kls = results.values(label, "kl").values()
    return Reading(label, values, min(kls, default=math.nan), "" if values else _absence(results, label, "path"))


def _reading(lines: Mapping[int, Sequence[Point]], name: str, absence: str, target: float) -> Reading:
    if not lines:
        return Reading(name, {}, missing=absence)
    kl = min(max(kl for kl, _ in line) for line in lines.values())
    values = {seed: value_at(line, target) for seed, line in lines.items()}
    found = {seed: value for seed, value in values.items() if value is not None}
    if len(found) == len(values):
        return Reading(name, found, kl)
    if kl < target:
        return Reading(name, {}, kl, f"not reached ({kl:.3g} nats)")
    begin = max(line[0][0] for line in lines.values())
    return Reading(name, {}, kl, f"begins at {begin:.3g} nats, and the reference has no value to begin from")


def _absence(results: Results, name: str, kind: Literal["path", "frontier"]) -> str:
    """Why nothing was measured for a setting or a family."""
    labels = [name] if kind == "path" else [member.label for member in families(results)[name]]
    if kind == "frontier" and len(labels) == 1:
        return "one strength is no frontier"
    return "failed" if any(results.failed_of(label) for label in labels) else "not measured"


def _points(results: Results, entries: Sequence[Mapping[str, float]]) -> tuple[Point, ...]:
    """Finite KL and primary metric of each entry."""
    metric = results.primary
    pairs = [(entry.get("kl", math.nan), entry.get(metric.key, math.nan)) for entry in entries] if metric else []
    return tuple((kl, value) for kl, value in pairs if math.isfinite(kl) and math.isfinite(value))


def _start(results: Results) -> tuple[Point, ...]:
    """The reference, where its value is known."""
    value = results.reference.get(results.primary.key, math.nan) if results.primary else math.nan
    return ((0.0, value),) if math.isfinite(value) else ()


def _between(near: Point, far: Point, edge: float) -> float:
    """The value at sqrt(KL) = edge on the line between two points."""
    first, last = _root(near[0]), _root(far[0])
    return near[1] + (far[1] - near[1]) * (edge - first) / (last - first)


def _root(kl: float) -> float:
    """sqrt(KL); an estimate or a rounding error below 0 is the reference itself."""
    return math.sqrt(max(0.0, kl))
