"""What held-out pairs say of policies: margins, accuracy by length and by confidence, and where algorithms disagree.

All of it is by the common log-ratio sum, which is every algorithm's reward up to its own strength, and all of it is a
diagnostic: a policy that ranks given completions well need not write better ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from prefopt.report.grid import Column, Entry, Grid
from prefopt.report.plotting import INK, Line, looks, mean_path, new_figure, points
from prefopt.report.schema import PairRow, Results

MARGINS, SIDES = "margins", "chosen_and_rejected"
MARGINS_CAPTION = (
    "Margins on held-out pairs, seeds averaged: from the 5th to the 95th percentile, the middle half thick, a dot at the "
    "median. Right of zero the policy raises the chosen completion more than the rejected one."
)
SIDES_CAPTION = (
    "Log-ratios of held-out completions over training, mean over seeds. Both sides may fall while the margin grows: the policy "
    "then moves probability to completions that are in no pair."
)
_TIE = 1e-3
_DISPUTED = 8
_QUARTERS = ("narrowest quarter", "second", "third", "widest quarter")


@dataclass(frozen=True)
class PairTable:
    """Margins of the settings on the same pairs, means over seeds.

    Args:
        ids: N pairs.
        labels: S settings.
        margins: [S, N] log-ratio of chosen minus rejected, nats.
        longer: [N] length of chosen minus that of rejected, tokens.
    """

    ids: tuple[str, ...]
    labels: tuple[str, ...]
    margins: np.ndarray
    longer: np.ndarray

    @property
    def right(self) -> np.ndarray:
        """[S, N] 1 where chosen is ahead, 0.5 for a tie up to rounding."""
        return np.where(np.abs(self.margins) < _TIE, 0.5, (self.margins > 0).astype(float))


def pair_table(rows: Sequence[PairRow], labels: Sequence[str]) -> PairTable | None:
    """The pairs that every setting has; None without any. Where seeds have pairs of their own, there are none in common."""
    found: dict[str, dict[str, list[float]]] = {label: {} for label in labels}
    longer: dict[str, int] = {}
    for row in rows:
        if row.label in found:
            found[row.label].setdefault(row.pair_id, []).append(row.margin)
            longer[row.pair_id] = row.chosen_length - row.rejected_length
    present = [label for label in labels if found[label]]
    if not present:
        return None
    ids = [pair for pair in found[present[0]] if all(pair in found[label] for label in present)]
    if not ids:
        return None
    margins = np.array([[math.fsum(found[label][pair]) / len(found[label][pair]) for pair in ids] for label in present])
    return PairTable(tuple(ids), tuple(present), margins, np.array([longer[pair] for pair in ids]))


def accuracy_grid(table: PairTable) -> Grid:
    """Accuracy where the chosen completion is longer, shorter or as long, and by how sure the policy is of the pair."""
    groups: Mapping[str, np.ndarray] = {
        "all pairs": np.ones_like(table.longer, dtype=bool), "chosen longer": table.longer > 0,
        "chosen shorter": table.longer < 0, "same length": table.longer == 0,
    }  # fmt: skip
    columns = [Column("setting", numeric=False)]
    columns += [Column(name, note=f"{int(kept.sum())} pairs") for name, kept in groups.items() if kept.any()]
    columns += [Column(name) for name in _QUARTERS]
    rows = []
    for label, right, margins in zip(table.labels, table.right, table.margins, strict=True):
        values = [right[kept].mean() for kept in groups.values() if kept.any()]
        quarters = np.array_split(np.argsort(np.abs(margins), kind="stable"), len(_QUARTERS))
        values += [right[quarter].mean() if len(quarter) else math.nan for quarter in quarters]
        rows.append((Entry(label, "strong"), *(Entry("n/a" if math.isnan(v) else f"{v:.1%}") for v in values)))
    sizes = ", ".join(f"{name} {int(kept.sum())}" for name, kept in groups.items())
    captions = (
        f"Pairs: {sizes}. Quarters are by the size of the margin, each setting's own: a policy whose widest margins are right "
        "more often knows what it knows.",
        "A policy that has learned length alone is right on one side and wrong on the other.",
    )  # fmt: skip
    return Grid("accuracy on held-out pairs", tuple(columns), tuple(rows), captions)


def disagreement_grid(table: PairTable) -> Grid | None:
    """The share of pairs that two settings order differently; None of fewer than two settings."""
    if len(table.labels) < 2:
        return None
    side = np.sign(np.where(np.abs(table.margins) < _TIE, 0, table.margins))
    rows = []
    for label, own in zip(table.labels, side, strict=True):
        shares = [float((own * other < 0).mean()) for other in side]
        entries = [Entry("" if name == label else f"{share:.0%}") for name, share in zip(table.labels, shares, strict=True)]
        rows.append((Entry(label, "strong"), *entries))
    columns = (Column("setting", numeric=False), *(Column(label) for label in table.labels))
    caption = "Share of held-out pairs that two settings order differently, seeds averaged first; ties disagree with nobody."
    return Grid("disagreement", columns, tuple(rows), (caption,))


def disputed_grid(table: PairTable) -> Grid | None:
    """The pairs on whose order the settings are most divided, by their ids, with every margin."""
    if len(table.labels) < 2:
        return None
    share = (table.margins > _TIE).mean(0)
    # Divided evenly first; among these, those on which the settings are furthest apart.
    order = np.lexsort((-np.ptp(table.margins, axis=0), np.abs(share - 0.5)))[:_DISPUTED]
    rows = [
        (Entry(table.ids[i], "strong"), Entry(f"{table.longer[i]:+d}"), *(Entry(f"{m:+.2f}") for m in table.margins[:, i]))
        for i in order
        if 0 < share[i] < 1
    ]
    if not rows:
        return None
    columns = (Column("pair", numeric=False), Column("tokens longer"), *(Column(label) for label in table.labels))
    return Grid("most disputed pairs", columns, tuple(rows), ("Margins in nats; the id names file and row.",))


def pair_grids(table: PairTable | None) -> dict[str, Grid]:
    """The tables of held-out pairs by the name of their file; one without rows has nothing to say."""
    none = Grid("", (), ())
    return {
        "pair_accuracy": none if table is None else accuracy_grid(table),
        "disagreement": none if table is None else disagreement_grid(table) or none,
        "disputed_pairs": none if table is None else disputed_grid(table) or none,
    }


def margins_figure(results: Results, table: PairTable) -> Figure:
    """Distribution of margins by setting: `MARGINS_CAPTION`."""
    figure = new_figure(results, 5.6, 0.9 + 0.34 * len(table.labels))
    axes, styles = figure.add_subplot(), looks(results)
    for row, (label, margins) in enumerate(zip(table.labels, table.margins, strict=True)):
        low, first, middle, third, high = np.quantile(margins, [0.05, 0.25, 0.5, 0.75, 0.95])
        look = styles[label]
        axes.plot([low, high], [row, row], color=look.colour, linewidth=1.2)
        axes.plot([first, third], [row, row], color=look.colour, linewidth=5.5, alpha=0.7)
        axes.plot(middle, row, look.marker, color=look.colour, markersize=6, markeredgecolor="white")
    axes.axvline(0.0, color=INK, linestyle=(0, (4, 2)), linewidth=1.0, zorder=1)
    axes.set_yticks(range(len(table.labels)), list(table.labels))
    axes.set_ylim(len(table.labels) - 0.5, -0.5)
    axes.grid(True, axis="x")
    axes.set_xlabel("log-ratio of chosen minus rejected (nats)")
    return figure


def sides_figure(results: Results) -> Figure | None:
    """Log-ratios of chosen and of rejected completions over training; None where they were not measured."""
    panels = (("chosen_log_ratio", "chosen"), ("rejected_log_ratio", "rejected"))
    lines = {key: {s.label: _over_training(results, s.label, key) for s in results.settings} for key, _ in panels}
    if not any(line for own in lines.values() for line in own.values()):
        return None
    figure = new_figure(results, 7.6, 3.0)
    grid, styles = figure.subplots(1, 2, sharey=True), looks(results)
    for axes, (key, title) in zip(grid, panels, strict=True):
        for label, line in lines[key].items():
            if line:
                x, y = np.array([(0.0, 0.0), *line]).T
                look = styles[label]
                axes.plot(x, y, color=look.colour, linestyle=look.dash, marker=look.marker, markersize=3, label=label)
        axes.axhline(0.0, color=INK, linewidth=0.8)
        axes.set_title(f"{title} completions")
        axes.grid(True)
        axes.set_xlabel("training step")
    grid[0].set_ylabel("log(policy / reference), nats")
    handles, names = grid[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper left", ncols=min(len(names), 8), frameon=False, handlelength=1.6)
    return figure


def _over_training(results: Results, label: str, key: str) -> Line:
    """Means over seeds of a metric along the path; empty where it was not measured."""
    seeds = [points(cell.path, "step", key) for cell in results.cells_of(label)]
    return mean_path([path for path in seeds if path])
