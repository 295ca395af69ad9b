"""Every rank holds a part of each weight, gradient and optimizer state: torch's fully_shard (FSDP2), by decoder layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from prefopt import checkpoint
from prefopt.communicator import gather_plain
from prefopt.errors import SaveError
from prefopt.models.heads import Head
from prefopt.models.protocol import Policy, trainable_parameters
from prefopt.parallel import sharded
from prefopt.parallel.processes import Processes, as_module


class FSDP2(Processes):
    """Shards.

    Weights are gathered layer by layer in forward and backward, and gradients are summed into shards at every micro-batch:
    gathering them once a step would need room for all of them.
    """

    name = "fsdp2"
    saves_together = True

    def prepare(self, policy: Policy) -> None:
        """See `Strategy.prepare`; the policy is sharded in place, rank 0's weights are copied to the others before."""
        super().prepare(policy)
        module: Any = as_module(policy)
        for tensor in module.state_dict().values():
            torch.distributed.broadcast(tensor, 0)
        mesh = init_device_mesh(trainable_parameters(policy)[0].device.type, (self.communicator.world_size,))
        # Heads are units of their own: they may be wider than the model, and a unit's gradients must be of one type.
        for unit in [unit for unit in module.modules() if isinstance(unit, GradientCheckpointingLayer | Head)]:
            fully_shard(unit, mesh=mesh)
        fully_shard(module, mesh=mesh)
        # The LM head is used outside of the model's forward, so the unit that holds it must span `evaluate`.
        register_fsdp_forward_method(module, "evaluate")
        for unit in _units(module):
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sums
        # The first module that runs becomes the root; a layer must not, when sampling comes before the first `evaluate`.
        module._get_fsdp_state()._lazy_init()

    def clip(self, parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
        """See `Strategy.clip`."""
        norm = super().clip(parameters, limit)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @contextlib.contextmanager
    def whole(self, policy: Any) -> Iterator[None]:
        """See `Strategy.whole`; all ranks enter and leave together."""
        if not _units(policy):  # the reference of full fine-tuning, which is a model of its own
            yield
            return
        self._gather(policy)
        try:
            yield
        finally:
            for unit in _units(policy):
                unit.reshard()
                # The root keeps its weights between forward and backward, where they are needed again at once.
                unit.set_reshard_after_forward(unit is not policy, recurse=False)
            policy.reset_iter_state()

    def release(self, policy: Any) -> None:
        """See `Strategy.release`."""
        self._gather(policy)
        for module in policy.modules():
            # torch's hooks there would shard the weights again for a state dict.
            module._state_dict_pre_hooks.clear()

    def save(self, folder: Path, step: int, tree: checkpoint.Tree, keep: int) -> None:
        """See `Strategy.save`; every rank writes the parts that it holds, so nothing is gathered."""
        tree, parts = sharded.separate(tree)
        told = False

        def write_parts(staged: Path | None) -> None:
            nonlocal told
            told = True
            where = gather_plain(self.communicator, staged and str(staged))[0]
            if where is None:
                raise SaveError(f"could not write into {folder}: rank 0 could not begin a checkpoint.")
            seen = gather_plain(self.communicator, Path(where).is_dir())
            if not all(seen):
                raise SaveError(
                    f"could not write into {folder}: rank {seen.index(False)} does not see what rank 0 writes there; "
                    "the folder must be one that all processes share."
                )
            sharded.write(parts, Path(where))

        if not self.leads:
            return write_parts(None)
        try:
            checkpoint.save(folder, step, tree, keep=keep, write_shards=write_parts)
        except SaveError:
            if not told:  # the others wait to hear where
                with contextlib.suppress(SaveError):
                    write_parts(None)
            raise

    def _gather(self, policy: Any) -> None:
        for unit in _units(policy):
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()


def _units(module: nn.Module) -> list[FSDPModule]:
    return [unit for unit in module.modules() if isinstance(unit, FSDPModule)]
