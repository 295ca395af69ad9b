"""How one run is spread over processes: what the trainer asks of torch.distributed, and the answers of a single process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from prefopt import checkpoint
from prefopt.communicator import Communicator, SingleProcess, gather_plain
from prefopt.errors import ConfigError
from prefopt.files import differences
from prefopt.models.protocol import Batch, Policy

T = TypeVar("T")


class Strategy:
    """One process.

    The objective that the trainer differentiates is divided by weights that are summed over all ranks, so the gradients of
    ranks are summed, never averaged, and a step is the same however many processes make it.

    Args:
        communicator: of the processes.

    Attributes:
        name: what `--strategy` calls it.
        saves_together: `save` needs all processes at the same time.
    """

    name = "single"
    saves_together = False

    def __init__(self, communicator: Communicator | None = None) -> None:
        self.communicator = communicator or SingleProcess()
        self._policy: Any = None

    @property
    def leads(self) -> bool:
        """This process prints and writes: rank 0."""
        return self.communicator.rank == 0

    def prepare(self, policy: Policy) -> None:
        """Takes over a policy that is the same on every rank, before its optimizer is built."""
        self._policy = policy

    def evaluate(self, batch: Batch, needs: Collection[str], *, last: bool) -> dict[str, Tensor]:
        """The prepared policy's `evaluate`, with gradient; `last` is the step's last micro-batch, whose backward pass leaves
        the sum over all ranks and micro-batches in the parameters' gradients."""
        found: dict[str, Tensor] = self._policy.evaluate(batch, needs)
        return found

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
        """Scales gradients down to a global norm of `limit`; the norm before that, a scalar."""
        return torch.nn.utils.clip_grad_norm_(parameters, limit)

    def whole(self, policy: Any) -> AbstractContextManager[None]:
        """Within it every rank has all weights of `policy` and may use them alone: sample, measure, without the others."""
        return contextlib.nullcontext()

    def release(self, policy: Any) -> None:
        """Leaves a trained policy as an ordinary module with all its weights, on every rank."""

    def save(self, folder: Path, step: int, tree: checkpoint.Tree, keep: int) -> None:
        """`checkpoint.save` of what all ranks hold; all of them call it, and rank 0's `tree` is what is written of values that
        every rank has. Raises SaveError, at least on rank 0."""
        if self.leads:
            checkpoint.save(folder, step, tree, keep=keep)

    def own(self, values: Mapping[str, Tensor | checkpoint.Sharded], counterparts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a checkpoint as this process holds them, like their `counterparts` here."""
        from prefopt.parallel import sharded  # imports of torch.distributed that other runs do without

        return sharded.read(values, counterparts)

    def at_step(self, step: int) -> None:
        """Told of every step, for messages about processes that are not heard of any more."""

    def first(self) -> AbstractContextManager[None]:
        """A block that rank 0 runs before the others, which then find what it left in caches. Nothing is exchanged in it."""
        return contextlib.nullcontext()

    def lead(self, action: Callable[[], T]) -> T:
        """What rank 0 alone does; its plain result, on every rank. If it fails, all ranks end."""
        return gather_plain(self.communicator, action() if self.leads else None)[0] if self._many else action()

    def agree(self, value: Mapping[str, Any], what: str) -> None:
        """Checks that all ranks hold the same plain values.

        Raises:
            ConfigError: they do not; on every rank.
        """
        found = gather_plain(self.communicator, dict(value))
        for rank, other in enumerate(found):
            if names := sorted(differences(found[0], other)):
                raise ConfigError(
                    f"{what} must be the same in all {len(found)} processes, but rank {rank} differs from rank 0 in "
                    f"{', '.join(names)}: start all of them with one command, on the same files and versions."
                )

    @property
    def _many(self) -> bool:
        return self.communicator.world_size > 1
