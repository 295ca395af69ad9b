"""What an executor is: it takes a job at a time and gives a future for it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class WorkerLost(Exception):
    """The process that ran a job ended without an answer: killed, out of memory, or its machine is gone."""


class Executor(Protocol):
    """Runs jobs side by side, each in a process of its own, so that a crash of one leaves the others alone.

    It is a context manager; on leaving, jobs that have not started are dropped.
    """

    @property
    def slots(self) -> int:
        """Jobs that are worth submitting at once."""
        ...

    def submit(self, function: Callable[[T], R], job: T, /) -> Future[R]:
        """Starts `function(job)`; both can be pickled. The future raises what the function raised, or WorkerLost."""
        ...

    def __enter__(self) -> Executor: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None: ...
