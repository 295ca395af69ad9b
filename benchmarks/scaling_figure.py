"""The page of pictures of benchmarks.scaling: one panel a sweep, seconds to the left and peak memory to the right."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.scaling_fits import Fit, Measured
from prefopt.report.plotting import DPI, INK, MUTED, styled, to_png

_SECONDS, _MEMORY = "#0072B2", "#D55E00"
_COLUMNS = 3
_LABELS = {
    "pairs": "prompts of a step",
    "prompt": "tokens of a prompt",
    "completion": "tokens of a completion",
    "completions": "completions of a prompt",
    "tokenising": "pairs tokenised",
    "reference pass": "pairs through the reference",
}


def draw(found: Mapping[str, Sequence[Measured]]) -> bytes:
    """The page as PNG; sweeps over the vocabulary share a panel."""
    wide = {name: points for name, points in found.items() if name.startswith("vocabulary")}
    single = {name: points for name, points in found.items() if name not in wide}
    count = len(single) + bool(wide)
    columns = min(count, _COLUMNS)
    rows = math.ceil(count / columns)
    with styled():
        figure = Figure(figsize=(3.8 * columns, 3.3 * rows), dpi=DPI, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        places = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
        for axes, (name, points) in zip(places, single.items(), strict=False):
            _panel(axes, name, points)
        if wide:
            _vocabulary_panel(places[-1], wide)
        return to_png(figure)


def _panel(axes: Axes, name: str, points: Sequence[Measured]) -> None:
    x = [m.x for m in points]
    title = _LABELS.get(name, name)
    _scatter(axes, x, [m.seconds for m in points], _SECONDS, "o")
    axes.set_xlabel(title)
    axes.set_ylabel("seconds", color=_SECONDS)
    if len(points) > 2:
        axes.set_title(f"{title}: R² {Fit.of(x, [m.seconds for m in points]).r2:.4f}")
    right = axes.twinx()
    right.spines["right"].set_visible(True)
    _scatter(right, x, [m.mb for m in points], _MEMORY, "s")
    right.set_ylabel("peak MB", color=_MEMORY)
    for side, highest in ((axes, max(m.seconds for m in points)), (right, max(m.mb for m in points))):
        side.set_ylim(0, 1.15 * highest)
        side.set_xlim(0, 1.05 * max(x))
    axes.grid(axis="y")


def _scatter(axes: Axes, x: Sequence[float], y: Sequence[float], colour: str, marker: str) -> None:
    """Points, and the straight line through them from x = 0 on."""
    axes.plot(x, y, marker, color=colour, markersize=4.5)
    if len(x) > 2:
        line = Fit.of(x, y)
        ends = np.array([0.0, max(x)])
        axes.plot(ends, line.intercept + line.slope * ends, color=colour, linewidth=1.2, alpha=0.7)


def _vocabulary_panel(axes: Axes, wide: Mapping[str, Sequence[Measured]]) -> None:
    """Peak memory over the vocabulary, beside what one tensor of all logits would add to the smallest point."""
    for (name, points), marker in zip(wide.items(), ("o", "s"), strict=False):
        x = [m.x for m in points]
        axes.plot(x, [m.mb for m in points], f"{marker}-", color=_MEMORY, markersize=4.5, label=name.split(", ")[1])
        full = [points[0].mb + 4 * m.point.scored * (m.x - points[0].x) / 2**20 for m in points]
        axes.plot(x, full, f"{marker}--", color=MUTED, markersize=3, linewidth=1.0)
    axes.plot([], [], "--", color=MUTED, label="if all logits stood in memory once")
    axes.set_title("vocabulary: peak memory")
    axes.set_xlabel("vocabulary")
    axes.set_ylabel("peak MB", color=_MEMORY)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    axes.grid(axis="y")
