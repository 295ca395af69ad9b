"""Signals that ask a run to end: the first one after the step that it is in, with a checkpoint; the second one at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# What a terminal sends, what schedulers send before they kill, and what some send to warn of it.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
_STANDARD_ERROR = 2


class StopRequest:
    """Whether a signal has come. `number` is 0 until then.

    Args:
        echo: seconds in which a second signal is taken for the first one: a launcher passes on to its processes what a
            terminal or a scheduler has sent to all of them already.
    """

    def __init__(self, echo: float = 0.0) -> None:
        self.number = 0
        self._echo, self._came = echo, 0.0

    def receive(self, number: int, _: FrameType | None) -> None:
        """The handler."""
        if self.number and time.monotonic() < self._came + self._echo:
            return
        if self.number:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.number, self._came = number, time.monotonic()
        name = signal.Signals(number).name
        # Not through a console: its lock may be held by what was interrupted.
        os.write(_STANDARD_ERROR, f"{name}: stopping after this step; again to stop at once.\n".encode())


@contextmanager
def listening(wanted: bool, echo: float = 0.0) -> Iterator[StopRequest]:
    """Takes the signals over while a run that can save itself is on; elsewhere, and in threads, they keep their meaning.

    Args:
        echo: as `StopRequest`.
    """
    request = StopRequest(echo)
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.receive) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def telling(text: str) -> Iterator[None]:
    """Says `text` before SIGTERM or SIGUSR1 ends the process at once, where nothing else takes them; they would do so silently.

    SIGINT, which Python raises as KeyboardInterrupt, is left to the caller.
    """

    def tell(number: int, _: FrameType | None) -> None:
        os.write(_STANDARD_ERROR, f"{signal.Signals(number).name}: {text}\n".encode())
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    main_thread = threading.current_thread() is threading.main_thread()
    ours = [n for n in SIGNALS if n != signal.SIGINT and main_thread and signal.getsignal(n) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, tell)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
