"""The picture of benchmarks.mdp: KL against the size of the data above, policies below. S states, A actions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullLocator
from torch import Tensor

from benchmarks.mdp_exact import Exact, kl, to_nearest
from prefopt.control.gridworld import Layout
from prefopt.control.segments import Preferences
from prefopt.report.plotting import DPI, GRID, INK, MUTED, styled, to_png
from prefopt.report.statistics import mean_interval

Key = tuple[Preferences, float]
"""Labels and bias."""

_COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00")
_MARKERS = ("o", "s", "^", "D")
# Right and down in the picture, of each action.
_DIRECTIONS = ((0, -1), (1, 0), (0, 1), (-1, 0))
_GOAL, _TRAP = "#009E73", "#882255"
_DARKEST = 1.0  # nats of a state's KL at which its shade ends
_EQUAL = 1e-6  # nats below which a limit is the soft-optimal policy


def draw_consistency(exact: Exact, layout: Layout, curves: Mapping[Key, Mapping[int, Sequence[Tensor]]]) -> bytes:
    """PNG: CPL's KL to pi* and to its limit against pairs; below, pi* and the limits that differ from it.

    Args:
        exact: the decision process.
        layout: what stands in its cells.
        curves: by labels and bias, of every size, the policies [S, A] of the draws.
    """
    best, constant = exact.best, exact.constant()
    limits = {key: [limit.logps for limit in exact.limits(*key)] for key in curves}
    with styled():
        figure = Figure(figsize=(10.4, 7.2), dpi=DPI, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        above, below = np.asarray(figure.subfigures(2, 1, height_ratios=(1.3, 1)))
        left, right = above.subplots(1, 2, sharey=True)
        for place, (key, sizes) in enumerate(curves.items()):
            look = {"color": _COLOURS[place], "marker": _MARKERS[place], "label": _name(key)}
            _curve(left, sizes, [best], look)
            _curve(right, sizes, limits[key], look)
            for limit in limits[key]:
                if (plateau := kl(limit, best)) > _EQUAL:
                    left.axhline(plateau, color=_COLOURS[place], linewidth=1.1, linestyle=(0, (4, 2)))
        ticks = sorted({size for own in curves.values() for size in own})
        for axes, title in ((left, "KL to the soft-optimal policy"), (right, "KL to its own limit on infinitely many pairs")):
            axes.plot(ticks, [constant / size for size in ticks], color=INK, linewidth=1, linestyle=(0, (1, 1.5)))
            _logarithmic(axes, ticks)
            axes.set(xlabel="pairs of segments", title=title)
        left.set_ylabel("nats a step, mean over states")
        left.legend(frameon=False, fontsize=7.5, loc="lower left")
        right.annotate(
            f"dashed: the limits' own KL to the soft-optimal policy\ndotted: {constant:.0f} / pairs, by the Fisher information"
            "\nbars: 95%, t over draws", (0.99, 0.99), xycoords="axes fraction", ha="right", va="top", fontsize=7, color=MUTED,
        )  # fmt: skip
        shown = {"soft-optimal policy": best} | {
            f"{_name(key)}, limit": found[0] for key, found in limits.items() if kl(found[0], best) > _EQUAL
        }
        for axes, (name, logps) in zip(below.subplots(1, len(shown)), shown.items(), strict=True):
            _policy(axes, layout, logps, best)
            axes.set_title(f"{name}\nregret {exact.measures(logps)['regret']:.2f}", fontsize=8.5)
        below.supxlabel(
            "lines: probabilities of the four moves; green: the goal, purple: traps; shade: the state's KL to the soft-optimal "
            f"policy, up to {_DARKEST:g} nat", fontsize=7.5, color=MUTED,
        )  # fmt: skip
        return to_png(figure)


def _logarithmic(axes: Axes, sizes: Sequence[int]) -> None:
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(True, color=GRID)


def _name(key: Key) -> str:
    return f"{key[0]} labels, bias {key[1]:g}"


def _curve(axes: Axes, sizes: Mapping[int, Sequence[Tensor]], others: Sequence[Tensor], look: Mapping[str, Any]) -> None:
    """KL to the nearest of `others`: mean over draws and its interval, at every size."""
    intervals = [mean_interval([to_nearest(logps, others) for logps in own]) for own in sizes.values()]
    means = np.array([interval.mean for interval in intervals])
    half = np.array([interval.half_width or 0.0 for interval in intervals])
    # An axis of logarithms has no place for a lower end at or below zero: such a bar goes down by a factor of ten.
    below = np.minimum(half, 0.9 * means)
    axes.errorbar(
        list(sizes), means, yerr=np.stack([below, half]), markersize=4.5, linewidth=1.5, elinewidth=1, capsize=2, **look
    )  # fmt: skip


def _policy(axes: Axes, layout: Layout, logps: Tensor, best: Tensor) -> None:
    """The grid: from the middle of a cell a line for each action, as long as it is likely."""
    rows, columns = np.divmod(np.arange(layout.size**2), layout.size)
    divergence = (logps.exp() * (logps - best)).sum(-1).clamp(max=_DARKEST).view(layout.size, layout.size)
    axes.imshow(divergence.numpy(), cmap="Greys", vmin=0, vmax=1.8 * _DARKEST)
    for action, (right, down) in enumerate(_DIRECTIONS):
        reach = 0.46 * logps[:, action].exp().numpy()
        axes.plot([columns, columns + right * reach], [rows, rows + down * reach], color=INK, linewidth=2)
    for cell, colour in ((layout.goal, _GOAL), *((trap, _TRAP) for trap in layout.traps)):
        corner = (float(columns[cell]) - 0.46, float(rows[cell]) - 0.46)
        axes.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, edgecolor=colour, linewidth=1.8))
    axes.set(xticks=(), yticks=())
    axes.spines[:].set(visible=True, color=GRID)
