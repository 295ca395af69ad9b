"""Tests on changed copies of losses/: each in a forked process that has torch and pytest already, and losses not yet.

A trial runs in a folder of its own that holds copies of losses/, tests/losses and the files beside them; the repository is
only read.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

import pytest

EVERYTHING = ("tests/losses",)
_SHARED = ("test_golden.py", "test_laws.py")
_FIXED = ("-q", "-x", "--import-mode=importlib", "-p", "no:cacheprovider", "-m", "not slow and not gpu", "--basetemp", "tmp")
_FOREIGN = 64  # the exit status of a trial that imported another losses than its own copy
_FORK = multiprocessing.get_context("fork")

End = Literal["survived", "failed", "hung", "crashed"]


@dataclass(frozen=True)
class Stage:
    """Arguments of one pytest run, and the seconds after which it counts as hung."""

    arguments: tuple[str, ...]
    limit: float


@dataclass(frozen=True)
class Task:
    """A copy with one file exchanged (None: as it is) and the test runs that it must pass, in order."""

    stages: tuple[Stage, ...]
    file: str | None = None
    source: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a task.

    Args:
        end: "survived" if every stage passed; "hung" if one ran past its limit; "crashed" if the process died.
        by: the first test that failed, or what else ended it.
        seconds: over all stages.
        modules: what the tests imported besides the package and themselves.
    """

    end: End
    by: str
    seconds: float
    modules: tuple[str, ...] = field(default=(), repr=False)


def snapshot(root: Path, folder: Path) -> Path:
    """Copies what trials need, so that edits during a run do not reach it.

    Raises:
        FileNotFoundError: `root` has no losses/ or tests/losses.
    """
    for name in ("losses", "tests/losses"):
        if not (root / name).is_dir():
            raise FileNotFoundError(
                f"{root} has no folder {name}; give the root of a repository that has losses/ and its tests."
            )
        shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".hypothesis"))
    # Settings of pytest, and pages that tests read: the papers, for one.
    for path in (*root.iterdir(), root / "tests" / "conftest.py"):
        if path.is_file() and not path.name.startswith("."):
            shutil.copy2(path, folder / path.relative_to(root))
    return folder


def near_tests(file: str, folder: Path) -> tuple[str, ...]:
    """Arguments for the tests most likely to notice: the module's own, and those of all losses whose names mention it."""
    module = Path(file).stem.lstrip("_")
    names = (f"test_{module}.py", *_SHARED)
    found = [f"tests/losses/{name}" for name in names if (folder / "tests" / "losses" / name).is_file()]
    return (*found, "-k", module) if found else ()


def run_tasks(tasks: Sequence[Task], base: Path, scratch: Path, jobs: int) -> Iterator[tuple[int, Outcome]]:
    """Runs tasks, `jobs` at a time; yields (index, outcome) as they end.

    Args:
        tasks: any number.
        base: a snapshot.
        scratch: a folder for the trials' copies; each is removed when its task ends.
        jobs: processes at a time.

    Raises:
        RuntimeError: a trial imported another `losses` than its copy.
    """
    if "losses" in sys.modules:
        raise RuntimeError(
            "losses is imported already, so trials would test it and not their copies; run this in a fresh process."
        )
    waiting = list(enumerate(tasks))[::-1]
    running: dict[int, _Trial] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                index, task = waiting.pop()
                running[index] = _Trial(task, base, scratch / str(index))
            earliest = min(trial.deadline for trial in running.values())
            wait([trial.process.sentinel for trial in running.values()], timeout=max(0.0, earliest - time.monotonic()))
            for index, trial in list(running.items()):
                outcome = trial.poll()
                if outcome:
                    del running[index]
                    yield index, outcome
    finally:
        for trial in running.values():
            trial.kill()


class _Trial:
    """A task on its way: one process after another, a stage each."""

    def __init__(self, task: Task, base: Path, folder: Path) -> None:
        self.task, self.folder = task, folder
        shutil.copytree(base, folder)
        if task.file is not None:
            (folder / task.file).write_text(task.source)
        self.begin = time.monotonic()
        self.stage = -1
        self._next()

    def _next(self) -> None:
        self.stage += 1
        stage = self.task.stages[self.stage]
        (self.folder / "verdict.json").unlink(missing_ok=True)
        self.process = _FORK.Process(target=_attempt, args=(self.folder, stage.arguments))
        self.process.start()
        self.deadline = time.monotonic() + stage.limit

    def poll(self) -> Outcome | None:
        """The outcome, or None while stages are left."""
        if self.process.exitcode is None:
            if time.monotonic() < self.deadline:
                return None
            self.kill()
            return self._end("hung", f"no end within {self.task.stages[self.stage].limit:.0f} s")
        verdict = self.folder / "verdict.json"
        if not verdict.is_file():
            return self._end("crashed", f"exit status {self.process.exitcode}")
        told = json.loads(verdict.read_text())
        if self.process.exitcode == _FOREIGN:
            raise RuntimeError(f"a trial imported losses from {told['by']} and not from its copy in {self.folder}.")
        # No test selected is no failure; whatever else is wrong was right on the unchanged copy.
        if self.process.exitcode not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            return self._end("failed", told["by"] or f"pytest ended with status {self.process.exitcode}")
        if self.stage + 1 < len(self.task.stages):
            self._next()
            return None
        return self._end("survived", "", tuple(told["modules"]))

    def kill(self) -> None:
        """Ends the process and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.process.kill()
        self.process.join()

    def _end(self, end: End, by: str, modules: tuple[str, ...] = ()) -> Outcome:
        shutil.rmtree(self.folder, ignore_errors=True)
        return Outcome(end, by, time.monotonic() - self.begin, modules)


class _FirstFailure:
    """A plugin of pytest that remembers which test failed first."""

    name = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.name = self.name or report.nodeid

    pytest_collectreport = pytest_runtest_logreport


def _attempt(folder: Path, arguments: Sequence[str]) -> None:
    """In the forked process: imports the copy, runs pytest, and leaves a verdict in the folder."""
    os.setsid()  # a group of its own, so that a hang ends with the processes that its tests have started
    os.chdir(folder)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        del os.environ[name]
    # Bytecode is found again by time and size of its source; a mutant may agree in both with what stood there before.
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(folder))
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ.update(PYTHONPATH=path, PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
    before = set(sys.modules)
    first = _FirstFailure()
    try:
        origin = str(importlib.import_module("losses").__file__)
    except Exception as error:
        status, first.name = int(pytest.ExitCode.TESTS_FAILED), f"import losses: {type(error).__name__}"
    else:
        if not Path(origin).is_relative_to(folder):
            status, first.name = _FOREIGN, origin
        else:
            status = int(pytest.main(["--rootdir", str(folder), *_FIXED, *arguments], plugins=[first]))
    modules = [name for name in set(sys.modules) - before if _is_elsewhere(name, folder)]
    Path("verdict.json").write_text(json.dumps({"by": first.name, "modules": sorted(modules)}))
    os._exit(status)


def _is_elsewhere(name: str, folder: Path) -> bool:
    """Whether a module has a file outside of the folder and knows nothing of the package."""
    if name.partition(".")[0] in ("losses", "prefopt", "tests"):
        return False
    file = getattr(sys.modules[name], "__file__", None)
    return file is not None and not Path(file).is_relative_to(folder)
