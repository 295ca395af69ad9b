"""A comparison: algorithms x seeds on the same rows, in the same order, against the same reference -> results.json.

A cell is a setting on a seed. Cells run in worker processes, each writes its own folder, and a finished cell is not run again,
so an interrupted comparison goes on where it stopped and takes new algorithms later.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from prefopt import __version__, algorithms
from prefopt.cell import run_cell
from prefopt.data.report import render
from prefopt.errors import ConfigError, OutputError, PrefoptError
from prefopt.files import write_json
from prefopt.machine import standard_console
from prefopt.options import Options, default_cache
from prefopt.report import print_summary, save_results, save_timings, write_report
from prefopt.report.schema import PER_PROMPT_FILE, SCHEMA_VERSION, Cell, CellTiming, Ledger, Results, Setting, Timings
from prefopt.stages import content_key
from prefopt.tasks import Shared, Task, build_task, prepare_process

STUDY_FILE, CELLS_FOLDER = "study.json", "cells"


@dataclass(frozen=True)
class Entry:
    """One algorithm of a comparison with the hyper-parameters that differ from its defaults, and a name if it needs one.

    Args:
        algorithm: a loss or a sum of losses, `online_` before it for fresh samples.
        hyper: its hyper-parameters.
        name: heads its row; made from the others if empty.
        reward: fields of `RewardOptions` that differ from the study's, so that rewards can be compared as algorithms are.
    """

    algorithm: str
    hyper: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    reward: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Its name in the report: as given, or the algorithm's with the values that were set."""
        return self.name or self.algorithm + "".join(f" {name}={value}" for name, value in self.values.items())

    @property
    def values(self) -> dict[str, Any]:
        """Everything that was set, for the report."""
        return {**self.hyper, **self.reward}

    def options(self, shared: Options) -> Options:
        """The study's options with this entry's reward."""
        return replace(shared, reward=replace(shared.reward, **self.reward)) if self.reward else shared


@dataclass(frozen=True)
class Study:
    """What is compared.

    Args:
        entries: algorithms with hyper-parameters; labels must differ.
        seeds: each trains every algorithm once.
        options: data, model, budget, evaluation.
        imports: users' files with losses of their own.
        title: heads the report.
        preset: how the options came about, for the report.
        notes: lines for the report.
    """

    entries: Sequence[Entry]
    seeds: Sequence[int]
    options: Options = field(default_factory=Options)
    imports: Sequence[str] = ()
    title: str = "Preference optimization, compared"
    preset: str = ""
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        labels = [entry.label for entry in self.entries]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if not labels or twice:
            raise ConfigError(f"name each setting once; {', '.join(twice) or 'nothing'} was named {'twice' if twice else ''}.")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"seeds must be one or more different numbers, got {list(self.seeds)}.")

    def settings(self) -> list[algorithms.Setting]:
        """Every entry with all its numbers. Raises ConfigError for an unknown algorithm or option."""
        algorithms.import_files(self.imports)
        return [algorithms.get(entry.algorithm).setting(**entry.hyper) for entry in self.entries]


def compare(
    study: Study,
    output: Path,
    *,
    cache: Path | None = None,
    workers: int | None = None,
    save_policies: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> Results:
    """Runs every cell that is not finished yet, then writes results.json, timings.json, per-prompt results and the report.

    Args:
        study: what is compared.
        output: its folder; one that holds another study is refused unless `overwrite`.
        cache: of shared starts, reward models and reference log-probs.
        workers: processes side by side; None chooses by task and cores, 0 runs cells in this process.
        save_policies: keep every trained policy.
        overwrite: delete what `output` holds.
        console: for people; None is silent.

    Raises:
        PrefoptError: bad options, data or output folder. A failing cell is reported in the results instead.
    """
    console = console or Console(quiet=True)
    settings = study.settings()
    cache = cache or default_cache()
    prepare_folder(output, study, overwrite)
    begin = time.perf_counter()
    prepare_process(study.options, 1)
    task = build_task(study.options, cache, console)
    training = task.training(study.seeds[0])
    console.print(render(training.report))
    shared = task.shared(on_policy=any(setting.algorithm.on_policy for setting in settings))
    for name, stage in shared.stages.items():
        console.print(f"{name}: {'from the cache' if stage.cached else f'{stage.seconds:.0f} s'}", highlight=False)
    prepared = time.perf_counter() - begin
    workers = _default_workers(study) if workers is None else workers
    jobs = [
        _Job(study, index, seed, output, cache, workers, save_policies)
        for seed in study.seeds
        for index in range(len(settings))
    ]
    # Setting by setting: workers that start on one seed together would wait for one of them to prepare it.
    waiting = sorted((job for job in jobs if not job.done), key=lambda job: job.index)
    if len(waiting) < len(jobs):
        console.print(f"{len(jobs) - len(waiting)} of {len(jobs)} cells were finished before and are kept.", highlight=False)
    _run_all(waiting, workers, console)
    results, timings = collect(study, task, shared, jobs, settings, prepared)
    _write_rows(jobs, output)
    save_timings(timings, output)
    save_results(results, output)
    path = write_report(output)
    print_summary(results, timings, console)
    console.print(str(path), highlight=False, soft_wrap=True)
    return results


def describe(study: Study, console: Console, cache: Path | None = None) -> None:
    """What `compare` would do, without training: rows by role, cells and their updates."""
    settings = study.settings()
    task_options = study.options
    table = Table(title="cells", title_justify="left")
    for column in ("setting", "stream", "seeds", "options"):
        table.add_column(column)
    for entry, setting in zip(study.entries, settings, strict=True):
        options = ", ".join(f"{name} {value}" for name, value in setting.hyper.items())
        table.add_row(entry.label, setting.algorithm.data, ", ".join(map(str, study.seeds)), options)
    console.print(table)
    if task_options.data.task == "text":
        console.print(render(build_task(task_options, cache or default_cache(), console).training(study.seeds[0]).report))
    seeds = len(study.seeds)
    console.print(
        f"{len(settings) * seeds} cells on {' '.join(task_options.data.data)}. Batch {task_options.budget.batch_size}, "
        f"{task_options.budget.epochs:g} epochs"
        + (f", at most {task_options.budget.max_steps} updates" if task_options.budget.max_steps else "")
        + (". Fewer than 3 seeds: a smoke run, no ranking." if seeds < 3 else "."),
        highlight=False,
    )


def prepare_folder(output: Path, study: Study, overwrite: bool) -> None:
    """Claims the output folder for this study, or goes on with an earlier part of it.

    Raises:
        OutputError: the folder holds another study, or something else.
    """
    own = {"options": study.options.as_dict(), "imports": [str(path) for path in study.imports]}
    own = json.loads(json.dumps(own))
    marker = output / STUDY_FILE
    if output.exists() and not output.is_dir():
        raise OutputError(f"--output-dir {output} is a file; name a folder.")
    if output.is_dir() and any(output.iterdir()):
        if marker.exists():
            held = json.loads(marker.read_text())
            if held == own:
                return
            # A comparison that stopped before its first cell, as on bad data, left nothing worth keeping.
            if (output / CELLS_FOLDER).exists():
                if not overwrite:
                    differing = sorted(differences(held, own))
                    raise OutputError(
                        f"{output} holds a comparison with other options ({', '.join(differing)}). Name another --output-dir, "
                        "or pass --overwrite to delete it."
                    )
                shutil.rmtree(output)
        else:
            raise OutputError(f"{output} is not empty and holds no comparison of prefopt; name another --output-dir.")
    output.mkdir(parents=True, exist_ok=True)
    write_json(marker, own)


def differences(one: Any, other: Any, path: str = "") -> set[str]:
    """The dotted names at which two trees of plain values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = one.keys() | other.keys()
        return set().union(*(differences(one.get(n), other.get(n), f"{path}.{n}" if path else n) for n in names))
    return set() if one == other else {path}


@dataclass(frozen=True)
class _Job:
    """A cell to run, with everything that a worker process needs."""

    study: Study
    index: int
    seed: int
    output: Path
    cache: Path
    workers: int
    save_policies: bool

    @property
    def entry(self) -> Entry:
        return self.study.entries[self.index]

    @property
    def folder(self) -> Path:
        # Sums of losses hold characters that file systems refuse. The hash keeps settings of one algorithm apart whatever
        # characters their values have, and sums that differ only in what was replaced.
        name, replaced = re.sub(r"[^\w.-]", "_", self.entry.algorithm), re.findall(r"[^\w.-]", self.entry.algorithm)
        key = content_key(self.entry.values, self.entry.name, *replaced)[:6]
        return self.output / CELLS_FOLDER / f"{name}-{key}-seed{self.seed}"

    @property
    def done(self) -> bool:
        return (self.folder / "cell.json").exists()


def _default_workers(study: Study) -> int:
    """Tiny models are bound by launch overhead and run side by side on a thread each; others get the whole machine."""
    cells = len(study.entries) * len(study.seeds)
    return max(1, min(os.cpu_count() or 1, cells)) if study.options.tiny else 1


def _run_all(jobs: Sequence[_Job], workers: int, console: Console) -> None:
    started = time.perf_counter()

    def tell(done: int, job: _Job, error: str | None) -> None:
        state = "done" if error is None else f"failed: {error.splitlines()[0]}"
        console.print(
            f"[{done}/{len(jobs)}] {job.entry.label} seed {job.seed} {state} ({time.perf_counter() - started:.0f} s)",
            highlight=False,
            markup=False,
        )

    if workers == 0:
        for done, job in enumerate(jobs, start=1):
            tell(done, job, _run_job(job))
        return
    # One process a cell: its peak memory is its own, and a crash of one leaves the others alone.
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=end_with_parent, max_tasks_per_child=1
    ) as pool:
        futures: dict[Future[str | None], _Job] = {pool.submit(_run_job, job): job for job in jobs}
        for done, future in enumerate(as_completed(futures), start=1):
            job = futures[future]
            failure = future.exception()
            if failure is not None:
                _write_failure(job, f"{type(failure).__name__}: {failure}")
            tell(done, job, str(failure) if failure is not None else future.result())


def end_with_parent() -> None:
    """Makes a worker process end when its parent is gone: after a kill -9 it would go on computing for nobody."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_job(job: _Job) -> str | None:
    """Runs a cell in this process and writes its folder; the error's text when it failed."""
    prepare_process(job.study.options, job.workers)
    console = standard_console() if job.workers == 1 else None
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / "failure.txt").unlink(missing_ok=True)
    options = job.entry.options(job.study.options)
    try:
        setting = job.study.settings()[job.index]
        write_json(
            job.folder / "config.json",
            {"label": job.entry.label, "hyper": dict(setting.hyper), "seed": job.seed, **options.as_dict()},
        )
        task = build_task(options, job.cache, console)
        result = run_cell(
            task, setting, options, job.seed, label=job.entry.label, cache=job.cache, folder=job.folder,
            resume=bool(options.logging.save_every), console=console,
        )  # fmt: skip
        if job.save_policies:
            result.save(job.folder / "policy")
        write_json(job.folder / "timing.json", asdict(result.timing))
        (job.folder / PER_PROMPT_FILE).write_text("".join(json.dumps(asdict(row)) + "\n" for row in result.rows))
        write_json(job.folder / "cell.json", asdict(result.cell))  # last: it says that the cell is finished
    except PrefoptError as error:
        _write_failure(job, str(error))
        return str(error)
    except Exception as error:
        import traceback

        _write_failure(job, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        return f"{type(error).__name__}: {error}"
    return None


def _write_failure(job: _Job, text: str) -> None:
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / "failure.txt").write_text(text)


def collect(
    study: Study, task: Task, shared: Shared, jobs: Sequence[_Job], settings: Sequence[algorithms.Setting], prepared: float
) -> tuple[Results, Timings]:
    """Every cell's results and timings as one comparison."""
    cells, timings = [], []
    for job in jobs:
        if job.done:
            stored = json.loads((job.folder / "cell.json").read_text())
            stored["ledger"] = Ledger(**stored["ledger"])
            cells.append(Cell(**{**stored, "path": tuple(stored["path"]), "curve": tuple(stored["curve"])}))
            timings.append(CellTiming(**json.loads((job.folder / "timing.json").read_text())))
        else:
            failure = job.folder / "failure.txt"
            text = failure.read_text() if failure.exists() else "the worker process ended without a message"
            cells.append(Cell(job.entry.algorithm, job.entry.label, job.seed, "failed", text))
    results = Results(
        schema_version=SCHEMA_VERSION,
        title=study.title,
        task=study.options.data.task,
        settings=tuple(
            Setting(e.algorithm, e.label, {**s.hyper, **e.reward}) for e, s in zip(study.entries, settings, strict=True)
        ),
        seeds=tuple(study.seeds),
        metrics=tuple(task.metrics),
        cells=tuple(cells),
        preset=study.preset,
        created=datetime.now(UTC).strftime("%Y-%m-%d"),
        environment=environment(),
        command=" ".join(["prefopt", *sys.argv[1:]]),
        train=study.options.as_dict(),
        data=task.training(study.seeds[0]).report.as_dict(),
        reference=dict(shared.reference),
        baselines=tuple(shared.baselines),
        judges=tuple(shared.judges),
        frontier=tuple(shared.frontier) if shared.frontier is not None else None,
        shared_ledger={f"{name}: trained tokens": float(stage.tokens) for name, stage in shared.stages.items()},
        notes=(*shared.notes, *study.notes),
    )
    seconds = {name: stage.seconds for name, stage in shared.stages.items() if not stage.cached}
    return results, Timings(tuple(timings), {"preparation": prepared, **seconds})


def environment() -> dict[str, str]:
    """What the numbers depend on besides the options."""
    import transformers

    return {
        "prefopt": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "threads": str(torch.get_num_threads()),
    }


def _write_rows(jobs: Sequence[_Job], output: Path) -> None:
    text = "".join((job.folder / PER_PROMPT_FILE).read_text() for job in jobs if job.done)
    if text:
        (output / PER_PROMPT_FILE).write_text(text)
