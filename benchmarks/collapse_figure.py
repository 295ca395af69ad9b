"""The picture of benchmarks.collapse: optima against closed forms above, trained rewards below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.collapse_exact import closed_form, end_mass, ks_distance, solve, w1_distance
from benchmarks.collapse_training import OFFSET, Trained
from prefopt.report.plotting import DPI, GRID, INK, MUTED, styled, to_png

_BARS = "#56B4E9"
_UTILITY_COLOURS = ("#0072B2", "#D55E00")
_SHARED_COLOUR = "#009E73"
_BINS = 20
_TALLEST = 6.0  # of a density's axis; the bars of atoms go beyond, and say so


def draw(utilities: Sequence[str], n: int, networks: Mapping[str, Trained], lists: Mapping[str, Trained]) -> bytes:
    """PNG: a panel for the optimum of each utility; below one for each trained network, and one for the lists, if any."""
    with styled():
        figure = Figure(figsize=(11.5, 6.4), dpi=DPI, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        above, below = np.asarray(figure.subfigures(2, 1, height_ratios=(1, 1.25)))
        for axes, utility in zip(above.subplots(1, len(utilities), sharey=True), utilities, strict=True):
            _optimum(axes, utility, n)
        panels = below.subplots(1, len(networks) + bool(lists))
        for axes, (name, trained) in zip(panels, networks.items(), strict=False):
            _network(axes, name, trained)
        if lists:
            _lists(panels[-1], lists)
        above.supylabel(f"density of {n} optimal rewards", fontsize=9)
        return to_png(figure)


def _optimum(axes: Axes, utility: str, n: int) -> None:
    rewards, law = solve(utility, n).rewards, closed_form(utility)
    heights, edges = np.histogram(rewards, bins=_BINS, range=(0, 1), density=True)
    axes.bar(edges[:-1], heights, width=1 / _BINS, align="edge", color=_BARS, edgecolor="white", linewidth=0.4)
    if law is None:
        title = f"ends {end_mass(rewards):.0%}"
    elif utility == "linear":
        axes.plot([0, 1], [_TALLEST, _TALLEST], "v", color=INK, markersize=5, clip_on=False)
        title = f"W1 {w1_distance(rewards, law):.3f}"
    else:
        x = np.linspace(0, 1, 400)[1:-1]
        axes.plot(x, law.pdf(x), color=INK, linewidth=1.2)
        title = f"KS {ks_distance(rewards, law):.3f}"
    for place in (0, -1):
        if heights[place] > _TALLEST:
            axes.annotate(
                f"{heights[place] / _BINS:.0%}", (edges[place] if place else 0.0, _TALLEST * 0.93), fontsize=7.5, color=MUTED,
                xytext=(12 if place == 0 else -12, 0), textcoords="offset points", ha="left" if place == 0 else "right",
            )  # fmt: skip
    axes.set(ylim=(0, _TALLEST), xlim=(0, 1), xticks=(0, 0.5, 1), title=f"{_formula(utility)}: {title}")
    axes.set_xlabel("reward")
    axes.grid(True, axis="y", color=GRID)


def _formula(utility: str) -> str:
    """U as it is written in the paper."""
    family, _, parameter = utility.partition(":")
    return {
        "linear": "x", "log": "log x", "inverse": "-1/x", "power": f"x^{parameter}", "inverse_power": f"-x^-{parameter}",
        "log_sigmoid": f"log σ({parameter}x)",
    }[family]  # fmt: skip


def _network(axes: Axes, utilities: str, trained: Trained) -> None:
    """Every prompt's rewards by rank, over the exact optimum of its utility."""
    names = utilities.split(",")
    count = trained.rewards.shape[1]
    places = np.arange(1, count + 1)
    worst = 0.0
    for number, name in enumerate(names):
        colour = _UTILITY_COLOURS[number] if len(names) > 1 else _SHARED_COLOUR
        optimum = solve(name, count, offset=OFFSET).rewards
        for index, rewards in enumerate(trained.of(number)):
            label = f"{len(trained.of(number))} prompts, {_formula(name)}" if index == 0 else None
            axes.plot(places, np.sort(rewards)[::-1], color=colour, linewidth=1, alpha=0.6, label=label)
            worst = max(worst, w1_distance(rewards, optimum))
        axes.plot(places, optimum, color=INK, linewidth=1.1, linestyle=(0, (3, 2)), label=None if number else "exact optimum")
    kind = "One utility: collapse" if len(names) == 1 else "Utility by prompt"
    axes.set(title=f"{kind}; W1 to optimum ≤ {worst:.3f}", xlabel="reward's place within its prompt", ylim=(-0.02, 1.02))
    axes.set_ylabel(f"trained reward (offset {OFFSET})")
    axes.grid(True, color=GRID)
    axes.legend(frameon=False, fontsize=7.5)


def _lists(axes: Axes, lists: Mapping[str, Trained]) -> None:
    """Mean and spread of the reward model's rewards by rank, beside the exact optimum."""
    runs = [(name, utilities, trained.of(number)) for utilities, trained in lists.items()
            for number, name in enumerate(utilities.split(","))]  # fmt: skip
    colours = (_SHARED_COLOUR, *_UTILITY_COLOURS)
    worst = 0.0
    for place, (name, utilities, rewards) in enumerate(runs):
        optimum = solve(name, rewards.shape[1], offset=OFFSET).rewards
        x = np.arange(1, rewards.shape[1] + 1) + 0.16 * (place - (len(runs) - 1) / 2)
        label = f"{_formula(name)}, {'all' if ',' not in utilities else 'half of the'} lists"
        axes.errorbar(x, rewards.mean(0), yerr=rewards.std(0), fmt="o", color=colours[place], markersize=4, label=label)
        axes.plot(x, optimum, "_", color=INK, markersize=11, label="exact optimum" if place == len(runs) - 1 else None)
        worst = max(worst, float(np.abs(rewards.mean(0) - optimum).max()))
    length = runs[0][2].shape[1]
    axes.set(title=f"Real lists of {length}: means within {worst:.3f}", xlabel="rank", ylim=(-0.05, 1.05))
    axes.set_xticks(range(1, length + 1))
    axes.set_ylabel("mean reward, and its spread over lists")
    axes.grid(True, axis="y", color=GRID)
    axes.legend(frameon=False, fontsize=7.5)
