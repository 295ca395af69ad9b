"""The forest plot: at the primary end point, every difference to the reference with its interval and its seeds."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.figure import Figure

from prefopt.report.matched import Endpoint, endpoint
from prefopt.report.plotting import INK, looks, remark, rows_figure
from prefopt.report.power import LEVEL
from prefopt.report.schema import Results
from prefopt.report.statistics import mean_interval


def forest(results: Results) -> Figure | None:
    """One row a setting or family: the mean difference to the reference with its t interval, and a dot for each seed.

    Where the reference has no value the metric itself is drawn; a smoke run has dots alone.
    """
    end = endpoint(results)
    if end is None or not end.compared:
        return None
    figure, (axes,) = rows_figure(results, [reading.name for reading in end.readings])
    styles = looks(results)
    base = end.reference if math.isfinite(end.reference) else 0.0
    for row, reading in enumerate(end.readings):
        values = [value - base for value in reading.values.values()]
        if not values:
            remark(axes, row, reading.missing)
            continue
        look = styles[reading.name]
        dot: dict[str, Any] = {"color": look.colour, "marker": look.marker, "linestyle": "none"}
        if results.smoke:
            axes.plot(values, [row] * len(values), markersize=6, markeredgecolor="white", **dot)
            continue
        axes.plot(values, [row + 0.27] * len(values), markersize=3.2, markeredgewidth=0, alpha=0.6, **dot)
        found = mean_interval(values)
        axes.errorbar(
            found.mean, row, xerr=found.half_width, linewidth=2.0, capsize=2.5, markersize=6.5, markeredgecolor="white", **dot
        )
    if math.isfinite(end.reference):
        axes.axvline(0.0, color=INK, linestyle=(0, (4, 2)), linewidth=1.0, zorder=1)
    arrow = {"up": " ↑", "down": " ↓", None: ""}[end.metric.better]
    axes.set_xlabel(f"{end.metric.label}{arrow} {end.place}{_minus(end)}")
    axes.margins(x=0.08)
    return figure


def forest_caption(results: Results) -> str:
    end = endpoint(results)
    if end is None:
        return ""
    what = "the difference to the reference" if math.isfinite(end.reference) else "the value"
    marks = "one dot per seed" if results.smoke else f"mean with its {LEVEL:.0%} t interval, and one small dot per seed"
    text = f"{end.metric.label} {end.place}: {what}, {marks}"
    return text + ("; the dashed line is the reference." if math.isfinite(end.reference) else ".")


def _minus(end: Endpoint) -> str:
    return ", minus the reference's" if math.isfinite(end.reference) else ""
