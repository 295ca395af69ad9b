"""The arithmetic of benchmarks.control on made curves: windows, tests, costs, and the sentence on dense comparisons."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks.control import Plan, studies
from benchmarks.control_cells import PIQL, Run
from benchmarks.control_figures import draw_curves
from benchmarks.control_report import comparison_table, cost_table, dense_sentence, success_table
from prefopt.control.segments import Labelling, compare_segments
from prefopt.control.steps import Steps
from prefopt.data.exact_world.labels import parse_labels


def run(
    algorithm: str, seed: int, successes: tuple[float, ...], task: str = "door", seconds: float = 10.0, size: int = 100
) -> Run:
    updates = tuple(10.0 * (i + 1) for i in range(len(successes)))
    return Run(task, algorithm, seed, updates, successes, successes, seconds, size)


def three(algorithm: str, level: float, task: str = "door", **more: float) -> list[Run]:
    """Three seeds around a level, alike for every algorithm but for a little."""
    return [
        run(algorithm, seed, (level - 0.2, level + noise + 0.01 * (seed == sum(map(ord, algorithm)) % 3)), task, **more)  # type: ignore
        for seed, noise in enumerate((0.0, 0.1, -0.1))
    ]


def test_the_best_window_is_the_best_mean_of_neighbours() -> None:
    own = run("cpl", 0, (0.0, 0.9, 0.3, 0.6, 0.0))
    assert own.best_window(1) == 0.9
    assert own.best_window(2) == pytest.approx(0.6)
    assert own.best_window(3) == pytest.approx(0.6)
    assert own.best_window(9) == pytest.approx(0.36)


def test_success_is_a_mean_over_seeds_with_its_interval() -> None:
    (row,) = success_table([run("cpl", seed, (value,)) for seed, value in enumerate((0.2, 0.4, 0.6))], 1)
    mean, half = row["door"]
    assert mean == pytest.approx(0.4)
    assert half == pytest.approx(4.3027 * 0.2 / math.sqrt(3), rel=1e-4)
    assert row["all tasks"] == pytest.approx([mean, half])


def test_all_tasks_average_within_a_seed_first() -> None:
    values = {("door", 0): 0.0, ("drawer", 0): 1.0, ("door", 1): 0.4, ("drawer", 1): 0.8}
    runs = [run("cpl", seed, (value,), task) for (task, seed), value in values.items()]
    (row,) = success_table(runs, 1)
    assert row["all tasks"][0] == pytest.approx((0.5 + 0.6) / 2)


def test_tests_are_paired_and_say_what_cannot_be_told() -> None:
    runs = [*three("cpl", 0.8), *three("sft", 0.3), *three(PIQL, 0.79), *three("cpl dense", 0.8)]
    found = {(row["task"], row["difference"]): row for row in comparison_table(runs, 1)}
    assert found["door", "cpl - sft"]["verdict"] == "cpl is better"
    assert found["door", f"cpl - {PIQL}"]["verdict"].startswith("cannot be told apart")
    assert {task for task, _ in found} == {"door", "all tasks"}
    assert len(found) == 8


def test_the_dense_sentence_follows_the_interval() -> None:
    assert "make no difference that can be told" in dense_sentence([*three("cpl", 0.5), *three("cpl dense", 0.505)], 1)
    assert " help: +30" in dense_sentence([*three("cpl", 0.5), *three("cpl dense", 0.8)], 1)
    assert " hurt: -30" in dense_sentence([*three("cpl", 0.8), *three("cpl dense", 0.5)], 1)
    assert "too few seeds" in dense_sentence([run("cpl", 0, (0.1,)), run("cpl dense", 0, (0.2,))], 1)


def test_costs_are_over_those_of_cpl() -> None:
    runs = [*three("cpl", 0.5, seconds=10.0, size=100), *three(PIQL, 0.5, seconds=16.0, size=400)]
    found = {row["algorithm"]: row for row in cost_table(runs)}
    assert found[PIQL]["seconds over cpl"] == pytest.approx(1.6)
    assert found[PIQL]["parameters over cpl"] == 4
    assert found["cpl"]["ms an update"] == pytest.approx(10_000 / 20)


def test_dense_comparisons_are_of_the_segments_of_the_sparse_ones(tmp_path: Path) -> None:
    made = studies(Plan(pairs=10, dense=3), tmp_path, "regret")
    count = 3000
    steps = Steps(torch.zeros(count, 1), torch.zeros(count, 1), torch.zeros(count), -torch.rand(count), torch.tensor([count]))
    met = []
    for kind in ("sparse", "dense"):
        data, control = made[kind].options.data, made[kind].options.control
        labelling = Labelling(control.preferences, parse_labels(data.labels))
        pairs = compare_segments(
            steps, labelling, pairs=data.pairs, length=control.segment_length, seed=0, segments=control.segments
        )  # fmt: skip
        met.append({*pairs.chosen.tolist(), *pairs.rejected.tolist()})
    sparse, dense = met
    assert len(sparse) == 20
    assert len(dense) > 15
    assert dense <= sparse


def test_curves_are_drawn() -> None:
    assert draw_curves([*three("cpl", 0.8), *three("sft", 0.3)]).startswith(b"\x89PNG")
