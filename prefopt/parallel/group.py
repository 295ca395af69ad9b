"""Reductions over the processes of torch.distributed."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from prefopt.parallel.watch import Watch


class Group:
    """A `Communicator` over the default process group. Tensors may lie on the CPU or on the rank's GPU.

    Args:
        watch: is told of every exchange, so that it can say who keeps the others waiting.
    """

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def sum(self, value: Tensor) -> Tensor:
        """See `Communicator.sum`; bit for bit the same on every rank."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def max(self, value: Tensor) -> Tensor:
        """See `Communicator.max`."""
        return self._reduced(value, dist.ReduceOp.MAX)

    def gather(self, value: Tensor) -> list[Tensor]:
        """See `Communicator.gather`."""
        value = value.detach().contiguous()
        shapes = self._gathered(torch.tensor([*value.shape, 0], device=value.device))
        sizes = [tuple(shape.tolist()[:-1]) for shape in shapes]
        flat = value.reshape(-1).view(torch.uint8)  # the one type that every backend knows
        counts = [math.prod(size) * value.element_size() for size in sizes]
        padded = flat.new_zeros(max(counts))
        padded[: len(flat)] = flat
        parts = self._gathered(padded)
        return [part[:count].view(value.dtype).view(size) for part, count, size in zip(parts, counts, sizes, strict=True)]

    def _reduced(self, value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        reduced = value.detach().clone(memory_format=torch.contiguous_format)
        with self._watch.exchange():
            dist.all_reduce(reduced, op=operation)
        return reduced

    def _gathered(self, value: Tensor) -> list[Tensor]:
        """Tensors of one shape."""
        parts = [torch.empty_like(value) for _ in range(self.world_size)]
        with self._watch.exchange():
            dist.all_gather(parts, value)
        return parts
