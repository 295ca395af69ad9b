"""The way of a stream's steps to the trainer: one step ahead, and sent to the device while the step before it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, Self, runtime_checkable

import torch

from prefopt.models.protocol import Batch
from prefopt.streams import Stream


@runtime_checkable
class Prefetchable(Protocol):
    """A stream that says whether it may be asked for a step before the last one is trained.

    Its steps then depend on neither the policy nor a global generator, and making them leaves the policy alone. A stream
    that says nothing is never asked ahead.
    """

    @property
    def prefetchable(self) -> bool:
        """True for a fixed data set, False for rollouts of the policy."""


@runtime_checkable
class Movable(Protocol):
    """A batch that can be sent to a device; others stay where their stream made them."""

    def to(self, device: torch.device) -> Self:
        """The batch there, without waiting for a GPU."""


class Feed:
    """Steps of a stream, on a device.

    Args:
        stream: not iterated yet.
        device: of the policy.
    """

    def __init__(self, stream: Stream, device: torch.device) -> None:
        self._stream = stream
        self._device = device
        self.ahead = isinstance(stream, Prefetchable) and stream.prefetchable
        self._steps: Iterator[Sequence[Batch]] | None = None
        # A step fetched early (None: the stream has ended), and the stream's state before it was.
        self._waiting: tuple[Any, Sequence[Batch] | None] | None = None

    def next(self) -> Sequence[Batch] | None:
        """The next step's micro-batches; None at the end."""
        if self._waiting is None:
            return self._fetch()
        (_, step), self._waiting = self._waiting, None
        return step

    def prefetch(self) -> None:
        """Makes and sends the next step now, if the stream allows it: called while the device is busy."""
        if self.ahead and self._waiting is None:
            state = self._stream.state_dict()
            self._waiting = (state, self._fetch())

    def state_dict(self) -> Any:
        """The stream's position after the last step that `next` returned."""
        return self._stream.state_dict() if self._waiting is None else self._waiting[0]

    def load_state_dict(self, state: Any) -> None:
        """The inverse of `state_dict`, before the first step is asked for."""
        self._stream.load_state_dict(state)

    def _fetch(self) -> Sequence[Batch] | None:
        if self._steps is None:
            self._steps = iter(self._stream)
        step = next(self._steps, None)
        if step is None or self._device.type == "cpu":  # where streams make them
            return step
        return [batch.to(self._device) if isinstance(batch, Movable) else batch for batch in step]
