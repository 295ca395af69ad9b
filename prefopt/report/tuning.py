"""How hyper-parameters were chosen (protocol, rule 3): space, trials, choice, borders, and what fewer trials would give."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from prefopt.report.grid import Column, Entry, Grid
from prefopt.report.plotting import PointLabel, looks, new_figure, place_labels
from prefopt.report.schema import Results, Tuning
from prefopt.report.tables import number, plain

TUNING_CAPTION = (
    "What tuning would have found with fewer trials: the expected criterion of the chosen one among n of the trials, drawn "
    "without replacement (Dodge et al. 2019); each group's last point is its own."
)


def tuning_grid(results: Results) -> Grid:
    """Space, trials, chosen values and warnings of every tuned group; no rows where nothing was tuned."""
    rows = []
    for item in results.tuning:
        failed = len(item.trials) - len(criteria(item))
        trials = f"{len(item.trials)}" + (f" ({failed} failed)" if failed else "")
        warning = f"at the border: {', '.join(item.border)}; a wider space may hold a value beyond it" if item.border else ""
        rows.append(
            (
                Entry(item.group, "strong"),
                Entry("; ".join(f"{name}: {words}" for name, words in item.space.items())),
                Entry(trials),
                Entry(", ".join(f"{name}={plain(value)}" for name, value in item.chosen.items())),
                Entry(number(item.value, ".4g")),
                Entry(", ".join(map(str, item.seeds))),
                Entry(warning, "failed" if warning else ""),
            )
        )
    columns = (
        Column("group", numeric=False), Column("space", numeric=False), Column("trials"), Column("chosen", numeric=False),
        Column("criterion"), Column("tuning seeds", numeric=False), Column("warnings", numeric=False),
    )  # fmt: skip
    ways = {"up": "the highest is chosen", "down": "the lowest is chosen"}
    captions = [f"Criterion: {words}." for words in dict.fromkeys(f"{t.criterion}, {ways[t.better]}" for t in results.tuning)]
    captions.append("Trials ran on rows and seeds that no number of this report comes from.")
    return Grid("tuning", columns, tuple(rows), tuple(captions))


def criteria(item: Tuning) -> list[float]:
    """The criterion of each trial that finished, in their order."""
    found = [trial.get("criterion") for trial in item.trials]
    return [float(value) for value in found if value is not None and math.isfinite(value)]


def expected_maximum(values: Sequence[float]) -> list[float]:
    """The expected maximum of n = 1..N of N values, drawn without replacement: sum_i v_(i) C(i-1, n-1) / C(N, n).

    Dodge et al. 2019 [dodge2019show] draw with replacement; without, the estimate has no bias.
    """
    ordered, total = sorted(values), len(values)
    return [
        math.fsum(value * math.comb(i, n - 1) for i, value in enumerate(ordered)) / math.comb(total, n)
        for n in range(1, total + 1)
    ]


def expected_best(results: Results) -> Figure | None:
    """The criterion of the trial that tuning would choose, by number of trials; one line a group. None without two trials."""
    lines = {item.group: _line(item) for item in results.tuning if len(criteria(item)) > 1}
    if not lines:
        return None
    figure = new_figure(results, 5.6, 3.2)
    axes = figure.add_subplot()
    styles = looks(results)
    for group, line in lines.items():
        look = styles.get(group)
        axes.plot(*zip(*line, strict=True), marker=".", linewidth=1.8, color=look.colour if look else None)
    axes.set_xlabel("trials")
    axes.set_ylabel("expected criterion of the chosen")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(True, axis="y", alpha=0.6)
    axes.margins(x=0.12)
    colours = {group: line.get_color() for group, line in zip(lines, axes.lines, strict=True)}
    labels = [PointLabel(group, *line[-1], colours[group]) for group, line in lines.items()]
    place_labels(figure, axes, labels, list(lines.values()))
    return figure


def _line(item: Tuning) -> list[tuple[float, float]]:
    sign = -1.0 if item.better == "down" else 1.0
    best = expected_maximum([sign * value for value in criteria(item)])
    return [(float(n), sign * value) for n, value in enumerate(best, start=1)]
