"""The signature figure: every setting's way through the plane of KL and reward, under the exact optimum where it is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from prefopt.report.plotting import (
    INK,
    MUTED,
    Line,
    Look,
    PointLabel,
    label_of,
    looks,
    mean_path,
    new_figure,
    place_labels,
    points,
)
from prefopt.report.schema import Results

_BANDS = ((0.0, 0.25, "#d3deea"), (0.25, 0.5, "#dfe8f1"), (0.5, 0.75, "#eaf0f6"), (0.75, 1.0, "#f4f7fa"))
# Beyond this ratio of the longest path's KL to the median one, a linear axis would squeeze all others into a corner.
_ROOT_SCALE_RATIO = 4.0


def plane_metric(results: Results) -> str:
    """What stands on the y axis of the plane: the reward that the frontier is in, else the primary metric."""
    if results.frontier is not None or results.primary is None:
        return "reward"
    return results.primary.key


def reward_kl_plane(results: Results) -> Figure | None:
    """Each setting's path over its checkpoints, KL in nats against reward, from the reference at (0, r_ref).

    Thin lines are seeds, thick ones their mean. In the exact world the optimal policies of all strengths lie on the
    frontier; the bands under it mark quarters of what is reachable at the same KL, so the distance down from the frontier is
    the regret.
    """
    y = plane_metric(results)
    start = (0.0, results.reference.get(y, math.nan))
    has_start = math.isfinite(start[1])
    by_label: dict[str, list[dict[float, tuple[float, float]]]] = {}
    for setting in results.settings:
        seeds = [points(cell.path, "kl", y) for cell in results.cells_of(setting.label)]
        seeds = [{0.0: start, **path} if has_start and 0 not in path else path for path in seeds if path]
        if seeds:
            by_label[setting.label] = seeds
    if not by_label:
        return None
    figure = new_figure(results, 7.4, 5.0)
    axes = figure.add_subplot()
    means = {label: mean_path(seeds) for label, seeds in by_label.items()}
    drawn = [[path[step] for step in sorted(path)] for seeds in by_label.values() for path in seeds]
    _set_plane_limits(axes, results, drawn, start)
    frontier = _draw_frontier(axes, results, start)
    styles = looks(results)
    labels: list[PointLabel] = []
    for label, seeds in by_label.items():
        _draw_paths(axes, styles[label], [[path[step] for step in sorted(path)] for path in seeds], means[label])
        if means[label]:
            labels.append(PointLabel(label, *means[label][-1], styles[label].colour))
    if has_start:
        axes.plot(*start, marker="D", markersize=6.5, color=INK, markeredgecolor="white", zorder=9, clip_on=False)
        labels.append(PointLabel("reference", *start, INK))
    metric = results.metric(y)
    root = axes.get_xscale() != "linear"
    axes.set_xlabel("KL from the reference (nats" + (", square-root scale)" if root else ")"))
    axes.set_ylabel(metric.label if metric else y)
    axes.grid(True, axis="y", alpha=0.6)
    place_labels(figure, axes, labels, [*means.values(), frontier])
    return figure


def plane_caption(results: Results) -> str:
    seeds = "thin lines are seeds, thick ones their mean" if len(results.seeds) > 1 else "one line per setting, one seed"
    reward = label_of(results, plane_metric(results))
    text = f"Paths over training checkpoints from the reference policy: KL on x, {reward} on y; {seeds}"
    if results.frontier:
        text += "; the black line is the exact optimum, and the bands mark quarters of what is reachable at the same KL"
    return text + "."


def _set_plane_limits(axes: Axes, results: Results, drawn: Sequence[Line], start: tuple[float, float]) -> None:
    """Limits around all paths, and around the part of the frontier above them."""
    xs = [x for line in drawn for x, _ in line]
    ys = [y for line in drawn for _, y in line] + ([start[1]] if math.isfinite(start[1]) else [])
    ends = [line[-1][0] for line in drawn]
    right = max(max(xs), 1e-3) * 1.1
    left = min(0.0, *xs)
    if max(ends) > _ROOT_SCALE_RATIO * max(float(np.median(ends)), 1e-9):
        axes.set_xscale("function", functions=(lambda v: np.sign(v) * np.sqrt(np.abs(v)), lambda v: np.sign(v) * np.square(v)))
        axes.xaxis.set_major_locator(MaxNLocator(8))
    axes.set_xlim(left - (0.015 * right if axes.get_xscale() == "linear" else 0.0002 * right), right)
    if results.frontier:
        ys += [float(np.interp(right, *np.array(_frontier_line(results, start)).T))]
    low, high = min(ys), max(ys)
    room = max(high - low, 1e-6)
    axes.set_ylim(low - 0.08 * room, high + 0.1 * room)


def _frontier_line(results: Results, start: tuple[float, float]) -> Line:
    """The frontier by KL, from the reference, where the strength is infinite."""
    found = [
        (point.kl, point.reward) for point in results.frontier or () if math.isfinite(point.kl) and math.isfinite(point.reward)
    ]
    return sorted({start, *found} if math.isfinite(start[1]) else set(found))


def _draw_frontier(axes: Axes, results: Results, start: tuple[float, float]) -> Line:
    """The exact frontier with bands of equal share below it; returns the line as drawn, empty without a frontier."""
    line = _frontier_line(results, start) if results.frontier else []
    if len(line) < 2:
        return []
    right = axes.get_xlim()[1]
    corners = np.array(line)
    # The frontier grows like sqrt(KL) from the reference, so equal steps in sqrt(KL) keep its corner round.
    x = np.linspace(0, np.sqrt(min(right, corners[-1, 0])), 300) ** 2
    top = np.interp(np.sqrt(x), np.sqrt(corners[:, 0]), corners[:, 1])
    base = corners[0, 1]
    for low, high, colour in _BANDS:
        axes.fill_between(x, base + low * (top - base), base + high * (top - base), color=colour, linewidth=0, zorder=0)
    end = (x[-1], top[-1])
    for share in (0.25, 0.5, 0.75):
        _beside(axes, f"{share:.0%}", (x[-1], base + share * (top[-1] - base)), (4, 0), ha="left", va="center")
    _beside(
        axes, "share of the optimal gain", (x[-1], base + 0.5 * (top[-1] - base)), (32, 0), ha="left", va="center", rotation=270
    )
    axes.plot(x, top, color=INK, linewidth=2.0, zorder=3)
    _beside(axes, "exact optimum", end, (-2, 8), ha="right", va="bottom", fontsize=8.5, color=INK, fontweight="bold")
    seen = [point for point in results.frontier or () if 0.05 * right < point.kl < 0.75 * end[0]]
    named = (
        {min(seen, key=lambda point: abs(point.kl - share * right)) for share in (0.07, 0.25, 0.45, 0.65)} if seen else set()
    )
    for point in named:
        axes.plot(point.kl, point.reward, "o", markersize=4, color="white", markeredgecolor=INK, zorder=4)
        _beside(axes, f"β={point.beta:g}", (point.kl, point.reward), (-4, 4), ha="right", va="bottom")
    return [(float(a), float(b)) for a, b in zip(x, top, strict=True)]


def _beside(axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], **style: Any) -> None:
    """A remark at an offset in points from a place in data coordinates."""
    look: dict[str, Any] = {"fontsize": 7, "color": MUTED, **style}
    axes.annotate(text, at, xytext=offset, textcoords="offset points", annotation_clip=False, **look)


def _draw_paths(axes: Axes, look: Look, seeds: Sequence[Line], mean: Line) -> None:
    """One setting: thin seeds, a thick mean with a dot at each checkpoint and a large one at the end."""
    if len(seeds) > 1:
        for line in seeds:
            axes.plot(*np.array(line).T, color=look.colour, linestyle=look.dash, linewidth=0.7, alpha=0.45, zorder=4)
    if not mean:
        return
    x, y = np.array(mean).T
    axes.plot(x, y, color="white", linewidth=4.2, zorder=5, alpha=0.8)
    axes.plot(x, y, color=look.colour, linestyle=look.dash, linewidth=2.2, zorder=6)
    axes.plot(x[1:-1], y[1:-1], look.marker, color=look.colour, markersize=3.2, zorder=6, markeredgewidth=0)
    axes.plot(
        x[-1], y[-1], look.marker, color=look.colour, markersize=8, markeredgecolor="white", markeredgewidth=1.2, zorder=7
    )
