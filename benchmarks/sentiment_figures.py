"""The pictures of benchmarks.sentiment: reward against KL, and proxy beside gold reward against the root of KL."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from prefopt.report.plotting import DPI, INK, MUTED, Line, PointLabel, looks, mean_path, place_labels, points, styled, to_png
from prefopt.report.schema import Results
from prefopt.tasks.sentiment import GOLD, PROXY


def draw_frontier(results: Results) -> bytes:
    """Gold reward against KL: a line from the reference through the checkpoints of each setting, a mark where it ends."""
    with styled():
        figure = Figure(figsize=(8.2, 4.8), dpi=DPI, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        lines, labels = [], []
        for setting in results.settings:
            look = looks(results)[setting.label]
            line = _path(results, setting.label, f"score/{GOLD}")
            if not line:
                continue
            axes.plot(*zip(*line, strict=True), color=look.colour, linestyle=look.dash, linewidth=1.3)
            axes.plot(*line[-1], look.marker, color=look.colour, markersize=5)
            lines.append(line)
            labels.append(PointLabel(setting.label, *line[-1], look.colour))
        axes.plot(0, results.reference[f"score/{GOLD}"], "o", color=INK, markersize=4)
        axes.set_xlabel("KL to the reference, nats per completion")
        axes.set_ylabel("gold reward")
        axes.grid(True)
        place_labels(figure, axes, labels, lines, size=7.5)
        return to_png(figure)


def draw_overoptimisation(results: Results, best_of: Sequence[Mapping[str, float]]) -> bytes:
    """Proxy and gold reward against sqrt(KL), best of n beside them: gold that falls while the proxy rises is gamed."""
    with styled():
        figure = Figure(figsize=(9.6, 4.6), dpi=DPI, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 2, sharex=True)
        for axes, judge in zip(panels, (PROXY, GOLD), strict=True):
            for setting in results.settings:
                look = looks(results)[setting.label]
                line = [(math.sqrt(max(kl, 0)), reward) for kl, reward in _path(results, setting.label, f"score/{judge}")]
                if line:
                    axes.plot(
                        *zip(*line, strict=True), color=look.colour, linestyle=look.dash, linewidth=1.2, label=setting.label
                    )
            _draw_best_of(axes, best_of, judge)
            axes.set_title(f"{judge} reward")
            axes.set_xlabel("square root of KL to the reference")
            axes.grid(True)
        handles, names = panels[1].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=7, frameon=False)
        return to_png(figure)


def _draw_best_of(axes: Axes, best_of: Sequence[Mapping[str, float]], judge: str) -> None:
    if best_of:
        sizes = sorted({row["n"] for row in best_of})
        means = [_mean([row[judge] for row in best_of if row["n"] == n]) for n in sizes]
        roots = [math.sqrt(next(row["kl"] for row in best_of if row["n"] == n)) for n in sizes]
        axes.plot(roots, means, "k--", linewidth=1.2, label="best of n (KL: its bound)")
        axes.annotate(f"n = {sizes[-1]:g}", (roots[-1], means[-1]), fontsize=7, color=MUTED)


def _path(results: Results, label: str, reward: str) -> Line:
    """(KL, reward) from the reference through the checkpoints, means over seeds."""
    start = (0.0, results.reference.get(reward, math.nan))
    paths = [points(cell.path, "kl", reward) for cell in results.cells_of(label)]
    line = mean_path(paths) if paths else []
    return [point for point in (start, *line) if all(map(math.isfinite, point))] if line else []


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
