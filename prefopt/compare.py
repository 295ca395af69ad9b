"""A comparison: algorithms x seeds on the same rows, in the same order, against the same reference -> results.json.

A cell is a setting on a seed (jobs.py). A finished cell is not run again, so an interrupted comparison goes on where it stopped
and takes new algorithms later; processes that share a folder share the work.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock
from rich.console import Console

from prefopt.data.report import render
from prefopt.environment import environment
from prefopt.errors import ConfigError, OutputError
from prefopt.executors import ExecutorName, Placement
from prefopt.files import LOCK, contents, differences, empty, write_json
from prefopt.jobs import CELLS_FOLDER, Job, run_all
from prefopt.matching import matched
from prefopt.options import default_cache
from prefopt.report import print_summary, save_results, save_timings, write_report
from prefopt.report.schema import (
    PER_PAIR_FILE,
    PER_PROMPT_FILE,
    REPEAT_FILE,
    SCHEMA_VERSION,
    Cell,
    Results,
    Setting,
    Timings,
    Tuning,
)
from prefopt.study import Study
from prefopt.tasks import Shared, Task, build_task, prepare_process
from prefopt.tuning import chosen, tuned, tuning_study

STUDY_FILE, TUNING_FOLDER = "study.json", "tuning"
_HERE = Placement(workers=0)


def compare(
    study: Study,
    output: Path,
    *,
    cache: Path | None = None,
    workers: int | None = None,
    executor: ExecutorName = "processes",
    ray_address: str = "",
    shard: tuple[int, int] = (1, 1),
    save_policies: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> Results:
    """Tunes where the study says so, runs every cell that is not finished yet, and writes results, timings and the report.

    Args:
        study: what is compared.
        output: its folder; one that holds another study is refused unless `overwrite`.
        cache: of shared starts, reward models and reference log-probs.
        workers: cells side by side; None chooses by task and cores, 0 runs them in this process.
        executor: processes of this machine, or a Ray cluster, whose machines share `output` and the working folder.
        ray_address: HOST:PORT of a running cluster, or auto; empty starts one on this machine.
        shard: (i, n): only every n-th cell, from the i-th on, for processes that share the folder. Who ends last writes the
            results; until then those that are there are returned and nothing is written.
        save_policies: keep every trained policy.
        overwrite: delete what `output` holds.
        console: for people; None is silent.

    Raises:
        PrefoptError: bad options, data or output folder. A failing cell is reported in the results instead.
    """
    console = console or Console(quiet=True)
    placement = Placement(executor, workers, ray_address)
    study.settings()
    cache = cache or default_cache()
    _check_shard(shard)
    prepare_folder(output, study, overwrite)
    begin = time.perf_counter()
    prepare_process(study.options, 1)
    study, records = tune(study, output, cache=cache, placement=placement, console=console)
    task, shared = _prepare(study, cache, console)
    study = matched(study, task, output, cache, console)
    prepared = time.perf_counter() - begin
    jobs = list_jobs(study, output, cache, placement, save_policies)
    _run_own(jobs, shard, placement, console)
    results, timings = collect(study, task, shared, jobs, prepared, records)
    unsettled = [job for job in jobs if not job.done and job.failure is None]
    if shard != (1, 1) and unsettled:
        console.print(
            f"shard {shard[0]} of {shard[1]} is done; {len(unsettled)} cells of the others are not. The last one to end "
            "writes the report.", highlight=False,
        )  # fmt: skip
        return results
    with FileLock(output / LOCK):
        _write_rows(jobs, output)
        save_timings(timings, output)
        save_results(results, output)
        path = write_report(output)
    print_summary(results, timings, console)
    console.print(str(path), highlight=False, soft_wrap=True)
    return results


def tune(
    study: Study, output: Path, *, cache: Path, placement: Placement, console: Console
) -> tuple[Study, tuple[Tuning, ...]]:
    """The study with the numbers that its trials chose, and how they were chosen; as it is where it is not tuned.

    Trials are cells of a study of their own in output/tuning, on rows and seeds that the report never uses.
    """
    if not study.tuning.trials:
        return study, ()
    trials = tuning_study(study)
    folder = output / TUNING_FOLDER
    task, shared = _prepare(trials, cache, console)
    jobs = list_jobs(trials, folder, cache, placement)
    _run_own(jobs, (1, 1), placement, console)
    results, timings = collect(trials, task, shared, jobs, 0.0, ())
    records = chosen(study, results, timings)
    for record in records:
        numbers = ", ".join(f"{name} {value:.3g}" for name, value in record.chosen.items())
        border = f"; at the border of its range: {', '.join(record.border)}" if record.border else ""
        console.print(f"tuned {record.group}: {numbers}{border}", highlight=False, markup=False)
    return tuned(study, records), records


def _prepare(study: Study, cache: Path, console: Console) -> tuple[Task, Shared]:
    """What all cells share, trained before they start."""
    task = build_task(study.options, cache, console)
    console.print(render(task.training(study.seeds[0]).report))
    shared = task.shared(on_policy=any(setting.algorithm.on_policy for setting in study.settings()))
    for name, stage in shared.stages.items():
        console.print(f"{name}: {'from the cache' if stage.cached else f'{stage.seconds:.0f} s'}", highlight=False)
    return task, shared


def list_jobs(study: Study, output: Path, cache: Path, placement: Placement = _HERE, save_policies: bool = False) -> list[Job]:
    """The cells of a study, seed by seed."""
    workers = placement.side_by_side(tiny=study.options.tiny, cells=len(study.entries) * len(study.seeds))
    return [
        Job(study, index, seed, output, cache, workers, save_policies)
        for seed in study.seeds
        for index in range(len(study.entries))
    ]


def _run_own(jobs: Sequence[Job], shard: tuple[int, int], placement: Placement, console: Console) -> None:
    for job in jobs:
        if job.damaged:
            console.print(
                f"{job.folder}: not what was written; the cell runs again.", highlight=False, markup=False, soft_wrap=True
            )
    mine = list(jobs)[shard[0] - 1 :: shard[1]]
    # Setting by setting: workers that start on one seed together would wait for one of them to prepare it.
    waiting = sorted((job for job in mine if not job.done), key=lambda job: job.index)
    if len(waiting) < len(mine):
        console.print(f"{len(mine) - len(waiting)} of {len(mine)} cells were finished before and are kept.", highlight=False)
    if waiting:
        with placement.start(tiny=waiting[0].study.options.tiny, cells=len(jobs)) as executor:
            run_all(waiting, executor, console)


def _check_shard(shard: tuple[int, int]) -> None:
    if not 1 <= shard[0] <= shard[1]:
        raise ConfigError(f"shard {shard[0]}/{shard[1]}: expected i/n with i from 1 to n.")


def prepare_folder(output: Path, study: Study, overwrite: bool) -> None:
    """Claims the output folder for this study, or goes on with an earlier part of it.

    Raises:
        OutputError: the folder holds another study, or something else.
    """
    own = json.loads(json.dumps(identity(study)))
    marker = output / STUDY_FILE
    if output.exists() and not output.is_dir():
        raise OutputError(f"--output-dir {output} is a file; name a folder.")
    if output.is_dir() and not marker.exists() and contents(output):
        raise OutputError(f"{output} is not empty and holds no comparison of prefopt; name another --output-dir.")
    output.mkdir(parents=True, exist_ok=True)
    with FileLock(output / LOCK):  # processes may start together on one folder
        held = json.loads(marker.read_text()) if marker.exists() else own
        # A comparison that stopped before its first cell, as on bad data, left nothing worth keeping.
        if held != own and ((output / CELLS_FOLDER).exists() or (output / TUNING_FOLDER).exists()):
            if not overwrite:
                differing = ", ".join(sorted(differences(held, own)))
                raise OutputError(
                    f"{output} holds a comparison with other options ({differing}). Name another --output-dir, "
                    "or pass --overwrite to delete it."
                )
            empty(output)
        write_json(marker, own)
        (output / REPEAT_FILE).write_text(yaml.safe_dump(study.values(), sort_keys=False), encoding="utf-8")


def identity(study: Study) -> dict[str, Any]:
    """What all cells of a folder have in common, and what was fixed before the first of them ran."""
    found: dict[str, Any] = {"options": study.options.as_dict(), "imports": [str(path) for path in study.imports]}
    if study.kl_targets:
        found["kl_targets"] = [*study.kl_targets]
    if study.tuning.trials:
        found["tuning"] = asdict(study.tuning)
    if study.match != "labels":
        found["match"] = study.match
    return found


def collect(
    study: Study, task: Task, shared: Shared, jobs: Sequence[Job], prepared: float, records: Sequence[Tuning]
) -> tuple[Results, Timings]:
    """Every cell's results and timings as one comparison."""
    finished = [job for job in jobs if job.done]
    cells = [
        job.result()
        if job in finished
        else Cell(job.entry.algorithm, job.entry.label, job.seed, "failed", job.failure or "it ended without a message")
        for job in jobs
    ]
    results = Results(
        schema_version=SCHEMA_VERSION,
        title=study.title,
        task=study.options.data.task,
        settings=tuple(
            Setting(e.algorithm, e.label, {**e.setting().hyper, **e.reward, **e.optimization, **e.budget}, e.tuned, e.group)
            for e in study.entries
        ),
        seeds=tuple(study.seeds),
        metrics=tuple(task.metrics),
        cells=tuple(cells),
        preset=study.preset,
        created=datetime.now(UTC).strftime("%Y-%m-%d"),
        environment=environment(),
        command=command_line(f"prefopt compare {REPEAT_FILE} --output-dir again"),
        train=study.options.as_dict(),
        data=task.training(study.seeds[0]).report.as_dict(),
        reference=dict(shared.reference),
        baselines=tuple(shared.baselines),
        judges=tuple(shared.judges),
        frontier=tuple(shared.frontier) if shared.frontier is not None else None,
        shared_ledger={f"{name}: trained tokens": float(stage.tokens) for name, stage in shared.stages.items()},
        notes=(*shared.notes, *_matching_note(study), *study.notes),
        question=study.question,
        kl_targets=tuple(study.kl_targets),
        tuning=tuple(records),
    )
    seconds = {name: stage.seconds for name, stage in shared.stages.items() if not stage.cached}
    return results, Timings(tuple(job.timing() for job in finished), {"preparation": prepared, **seconds})


def _matching_note(study: Study) -> list[str]:
    """What settings spend alike, where it is not rows and passes."""
    if study.match == "labels":
        return []
    updates = ", ".join(f"{entry.label} {entry.budget['max_steps']}" for entry in study.entries)
    return [f"Matched: {study.match}, to those of {study.entries[0].label}'s run. Updates: {updates}."]


# Flags that change who computes what and not what comes out.
_PLACING = ("--executor", "--ray-address", "--shard", "--workers")


def command_line(otherwise: str) -> str:
    """The command line without what is of one process alone, so that all who share a study write the same; `otherwise` where
    the program is another one that uses prefopt."""
    program = Path(sys.argv[0])
    if program.name != "prefopt" and (program.parent.name, program.name) != ("prefopt", "__main__.py"):
        return otherwise
    kept, skip = [], False
    for word in sys.argv[1:]:
        if not skip and word.split("=")[0] not in _PLACING:
            kept.append(word)
        skip = not skip and word in _PLACING
    return shlex.join(["prefopt", *kept])


def _write_rows(jobs: Sequence[Job], output: Path) -> None:
    """The cells' rows one after the other; cells of earlier versions have none of pairs."""
    for name in (PER_PROMPT_FILE, PER_PAIR_FILE):
        files = [job.folder / name for job in jobs if job.done]
        text = "".join(file.read_text(encoding="utf-8") for file in files if file.exists())
        if text:
            (output / name).write_text(text, encoding="utf-8")
