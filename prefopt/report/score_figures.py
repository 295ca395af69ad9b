"""The picture of `prefopt score`: cosines between the gradients of losses, as a heat map."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from prefopt.report.plotting import DPI, GRID, INK, styled, to_png

# More numbers than this are too small to read.
_MOST_NUMBERS = 16


def cosine_png(labels: Sequence[str], cosine: np.ndarray) -> bytes:
    """A heat map with one row and one column a loss.

    Args:
        labels: L names, in the order of rows and columns.
        cosine: [L, L] in [-1, 1]; NaN, where a gradient is zero, is drawn grey.
    """
    with styled():
        return to_png(_cosine_figure(labels, cosine))


def _cosine_figure(labels: Sequence[str], cosine: np.ndarray) -> Figure:
    count = len(labels)
    cell = 0.5 if count <= _MOST_NUMBERS else 0.26
    size = max(2.6, cell * count)
    figure = Figure(figsize=(size + 2.4, size + 1.4), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = mpl.colormaps["RdBu_r"].with_extremes(bad=GRID)
    image = axes.imshow(np.ma.masked_invalid(cosine), cmap=colours, vmin=-1, vmax=1)
    small = 8.0 if count <= _MOST_NUMBERS else 6.5
    axes.set_xticks(range(count), labels, rotation=60, ha="right", rotation_mode="anchor", fontsize=small)
    axes.set_yticks(range(count), labels, fontsize=small)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("cosine of gradients with respect to token log-probs")
    if count <= _MOST_NUMBERS:
        for (row, column), value in np.ndenumerate(cosine):
            if np.isfinite(value):
                colour = "white" if abs(value) > 0.6 else INK
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7.0, color=colour)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, ticks=(-1, 0, 1))
    bar.outline.set_visible(False)
    return figure
