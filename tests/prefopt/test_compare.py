"""A whole comparison in a small exact world: equal runs, going on after an interruption, failing cells, shared rows."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import losses
from losses.types import LossOutput
from prefopt import cell, compare, jobs
from prefopt.data.exact_world import WorldConfig
from prefopt.errors import ConfigError, OutputError
from prefopt.optimization import Logging, Optimization
from prefopt.options import DataOptions, EvaluationOptions, Options, SupervisedOptions
from prefopt.packing import PackedBatch
from prefopt.report import load_results, write_report
from prefopt.report.schema import Results
from prefopt.rollouts import RolloutStream
from prefopt.streams import Budget, OfflineStream
from prefopt.study import Entry, Study
from prefopt.tasks import exact


@losses.register("compare_test_broken")
def compare_test_broken_loss(policy_chosen_logps: torch.Tensor, policy_rejected_logps: torch.Tensor) -> LossOutput:
    """Fails in the middle of training: a bug in a user's loss."""
    raise RuntimeError("the user's loss fell over")


@contextmanager
def small_world() -> Iterator[None]:
    """The exact task with 4 prompts of 40 completions and a start trained for a moment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "WorldConfig", lambda seed: WorldConfig.tabular(seed))
        patch.setattr(exact, "START_SAMPLES", 512)
        patch.setattr(exact, "START_BUDGET", Budget(batch_size=64, epochs=2.0, micro_batch_tokens=1 << 20))
        yield


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny_world(shared_cache: Path) -> Iterator[Path]:
    """The small world for one test, so that no other test of the process sees it; the cache that all share."""
    with small_world():
        yield shared_cache


def study(*algorithms: str | Entry, seeds: tuple[int, ...] = (0, 1), **changes: Any) -> Study:
    options = Options(
        data=DataOptions(pairs=64),
        supervised=SupervisedOptions(reward_batch_size=32, reward_learning_rate=1e-3),
        budget=Budget(batch_size=16, max_steps=2, **changes),
        optimization=Optimization(learning_rate=1e-3),
        logging=Logging(log_every=1),
        evaluation=EvaluationOptions(checkpoints=1),
    )
    entries = [Entry(each) if isinstance(each, str) else each for each in algorithms]
    return Study(entries, seeds, options)


PPO = Entry("ppo", {"rollout_size": 32, "ppo_epochs": 1})


def run(given: Study, output: Path, cache: Path, **options: Any) -> Results:
    return compare.compare(given, output, cache=cache, workers=0, **options)


def stored(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="session")
def finished(shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DPO and PPO on two seeds, from an empty cache."""
    folder = tmp_path_factory.mktemp("study") / "first"
    with small_world():
        run(study("dpo", PPO), folder, shared_cache)
    return folder


def test_results_load_and_say_what_was_measured(finished: Path) -> None:
    results = load_results(finished)
    assert [(cell.label, cell.seed, cell.status) for cell in results.cells] == [
        ("dpo", 0, "ok"), ("ppo rollout_size=32 ppo_epochs=1", 0, "ok"),
        ("dpo", 1, "ok"), ("ppo rollout_size=32 ppo_epochs=1", 1, "ok"),
    ]  # fmt: skip
    keys = {metric.key for metric in results.metrics}
    for each in results.cells:
        assert set(each.final) == keys
        assert each.path[-1] == {"step": 2.0, **each.final}
        assert [line["step"] for line in each.curve] == [1.0, 2.0]
        assert each.final["kl"] > 0
        assert each.final["gap"] >= -1e-6
        assert each.final["regret"] >= 0
    assert results.reference["kl"] == pytest.approx(0, abs=1e-9)
    assert results.reference["gap"] == 0
    assert results.frontier
    dpo, ppo = results.cells[:2]
    assert dpo.ledger.labels == 32
    assert ppo.ledger.labels == 64
    assert (dpo.ledger.generated_tokens, dpo.ledger.reward_model_tokens) == (0, 0)
    assert ppo.ledger.generated_tokens > 32
    assert ppo.ledger.reward_model_tokens > 0
    assert dpo.ledger.reference_tokens > 0
    assert results.smoke
    assert (finished / "timings.json").exists()
    assert write_report(finished).stat().st_size > 1000


def test_seeds_differ_and_algorithms_start_together(finished: Path) -> None:
    results = load_results(finished)
    first, second = (cell.final["reward"] for cell in results.cells_of("dpo"))
    assert first != second
    dpo = results.cells_of("dpo")[0]
    assert dpo.curve[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_equal_runs_have_equal_results(finished: Path, tiny_world: Path, tmp_path: Path) -> None:
    """Another folder and a cache that is warm by now: results.json is the same byte for byte; clocks live elsewhere."""
    run(study("dpo", PPO), tmp_path / "again", tiny_world)
    assert stored(tmp_path / "again") == stored(finished)
    assert (tmp_path / "again" / "results.json").read_bytes() == (finished / "results.json").read_bytes()
    assert "seconds" not in (finished / "results.json").read_text()


@pytest.fixture
def cells_run(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Label and seed of every cell that is really trained."""
    ran: list[tuple[str, int]] = []
    run_cell = jobs.run_cell

    def noted(task: Any, setting: Any, options: Any, seed: int, **more: Any) -> Any:
        ran.append((more["label"], seed))
        return run_cell(task, setting, options, seed, **more)

    monkeypatch.setattr(jobs, "run_cell", noted)
    return ran


@pytest.mark.slow
def test_finished_cells_are_not_run_again_and_new_algorithms_join(
    tiny_world: Path, tmp_path: Path, cells_run: list[tuple[str, int]]
) -> None:
    """One seed, then the same again, then another algorithm, then another seed: each cell is trained once."""
    folder = tmp_path / "study"
    first = run(study("dpo", seeds=(0,)), folder, tiny_world)
    run(study("dpo", seeds=(0,)), folder, tiny_world)
    assert cells_run == [("dpo", 0)]
    run(study("dpo", "ipo", Entry("dpo", {"beta": 0.5}), seeds=(0,)), folder, tiny_world)
    assert cells_run[1:] == [("ipo", 0), ("dpo beta=0.5", 0)]
    both = run(study("dpo", "ipo", Entry("dpo", {"beta": 0.5})), folder, tiny_world)
    assert sorted(cells_run[3:]) == [("dpo", 1), ("dpo beta=0.5", 1), ("ipo", 1)]
    assert both.cells[0] == first.cells[0]
    assert [cell.status for cell in both.cells] == ["ok"] * 6
    assert both.values("dpo", "reward") != both.values("dpo beta=0.5", "reward")


@pytest.mark.slow
def test_a_failing_cell_is_reported_and_the_others_finish(
    tiny_world: Path, tmp_path: Path, cells_run: list[tuple[str, int]]
) -> None:
    """The error stands in the results and in the cell's folder; the failed cell, and it alone, is tried again next time."""
    folder = tmp_path / "study"
    given = study("compare_test_broken", "dpo")
    results = run(given, folder, tiny_world)
    assert [(cell.label, cell.status) for cell in results.cells] == [("compare_test_broken", "failed"), ("dpo", "ok")] * 2
    assert results.cells[0].error_line == "RuntimeError: the user's loss fell over"
    assert load_results(folder).failed_of("compare_test_broken")[1].error is not None
    assert "Traceback" in next((folder / "cells").glob("compare_test_broken-*/failure.txt")).read_text()
    assert "the user&#39;s loss fell over" in (folder / "report.html").read_text()
    assert len(cells_run) == 4
    run(given, folder, tiny_world)
    assert cells_run[4:] == [("compare_test_broken", 0), ("compare_test_broken", 1)]


def test_the_folder_of_another_study_is_refused(finished: Path, tiny_world: Path, tmp_path: Path) -> None:
    before = stored(finished)
    with pytest.raises(OutputError, match=r"other options \(options\.budget\.epochs\).*--overwrite"):
        run(study("dpo", PPO, epochs=2.0), finished, tiny_world)
    assert stored(finished) == before
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="holds no comparison of prefopt"):
            run(study("dpo"), tmp_path, tiny_world, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").exists()
    with pytest.raises(OutputError, match="is a file"):
        run(study("dpo"), tmp_path / "thesis.tex", tiny_world)


def test_overwrite_starts_afresh(tiny_world: Path, tmp_path: Path, cells_run: list[tuple[str, int]]) -> None:
    folder = tmp_path / "study"
    run(study("dpo", seeds=(0,)), folder, tiny_world)
    results = run(study("ipo", seeds=(0,), epochs=2.0), folder, tiny_world, overwrite=True)
    assert cells_run == [("dpo", 0), ("ipo", 0)]
    assert [cell.label for cell in results.cells] == ["ipo"]
    assert len(list((folder / "cells").iterdir())) == 1


def test_all_algorithms_of_a_seed_see_the_same_rows_in_the_same_order(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ids that each cell's stream yields: equal across algorithms, PPO's prompts being those rows' too; other seeds see
    other pairs in another order."""
    seen: dict[tuple[str, int], list[str]] = {}
    build_stream = cell.build_stream

    class Noting:
        def __init__(self, stream: OfflineStream | RolloutStream, ids: list[str]) -> None:
            self._stream, self._ids = stream, ids

        def __iter__(self) -> Iterator[list[PackedBatch]]:
            for step in self._stream:
                self._ids.extend(identity for batch in step for identity in batch.ids)
                yield step

        def __getattr__(self, name: str) -> Any:
            return getattr(self._stream, name)

    def noting(task: Any, setting: Any, *more: Any, **options: Any) -> Any:
        stream, tokens = build_stream(task, setting, *more, **options)
        return Noting(stream, seen.setdefault((setting.algorithm.name, more[-1]), [])), tokens

    monkeypatch.setattr(cell, "build_stream", noting)
    run(study("dpo", "cpl", "sft", "ipo", PPO), tmp_path / "study", tiny_world)
    for seed in (0, 1):
        rows = seen["dpo", seed]
        assert len(set(rows)) == 32
        for name in ("cpl", "sft", "ipo"):
            assert seen[name, seed] == rows
        # A rollout's id is its prompt's with the number of the draw; the first 32 rows of the order make the first buffer.
        assert {identity.split("#")[0] for identity in seen["ppo", seed]} == set(rows)
    assert seen["dpo", 0] != seen["dpo", 1]


def test_studies_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="dpo was named twice"):
        study("dpo", "dpo")
    with pytest.raises(ConfigError, match="seeds must be"):
        study("dpo", seeds=(1, 1))
    with pytest.raises(ConfigError, match="name each setting once"):
        study()
    with pytest.raises(ConfigError, match="did you mean 'ipo'"):
        study("ipoo").settings()


@pytest.mark.slow
def test_worker_processes_give_the_results_of_one_process(tmp_path: Path) -> None:
    """The real exact world, cells side by side from an empty cache: results.json does not depend on who ran what."""
    cache = tmp_path / "cache"
    compare.compare(study("dpo", PPO, seeds=(0,)), tmp_path / "workers", cache=cache, workers=2)
    compare.compare(study("dpo", PPO, seeds=(0,)), tmp_path / "one", cache=cache, workers=0)
    one, workers = stored(tmp_path / "one"), stored(tmp_path / "workers")
    for part in (one, workers):
        part["environment"].pop("threads")
    assert [cell["status"] for cell in one["cells"]] == ["ok", "ok"]
    assert one == workers


ORPHANS = """
    import os, sys, time
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context
    from prefopt.machine import end_with_parent
    if __name__ == "__main__":
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=end_with_parent)
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600).result()
"""


@pytest.mark.slow
def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    """kill -9 on the comparison: its worker, in the middle of a cell, is gone within seconds."""
    script = tmp_path / "orphans.py"
    script.write_text(textwrap.dedent(ORPHANS))
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while _alive(worker):
        assert time.monotonic() < deadline, "the worker goes on without its parent"
        time.sleep(0.1)


def _alive(pid: int) -> bool:
    """Running, not merely waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
