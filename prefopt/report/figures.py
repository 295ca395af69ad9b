"""The figures of a report: the reward-KL plane, learning curves, final values, and cost.

Each function takes `Results` and returns a matplotlib figure, or None when the results hold nothing to draw. One seed, missing
metrics, failed cells and NaN are ordinary: what exists is drawn.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from prefopt.report.forest import forest, forest_caption
from prefopt.report.pairs import (
    MARGINS,
    MARGINS_CAPTION,
    SIDES,
    SIDES_CAPTION,
    PairTable,
    margins_figure,
    sides_figure,
)
from prefopt.report.plane import plane_caption, plane_metric, reward_kl_plane
from prefopt.report.plotting import (
    INK,
    Line,
    label_of,
    looks,
    mean_path,
    new_figure,
    points,
    remark,
    rows_figure,
    smooth,
    styled,
    to_png,
    to_svg,
)
from prefopt.report.power import LEVEL
from prefopt.report.schema import Metric, Results, Timings
from prefopt.report.statistics import mean_interval
from prefopt.report.strengths import strengths_caption, strengths_plane
from prefopt.report.tuning import TUNING_CAPTION, expected_best

FOREST, FRONTIER, PLANE = "forest", "frontier", "reward_kl"
"""What the first screen shows: the forest plot, and the frontier or, without one, the plane."""
_CURVES_CAPTION = (
    "Over training steps, mean over seeds, with a running mean over the training log; "
    "each algorithm's margins are on a scale of its own."
)


@dataclass(frozen=True)
class Picture:
    """A finished figure: file stem, PNG and SVG, one sentence that says what is drawn."""

    name: str
    png: bytes
    svg: bytes
    caption: str


def draw_all(results: Results, timings: Timings | None = None, pairs: PairTable | None = None) -> tuple[Picture, ...]:
    """Every figure that these results and their held-out pairs can fill, in the order of the report."""
    recipes: tuple[tuple[str, Callable[[], Figure | None], str], ...] = (
        (FOREST, lambda: forest(results), forest_caption(results)),
        (FRONTIER, lambda: strengths_plane(results), strengths_caption(results)),
        (PLANE, lambda: reward_kl_plane(results), plane_caption(results)),
        ("learning_curves", lambda: learning_curves(results), _CURVES_CAPTION),
        ("final_values", lambda: final_values(results), _final_caption(results)),
        (SIDES, lambda: sides_figure(results), SIDES_CAPTION),
        (MARGINS, lambda: None if pairs is None else margins_figure(results, pairs), MARGINS_CAPTION),
        ("tuning", lambda: expected_best(results), TUNING_CAPTION),
        ("cost", lambda: cost_bars(results, timings), "What each setting used, mean over the seeds that finished."),
    )  # fmt: skip
    pictures = []
    with styled():
        for name, draw, caption in recipes:
            figure = draw()
            if figure is not None:
                pictures.append(Picture(name, to_png(figure), to_svg(figure), caption))
    return tuple(pictures)


def learning_curves(results: Results) -> Figure | None:
    """Metrics over training steps. The loss itself is not drawn: the losses of two algorithms have no common scale."""
    y = plane_metric(results)
    panels = (
        ("path", y, label_of(results, y)),
        ("path", "kl", "KL from the reference (nats)"),
        ("curve", "rewards/margins", "implicit reward margin"),
        ("curve", "rewards/accuracies", "training accuracy"),
    )
    data = [(title, source, lines) for source, key, title in panels if (lines := _over_steps(results, source, key))]
    if not data:
        return None
    columns = min(2, len(data))
    rows = math.ceil(len(data) / columns)
    figure = new_figure(results, 3.9 * columns + 0.4, 2.6 * rows + 0.5)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    styles = looks(results)
    for axes, (title, source, lines) in zip(grid, data, strict=False):
        for label, line in lines.items():
            x, values = np.array(line).T
            window = max(1, len(values) // 25) if source == "curve" else 1
            style = styles[label]
            axes.plot(x, smooth(values, window), color=style.colour, linestyle=style.dash, linewidth=1.6)
        axes.set_title(title)
        axes.grid(True)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ends = [max(abs(value) for _, value in line) for line in lines.values()]
        if max(ends) > 30 * max(float(np.median(ends)), 1e-12):
            axes.set_yscale("symlog", linthresh=max(float(np.median(ends)), 1e-6))
    for axes in grid[len(data) :]:
        axes.set_visible(False)
    figure.supxlabel("training step", fontsize=9, color=INK)
    shown = [setting.label for setting in results.settings if any(setting.label in lines for _, _, lines in data)]
    handles = [Line2D([], [], color=styles[label].colour, linestyle=styles[label].dash, linewidth=2.2) for label in shown]
    # Inches of a handle and of a letter; a legend that is too wide would be cut at the edge.
    fitting = max(1, int(figure.get_figwidth() / (0.6 + 0.08 * max(map(len, shown)))))
    columns = min(len(shown), fitting, 8)
    figure.legend(handles, shown, loc="outside upper left", ncols=columns, frameon=False, handlelength=1.6)
    return figure


def final_values(results: Results) -> Figure | None:
    """Final values by setting: small dots are seeds, the large one their mean with its t interval.

    The dashed line is the reference. The primary metric stands first; at most four metrics that are not diagnostics.
    """
    shown = [metric for metric in results.metrics if not metric.diagnostic]
    shown = [metric for metric in shown if any(results.values(setting.label, metric.key) for setting in results.settings)]
    shown = sorted(shown, key=lambda metric: not metric.primary)[:4]
    if not shown:
        return None
    figure, grid = rows_figure(results, [setting.label for setting in results.settings], len(shown))
    styles = looks(results)
    for axes, metric in zip(grid, shown, strict=True):
        for row, setting in enumerate(results.settings):
            values = list(results.values(setting.label, metric.key).values())
            if not values:
                remark(axes, row, _absence(results, setting.label))
                continue
            style = styles[setting.label]
            if results.smoke:
                axes.plot(values, [row] * len(values), style.marker, color=style.colour, markersize=6, markeredgecolor="white")
                continue
            # Seeds stand under their mean, which would hide them.
            axes.plot(
                values,
                [row + 0.27] * len(values),
                style.marker,
                color=style.colour,
                alpha=0.6,
                markersize=3.2,
                markeredgewidth=0,
            )
            interval = mean_interval(values)
            mark = {"fmt": style.marker, "color": style.colour, "markersize": 6.5, "markeredgecolor": "white"}
            axes.errorbar(interval.mean, row, xerr=interval.half_width, linewidth=2.0, capsize=2.5, **mark)
        base = results.reference.get(metric.key, math.nan)
        if math.isfinite(base):
            axes.axvline(base, color=INK, linestyle=(0, (4, 2)), linewidth=1.0, zorder=1)
        _title(axes, metric.label + {"up": " ↑", "down": " ↓", None: ""}[metric.better])
        axes.margins(x=0.12)
    return figure


def cost_bars(results: Results, timings: Timings | None = None) -> Figure | None:
    """Length and KL at the end, tokens by kind, seconds and peak memory: one small panel each."""
    panels: list[tuple[str, dict[str, float], Callable[[float], str]]] = []
    for metric in results.metrics:
        if "length" in metric.key.split("/")[-1].split("_") or metric.key == "kl":
            panels.append((metric.label, _final_means(results, metric), partial(_formatted, metric)))
    tokens = {setting.label: _tokens(results, setting.label) for setting in results.settings}
    panels.append(("tokens through a model", tokens, _short))
    if timings is not None:
        for name, title in (("seconds", "seconds"), ("peak_memory_mb", "peak memory (MB)")):
            panels.append(
                (title, {setting.label: results.clock(timings, setting.label, name) for setting in results.settings}, _short)
            )
    panels = [panel for panel in panels if any(math.isfinite(value) and value != 0 for value in panel[1].values())][:5]
    if not panels:
        return None
    figure, grid = rows_figure(results, [setting.label for setting in results.settings], len(panels))
    styles = looks(results)
    for axes, (title, values, write) in zip(grid, panels, strict=True):
        for row, setting in enumerate(results.settings):
            value = values.get(setting.label, math.nan)
            if not math.isfinite(value):
                remark(axes, row, _absence(results, setting.label))
                continue
            axes.barh(row, value, height=0.62, color=styles[setting.label].colour, alpha=0.9)
            axes.annotate(
                write(value),
                (max(value, 0.0), row),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
                color=INK,
            )
        _title(axes, title)
        axes.margins(x=0.28)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.grid(False)
    return figure


def _over_steps(results: Results, source: str, key: str) -> dict[str, Line]:
    """Mean over seeds of one key over steps, by setting; settings without it are absent."""
    found = {}
    for setting in results.settings:
        seeds = [points(getattr(cell, source), "step", key) for cell in results.cells_of(setting.label)]
        line = mean_path([path for path in seeds if path])
        if len(line) > 1:
            found[setting.label] = line
    return found


def _title(axes: Axes, text: str) -> None:
    """A title that wraps instead of running into the panel beside it."""
    axes.set_title(textwrap.fill(text, 22))


def _absence(results: Results, label: str) -> str:
    return "failed" if results.failed_of(label) and not results.cells_of(label) else "not measured"


def _final_means(results: Results, metric: Metric) -> dict[str, float]:
    values: Mapping[str, list[float]] = {s.label: list(results.values(s.label, metric.key).values()) for s in results.settings}
    return {label: mean_interval(found).mean for label, found in values.items()}


def _tokens(results: Results, label: str) -> float:
    spent = [cell.ledger for cell in results.cells_of(label)]
    return mean_interval(
        [float(x.trained_tokens + x.reference_tokens + x.generated_tokens + x.reward_model_tokens) for x in spent]
    ).mean


def _formatted(metric: Metric, value: float) -> str:
    return format(value, metric.format)


def _short(value: float) -> str:
    """Three figures with a suffix: 1.23M."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def _final_caption(results: Results) -> str:
    if results.smoke:
        return "Final values, one dot per seed; the dashed line is the reference policy."
    dots = f"small dots are seeds, large ones their mean with its {LEVEL:.0%} t interval"
    return f"Final values: {dots}; the dashed line is the reference policy."
