"""The reliability diagram of a reward model."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from prefopt.evaluate import wilson_interval
from prefopt.report.plotting import DPI, INK, MUTED, styled, to_png
from prefopt.rewards.quality import BINS, Quality

_COLOUR = "#0072B2"


def reliability_png(quality: Quality, title: str) -> bytes:
    """Accuracy against confidence by bin, and how many pairs each bin holds, as PNG."""
    with styled():
        return to_png(_reliability(quality, title))


def _reliability(quality: Quality, title: str) -> Figure:
    figure = Figure(figsize=(4.2, 4.6), dpi=DPI, layout="constrained", facecolor="white")
    above, below = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    bins = quality.curve
    x, y = [item.confidence for item in bins], [item.accuracy for item in bins]
    intervals = [wilson_interval(item.accuracy * item.pairs, item.pairs) for item in bins]
    bars = [[item.accuracy - low for item, (low, _) in zip(bins, intervals, strict=True)],
            [high - item.accuracy for item, (_, high) in zip(bins, intervals, strict=True)]]  # fmt: skip
    above.plot([0.5, 1], [0.5, 1], color=MUTED, linewidth=1, linestyle="--", label="calibrated")
    above.errorbar(
        x, y, yerr=bars, color=_COLOUR, marker="o", markersize=4, linewidth=1.4, elinewidth=0.8, capsize=2,
        label="this model, 95% intervals",
    )  # fmt: skip
    above.legend(frameon=False, loc="upper left", fontsize=8)
    above.set(xlim=(0.49, 1.01), ylim=(0, 1.2), ylabel="share that it prefers rightly")
    above.set_title(f"{title}: ECE {quality.ece:.3f}, accuracy {quality.accuracy:.1%}", color=INK)
    above.set_yticks([0, 0.25, 0.5, 0.75, 1])
    above.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    above.grid(visible=True)
    below.bar(x, [item.pairs for item in bins], width=0.4 / BINS, color=_COLOUR)
    below.set(xlabel="confidence in its preference", ylabel="pairs")
    below.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    below.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure
