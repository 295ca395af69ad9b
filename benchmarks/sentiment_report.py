"""The tables of benchmarks.sentiment: the frontier, gains over the reference, early stopping, and what labels are worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from prefopt.report.grid import Column, Entry, Grid, to_rich
from prefopt.report.schema import PromptRow, Results
from prefopt.report.statistics import mean_interval
from prefopt.tasks.sentiment import GOLD, LEXICON, PROXY

Row = dict[str, Any]


def frontier_table(results: Results) -> list[Row]:
    """Where each setting ends, means and half-widths of t intervals over seeds; the reference first."""
    start = results.reference
    rows: list[Row] = [
        {"setting": "reference", **{key: [start.get(metric, math.nan), None] for key, metric in _COLUMNS.items()}}
    ]
    for setting in results.settings:
        row: Row = {"setting": setting.label}
        for key, metric in _COLUMNS.items():
            interval = mean_interval(list(results.values(setting.label, metric).values()))
            row[key] = [interval.mean, interval.half_width]
        rows.append(row)
    return rows


_COLUMNS = {
    "gold": f"score/{GOLD}", "proxy": f"score/{PROXY}", "lexicon": f"score/{LEXICON}", "KL": "kl", "length": "length",
    "distinct-2": "distinct_2", "repetition": "repetition", "perplexity": "perplexity",
}  # fmt: skip


def gains_table(
    results: Results, rows: Sequence[PromptRow], reference: Sequence[PromptRow], labels: Sequence[str], kl_bound: float
) -> list[Row]:
    """Gold reward of a setting minus that of the reference on the same prompts and draws.

    Over seeds: a t interval of the seeds' means. Over prompts: one of each prompt's gains, averaged over seeds first.
    """
    made = []
    for label in labels:
        by_seed, by_prompt = paired_gains(rows, reference, label)
        seeds, prompts = mean_interval(list(by_seed.values())), mean_interval(list(by_prompt.values()))
        kl = mean_interval(list(results.values(label, "kl").values())).mean
        # Without an interval over seeds nothing is said to be raised.
        low = [i.mean - i.half_width if i.half_width is not None else -math.inf for i in (seeds, prompts)]
        made.append(
            {
                "setting": label, "gain": [seeds.mean, seeds.half_width], "over prompts": [prompts.mean, prompts.half_width],
                "seeds": seeds.n, "prompts": prompts.n, "KL": [kl, None],
                "raised": min(low) > 0 and kl < kl_bound,
            }
        )  # fmt: skip
    return made


def paired_gains(
    rows: Sequence[PromptRow], reference: Sequence[PromptRow], label: str, judge: str = GOLD
) -> tuple[dict[int, float], dict[str, float]]:
    """The mean gain of each seed, and that of each prompt over seeds."""
    before = {(row.seed, row.prompt_id): row.score for row in reference if row.judge == judge}
    gains = {
        (row.seed, row.prompt_id): row.score - before[row.seed, row.prompt_id]
        for row in rows
        if row.label == label and row.judge == judge
    }
    return _means(gains, 0), _means(gains, 1)


def _means(gains: Mapping[tuple[int, str], float], place: int) -> dict[Any, float]:
    found: dict[Any, list[float]] = {}
    for key, value in gains.items():
        found.setdefault(key[place], []).append(value)
    return {key: sum(values) / len(values) for key, values in found.items()}


def early_stopping(results: Results) -> list[Row]:
    """Gold reward at the end, and at the checkpoint where the other seeds' mean gold reward is highest.

    A checkpoint that is chosen by the same samples that it is reported on looks better than it is: so each seed is stopped
    where the other seeds say.
    """
    made = []
    for setting in results.settings:
        paths = [{point["step"]: point for point in cell.path} for cell in results.cells_of(setting.label)]
        steps = sorted(set.intersection(*map(set, paths))) if paths else []
        if len(paths) < 2 or len(steps) < 2:
            continue
        stopped, chosen = [], []
        for index, path in enumerate(paths):
            others = paths[:index] + paths[index + 1 :]
            best = max((sum(other[step][f"score/{GOLD}"] for other in others), step) for step in steps)[1]
            chosen.append(best)
            stopped.append(path[best][f"score/{GOLD}"])
        last = [path[steps[-1]][f"score/{GOLD}"] for path in paths]
        difference = mean_interval([one - other for one, other in zip(stopped, last, strict=True)])
        made.append(
            {
                "setting": setting.label, "at the end": [mean_interval(last).mean, None],
                "stopped": [mean_interval(stopped).mean, None], "difference": [difference.mean, difference.half_width],
                "updates": "/".join(f"{step:g}" for step in chosen),
            }
        )  # fmt: skip
    return made


def labels_table(found: Sequence[Row]) -> list[Row]:
    """Means over seeds of what an equal number of labels bought."""
    rows = []
    for label in dict.fromkeys(row["label"] for row in found):
        own = [row for row in found if row["label"] == label]
        row: Row = {"setting": label}
        for key in ("gold", "lexicon", "KL", "distinct-2", "perplexity"):
            interval = mean_interval([one[_COLUMNS[key]] for one in own])
            row[key] = [interval.mean, interval.half_width]
        rows.append(row)
    return rows


def show(found: Mapping[str, Sequence[Row]], console: Console) -> None:
    """Every table on the terminal."""
    for title, rows in found.items():
        if rows:
            columns = tuple(Column(name, numeric=number > 0) for number, name in enumerate(rows[0]))
            grid = Grid(title, columns, tuple(tuple(Entry(_text(value)) for value in row.values()) for row in rows))
            console.print(to_rich(grid))


def _text(value: Any) -> str:
    if isinstance(value, list):
        mean, half = value
        return f"{mean:.3g}" if half is None else f"{mean:.3g} ± {half:.2g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
