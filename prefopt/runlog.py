"""A run's metrics.jsonl and what people see of it: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from prefopt.errors import OutputError

FILE = "metrics.jsonl"
TIMING_PREFIX = "time/"


def read_lines(folder: Path, *, up_to: float = math.inf) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl up to a step, timings left out; a line cut short by a crash is left out too."""
    path = folder / FILE
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        if line["step"] <= up_to:
            lines.append({key: value for key, value in line.items() if not key.startswith(TIMING_PREFIX)})
    return lines


class RunLog:
    """Writes metrics lines and shows progress.

    Args:
        folder: where metrics.jsonl is; None writes nothing.
        title: of the progress bar.
        total: steps of the whole run.
        start: steps already made; lines beyond it are of an interrupted run and are dropped.
        console: where progress goes; None shows nothing.
        patient: lines that cannot be written, as on a full disk, are held back for later; otherwise they end the run.
    """

    def __init__(
        self,
        folder: Path | None,
        title: str,
        total: int,
        *,
        start: int = 0,
        console: Console | None = None,
        patient: bool = False,
    ) -> None:
        self.earlier: list[dict[str, Any]] = []
        self._file: FileIO | None = None
        self._unwritten, self._patient = b"", patient
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / FILE
            if start:
                self.earlier = read_lines(folder, up_to=start)
                texts = path.read_text().splitlines() if path.exists() else []
                # A new file in the place of the old one: whoever is killed here leaves one of them whole.
                staged = path.with_name(f".{FILE}.partial")
                staged.write_text("".join(f"{text}\n" for text in texts if _step(text) <= start))
                os.replace(staged, path)
            # Unbuffered: what a full disk refused is still in our hands.
            self._file = FileIO(path, "a" if start else "w")
        self._console = console
        self._title = title
        self._total = total
        self._progress: Progress | None = None
        if console is not None and console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._progress = Progress(*columns, console=console, transient=True)
            self._task = self._progress.add_task(title, total=total, completed=start, note="")

    def __enter__(self) -> RunLog:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._file is not None:
            with self._file:
                self._flush()

    def _flush(self) -> None:
        """Writes what is unwritten. Raises OutputError where that fails and the run is not to wait for room."""
        assert self._file is not None
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not self._patient:
                raise OutputError(
                    f"could not write {self._file.name}: {error.strerror}. Free space, and resume from the newest checkpoint."
                ) from error

    def advance(self, step: int) -> None:
        """Moves the progress bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def write(self, line: Mapping[str, Any], timings: Mapping[str, float]) -> None:
        """One line of metrics; timings stand beside them under `time/`, since equal runs differ in them alone."""
        if self._file is not None:
            self._unwritten += (json.dumps({**line, **timings}) + "\n").encode()
            self._flush()
        note = "  ".join(f"{key} {value:.4g}" for key, value in line.items() if key in _SHOWN)
        if self._progress is not None:
            self._progress.update(self._task, note=note)
        elif self._console is not None:
            self._console.print(f"{self._title}: step {line['step']}/{self._total}  {note}", highlight=False, soft_wrap=True)


def counter(console: Console | None, title: str) -> Callable[[int, int], None] | None:
    """A callback (done, total) for long passes: a bar on a terminal, a line at every quarter elsewhere."""
    if console is None:
        return None
    bars: list[Progress] = []
    quarters: set[int] = set()

    def show(done: int, total: int) -> None:
        if console.is_terminal:
            if not bars:
                bars.append(
                    Progress(
                        TextColumn(title),
                        BarColumn(),
                        MofNCompleteColumn(),
                        TimeRemainingColumn(),
                        console=console,
                        transient=True,
                    )
                )
                bars[0].add_task(title, total=total)
                bars[0].start()
            bars[0].update(bars[0].task_ids[0], completed=done)
            if done >= total:
                bars.pop().stop()
        elif (quarter := 4 * done // total) not in quarters:
            quarters.add(quarter)
            console.print(f"{title}: {done}/{total}", highlight=False, soft_wrap=True)

    return show


_SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "kl", "score", "eval/reward", "eval/kl")


def _step(text: str) -> float:
    try:
        return float(json.loads(text)["step"])
    except (json.JSONDecodeError, KeyError):
        return math.inf
