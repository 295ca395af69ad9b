"""Cells as jobs: each in a folder of its own, in a process of its own, under a lock of its own, and done once.

Any number of processes, on one machine or on several that share a folder, may work on one study: a cell belongs to who holds
its lock, which the system lets go of when the holder ends, however it ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import traceback
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from prefopt.cell import run_cell
from prefopt.environment import environment
from prefopt.errors import OutputError, PrefoptError, Stopped
from prefopt.executors import Executor, WorkerLost
from prefopt.files import LOCK, staged_folder, write_json
from prefopt.machine import standard_console
from prefopt.report.schema import PER_PAIR_FILE, PER_PROMPT_FILE, Cell, CellTiming, Ledger, save_rows
from prefopt.stages import content_key
from prefopt.study import Entry, Study
from prefopt.tasks import build_task, prepare_process

CELLS_FOLDER = "cells"
CELL_FILE, CONFIG_FILE, ENVIRONMENT_FILE, FAILURE_FILE = "cell.json", "config.json", "environment.json", "failure.txt"
MANIFEST_FILE, TIMING_FILE = "manifest.json", "timing.json"
# Seconds between two looks at cells that other processes hold.
_LOOK_EVERY = 1.0
# How often a cell is started at most whose worker is lost: it may be the cell that takes the worker down.
_TRIES = 3


@dataclass(frozen=True)
class Job:
    """A cell to run, with everything that a worker process needs."""

    study: Study
    index: int
    seed: int
    output: Path
    cache: Path
    workers: int = 0
    save_policies: bool = False

    @property
    def entry(self) -> Entry:
        return self.study.entries[self.index]

    @cached_property
    def folder(self) -> Path:
        """Sums of losses hold characters that file systems refuse. The hash keeps settings of one algorithm apart whatever
        characters their values have, and sums that differ only in what was replaced."""
        name, replaced = re.sub(r"[^\w.-]", "_", self.entry.algorithm), re.findall(r"[^\w.-]", self.entry.algorithm)
        key = content_key(self.entry.values, self.entry.name, *replaced)[:6]
        return self.output / CELLS_FOLDER / f"{name}-{key}-seed{self.seed}"

    @property
    def done(self) -> bool:
        """It is finished, and its result is what was written."""
        try:
            held = (self.folder / CELL_FILE).read_bytes()
        except OSError:
            return False
        manifest = self.folder / MANIFEST_FILE
        # Cells of earlier versions have no manifest.
        return not manifest.exists() or json.loads(manifest.read_text())[CELL_FILE] == _digest(held)

    @property
    def damaged(self) -> bool:
        """It was finished once, and its result is no longer what was written."""
        return (self.folder / CELL_FILE).exists() and not self.done

    @property
    def failure(self) -> str | None:
        """What stopped it, where something did."""
        file = self.folder / FAILURE_FILE
        return file.read_text() if file.exists() else None

    @property
    def lock(self) -> FileLock:
        """Of its folder, which is there."""
        return FileLock(self.folder / LOCK, timeout=0)

    def config(self) -> dict[str, Any]:
        """Everything that the cell follows from besides the code and the machine."""
        entry, options = self.entry, self.entry.options(self.study.options)
        return {
            "label": entry.label, "seed": self.seed, "entry": asdict(entry), "imports": [*map(str, self.study.imports)],
            "hyper": dict(entry.setting().hyper), **options.as_dict(),
        }  # fmt: skip

    def result(self) -> Cell:
        """What the finished cell measured."""
        stored = json.loads((self.folder / CELL_FILE).read_text())
        stored["ledger"] = Ledger(**stored["ledger"])
        return Cell(**{**stored, "path": tuple(stored["path"]), "curve": tuple(stored["curve"])})

    def timing(self) -> CellTiming:
        """How long it took."""
        return CellTiming(**json.loads((self.folder / TIMING_FILE).read_text()))


def run_all(jobs: Sequence[Job], executor: Executor, console: Console) -> None:
    """Runs the jobs that nobody else runs, waits for those that somebody does, and takes over what others leave unfinished.

    Args:
        jobs: in the order in which they start.
        executor: what they run on. A job whose worker is lost runs again, a few times.
        console: for a line a cell.
    """
    lines, lost = _Lines(len(jobs), console), Counter[Path]()
    waiting, elsewhere, running = deque(jobs), list[Job](), dict[Future[str | None], Job]()
    while waiting or elsewhere or running:
        while waiting and len(running) < executor.slots:
            job = waiting.popleft()
            # A cell that another process holds is no reason to start one here.
            if _held(job):
                elsewhere.append(job)
            else:
                running[executor.submit(run_job, job)] = job
        if not running:
            time.sleep(_LOOK_EVERY)
            for job in elsewhere:
                if job.done:
                    lines.tell(job, None, "done elsewhere")
                else:
                    waiting.append(job)
            elsewhere.clear()
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            job = running.pop(future)
            try:
                outcome = _outcome(job, future)
            except WorkerLost as error:
                lost[job.folder] += 1
                if lost[job.folder] < _TRIES:
                    lines.note(job, f"its worker was lost ({error}); it runs again.")
                    waiting.appendleft(job)
                    continue
                outcome = f"its worker was lost {_TRIES} times: {error}"
                _write_failure(job, outcome)
            if outcome == ELSEWHERE:
                elsewhere.append(job)
            else:
                lines.tell(job, outcome)


def _outcome(job: Job, future: Future[str | None]) -> str | None:
    """As of `run_job`. Raises Stopped and WorkerLost."""
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, Stopped | WorkerLost):
        raise error
    _write_failure(job, str(error) if isinstance(error, PrefoptError) else f"{type(error).__name__}: {error}")
    return str(error)


def _held(job: Job) -> bool:
    job.folder.mkdir(parents=True, exist_ok=True)
    try:
        with job.lock:
            return False
    except Timeout:
        return True


ELSEWHERE = "another process runs it"


def run_job(job: Job) -> str | None:
    """Runs a cell in this process and writes its folder; the error's text when it failed, ELSEWHERE when it is taken.

    Raises:
        OutputError: there is no such folder.
    """
    if not job.folder.is_dir():
        raise OutputError(
            f"{job.folder} is not on the machine of a worker; a study's folder must lie on a disk that all workers share."
        )
    try:
        with job.lock:
            return None if job.done else _run(job)
    except Timeout:
        return ELSEWHERE


def _run(job: Job) -> str | None:
    prepare_process(job.study.options, job.workers)
    console = standard_console() if job.workers == 1 else None
    (job.folder / FAILURE_FILE).unlink(missing_ok=True)
    options = job.entry.options(job.study.options)
    try:
        setting = job.study.settings()[job.index]
        write_json(job.folder / CONFIG_FILE, job.config())
        write_json(job.folder / ENVIRONMENT_FILE, environment())
        task = build_task(options, job.cache, console)
        result = run_cell(
            task, setting, options, job.seed, label=job.entry.label, cache=job.cache, folder=job.folder,
            resume=bool(options.logging.save_every), console=console,
        )  # fmt: skip
        if job.save_policies:
            with staged_folder(job.folder / "policy") as staged:
                result.save(staged)
        write_json(job.folder / TIMING_FILE, asdict(result.timing))
        save_rows(result.rows, job.folder / PER_PROMPT_FILE)
        save_rows(result.pairs, job.folder / PER_PAIR_FILE)
        _finish(job, asdict(result.cell))
    except Stopped:
        raise  # it is to go on, not to be reported
    except PrefoptError as error:
        _write_failure(job, str(error))
        return str(error)
    except Exception as error:
        _write_failure(job, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        return f"{type(error).__name__}: {error}"
    return None


def _finish(job: Job, cell: dict[str, Any]) -> None:
    """Writes the manifest, and last the cell's result, which says that the cell is finished."""
    staged = job.folder / f"{CELL_FILE}.new"
    write_json(staged, cell)
    listed = (CONFIG_FILE, ENVIRONMENT_FILE, PER_PROMPT_FILE, PER_PAIR_FILE, "metrics.jsonl")
    files = {name: _digest((job.folder / name).read_bytes()) for name in listed if (job.folder / name).exists()}
    write_json(job.folder / MANIFEST_FILE, {**files, CELL_FILE: _digest(staged.read_bytes())})
    os.replace(staged, job.folder / CELL_FILE)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write_failure(job: Job, text: str) -> None:
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / FAILURE_FILE).write_text(text)


class _Lines:
    """A line for every cell that ends, and for what happens to it before."""

    def __init__(self, total: int, console: Console) -> None:
        self._total, self._console = total, console
        self._done, self._begin = 0, time.perf_counter()

    def note(self, job: Job, text: str) -> None:
        self._console.print(f"{job.entry.label} seed {job.seed}: {text}", highlight=False, markup=False, soft_wrap=True)

    def tell(self, job: Job, error: str | None, state: str = "done") -> None:
        self._done += 1
        state = state if error is None else f"failed: {error.splitlines()[0]}"
        spent = time.perf_counter() - self._begin
        left = spent / self._done * (self._total - self._done)
        rest = f", about {left / 60:.0f} min left" if left >= 60 else ""
        self._console.print(
            f"[{self._done}/{self._total}] {job.entry.label} seed {job.seed} {state} ({spent:.0f} s{rest})",
            highlight=False, markup=False,
        )  # fmt: skip
