"""Every rank holds the whole policy; gradients are summed over ranks by torch's DistributedDataParallel."""

# No `from __future__ import annotations`: torch reads those of the hook, as objects.
from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from prefopt.models.protocol import Batch, Policy
from prefopt.parallel.processes import Processes, as_module


class DDP(Processes):
    """Replicas."""

    name = "ddp"

    def prepare(self, policy: Policy) -> None:
        """See `Strategy.prepare`; rank 0's weights are copied to the others."""
        super().prepare(policy)
        # A parameter may be left out of a step: an LM head under a loss on rewards, the critic's adapter.
        self._replica = DistributedDataParallel(
            _Evaluated(as_module(policy)), find_unused_parameters=True, gradient_as_bucket_view=True
        )
        self._replica.register_comm_hook(None, _summed)

    def evaluate(self, batch: Batch, needs: Collection[str], *, last: bool) -> dict[str, Tensor]:
        """See `Strategy.evaluate`."""
        self._replica.require_backward_grad_sync = last  # as its no_sync() does, which would have to span the backward pass
        found: dict[str, Tensor] = self._replica(batch, needs)
        return found


class _Evaluated(nn.Module):
    """`policy.evaluate` as the forward of a module."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy: Any = policy

    def forward(self, batch: Batch, needs: Collection[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.policy.evaluate(batch, needs)
        return found


def _summed(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Sums where the default hook averages."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    future: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return future
