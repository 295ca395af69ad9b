"""A loop by round: the table, the figure and summary.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.console import Console
from rich.table import Table

from prefopt.iterate.folder import write_json
from prefopt.report.plotting import DPI, styled, to_png

SUMMARY_FILE, FIGURE_FILE = "summary.json", "rounds.png"


@dataclass(frozen=True)
class Curve:
    """One quantity by round.

    Args:
        key: in the metrics of round.json.
        label: for people.
        panel: the axes that it is drawn in.
        colour: its own in its panel.
        format: of its numbers in the table.
        of_samples: it is about the samples, which are those of the policy before the round.
    """

    key: str
    label: str
    panel: str
    colour: str
    format: str = ".3f"
    of_samples: bool = False


_BLUE, _RED, _GREEN = "#0072B2", "#D55E00", "#009E73"
_REWARD, _KL, _AGREEMENT = "reward", "KL to the start, nats", "agreement with the labels"


def curves(start: Mapping[str, Any]) -> tuple[Curve, ...]:
    """What is shown of a loop; its task's primary metric stands in start.json."""
    primary = start["primary"]
    return (
        Curve("samples/score", "labeller's score of samples", _REWARD, _GREEN, of_samples=True),
        Curve("proxy", "learned reward", _REWARD, _RED),
        Curve(primary["key"], primary["label"], _REWARD, _BLUE, primary["format"]),
        Curve("kl", "KL to the start", _KL, _BLUE),
        Curve("labels/agree_true", "true reward", _AGREEMENT, _GREEN, ".1%", of_samples=True),
        Curve("labels/agree_before", "learned before", _AGREEMENT, _RED, ".1%", of_samples=True),
        Curve("labels/agree_after", "learned after", _AGREEMENT, _BLUE, ".1%"),
    )


def write_summary(output: Path, start: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> None:
    """output/summary.json and rounds.png; equal loops give equal files."""
    kept = [{key: value for key, value in facts.items() if not key.startswith("time/")} for facts in rounds]
    write_json(output / SUMMARY_FILE, {"start": start, "rounds": kept})
    with styled():
        (output / FIGURE_FILE).write_bytes(to_png(_figure(start, rounds)))


def print_rounds(start: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]], console: Console) -> None:
    """A row for the start and one for each round."""
    shown = [curve for curve in curves(start) if any(_value(facts, curve) is not None for facts in rounds)]
    table = Table(
        title="rounds", title_justify="left", caption="agreement: share of the round's labels", caption_justify="left"
    )
    for header in ("round", "labels", *(_header(curve) for curve in shown), "policy"):
        table.add_column(header, justify="left" if header == "policy" else "right")
    table.add_row("start", "", *(_cell(start, curve) for curve in shown), start["policy"][:8])
    for facts in rounds:
        row = [str(facts["round"]), str(facts["counts"]["labels"]), *(_cell(facts, curve) for curve in shown)]
        table.add_row(*row, facts["policy_after"][:8])
    console.print(table)


def _header(curve: Curve) -> str:
    return f"agree: {curve.label}" if curve.panel == _AGREEMENT else curve.label


def _value(facts: Mapping[str, Any], curve: Curve) -> float | None:
    value: float | None = facts["metrics"].get(curve.key)
    return value


def _cell(facts: Mapping[str, Any], curve: Curve) -> str:
    value = _value(facts, curve)
    return "" if value is None else format(value, curve.format)


def _figure(start: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]) -> Figure:
    """Reward, KL and agreement side by side; what is about samples stands at the policy that drew them."""
    figure = Figure(figsize=(10.2, 3.2), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = dict(zip((_REWARD, _KL, _AGREEMENT), figure.subplots(1, 3), strict=True))
    for curve in curves(start):
        points = [(facts["round"] - curve.of_samples, _value(facts, curve)) for facts in rounds]
        points = [(0, _value(start, curve)), *points] if not curve.of_samples else points
        known = [(x, y) for x, y in points if y is not None]
        if known:
            axes[curve.panel].plot(*zip(*known, strict=True), color=curve.colour, marker="o", markersize=4, label=curve.label)
    for name, panel in axes.items():
        panel.set(xlabel="after round", title=name, xlim=(-0.2, len(rounds) + 0.2))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(visible=True)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(frameon=False, fontsize=8)
    axes[_AGREEMENT].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure
