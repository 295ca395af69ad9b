"""All reductions over ranks go through one small interface; a single process is its first implementation."""

from __future__ import annotations

import json
from typing import Any, Protocol

import torch
from torch import Tensor


class Communicator(Protocol):
    """What the trainer needs of a process group."""

    @property
    def rank(self) -> int:
        """This process's number, 0 to world_size - 1."""

    @property
    def world_size(self) -> int:
        """How many processes take part."""

    def sum(self, value: Tensor) -> Tensor:
        """The sum over ranks, on every rank. No gradient."""

    def max(self, value: Tensor) -> Tensor:
        """The maximum over ranks, on every rank. No gradient."""

    def gather(self, value: Tensor) -> list[Tensor]:
        """Every rank's tensor, in rank order; of one type, and of as many dimensions, whose sizes may differ. No gradient."""


class SingleProcess:
    """One process: every reduction is the identity."""

    rank = 0
    world_size = 1

    def sum(self, value: Tensor) -> Tensor:
        return value

    def max(self, value: Tensor) -> Tensor:
        return value

    def gather(self, value: Tensor) -> list[Tensor]:
        return [value]


def gather_bytes(communicator: Communicator, value: bytes) -> list[bytes]:
    """Every rank's bytes, in rank order."""
    if communicator.world_size == 1:
        return [value]
    own = torch.frombuffer(bytearray(value), dtype=torch.uint8)
    return [part.numpy().tobytes() for part in communicator.gather(own)]


def gather_plain(communicator: Communicator, value: Any) -> list[Any]:
    """Every rank's plain value (what JSON can say), in rank order. Nothing is pickled."""
    if communicator.world_size == 1:
        return [value]
    return [json.loads(part) for part in gather_bytes(communicator, json.dumps(value).encode())]
