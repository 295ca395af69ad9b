"""Calls of users' functions that may not take for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch


class TooSlow(Exception):
    """A call was not done in time."""


def call_within(seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, or TooSlow after so many seconds.

    What has not ended by then goes on in a thread of its own, which ends with the process: no thread can be ended from outside,
    and a signal would be caught by a function that catches everything.

    Args:
        seconds: 0 waits for ever, in this thread.
    """
    if not seconds:
        return function(*arguments)
    outcome: list[Any] = []
    failure: list[BaseException] = []
    gradients = torch.is_grad_enabled()  # of the caller; a thread begins with gradients on

    def run() -> None:
        try:
            with torch.set_grad_enabled(gradients):
                outcome.append(function(*arguments))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="reward function", daemon=True)
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    if not outcome:
        raise TooSlow
    return outcome[0]
