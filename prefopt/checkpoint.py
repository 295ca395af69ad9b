"""Checkpoints: trees of tensors and plain values, written aside, checked by checksums, renamed when complete.

A folder `checkpoint-<step>` holds state.safetensors, state.json, the parts that other processes wrote of tensors that none of
them holds whole and, written last, manifest.json with the size and sha256 of all: torch and safetensors load a file with a
flipped byte silently. Nothing is ever pickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import random
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import load_file, save_file
from safetensors.torch import save as tensors_to_bytes

from prefopt.communicator import Communicator, SingleProcess, gather_plain
from prefopt.errors import ConfigError, OutputError, SaveError

FORMAT_VERSION = 3
_FILES = ("state.safetensors", "state.json")
_PREFIX, _REPLACED = "checkpoint-", "-old"
# What files can raise that are not what was written; RecursionError comes of JSON that is nested a thousand deep.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError)
# Free space that a save asks for, in sizes of what it writes.
_ROOM = 1.2
Tree = Any
"""Nested dicts (string keys) and lists of tensors, `Sharded`, numbers, strings, booleans and None."""


@dataclass(frozen=True)
class Sharded:
    """A tensor whose parts lie in files beside state.safetensors (prefopt.parallel.sharded writes and reads them).

    Args:
        name: in those files.
        shape: of the whole.
        dtype: its type.
        folder: of the checkpoint; None before it is written.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    folder: Path | None = None

    @property
    def nbytes(self) -> int:
        """Of the whole."""
        return math.prod(self.shape) * self.dtype.itemsize


def save(
    folder: Path, step: int, tree: Tree, *, keep: int = 2, write_shards: Callable[[Path], None] = lambda staged: None
) -> Path:
    """Writes `tree` as folder/checkpoint-<step>, then removes what is older than the newest `keep` checkpoints that verify.

    Args:
        folder: of the run.
        step: updates made.
        tree: what is written.
        keep: checkpoints that stay.
        write_shards: called with the unfinished folder; writes the files that the tree's `Sharded` lie in.

    Raises:
        SaveError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    target = folder / f"{_PREFIX}{step}"
    unique = uuid.uuid4().hex[:8]
    staged, replaced = folder / f".tmp-{step}-{unique}", folder / f".tmp-{step}-{unique}{_REPLACED}"
    tensors: dict[str, torch.Tensor] = {}
    shards: list[Sharded] = []
    plain = _split(tree, "", tensors, shards)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_space(folder, sum(t.nbytes for t in tensors.values()) + sum(s.nbytes for s in shards))
        staged.mkdir()
        write_shards(staged)
        # Clones: safetensors refuses tensors that share memory, and optimizer steps are 0-d views.
        save_file(
            {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, staged / "state.safetensors"
        )
        (staged / "state.json").write_text(json.dumps(plain))
        files = {path.name: _describe(path) for path in sorted(staged.iterdir())}
        (staged / "manifest.json").write_text(json.dumps({"version": FORMAT_VERSION, "step": step, "files": files}))
        for name in (*files, "manifest.json"):
            _fsync(staged / name)
        _fsync(staged)
        if target.exists():
            os.replace(target, replaced)
        os.replace(staged, target)
        _fsync(folder)
    except (OSError, SafetensorError, SaveError) as error:
        shutil.rmtree(staged, ignore_errors=True)
        if replaced.exists() and not target.exists():
            os.replace(replaced, target)
        if isinstance(error, SaveError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise SaveError(f"could not write {target}: {reason}. Earlier checkpoints are intact.") from error
    shutil.rmtree(replaced, ignore_errors=True)
    _rotate(folder, keep)
    return target


def _check_space(folder: Path, size: int) -> None:
    """Raises OSError when the disk has no room for `size` bytes of tensors and what goes with them."""
    needed, free = _ROOM * size, shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"No space left: {_amount(needed)} are needed, and {_amount(free)} are free")


def _amount(size: float) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def _rotate(folder: Path, keep: int) -> None:
    """Damaged checkpoints do not count, so that they never drive out the last good one."""
    good = 0
    for path in reversed(list_checkpoints(folder)):
        if good == keep:
            _remove(path)
        elif _verifies(path):
            good += 1


def _remove(path: Path) -> None:
    """A checkpoint leaves its name before its files, so that no part of it is ever seen under that name."""
    leaving = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex[:8]}")
    os.replace(path, leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def _verifies(path: Path) -> bool:
    try:
        _verify(path)
    except OutputError:
        return False
    return True


def load_latest(folder: Path, say: Callable[[str], None], communicator: Communicator | None = None) -> tuple[int, Tree] | None:
    """The newest checkpoint that verifies, as (step, tree); None when there is none at all.

    Args:
        folder: where `save` wrote.
        say: told about every checkpoint that was passed over, and why.
        communicator: of the processes that load together; they share the work of verifying, and get the same checkpoint.

    Raises:
        OutputError: checkpoints exist, but none of them verifies.
        ConfigError: the processes see different checkpoints.
    """
    together = communicator or SingleProcess()
    if together.rank == 0:
        _sweep(folder)
    gather_plain(together, None)  # the others look when rank 0 has cleared up
    found = list_checkpoints(folder)
    seen = gather_plain(together, [path.name for path in found])
    if any(names != seen[0] for names in seen):
        newest = ", ".join(names[-1] if names else "none" for names in seen)
        raise ConfigError(
            f"the processes see different checkpoints in {folder} (the newest, by rank: {newest}): the folder must be one that "
            "all of them share."
        )
    problems = []
    for path in reversed(found):
        loaded, problem = None, None
        try:
            loaded = load(path, rank=together.rank, ranks=together.world_size)
        except OutputError as error:
            problem = str(error)
        problem = next((other for other in gather_plain(together, problem) if other is not None), None)
        if problem is None:
            return loaded
        problems.append(problem)
        say(f"{problem} Falling back to the checkpoint before it.")
    if found:
        raise OutputError(f"no checkpoint in {folder} can be used: {' '.join(problems)} Start again in another folder.")
    return None


def _sweep(folder: Path) -> None:
    """Removes what killed writers left; what one had moved out of its way goes back."""
    for stale in folder.glob(".tmp-*"):
        target = folder / f"{_PREFIX}{stale.name.split('-')[1]}"
        if stale.name.endswith(_REPLACED) and not target.exists():
            os.replace(stale, target)
        else:
            shutil.rmtree(stale, ignore_errors=True)


def load(path: Path, *, rank: int = 0, ranks: int = 1) -> tuple[int, Tree]:
    """One checkpoint, verified against its manifest.

    Args:
        path: folder/checkpoint-<step>.
        rank: of `ranks` processes that read it together, each of which verifies its share of the parts.
        ranks: how many they are.

    Raises:
        OutputError: a file is missing, cut short or changed; the message names it.
    """
    manifest = _verify(path, rank, ranks)
    try:
        tensors = load_file(path / "state.safetensors")
        return int(manifest["step"]), _join(json.loads((path / "state.json").read_text()), tensors, path)
    except _UNREADABLE as error:
        raise OutputError(f"{path} cannot be read: {error}.") from error


def _verify(path: Path, rank: int = 0, ranks: int = 1) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are those that were written. Raises OutputError as `load`."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["version"] != FORMAT_VERSION:
            raise OutputError(
                f"{path} has format version {manifest['version']}, this prefopt reads {FORMAT_VERSION}: resume with the "
                "version that wrote it."
            )
        unnamed = sorted(set(_FILES) - manifest["files"].keys())
        if unnamed:
            raise OutputError(f"{path}/manifest.json has no checksum of {', '.join(unnamed)}.")
        # Readers of parts look into every such file.
        if added := sorted({found.name for found in path.glob("*.safetensors")} - manifest["files"].keys()):
            raise OutputError(f"{path} holds what its manifest does not name: {', '.join(added)}.")
        parts = sorted(set(manifest["files"]) - set(_FILES))
        for name, expected in manifest["files"].items():
            if Path(name).name != name or (path / name).is_symlink():
                raise OutputError(f"{path}/manifest.json names a file outside its folder: {name!r}.")
            if name in parts and parts.index(name) % ranks != rank:
                continue
            if _describe(path / name) != expected:
                raise OutputError(f"{path / name} is damaged: its checksum or size is not the one in the manifest.")
        return manifest
    except _UNREADABLE as error:
        raise OutputError(f"{path} cannot be read: {error}.") from error


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoint folders, oldest first."""
    found = [p for p in folder.glob(f"{_PREFIX}*") if p.name.removeprefix(_PREFIX).isdigit()] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.removeprefix(_PREFIX)))


def generator_state() -> Tree:
    """State of Python's, NumPy's and torch's generators (every CUDA device included)."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": {"version": version, "internal": list(internal), "gauss": gauss},
        "numpy": {
            "kind": kind,
            "keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            "rest": [position, has_gauss, cached],
        },
        "torch": torch.get_rng_state(),
        "cuda": [state.cpu() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
    }


def load_generator_state(tree: Tree) -> None:
    """The inverse of `generator_state`."""
    python = tree["python"]
    random.setstate((python["version"], tuple(python["internal"]), python["gauss"]))
    kind, rest = tree["numpy"]["kind"], tree["numpy"]["rest"]
    np.random.set_state((kind, tree["numpy"]["keys"].numpy().astype(np.uint32), *rest))
    torch.set_rng_state(tree["torch"])
    if tree["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(tree["cuda"])


def optimizer_state(optimizer: torch.optim.Optimizer) -> Tree:
    """An optimizer's state with string keys."""
    state = optimizer.state_dict()
    groups = [{key: value for key, value in group.items() if key != "params"} for group in state["param_groups"]]
    return {"state": {str(index): dict(values) for index, values in state["state"].items()}, "groups": groups}


def load_optimizer_state(optimizer: torch.optim.Optimizer, tree: Tree) -> None:
    """The inverse of `optimizer_state`, for an optimizer over the same parameters in the same order."""
    own = optimizer.state_dict()["param_groups"]
    groups = [{**saved, "params": group["params"]} for saved, group in zip(tree["groups"], own, strict=True)]
    optimizer.load_state_dict(
        {"state": {int(index): values for index, values in tree["state"].items()}, "param_groups": groups}
    )


def copied(tree: Tree) -> Tree:
    """A tree that shares nothing with `tree`, its tensors in main memory: what is written while the original changes."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, Mapping):
        return {key: copied(value) for key, value in tree.items()}
    return [copied(value) for value in tree] if isinstance(tree, list | tuple) else tree


_TENSOR, _SHARDED = "__tensor__", "__sharded__"


def _split(tree: Tree, path: str, tensors: dict[str, torch.Tensor], shards: list[Sharded] | None = None) -> Tree:
    if isinstance(tree, torch.Tensor):
        # The number keeps apart {"a/b": x} and {"a": {"b": y}}.
        name = f"{len(tensors)}{path}"
        tensors[name] = tree
        return {_TENSOR: name}
    if isinstance(tree, Sharded) and shards is not None:
        shards.append(tree)
        return {_SHARDED: tree.name, "shape": list(tree.shape), "dtype": str(tree.dtype).removeprefix("torch.")}
    if isinstance(tree, Mapping):
        return {str(key): _split(value, f"{path}/{key}", tensors, shards) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_split(value, f"{path}/{index}", tensors, shards) for index, value in enumerate(tree)]
    if tree is None or isinstance(tree, str | int | float | bool):
        return tree
    raise TypeError(f"a checkpoint cannot hold a {type(tree).__name__} (at {path or 'the root'}).")


def _join(tree: Tree, tensors: Mapping[str, torch.Tensor], folder: Path | None = None) -> Tree:
    if isinstance(tree, list):
        return [_join(value, tensors, folder) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if _TENSOR in tree:
        return tensors[tree[_TENSOR]]
    if _SHARDED in tree:
        dtype = getattr(torch, tree["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{tree['dtype']!r} is no type of tensors")
        return Sharded(str(tree[_SHARDED]), tuple(int(size) for size in tree["shape"]), dtype, folder)
    return {key: _join(value, tensors, folder) for key, value in tree.items()}


def to_bytes(tree: Tree) -> bytes:
    """A tree as bytes, for other processes: the plain values as JSON, their length before them, and the tensors behind them."""
    tensors: dict[str, torch.Tensor] = {}
    plain = json.dumps(_split(tree, "", tensors)).encode()
    return len(plain).to_bytes(8, "little") + plain + tensors_to_bytes(tensors)


def from_bytes(data: bytes) -> Tree:
    """The inverse of `to_bytes`."""
    end = 8 + int.from_bytes(data[:8], "little")
    return _join(json.loads(data[8:end]), tensors_from_bytes(data[end:]))


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
