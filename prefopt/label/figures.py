"""Position bias and agreement against the size of the labeller."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from prefopt.label.measure import AVERAGED, LabelReport, Share
from prefopt.report.plotting import DPI, MUTED, styled, to_png

_COLOUR = "#0072B2"


def size_png(reports: Sequence[LabelReport], baseline: Share | None) -> bytes | None:
    """Two panels, as PNG; None when the sizes of fewer than two labellers are known.

    Args:
        reports: of several labellers on the same pairs.
        baseline: agreement of "the longer completion is better", drawn as a line.
    """
    if sum(report.parameters is not None for report in reports) < 2:
        return None
    with styled():
        return to_png(_figure(reports, baseline))


def _figure(reports: Sequence[LabelReport], baseline: Share | None) -> Figure:
    figure = Figure(figsize=(7.6, 3.2), dpi=DPI, layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, sharex=True)
    _draw(left, reports, [report.position_bias for report in reports], "same place wins both orders")
    _draw(right, reports, [report.agreement.get(AVERAGED) for report in reports], "agreement with people, both orders")
    right.axhline(0.5, color=MUTED, linewidth=0.8)
    if baseline is not None:
        right.axhline(baseline.value, color=MUTED, linewidth=1, linestyle="--")
        at = (0.99, baseline.value)
        right.annotate("longer wins", at, xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8, color=MUTED)
    return figure


def _draw(axes: Axes, reports: Sequence[LabelReport], shares: Sequence[Share | None], title: str) -> None:
    for report, share in zip(reports, shares, strict=True):
        if report.parameters is None or share is None:
            continue
        # Rounding may put a share of 0 or 1 a hair outside of its own interval.
        bars = [[max(0.0, share.value - share.low)], [max(0.0, share.high - share.value)]]
        axes.errorbar([report.parameters], [share.value], yerr=bars, color=_COLOUR, marker="o", markersize=4, capsize=2)
        axes.annotate(report.labeller, (report.parameters, share.value), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.margins(x=0.2)
    axes.set(ylim=(0, 1), xlabel="weights of the labeller", title=title)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(visible=True)
