"""The picture of benchmarks.abc: learning curves of every credit, and how far each is above sparse, with bands over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.abc_curves import WINDOW, Curve, running_mean
from prefopt.report.plotting import DPI, MUTED, Look, looks, styled, to_png
from prefopt.report.schema import Results
from prefopt.report.statistics import mean_interval


def draw_credit(results: Results, curves: Mapping[str, Mapping[int, Curve]], base: str) -> bytes:
    """Running means of the score against collections: each setting, and each minus the base setting of the same seed."""
    with styled():
        figure = Figure(figsize=(9.6, 4.2), dpi=DPI, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        found = looks(results)
        for setting, own in curves.items():
            _band(left, [running_mean(curve) for curve in own.values()], found[setting], setting)
            pairs = [(own[seed], curves[base][seed]) for seed in own if seed in curves[base]]
            if setting != base:
                _band(right, [running_mean([a - b for a, b in zip(*pair, strict=False)]) for pair in pairs], found[setting])
        right.axhline(0, color=found[base].colour, linewidth=1.2)
        left.set_title(f"score of the reward model, mean of {WINDOW} collections")
        right.set_title(f"the same minus {base}, paired by seed")
        for axes in (left, right):
            axes.set_xlabel("collections of rollouts")
            axes.grid(True)
        seeds = max(map(len, curves.values()))
        figure.legend(loc="outside lower center", ncols=len(curves), fontsize=7.5, frameon=False)
        right.annotate(
            f"bands: 95%, t over {seeds} seeds", (0.98, 0.02), xycoords="axes fraction", ha="right", fontsize=7, color=MUTED
        )
        return to_png(figure)


def _band(axes: Axes, curves: Sequence[Curve], look: Look, label: str = "") -> None:
    """Mean over seeds and its interval, at the collections that all have."""
    places = range(min(map(len, curves), default=0))
    intervals = [mean_interval([curve[place] for curve in curves]) for place in places]
    x = [place + WINDOW for place in places]
    axes.plot(x, [item.mean for item in intervals], color=look.colour, linestyle=look.dash, linewidth=1.4, label=label or None)
    if intervals and intervals[0].half_width is not None:
        low, high = ([i.mean + sign * (i.half_width or 0.0) for i in intervals] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=look.colour, alpha=0.13, linewidth=0)
