"""Synthetic comparisons: made by formula, so that a test knows every number that the report must show."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from prefopt.report.schema import (
    Baseline,
    Cell,
    CellTiming,
    FrontierPoint,
    Judge,
    Ledger,
    Metric,
    Results,
    Setting,
    Timings,
)

REFERENCE = 0.11
# label: algorithm, KL at the end, share of the reachable gain that it reaches.
RUNS = {
    "dpo": ("dpo", 0.92, 0.68), "ipo": ("ipo", 0.16, 0.55), "cpl": ("cpl", 0.40, 0.62), "simpo": ("simpo", 1.15, 0.42),
    "kto": ("kto", 0.50, 0.58), "ppo": ("ppo", 0.75, 0.83), "grpo": ("grpo", 1.02, 0.80), "dpo beta=0.5": ("dpo", 0.30, 0.80),
}  # fmt: skip


def optimum(kl: float) -> float:
    """A frontier with the shape of the exact world's: sqrt(KL) near the reference, then flattening."""
    return REFERENCE + 1.9 * math.tanh(0.72 * math.sqrt(kl))


def one_cell(label: str, algorithm: str, kl: float, share: float, seed: int) -> Cell:
    """A run that moves along share * frontier with noise of its own seed."""
    random = np.random.default_rng([seed, len(label), ord(label[0])])
    end = kl * math.exp(0.06 * random.normal())
    path = []
    for step in range(0, 601, 75):
        at = end * (step / 600) ** 1.3
        reward = REFERENCE + share * (optimum(at) - REFERENCE) * (1 + 0.02 * random.normal())
        path.append({"step": float(step), "kl": at, "reward": reward, "length": 3.6 + at})
    curve = [
        {
            "step": float(step),
            "loss": 0.69 - step / 2000,
            "rewards/margins": share * step / 300 + 0.1 * random.normal(),
            "rewards/accuracies": min(1.0, 0.5 + 0.3 * step / 600 + 0.04 * random.normal()),
        }
        for step in range(10, 601, 10)
    ]
    last = path[-1]
    final = {
        "reward": last["reward"],
        "kl": last["kl"],
        "regret": optimum(last["kl"]) - last["reward"],
        "length": last["length"],
    }
    final |= {"accuracy": 0.6 + share / 5, "accuracy_log_ratio": 0.58 + share / 5}
    ledger = Ledger(38_400, 16, 1.92, 211_000, 211_000, 350_000 if algorithm in ("ppo", "grpo") else 0, 0)
    return Cell(algorithm, label, seed, "ok", None, final, tuple(path), tuple(curve), ledger)


def exact_results(seeds: int = 3, labels: tuple[str, ...] = tuple(RUNS)) -> Results:
    """The exact world with a frontier."""
    metrics = (
        Metric("reward", "hidden reward", "up", ".3f", primary=True),
        Metric("kl", "KL (nats)", None, ".3f"),
        Metric("regret", "regret", "down", ".3f"),
        Metric("length", "length", None, ".2f"),
        Metric("accuracy", "accuracy, own score", "up", ".1%", diagnostic=True),
        Metric("accuracy_log_ratio", "accuracy, log-ratio sum", "up", ".1%", diagnostic=True),
    )
    runs = {label: RUNS[label] for label in labels}
    return Results(
        schema_version=1,
        title="eight settings in the exact world",
        task="exact",
        settings=tuple(
            Setting(algorithm, label, {"beta": 0.1, "average_log_prob": True}) for label, (algorithm, _, _) in runs.items()
        ),
        seeds=tuple(range(seeds)),
        metrics=metrics,
        cells=tuple(one_cell(label, *run, seed) for label, run in runs.items() for seed in range(seeds)),
        preset="exact-small",
        created="2026-01-02T03:04:05Z",
        environment={"torch": "2.13.0", "python": "3.11"},
        command="prefopt compare dpo ipo --task exact",
        train={"steps": 600, "batch": {"pairs": 64, "order": "shared"}},
        data={
            "rows": {"policy": 20000, "tuning": 2000},
            "sources": ["exact:bt"],
            "dropped": [{"why": "tie", "rows": 12}],
            "truncated": None,
        },
        reference={"reward": REFERENCE, "kl": 0.0, "length": 3.6},
        baselines=(Baseline("longer wins", "accuracy", 0.44),),
        frontier=tuple(FrontierPoint(kl, optimum(kl), round(0.6 / kl, 2)) for kl in np.linspace(0.02, 1.6, 24).tolist()),
        shared_ledger={"sft_tokens": 120000.0},
        notes=("labels are drawn once",),
    )


def text_results(seeds: int = 3) -> Results:
    """A text task: no frontier; two judges, one of them near chance; an algorithm that drifts far."""
    exact = exact_results(seeds, ("dpo", "ipo", "kto", "ppo"))
    metrics = (
        Metric("score/big-rm", "score, big-rm", "up", "+.3f", primary=True),
        Metric("win_rate/tiny-rm", "preferred to reference, tiny-rm", "up", ".1%"),
        Metric("kl", "KL (nats)", None, ".2f", note="sampled at temperature 1, up to 64 tokens"),
        Metric("length", "length (tokens)", None, ".1f"),
    )
    far = {"dpo": 18.0, "ipo": 4.0, "kto": 9.0, "ppo": 120.0}

    def as_text(cell: Cell) -> Cell:
        scale = far[cell.label]
        path = tuple({"step": p["step"], "kl": p["kl"] * scale, "score/big-rm": p["reward"] - 0.3} for p in cell.path)
        final = {"score/big-rm": cell.final["reward"] - 0.3, "win_rate/tiny-rm": 0.5 + cell.final["reward"] / 8}
        return replace(cell, path=path, final=final | {"kl": path[-1]["kl"], "length": 40 + scale / 3})

    return replace(
        exact,
        task="text",
        title="four settings on conversations",
        metrics=metrics,
        cells=tuple(map(as_text, exact.cells)),
        reference={"score/big-rm": REFERENCE - 0.3, "win_rate/tiny-rm": 0.5, "kl": 0.0, "length": 38.0},
        baselines=(),
        frontier=None,
        judges=(
            Judge("big-rm", 0.71, 0.68, 0.74, 900, 0.12, 0.31),
            Judge("tiny-rm", 0.56, 0.52, 0.60, 900, same_backbone=True, note="64 M"),
        ),
    )


def some_timings(results: Results) -> Timings:
    """Seconds for every cell; memory was not measured."""
    cells = tuple(CellTiming(cell.label, cell.seed, 20.0 + cell.seed, 0.04, 5300.0) for cell in results.cells)
    return Timings(cells, {"sft": 11.5})


def fail_cell(results: Results, label: str, seed: int, error: str) -> Results:
    """The same comparison with one cell failed."""
    broken = [
        Cell(cell.algorithm, label, seed, "failed", error) if (cell.label, cell.seed) == (label, seed) else cell
        for cell in results.cells
    ]
    return replace(results, cells=tuple(broken))


@pytest.fixture
def make_exact() -> Callable[..., Results]:
    return exact_results


@pytest.fixture
def make_text() -> Callable[..., Results]:
    return text_results


@pytest.fixture
def make_timings() -> Callable[[Results], Timings]:
    return some_timings


@pytest.fixture
def fail() -> Callable[..., Results]:
    return fail_cell
