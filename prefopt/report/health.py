"""Whether a run on rollouts was healthy: what people watch, with the range that it is expected in.

The ranges are rules of thumb (Huang et al. 2024; Engstrom et al. 2020), not tests: a value outside says where to look
first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from prefopt.report.grid import Column, Entry, Grid
from prefopt.report.schema import Cell, Results

# The part of a run that says how it ended, and the one that says how it began.
_LAST, _FIRST = 0.25, 0.1


@dataclass(frozen=True)
class Watched:
    """One metric of the training log.

    Args:
        key: its name in the log.
        label: what a reader calls it.
        low, high: where its mean over the last quarter of a run is expected.
        look: where to look when it is not.
        relative: the bounds are of its ratio to the first tenth of the run.
    """

    key: str
    label: str
    low: float
    high: float
    look: str
    relative: bool = False


WATCHED = (
    Watched("kl", "KL to reference, nats", -0.5, 10.0, "kl_coef too low; a reward that is being exploited"),
    Watched("approx_kl", "KL of one update, nats/token", 0.0, 0.02, "learning rate or epochs too high; stop_kl"),
    Watched("clip_frac", "clipped tokens", 0.0, 0.3, "learning rate or epochs too high"),
    Watched("ratio/max", "largest ratio", 0.0, 10.0, "a few tokens moved far; lower the learning rate, or dual_clip"),
    Watched("value/explained_variance", "explained variance", 0.0, 1.0, "a value head that misleads: vf_coef, learning rate"),
    Watched("entropy/sampled", "entropy, of its start", 0.5, 1.5, "collapse or blow-up: entropy_coef, kl_coef", relative=True),
    Watched("completion_length", "length, of its start", 0.5, 2.0, "a reward that pays for length", relative=True),
    Watched("eos_share", "ends by itself", 0.5, 1.0, "the limit of length, or missing_eos_penalty"),
    Watched("score", "score", -math.inf, math.inf, ""),
    Watched("score/spread", "spread of scores", 1e-3, math.inf, "equal scores teach nothing"),
    Watched("score/disagreement", "ensemble's disagreement", 0.0, math.inf, ""),
    Watched("kl_coef", "price of KL", 1e-4, 10.0, "a controller whose target cannot be met"),
)


def health_grid(results: Results) -> Grid:
    """Settings on rollouts by what is watched; a value outside of its range is marked. No rows where nothing was watched."""
    rows = []
    shown = [w for w in WATCHED if any(w.key in line for cell in results.cells for line in cell.curve)]
    warnings = []
    for setting in results.settings:
        cells = [cell for cell in results.cells_of(setting.label) if any("completion_length" in line for line in cell.curve)]
        if not cells:
            continue
        row = [Entry(setting.label, "strong")]
        for watched in shown:
            found = _value(watched, cells)
            outside = math.isfinite(found) and not watched.low <= found <= watched.high
            row.append(Entry(_text(found) + (" !" if outside else ""), "failed" if outside else ""))
            if outside:
                warnings.append(
                    f"{setting.label}: {watched.label} is {_text(found)}, expected {_range(watched)}: {watched.look}."
                )
        rows.append(tuple(row))
    columns = [Column("setting", numeric=False), *(Column(w.label, note=f"expected {_range(w)}") for w in shown)]
    captions = [
        "Mean over seeds of the last quarter of the training log; expected ranges are rules of thumb.",
        "Expected: " + "; ".join(f"{w.label} {_range(w)}" for w in shown) + ".",
    ]
    return Grid("health of the runs on rollouts", tuple(columns), tuple(rows), (*captions, *warnings) if rows else ())


def _value(watched: Watched, cells: Sequence[Cell]) -> float:
    """Mean over cells of the last quarter, or of its ratio to the first tenth; NaN where nothing was logged."""
    found = []
    for cell in cells:
        series = [line[watched.key] for line in cell.curve if watched.key in line and math.isfinite(line[watched.key])]
        if not series:
            continue
        last = _mean(series[-max(1, round(_LAST * len(series))) :])
        first = _mean(series[: max(1, round(_FIRST * len(series)))])
        found.append(last if not watched.relative else last / first if first else math.nan)
    return _mean(found) if found else math.nan


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _text(value: float) -> str:
    return "n/a" if not math.isfinite(value) else f"{value:.3g}"


def _range(watched: Watched) -> str:
    """In words."""
    unit = " times" if watched.relative else ""
    if math.isinf(watched.low) and math.isinf(watched.high):
        return "any"
    if math.isinf(watched.high):
        return f"at least {watched.low:g}{unit}"
    return f"{watched.low:g} to {watched.high:g}{unit}"
