"""The picture of benchmarks.zoo: every loss's reward at the primary KL, and the interval of ranks that can be told."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.zoo_report import Block, Report, ranked, unreached
from prefopt.report.plotting import DPI, GRID, INK, MUTED, styled, to_png

_POINT, _RANK = "#0072B2", "#D55E00"
_ROW = 0.155  # inches


def draw_comparison(report: Report) -> bytes:
    """Part A as PNG. Bars are half an HSD to each side: two losses differ significantly if and only if theirs do not touch."""
    block = report.everything[0]
    names = ranked(report, block)
    with styled():
        height = 1.15 + _ROW * max(1, len(names))
        figure = Figure(figsize=(8.6, height), dpi=DPI, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.6, 1))
        _rewards(left, report, block, names)
        _ranks(right, report, block, names)
        for axes in (left, right):
            axes.set_ylim(len(names) - 0.4, -0.6)
            axes.tick_params(axis="y", length=0, labelcolor=INK, labelsize=7.5)
            axes.grid(True, axis="both", color=GRID)
            axes.spines["left"].set_visible(False)
        short = [row.loss for row in unreached(report, block)]
        if short:
            figure.supxlabel(
                f"Not at {report.primary:g} nat in every world: {', '.join(short)}.", fontsize=7.5, color=MUTED, wrap=True
            )
        return to_png(figure)


def _rewards(axes: Axes, report: Report, block: Block, names: list[str]) -> None:
    comparison = block.at[report.primary]
    rewards = {row.loss: row.rewards(report.primary) for row in block.rows}
    means = [sum(rewards[name]) / len(rewards[name]) for name in names]
    for place, name in enumerate(names):
        axes.plot(rewards[name], [place] * len(rewards[name]), "o", color=MUTED, markersize=1.8, alpha=0.6, linewidth=0)
    half = comparison.hsd / 2 if comparison.standings else 0.0
    axes.errorbar(means, range(len(names)), xerr=half or None, fmt="o", color=_POINT, markersize=4, elinewidth=1.4)
    axes.set_yticks(range(len(names)), names)
    axes.set_title(f"hidden reward at {report.primary:g} nat, {len(block.worlds)} worlds")
    worlds = [report.worlds[seed].optimal_reward[report.primary] for seed in block.worlds]
    axes.set_xlabel(
        f"small: worlds; bars: half an HSD to each side, so those apart differ. Optimum: {sum(worlds) / len(worlds):.2f}",
        fontsize=7.5,
    )


def _ranks(axes: Axes, report: Report, block: Block, names: list[str]) -> None:
    comparison = block.at[report.primary]
    if not comparison.standings:
        axes.text(0.5, 0.5, comparison.missing, transform=axes.transAxes, ha="center", color=MUTED, style="italic")
    for place, standing in enumerate(comparison.standings):
        axes.plot([standing.best_rank, standing.worst_rank], [place] * 2, color=_RANK, linewidth=3, solid_capstyle="butt")
        axes.annotate(
            standing.letters, (1.0, place), xycoords=("axes fraction", "data"), xytext=(3, 0), textcoords="offset points",
            fontsize=7.5, va="center",
        )  # fmt: skip
    axes.set_xlim(0.5, max(2, len(names)) + 0.5)
    axes.set_title("rank interval, and letters")
    axes.set_xlabel("losses that share a letter cannot be told apart (95%)", fontsize=7.5)
