"""A study's power before it runs: a table by number of seeds, and its picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from prefopt.report.grid import Column, Entry, Grid
from prefopt.report.plotting import DPI, INK, MUTED
from prefopt.report.power import (
    LEVEL,
    MOST_SEEDS,
    POWER,
    detectable_over_prompts,
    detectable_over_seeds,
    power_of,
    seeds_needed,
)
from prefopt.report.schema import MINIMUM_SEEDS


@dataclass(frozen=True)
class Plan:
    """What is known before a run.

    Args:
        deviation: over seeds, of the difference between two algorithms paired by seed; in the metric's unit.
        seeds: the most that are shown.
        difference: of interest, in the same unit; None where none is named.
        tests: in the family of the primary end point; the strictest of Holm's tests has the level 0.05 / tests.
        power: with which a difference is to be found.
    """

    deviation: float
    seeds: int = 10
    difference: float | None = None
    tests: int = 1
    power: float = POWER

    @property
    def level(self) -> float:
        return 1 - (1 - LEVEL) / self.tests


def plan_grid(plan: Plan) -> Grid:
    """The smallest detectable difference, and the power at the difference of interest, from 3 seeds on."""
    rows = []
    for n in range(MINIMUM_SEEDS, max(plan.seeds, MINIMUM_SEEDS) + 1):
        row = [Entry(str(n)), Entry(f"{detectable_over_seeds(plan.deviation, n, plan.power, plan.level):.3g}")]
        if plan.difference is not None:
            row.append(Entry(f"{power_of(plan.difference, plan.deviation, n, plan.level):.1%}"))
        rows.append(tuple(row))
    columns = [Column("seeds"), Column(f"smallest difference found with probability {plan.power:g}")]
    if plan.difference is not None:
        columns.append(Column(f"power at {plan.difference:g}"))
    holm = "" if plan.tests == 1 else f" at level {1 - plan.level:.2g}, the strictest of Holm's {plan.tests} tests"
    title = f"two-sided t test of differences paired by seed, standard deviation {plan.deviation:.3g} over seeds{holm}"
    return Grid(title, tuple(columns), tuple(rows))


def needed_line(plan: Plan) -> str:
    """How many seeds the difference of interest needs; empty where none is named."""
    if plan.difference is None:
        return ""
    count = seeds_needed(plan.deviation, plan.difference, power=plan.power, level=plan.level)
    seeds = f"more than {MOST_SEEDS}" if count is None else str(count)
    return f"A difference of {plan.difference:g} is found with probability {plan.power:g} by {seeds} seeds."


def prompts_line(prompts: int, deviation: float, power: float = POWER) -> str:
    """What prompts alone resolve, however many the seeds; `deviation` is over prompts, 1/2 for a win rate of one half."""
    found = detectable_over_prompts(deviation, prompts, power)
    points = f" ({100 * found:.1f} points of win rate)" if deviation == 0.5 else ""
    return (
        f"{prompts} prompts resolve a difference of {found:.3g}{points} with probability {power:g}, at a standard deviation of "
        f"{deviation:.3g} over prompts; seeds do not help beyond that for other prompts."
    )


def power_curves(plan: Plan) -> Figure:
    """Power against the number of seeds: of the difference of interest, or of half, one and two standard deviations."""
    found: Sequence[float] = (
        (plan.difference,) if plan.difference is not None else tuple(k * plan.deviation for k in (0.5, 1.0, 2.0))
    )
    figure = Figure(figsize=(5.6, 3.4), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    counts = range(MINIMUM_SEEDS, max(plan.seeds, MINIMUM_SEEDS + 1) + 1)
    for difference in found:
        powers = [power_of(difference, plan.deviation, n, plan.level) for n in counts]
        axes.plot(counts, powers, marker="o", markersize=4, linewidth=1.8, label=f"difference {difference:.3g}")
    axes.axhline(plan.power, color=MUTED, linestyle=(0, (4, 2)), linewidth=1.0)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("seeds")
    axes.set_ylabel("power")
    axes.set_title(f"standard deviation {plan.deviation:.3g} over seeds", color=INK)
    axes.legend(frameon=False)
    axes.grid(True, alpha=0.6)
    return figure
