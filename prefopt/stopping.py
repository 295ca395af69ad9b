"""Signals that ask a run to end: the first one after the step that it is in, with a checkpoint; the second one at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# What a terminal sends, what schedulers send before they kill, and what some send to warn of it.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
_STANDARD_ERROR = 2


class StopRequest:
    """Whether a signal has come. `number` is 0 until then."""

    def __init__(self) -> None:
        self.number = 0

    def receive(self, number: int, _: FrameType | None) -> None:
        """The handler."""
        if self.number:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.number = number
        name = signal.Signals(number).name
        # Not through a console: its lock may be held by what was interrupted.
        os.write(_STANDARD_ERROR, f"{name}: stopping after this step; again to stop at once.\n".encode())


@contextmanager
def listening(wanted: bool) -> Iterator[StopRequest]:
    """Takes the signals over while a run that can save itself is on; elsewhere, and in threads, they keep their meaning."""
    request = StopRequest()
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.receive) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
