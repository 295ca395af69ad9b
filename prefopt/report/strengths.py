"""The frontier of each family over its strengths, at the end of training: KL against the primary metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from prefopt.report.matched import Point, frontiers
from prefopt.report.plotting import GRID, INK, Line, PointLabel, looks, new_figure, place_labels
from prefopt.report.schema import Results


def strengths_plane(results: Results) -> Figure | None:
    """One line a family through the ends of its strengths, from the reference; None where no family has two strengths.

    Thin lines are seeds; the thick one joins the means of the strengths, ordered by KL. Vertical lines are the KL targets.
    """
    found = frontiers(results)
    drawn = {family: list(lines.values()) for family, lines in found.lines.items() if lines}
    metric = results.primary
    if not drawn or metric is None:
        return None
    figure = new_figure(results, 7.4, 4.6)
    axes = figure.add_subplot()
    styles = looks(results)
    for target in results.kl_targets:
        axes.axvline(target, color=GRID, linewidth=1.4, zorder=0)
    labels, means = [], []
    for family, lines in drawn.items():
        look = styles[family]
        for line in lines if len(lines) > 1 else ():
            axes.plot(*_bent(line), color=look.colour, linewidth=0.7, alpha=0.45, zorder=4)
        mean = _mean_line(lines)
        axes.plot(*_bent(mean), color="white", linewidth=4.2, alpha=0.8, zorder=5)
        dot: dict[str, Any] = {"marker": look.marker, "markersize": 6, "markeredgecolor": "white"}
        axes.plot(*_bent(mean), color=look.colour, linewidth=2.2, zorder=6)
        axes.plot(*np.array(mean).T, color=look.colour, linestyle="none", zorder=7, **dot)
        labels.append(PointLabel(family, *mean[-1], look.colour))
        means.append(mean)
    start = results.reference.get(metric.key)
    if start is not None:
        axes.plot(0.0, start, marker="D", markersize=6.5, color=INK, markeredgecolor="white", zorder=9, clip_on=False)
        labels.append(PointLabel("reference", 0.0, start, INK))
    axes.set_xlabel("KL from the reference (nats)")
    axes.set_ylabel(metric.label)
    axes.grid(True, axis="y", alpha=0.6)
    axes.margins(x=0.04, y=0.1)
    place_labels(figure, axes, labels, means)
    return figure


def strengths_caption(results: Results) -> str:
    metric = results.primary
    targets = "; vertical lines are the KL targets" if results.kl_targets else ""
    return (
        f"Frontiers over strengths at the end of training: KL on x, {metric.label if metric else 'reward'} on y, "
        f"a point for each strength{targets}."
    )


def _mean_line(lines: list[tuple[Point, ...]]) -> Line:
    """The mean over seeds of the points in order of KL; [(KL, value)]."""
    return [(float(kl), float(value)) for kl, value in np.mean(np.array(lines), axis=0)]


def _bent(line: Sequence[Point]) -> np.ndarray:
    """The line as it is read, straight in the square root of KL; [2, n]."""
    roots, values = np.sqrt(np.maximum(0.0, [kl for kl, _ in line])), [value for _, value in line]
    dense = np.unique(np.concatenate([roots, np.linspace(roots[0], roots[-1], 100)]))
    return np.stack([dense**2, np.interp(dense, roots, values)])
