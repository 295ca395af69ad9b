"""What the figures share: palette, style, paths averaged over seeds, and labels that do not cover what they label."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from prefopt.report.matched import families
from prefopt.report.schema import Results
from prefopt.report.tables import SMOKE

Line = list[tuple[float, float]]
DPI = 180
INK, MUTED, GRID = "#1b1f24", "#667079", "#e3e7eb"

LEADER_FROM = 12.0
"""Points between a label and what it names from which on a thin line joins them."""

# Okabe and Ito's colours without yellow (too pale on white) and black (the reference), then two of Tol's.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))
_MARKERS = ("o", "s", "^", "D")

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "text.parse_math": False,  # a label with two dollar signs is a label
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
    "svg.hashsalt": "prefopt",  # equal figures, equal ids
}


@dataclass(frozen=True)
class Look:
    """How one setting is drawn in every figure: a colour for its family; from the ninth family on, dash and marker tell apart.

    Strengths of one family share colour and marker and differ in dash.
    """

    colour: str
    dash: Any
    marker: str


def looks(results: Results) -> dict[str, Look]:
    """A look for each setting and each family, by the family's place in the comparison."""
    made = {}
    for index, (family, members) in enumerate(families(results).items()):
        colour, turn = _COLOURS[index % len(_COLOURS)], index // len(_COLOURS)
        marker = _MARKERS[turn % len(_MARKERS)]
        for strength, setting in enumerate(members):
            made[setting.label] = Look(colour, _DASHES[(turn + strength) % len(_DASHES)], marker)
        made.setdefault(family, Look(colour, _DASHES[turn % len(_DASHES)], marker))
    return made


@contextmanager
def styled() -> Iterator[None]:
    """The style of all figures; the user's own matplotlib settings neither enter nor change."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def new_figure(results: Results, width: float, height: float) -> Figure:
    """An empty figure on the Agg canvas, in inches; no window system and no pyplot state.

    A smoke run says so under the picture, which may be copied out of its report.
    """
    room = 0.2 / height if results.smoke else 0.0
    layout = ConstrainedLayoutEngine(rect=(0, room, 1, 1 - room))
    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout, facecolor="white")
    if results.smoke:
        figure.text(0.008, 0.25 * room, SMOKE, fontsize=7.5, color=MUTED, style="italic", va="bottom")
    FigureCanvasAgg(figure)
    return figure


def rows_figure(results: Results, names: Sequence[str], panels: int = 1) -> tuple[Figure, np.ndarray]:
    """Panels side by side with a row for each name, the first on top, names at the left."""
    count = len(names)
    figure = new_figure(results, 1.4 + 2.1 * panels if panels > 1 else 5.2, 0.9 + 0.34 * count)
    grid = figure.subplots(1, panels, sharey=True, squeeze=False).ravel()
    for axes in grid:
        axes.set_yticks(range(count), names)
        axes.set_ylim(count - 0.5, -0.5)
        axes.grid(True, axis="y", color=GRID)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(4))
    return figure, grid


def remark(axes: Axes, row: int, text: str) -> None:
    """What stands in a row that has no value."""
    place: dict[str, Any] = {"xy": (0.02, row), "xycoords": ("axes fraction", "data"), "va": "center"}
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    axes.annotate(text, **place, fontsize=7.5, color=MUTED, style="italic", bbox=box)


def to_png(figure: Figure) -> bytes:
    """The figure as PNG, without a time stamp: equal results give equal pictures."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def to_svg(figure: Figure) -> bytes:
    """The figure as SVG, its text as outlines, without a time stamp; call it after `to_png`, whose layout it keeps."""
    figure.set_layout_engine("none")  # laying out anew takes as long as drawing
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def label_of(results: Results, key: str) -> str:
    """A metric's label, or the key of one that is not declared."""
    metric = results.metric(key)
    return metric.label if metric else key


def points(path: Sequence[Mapping[str, float]], x: str, y: str) -> dict[float, tuple[float, float]]:
    """Finite (x, y) of a path by step."""
    found = {}
    for entry in path:
        values = (entry.get(x, math.nan), entry.get(y, math.nan))
        if all(map(math.isfinite, values)):
            found[entry.get("step", math.nan)] = values
    return found


def mean_path(paths: Sequence[Mapping[float, tuple[float, float]]]) -> Line:
    """The mean over seeds at the steps that every seed has, in order of steps; [(x, y)]."""
    if not paths:
        return []
    shared = sorted(set.intersection(*(set(path) for path in paths)))
    return [(float(np.mean([p[step][0] for p in paths])), float(np.mean([p[step][1] for p in paths]))) for step in shared]


def smooth(values: Sequence[float], window: int) -> np.ndarray:
    """A centred running mean that shortens at the ends; [n] -> [n]."""
    array = np.asarray(values, dtype=float)
    half = window // 2
    return np.array([array[max(0, i - half) : i + half + 1].mean() for i in range(len(array))])


@dataclass(frozen=True)
class PointLabel:
    """Text that names a point, in data coordinates."""

    text: str
    x: float
    y: float
    colour: str


def place_labels(figure: Figure, axes: Axes, labels: Sequence[PointLabel], drawn: Sequence[Line], size: float = 8.5) -> None:
    """Writes each label beside its point where it covers least of the lines in `drawn` and of the other labels.

    Tries 24 directions at five distances; a label that ends up far away gets a thin leader. Call it when all limits and scales
    are set: positions are in pixels.
    """
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    unit = figure.dpi / 72
    crowd = _pixels_along(axes, drawn)
    frame = axes.get_window_extent(renderer)
    placed: list[Bbox] = []
    for label in labels:
        anchor = axes.transData.transform((label.x, label.y))
        text = axes.text(
            0, 0, label.text, fontsize=size, color=label.colour, fontweight="bold", ha="center", va="center", zorder=8
        )
        text.set_path_effects([withStroke(linewidth=2.2, foreground="white", alpha=0.85)])
        text.set_in_layout(False)
        extent = text.get_window_extent(renderer)
        box, distance = _best_box(anchor, extent.width + 4 * unit, extent.height + 2 * unit, unit, crowd, frame, placed)
        placed.append(box)
        centre = ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)
        x, y = axes.transData.inverted().transform(centre)
        text.set_position((float(x), float(y)))
        if distance > LEADER_FROM:
            near = np.array([min(max(anchor[0], box.x0), box.x1), min(max(anchor[1], box.y0), box.y1)])
            ends = axes.transData.inverted().transform(np.stack([anchor, near]))
            axes.plot(
                ends[:, 0], ends[:, 1], color=label.colour, linewidth=0.6, alpha=0.7, zorder=7, scalex=False, scaley=False
            )


def _best_box(
    anchor: np.ndarray, width: float, height: float, unit: float, crowd: np.ndarray, frame: Bbox, placed: Sequence[Bbox]
) -> tuple[Bbox, float]:
    """The cheapest place for a box of this size (pixels) near the anchor, and its distance in points."""
    choices: list[tuple[float, Bbox, float]] = []
    for distance in (6.0, 12.0, 22.0, 36.0, 54.0):
        for angle in np.arange(24) * (2 * np.pi / 24):
            cosine, sine = np.cos(angle), np.sin(angle)
            reach = distance * unit
            centre = (anchor[0] + cosine * (reach + width / 2), anchor[1] + sine * (reach + height / 2))
            box = Bbox.from_bounds(centre[0] - width / 2, centre[1] - height / 2, width, height)
            inside = (crowd[:, 0] > box.x0) & (crowd[:, 0] < box.x1) & (crowd[:, 1] > box.y0) & (crowd[:, 1] < box.y1)
            overlap = sum(_shared_area(box, other) for other in placed) / (width * height)
            outside = 1 - _shared_area(box, frame) / (width * height)
            near = np.array([min(max(anchor[0], box.x0), box.x1), min(max(anchor[1], box.y0), box.y1)])
            crossed = _near_segment(crowd, anchor + 0.5 * (near - anchor), near, 3 * unit) if distance > LEADER_FROM else 0
            # Right of the point reads best, so other directions pay a little.
            choices.append(
                (
                    (inside.sum() + crossed) / unit + 200 * overlap + 200 * outside + 0.5 * distance + 2 * (1 - cosine),
                    box,
                    distance,
                )
            )
    _, box, distance = min(choices, key=lambda choice: choice[0])
    return box, distance


def _near_segment(crowd: np.ndarray, start: np.ndarray, end: np.ndarray, width: float) -> int:
    """How many points of the crowd lie within `width` pixels of a segment."""
    along = end - start
    share = np.clip((crowd - start) @ along / max(float(along @ along), 1e-9), 0, 1)
    return int((np.linalg.norm(crowd - (start + share[:, None] * along), axis=1) < width).sum())


def _shared_area(first: Bbox, second: Bbox) -> float:
    width = min(first.x1, second.x1) - max(first.x0, second.x0)
    height = min(first.y1, second.y1) - max(first.y0, second.y0)
    return max(width, 0.0) * max(height, 0.0)


def _pixels_along(axes: Axes, drawn: Sequence[Line]) -> np.ndarray:
    """Points every few pixels along the lines; [n, 2] in pixels."""
    pieces = [np.zeros((0, 2))]
    for line in drawn:
        corners = axes.transData.transform(np.asarray(line, dtype=float).reshape(-1, 2))
        for start, end in pairwise(corners):
            steps = max(2, int(np.hypot(*(end - start)) / 3))
            pieces.append(start + np.linspace(0, 1, steps)[:, None] * (end - start))
        pieces.append(corners)
    return np.concatenate(pieces)
