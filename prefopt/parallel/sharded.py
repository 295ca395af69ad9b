"""Tensors of which every process holds a part, in checkpoints: each writes its own, and reads its own back, on any number of
processes. torch.distributed.checkpoint does it, in safetensors; its other formats would pickle."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, distribute_tensor

from prefopt.checkpoint import Sharded, Tree
from prefopt.errors import OutputError, SaveError


def separate(tree: Tree) -> tuple[Tree, dict[str, Tensor]]:
    """The tree with `Sharded` in the place of what processes hold parts of, and those tensors by their names there."""
    parts: dict[str, Tensor] = {}

    def apart(value: Any, path: str) -> Any:
        if isinstance(value, Mapping):
            return {key: apart(inner, f"{path}/{key}") for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [apart(inner, f"{path}/{index}") for index, inner in enumerate(value)]
        if not isinstance(value, DTensor):
            return value
        name = f"part {len(parts)}{path}"
        parts[name] = value.detach()
        return Sharded(name, tuple(value.shape), value.dtype)

    return apart(tree, ""), parts


def write(parts: Mapping[str, Tensor], folder: Path) -> None:
    """Each process writes what it holds into a file of its own in `folder`; all of them call it.

    Raises:
        SaveError: one of them could not; on all of them.
    """
    try:
        dcp.save(dict(parts), storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        raise SaveError(f"could not write into {folder.parent}: {_reasons(error)}. Earlier checkpoints are intact.") from error


def read(values: Mapping[str, Tensor | Sharded], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a checkpoint as this process holds them.

    Args:
        values: of checkpoints, by name.
        own: their counterparts in this process. Where one is a part (all processes call this then, with the same names), so
            is the result; other results are whole.

    Raises:
        OutputError: the files do not hold what the checkpoint says.
    """
    found: dict[str, Tensor] = {}
    targets: dict[Path | None, dict[str, Tensor]] = {}
    for name, value in values.items():
        mine = own.get(name)
        part = mine if isinstance(mine, DTensor) and mine.shape == value.shape else None
        if isinstance(value, Sharded):
            found[name] = _empty(value, part)
            targets.setdefault(value.folder, {})[value.name] = found[name]
        else:
            found[name] = value if part is None else _share(value, part)
    for folder, wanted in targets.items():
        _fill(wanted, folder)
    return found


def _share(value: Tensor, part: DTensor) -> Tensor:
    return distribute_tensor(value.to(part.device), part.device_mesh, part.placements, src_data_rank=None)


def _empty(value: Sharded, part: DTensor | None) -> Tensor:
    try:
        return torch.empty(value.shape, dtype=value.dtype) if part is None else torch.empty_like(part, dtype=value.dtype)
    except (RuntimeError, MemoryError) as error:
        raise OutputError(f"{value.folder} cannot be read: {value.name} of shape {value.shape}: {error}.") from error


def _fill(targets: dict[str, Tensor], folder: Path | None) -> None:
    assert folder is not None
    alone = not any(isinstance(target, DTensor) for target in targets.values())
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is")  # that it reads alone, which is meant
            dcp.load(targets, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=alone)
    except (CheckpointException, RuntimeError, KeyError, ValueError) as error:
        what = _reasons(error) if isinstance(error, CheckpointException) else error
        raise OutputError(f"{folder} cannot be read: {what}.") from error


def _reasons(error: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
