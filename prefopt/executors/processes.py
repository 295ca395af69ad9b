"""Jobs on this machine: one after the other in this process, or each in a new one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from prefopt.executors.protocol import R, T, WorkerLost
from prefopt.machine import end_with_parent


class ThisProcess:
    """Runs a job when it is submitted, so that signals and debuggers reach it."""

    slots = 1

    def submit(self, function: Callable[[T], R], job: T) -> Future[R]:
        """As the protocol; the future is done."""
        future: Future[R] = Future()
        try:
            future.set_result(function(job))
        except Exception as error:
            future.set_exception(error)
        return future

    def __enter__(self) -> ThisProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Processes:
    """Runs every job in a new process: its peak memory is its own.

    Args:
        slots: processes side by side.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._threads = ThreadPoolExecutor(slots)

    def submit(self, function: Callable[[T], R], job: T) -> Future[R]:
        """As the protocol."""
        return self._threads.submit(_alone, function, job)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)


def _alone(function: Callable[[T], R], job: T) -> R:
    # A pool of one for each job: a pool of many breaks as a whole when one of its processes dies.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
        try:
            return pool.submit(function, job).result()
        except BrokenProcessPool as error:
            raise WorkerLost("its process ended without an answer: killed, or out of memory") from error
