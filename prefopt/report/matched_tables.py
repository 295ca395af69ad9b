"""The tables of the primary end point: values at equal KL, and the paired tests.

Rows stand in the order of the settings; nothing is ranked. Under three seeds there are values and no tests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from prefopt.report.grid import Column, Entry, Grid
from prefopt.report.matched import Endpoint, Reading, curves, endpoint, hypervolumes, read
from prefopt.report.power import LEVEL
from prefopt.report.schema import Metric, Results
from prefopt.report.sentences import interval, signed, unsigned
from prefopt.report.statistics import Comparison, scipy_installed
from prefopt.report.tables import NOTHING, heading, number, over_seeds, seeds_line


def matched_grid(results: Results) -> Grid:
    """The primary metric at every KL target, the hypervolume up to the largest, and the KL that each curve reaches.

    Without targets, or without a primary metric, the grid has no rows.
    """
    metric = results.primary
    if metric is None or not results.kl_targets:
        return Grid("reward at equal KL", (), ())
    found = curves(results)
    columns = [Column({"path": "setting", "frontier": "family"}[found.kind], numeric=False)]
    columns += [Column(f"at {target:g} nats") for target in results.kl_targets]
    columns += [Column("hypervolume"), Column("reaches, nats")]
    by_target = [{reading.name: reading for reading in read(results, found, target)} for target in results.kl_targets]
    areas = hypervolumes(results)
    rows = [_reference_row(results, metric, len(columns))]
    for name in found.lines:
        readings = [readings[name] for readings in by_target]
        area = over_seeds(results, list(areas[name].values()), metric.format) if name in areas else NOTHING
        texts = [Entry(_reading_text(results, reading, metric), "" if reading.values else "dim") for reading in readings]
        rows.append((Entry(name, "strong"), *texts, Entry(area), Entry(number(readings[0].kl, ".3g"))))
    end = endpoint(results)
    captions = [end.how if end else "", "Compared are those that reach a KL on every seed that finished."]
    captions.append(f"Primary: {results.kl_targets[0]:g} nats; other columns are exploratory.")
    captions.append(
        f"Hypervolume: the area between the reference's value and the monotone curve over KL from 0 to "
        f"{max(results.kl_targets):g} nats; of noisy estimates the monotone curve is a maximum and lies above the truth."
    )
    if end is not None and end.curve == "path":
        captions.append("A family with one strength has no frontier, so paths are compared.")
    title = f"{metric.label} at equal KL ({seeds_line(results)})"
    return Grid(title, tuple(columns), tuple(rows), tuple(captions))


def target_grid(results: Results, kl: float) -> Grid:
    """The primary metric at one KL with its difference to the reference, for the Python API.

    Raises:
        ConfigError: a KL that is not above 0.
    """
    end = endpoint(results, kl)
    if end is None:
        return Grid(f"{heading(results)}: no primary metric is declared", (), ())
    metric = end.metric
    rows = [_reference_row(results, metric, 5)]
    tests = {pair.left: pair for pair in end.against}
    for reading in end.readings:
        pair = tests.get(reading.name)
        tested = pair is not None and pair.half_width is not None
        rows.append(
            (
                Entry(reading.name, "strong"),
                Entry(_reading_text(results, reading, metric), "" if reading.values else "dim"),
                Entry(f"{signed(pair, pair.difference)} ({interval(pair)})" if pair and tested else NOTHING),
                Entry(number(pair.p_holm, ".3g") if pair else NOTHING),
                Entry(number(reading.kl, ".3g")),
            )
        )
    columns = (
        Column("setting", numeric=False), Column(f"{metric.label} {end.place}"),
        Column(f"difference to reference ({LEVEL:.0%} interval)"), Column("p (Holm)"), Column("reaches, nats"),
    )  # fmt: skip
    primary = results.kl_targets[:1] == (kl,)
    captions = (end.how, "" if primary else f"{kl:g} nats is not the KL that was fixed before the run: exploratory.")
    return Grid(f"{heading(results)} ({seeds_line(results)})", columns, tuple(rows), tuple(filter(None, captions)))


def paired_grids(results: Results) -> tuple[Grid, ...]:
    """Paired t tests at the primary end point: against the reference, and between settings. None under three seeds."""
    end = endpoint(results)
    if results.smoke or end is None or not scipy_installed():
        return ()
    tables = ((end.against, "each against the reference"), (end.pairs, "pairs"))
    return tuple(_tests_grid(tests, end, what) for tests, what in tables if tests)


def _reading_text(results: Results, reading: Reading, metric: Metric) -> str:
    return reading.missing or over_seeds(results, list(reading.values.values()), metric.format)


def _reference_row(results: Results, metric: Metric, width: int) -> tuple[Entry, ...]:
    value = Entry(number(results.reference.get(metric.key, math.nan), metric.format))
    return (Entry("reference", "strong"), value, *[Entry("")] * (width - 2))


def _tests_grid(tests: Sequence[Comparison], end: Endpoint, what: str) -> Grid:
    rows = []
    for item in tests:
        texts = (
            f"{item.left} − {item.right}",
            signed(item, item.difference),
            f"no interval: {item.missing}" if item.missing else interval(item),
            number(item.p, ".3g"),
            number(item.p_holm, ".3g"),
            number(item.detectable, unsigned(item)),
            str(item.n),
        )
        rows.append(tuple(Entry(text) for text in texts))
    columns = (
        Column("difference of", numeric=False), Column("mean"), Column(f"{LEVEL:.0%} interval"),
        Column("p"), Column("p (Holm)"), Column("smallest detectable"), Column("seeds"),
    )  # fmt: skip
    captions = [
        f"Two-sided t tests of differences paired by seed; Holm's correction over the {len(tests)} tests of this table.",
        "Intervals are uncorrected.",
        "Smallest detectable: the true difference that one such test finds with probability 0.8 at this spread over seeds.",
    ]
    if end.how:
        captions.append(end.how)
    captions += [f"Not compared: {reading.name}, {reading.missing}." for reading in end.left_out]
    return Grid(f"{end.metric.label} {end.place}, {what}", columns, tuple(rows), tuple(captions))
