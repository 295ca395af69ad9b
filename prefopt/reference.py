"""Reference log-probs per token, computed once per content: weights, token ids and dtype.

The key holds nothing of algorithm, strength, seed or batching, so every run on the same reference shares the entries.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prefopt.data.records import Example
from prefopt.models.causal_lm import FrozenReference
from prefopt.packing import flat_roles, pack, split_by_tokens


class ReferenceCache:
    """Per-token log-probs of completions under one frozen reference.

    Args:
        reference: evaluated when an entry is missing.
        folder: where entries live between runs; None keeps them in memory.
        micro_batch_tokens: packed tokens of one forward pass.
        on_progress: called with (done, total) examples while entries are computed.

    Attributes:
        computed_tokens: packed tokens of the forward passes made here.
        asked_tokens: packed tokens of the different examples asked for, computed here or earlier by others: the cost of a
            run, which must not depend on what ran before it.
    """

    def __init__(
        self,
        reference: FrozenReference,
        folder: Path | None = None,
        *,
        micro_batch_tokens: int = 8192,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._reference = reference
        self._budget = micro_batch_tokens
        self._on_progress = on_progress
        self._known: dict[bytes, Tensor] = {}
        self._folder = None
        self._asked: set[tuple[bytes, ...]] = set()
        # What this object computed depends on what others left on disk; what it was asked for does not.
        self.computed_tokens = 0
        self.asked_tokens = 0
        if folder is not None:
            dtype = "bf16-autocast" if reference.device.type == "cuda" else str(reference.dtype).removeprefix("torch.")
            self._folder = folder / f"{reference.weights}-{dtype}"
            self._load()

    def rows(self, examples: Sequence[Example]) -> list[Tensor]:
        """[length] float32 (or wider) log-probs of every completion, in row order: example 0's completions first."""
        keys = [tuple(_keys(example)) for example in examples]
        missing = [example for example, own in zip(examples, keys, strict=True) if any(key not in self._known for key in own)]
        if missing:
            self._compute(list(dict.fromkeys(missing)))
        for example, own in zip(examples, keys, strict=True):
            if own not in self._asked:
                self._asked.add(own)
                self.asked_tokens += example.tokens
        return [self._known[key] for own in keys for key in own]

    def _compute(self, examples: list[Example]) -> None:
        done = 0
        fresh: dict[bytes, Tensor] = {}
        # Sorted by length: similar groups share an attention call, and the order does not matter here.
        for part in split_by_tokens(sorted(examples, key=lambda e: e.tokens), self._budget):
            rows = self._reference.token_logps(pack(part, roles=flat_roles)).cpu()
            keys = [key for example in part for key in _keys(example)]
            lengths = [len(ids) for example in part for ids in example.completion_ids]
            fresh.update({key: row[:length].clone() for key, row, length in zip(keys, rows, lengths, strict=True)})
            self.computed_tokens += sum(example.tokens for example in part)
            done += len(part)
            if self._on_progress is not None:
                self._on_progress(done, len(examples))
        self._known.update(fresh)
        if self._folder is not None:
            self._store(fresh)

    def _store(self, fresh: dict[bytes, Tensor]) -> None:
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        lengths = torch.tensor([len(row) for row in fresh.values()])
        keys = torch.frombuffer(bytearray(b"".join(fresh)), dtype=torch.uint8).view(-1, 32)
        staged = self._folder / f".tmp-{uuid.uuid4().hex}"
        save_file({"keys": keys, "lengths": lengths, "values": torch.cat(list(fresh.values()))}, staged)
        name = hashlib.sha256(keys.numpy().tobytes()).hexdigest()[:16]
        os.replace(staged, self._folder / f"{name}.safetensors")

    def _load(self) -> None:
        assert self._folder is not None
        for path in sorted(self._folder.glob("*.safetensors")):
            shard = load_file(path)
            rows = shard["values"].split(shard["lengths"].tolist())
            self._known.update(zip((bytes(key) for key in shard["keys"].numpy()), rows, strict=True))


def _keys(example: Example) -> list[bytes]:
    prompt = ",".join(map(str, example.prompt_ids))
    return [hashlib.sha256(f"{prompt}|{','.join(map(str, ids))}".encode()).digest() for ids in example.completion_ids]
