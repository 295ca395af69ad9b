"""All reductions over ranks go through one small interface; a single process is its first implementation."""

from __future__ import annotations

from typing import Protocol

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
        """Every rank's tensor, in rank order; their first dimensions may differ. No gradient."""


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
