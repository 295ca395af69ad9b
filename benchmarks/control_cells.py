"""Cells of benchmarks.control: preference algorithms through `compare`, P-IQL by its own loop, on the same episodes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.piql import PiqlOptions, train_piql
from prefopt.compare import compare
from prefopt.control.policies import Actor, ControlPolicy
from prefopt.files import write_json
from prefopt.machine import end_with_parent
from prefopt.options import Options
from prefopt.report.schema import Results, Timings, load_timings
from prefopt.stages import content_key
from prefopt.study import Study
from prefopt.tasks import prepare_process
from prefopt.tasks.simulated import SimulatedTask

PIQL = "p-iql"


@dataclass(frozen=True)
class Run:
    """One policy's way through training.

    Args:
        task, algorithm, seed: whose.
        updates, successes, returns: at each evaluation, the last one at the end.
        seconds: of training, evaluations and start-up left out.
        parameters: trained, of all networks; those of target networks included.
    """

    task: str
    algorithm: str
    seed: int
    updates: tuple[float, ...]
    successes: tuple[float, ...]
    returns: tuple[float, ...]
    seconds: float
    parameters: int

    def best_window(self, width: int) -> float:
        """The best mean of `width` neighbouring evaluations: how the paper reads its curves, which flatters every algorithm."""
        width = min(width, len(self.successes))
        sums = [sum(self.successes[i : i + width]) for i in range(len(self.successes) - width + 1)]
        return max(sums) / width


def run_study(task: str, study: Study, folder: Path, cache: Path, workers: int, console: Console) -> list[Run]:
    """A study's cells as runs; finished ones are kept. Its policies are saved in the folder.

    Raises:
        PrefoptError: as `compare`; and a failed cell, whose message it carries.
    """
    results = compare(study, folder, cache=cache, workers=workers, save_policies=True, console=console)
    timings = load_timings(folder)
    assert timings is not None
    actor = SimulatedTask(study.options, cache).actor()
    return read_runs(task, results, timings, sum(weight.numel() for weight in actor.parameters()))


def read_runs(task: str, results: Results, timings: Timings, parameters: int) -> list[Run]:
    """The finished cells of a comparison."""
    seconds = {(timing.label, timing.seed): timing.seconds_per_step for timing in timings.cells}
    runs = []
    for setting in results.settings:
        for cell in results.cells_of(setting.label):
            updates, successes, returns = zip(
                *((line["step"], line["success"], line["return"]) for line in cell.path), strict=True
            )
            spent = seconds[cell.label, cell.seed] * updates[-1]
            runs.append(Run(task, cell.label, cell.seed, updates, successes, returns, spent, parameters))
    return runs


def run_piql(
    task: str, options: Options, piql: PiqlOptions, seeds: Sequence[int], folder: Path, cache: Path, workers: int
) -> list[Run]:
    """P-IQL on the pairs and from the start of each seed; finished seeds are kept."""
    jobs = [(task, options, piql, seed, folder, cache) for seed in seeds]
    waiting = [job for job in jobs if not _stored(*job).exists()]
    if waiting:
        with ProcessPoolExecutor(
            min(workers, len(waiting)), mp_context=get_context("spawn"), initializer=end_with_parent, max_tasks_per_child=1
        ) as pool:
            for future in [pool.submit(_run_seed, *job) for job in waiting]:
                future.result()
    return [_read(json.loads(_stored(*job).read_text())) for job in jobs]


def piql_actor(folder: Path, seed: int) -> Path:
    """Where the policy of a seed is saved, as `load_actor` reads it."""
    return folder / f"policy-{seed}"


def _run_seed(task: str, options: Options, piql: PiqlOptions, seed: int, folder: Path, cache: Path) -> None:
    prepare_process(options, 1)
    world = SimulatedTask(options, cache)
    offline, start = world.offline(seed), world.started(seed)[0]

    def evaluate(actor: Actor) -> Mapping[str, float]:
        found = world.outcomes(actor)
        assert found.returns is not None
        return {"success": found.rate, "return": float(found.returns.mean())}

    count = options.evaluation.checkpoints
    at = {round(piql.updates * (i + 1) / count) for i in range(count)}
    found = train_piql(
        start, offline.steps, world.pairs(seed), piql, seed=seed, episodes=offline.train, held_out=world.test_pairs(seed),
        evaluate=evaluate, evaluate_at=at,
    )  # fmt: skip
    columns = [tuple(line[name] for line in found.lines) for name in ("step", "success", "return")]
    run = Run(task, PIQL, seed, *columns, found.seconds, sum(found.parameters.values()))
    folder.mkdir(parents=True, exist_ok=True)
    ControlPolicy(found.actor, offline.steps).save(piql_actor(folder, seed))
    write_json(_stored(task, options, piql, seed, folder, cache), asdict(run))


def _stored(task: str, options: Options, piql: PiqlOptions, seed: int, folder: Path, cache: Path) -> Path:
    return folder / f"{task}-{seed}-{content_key(options.as_dict(), asdict(piql))}.json"


def _read(stored: Mapping[str, Any]) -> Run:
    return Run(**{name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()})
