"""Rows of log-probs in files that are mapped into memory, and the index that finds a row by its key.

A shard's name is the sha256 of its content and of what made it, so equal shards have one name, and a damaged one has a name
that does not fit.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prefopt.errors import OutputError

UNKNOWN = -1
"""What `Index.find` says of a key that it does not hold."""


@dataclass(frozen=True)
class Shard:
    """Rows of log-probs behind each other.

    Args:
        keys: [n, 32] uint8.
        lengths: [n] int64.
        values: [sum of lengths], in the reference's dtype.
    """

    keys: np.ndarray
    lengths: np.ndarray
    values: Tensor

    def digest(self, identity: str) -> str:
        """Content and reference as 32 hex digits: the shard's name."""
        found = hashlib.sha256(f"{identity} {len(self.keys)} {self.values.dtype}".encode())
        for part in (self.keys, self.lengths, self.values.view(torch.uint8).numpy()):
            found.update(part.data)
        return found.hexdigest()[:32]


def write_shard(shard: Shard, path: Path) -> None:
    """Writes a shard beside its place and renames it, so that nobody sees half of it.

    Raises:
        OutputError: the disk is full, or the folder cannot be written.
    """
    tensors = {"keys": torch.tensor(shard.keys), "lengths": torch.from_numpy(shard.lengths), "values": shard.values}
    staged = path.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, staged)
        staged.chmod(0o644)  # safetensors takes 0600, but users may share a cache
        os.replace(staged, path)
    except (OSError, SafetensorError) as error:
        staged.unlink(missing_ok=True)
        raise unwritable(path.parent, error) from error


def unwritable(folder: Path, error: Exception) -> OutputError:
    """What to do about a folder that takes no shards."""
    return OutputError(
        f"cannot store reference log-probs in {folder}: {error}. Free space, or name another folder with PREFOPT_CACHE; what "
        "is stored so far will be used again."
    )


def read_shard(path: Path) -> Shard:
    """Maps a shard into memory: the values are read when they are used. Its digest is not checked here.

    Raises:
        SafetensorError: the file is cut, or no shard.
    """
    with safe_open(path, framework="pt") as file:
        keys, lengths, values = (file.get_tensor(name) for name in ("keys", "lengths", "values"))
    return Shard(keys.numpy(), lengths.numpy(), values)


class Index:
    """Key -> row over all shards, in 56 bytes a row: sorted keys for the search, and where each row's values stand."""

    def __init__(self) -> None:
        self._values: list[Tensor] = []
        self._keys = np.empty(0, dtype="S32")  # sorted; the padding that S comparisons ignore cannot part equal widths
        self._rows = np.empty((0, 3), dtype=np.int64)  # shard, begin, end of each key

    def add(self, shards: Sequence[Shard]) -> None:
        """Appends rows; of equal keys the first stays."""
        keys, rows = [self._keys], [self._rows]
        for shard in shards:
            ends = np.cumsum(shard.lengths)
            keys.append(np.ascontiguousarray(shard.keys).view("S32").reshape(-1))
            rows.append(np.stack([np.full_like(ends, len(self._values)), ends - shard.lengths, ends], axis=1))
            self._values.append(shard.values)
        if len(keys) > 1:
            self._keys, first = np.unique(np.concatenate(keys), return_index=True)
            self._rows = np.concatenate(rows)[first]

    def find(self, keys: Sequence[bytes]) -> np.ndarray:
        """[n] number of each key's row, `UNKNOWN` where there is none."""
        wanted = np.frombuffer(b"".join(keys), dtype="S32")
        if not len(self._keys):
            return np.full(len(wanted), UNKNOWN)
        at = np.searchsorted(self._keys, wanted).clip(max=len(self._keys) - 1)
        return np.where(self._keys[at] == wanted, at, UNKNOWN)

    def values(self, number: int) -> Tensor:
        """The row's log-probs, a view of its shard."""
        shard, begin, end = self._rows[number].tolist()
        return self._values[shard][begin:end]
