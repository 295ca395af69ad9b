"""Reference log-probs per token, computed once per content: weights, token ids and dtype.

The key holds nothing of algorithm, strength, seed or batching, so every run on the same reference shares the entries.
On disk they stand in shards that are mapped into memory, named by the sha256 of their content and of the reference that made
them: a shard that was damaged, cut or copied from another reference does not verify, and its rows are computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import warnings
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from prefopt.data.records import Example
from prefopt.errors import ConfigError
from prefopt.models.causal_lm import CausalLMPolicy, FrozenReference
from prefopt.models.fingerprint import fingerprint
from prefopt.models.packed import Reference
from prefopt.packing import PackedBatch, flat_roles, pack
from prefopt.shards import UNKNOWN, Index, Shard, read_shard, unwritable, write_shard

try:
    import fcntl
except ImportError:  # no such locks on this system: processes side by side may compute a row twice, nothing else
    fcntl = None  # type: ignore[assignment]

# What an interrupted pass may lose, and what it holds outside of shards: half a minute of work, 4 MB of float32.
STORE_SECONDS = 30.0
STORE_VALUES = 1 << 20
# A pass of more parts than this is shared out between processes, in as many sections.
SECTIONS = 16
# The place of a row that is computed, but not yet in a shard.
_FRESH = -2


class ReferenceCache:
    """Per-token log-probs of completions under one frozen reference.

    Args:
        reference: evaluated when an entry is missing.
        folder: where entries live between runs; None keeps them in memory.
        micro_batch_tokens: packed tokens of one forward pass.
        on_progress: called with (done, total) examples while entries are computed ahead.

    Attributes:
        computed_tokens: packed tokens of the forward passes made here.
        asked_tokens: packed tokens of the different examples asked for, computed here or earlier by others: the cost of a
            run, which must not depend on what ran before it.
    """

    def __init__(
        self,
        reference: Reference,
        folder: Path | None = None,
        *,
        micro_batch_tokens: int = 8192,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._reference = reference
        self._budget = micro_batch_tokens
        self._on_progress = on_progress
        self._index = Index()
        self._fresh: dict[bytes, Tensor] = {}  # computed, not yet in a shard: bounded by STORE_VALUES
        self._fresh_values = 0
        self._stored_at = time.monotonic()
        self._asked: set[bytes] = set()
        # What this object computed depends on what others left on disk; what it was asked for does not.
        self.computed_tokens = 0
        self.asked_tokens = 0
        dtype = "bf16-autocast" if reference.device.type == "cuda" else str(reference.dtype).removeprefix("torch.")
        self._identity = f"{reference.weights}-{dtype}"
        self._folder = None if folder is None else folder / self._identity
        self._seen: set[str] = set()  # names of shards, good and bad
        self._load()

    def rows(self, examples: Sequence[Example], *, store: bool = True) -> list[Tensor]:
        """[length] float32 (or wider) log-probs of every completion, in row order: example 0's completions first.

        Args:
            examples: what is not known of them is computed.
            store: False leaves what was computed in memory until there is more of it, or until `store` is called: for many
                small calls.
        """
        keys = [completion_keys(example) for example in examples]
        self._count(examples, keys)
        flat = [key for own in keys for key in own]
        places = self._places(flat)
        if (places == UNKNOWN).any():
            if store:
                self.prepare(examples)
            else:
                self._compute(examples, self._missing(examples, range(len(examples))))
            places = self._places(flat)
        return [
            self._fresh[key] if place == _FRESH else self._index.values(int(place))
            for key, place in zip(flat, places, strict=True)
        ]

    def prepare(self, examples: Sequence[Example], indices: Sequence[int] | None = None) -> None:
        """Computes what is missing ahead of training and stores it as it goes: a process that is killed has lost
        `STORE_SECONDS` of work, one that stops by an error or an interrupt nothing. Processes that need the same rows at
        the same time share the work.

        Args:
            examples: read one by one, so that a lazy sequence is never in memory as a whole.
            indices: those of `examples` that will be asked for, in any order; None is all.

        Raises:
            OutputError: the disk is full, or the folder cannot be written.
        """
        missing = self._missing(examples, range(len(examples)) if indices is None else indices)
        if not len(missing):
            return
        shared_out = int(missing.sizes.sum()) > SECTIONS * self._budget
        sections = missing.sections if shared_out else np.zeros_like(missing.sections)
        done, waiting = 0, sorted(set(sections.tolist()))
        for wait in (False, True):  # sections that another process works on come last, and are mostly there by then
            taken = []
            for number in waiting:
                with self._claim(f"{number}of{SECTIONS}" if shared_out else "all", wait=wait) as mine:
                    if not mine:
                        taken.append(number)
                        continue
                    own = missing.indices[sections == number]
                    self._load()
                    left = self._missing(examples, own)
                    if len(left) < len(own):  # others have stored some meanwhile
                        done += len(own) - len(left)
                        self._tell(done, len(missing))
                    self._compute(examples, left, done, len(missing))
                    done += len(left)
            waiting = taken

    def count(self, examples: Iterable[Example]) -> None:
        """Counts examples as asked for without computing them: those of the steps before a resumed one."""
        for example in examples:
            self._count([example], [completion_keys(example)])

    def store(self) -> None:
        """Moves what was computed into a shard.

        Raises:
            OutputError: the disk is full, or the folder cannot be written.
        """
        self._stored_at = time.monotonic()
        if not self._fresh:
            return
        keys = np.frombuffer(b"".join(self._fresh), dtype=np.uint8).reshape(-1, 32)
        lengths = np.array([len(row) for row in self._fresh.values()], dtype=np.int64)
        shard = Shard(keys, lengths, torch.cat(list(self._fresh.values())))
        if self._folder is not None:
            path = self._folder / f"{shard.digest(self._identity)}.safetensors"
            write_shard(shard, path)
            self._seen.add(path.name)
            shard = read_shard(path)  # from here on the file's pages hold the values, not this process
        self._index.add([shard])
        self._fresh, self._fresh_values = {}, 0

    def _count(self, examples: Sequence[Example], keys: Sequence[Sequence[bytes]]) -> None:
        for example, own in zip(examples, keys, strict=True):
            name = _example_key(own)
            if name not in self._asked:
                self._asked.add(name)
                self.asked_tokens += example.tokens

    def _places(self, keys: Sequence[bytes]) -> np.ndarray:
        """Where each key's row stands: a number of the index, `_FRESH` or `UNKNOWN`."""
        found = self._index.find(keys)
        if self._fresh:
            for i in np.flatnonzero(found == UNKNOWN).tolist():
                if keys[i] in self._fresh:
                    found[i] = _FRESH
        return found

    def _missing(self, examples: Sequence[Example], indices: Iterable[int]) -> _Missing:
        """Those of which a row is not known, equal ones once; all are counted as asked for."""
        found: dict[bytes, tuple[int, int]] = {}
        left = iter(indices)
        while chunk := list(islice(left, 1024)):
            part = [examples[int(i)] for i in chunk]
            keys = [completion_keys(example) for example in part]
            self._count(part, keys)
            unknown = iter(self._places([key for own in keys for key in own]) == UNKNOWN)
            for index, example, own in zip(chunk, part, keys, strict=True):
                if any(list(islice(unknown, len(own)))):
                    found.setdefault(_example_key(own), (int(index), example.tokens))
        table = np.array(list(found.values()), dtype=np.int64).reshape(-1, 2)
        return _Missing(table[:, 0], table[:, 1], np.array([key[0] % SECTIONS for key in found], dtype=np.int64))

    def _compute(self, examples: Sequence[Example], missing: _Missing, done: int | None = None, total: int = 0) -> None:
        """Without `done`, leaves the last entries unstored and reports no progress."""
        # Sorted by length: similar groups share an attention call. The longest come first: if memory does not suffice, that
        # shows at once.
        order = np.argsort(-missing.sizes, kind="stable")
        try:
            for part in _parts(missing.sizes[order], self._budget):
                chosen = [examples[int(i)] for i in missing.indices[order[part]]]
                rows = self._reference.token_logps(pack(chosen, roles=flat_roles)).cpu()
                keys = [key for example in chosen for key in completion_keys(example)]
                lengths = [len(ids) for example in chosen for ids in example.completion_ids]
                self._fresh.update({k: row[:n].clone() for k, row, n in zip(keys, rows, lengths, strict=True)})
                self._fresh_values += sum(lengths)
                self.computed_tokens += sum(example.tokens for example in chosen)
                if done is not None:
                    done += len(chosen)
                    self._tell(done, total)
                if self._fresh_values >= STORE_VALUES or time.monotonic() - self._stored_at >= STORE_SECONDS:
                    self.store()
        finally:
            if done is not None:
                self.store()

    def _tell(self, done: int, total: int) -> None:
        if self._on_progress is not None:
            self._on_progress(done, total)

    @contextlib.contextmanager
    def _claim(self, name: str, *, wait: bool) -> Iterator[bool]:
        """True with the named work locked against other processes; the lock ends with the process, however it ends."""
        if self._folder is None or fcntl is None:
            yield True
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = (self._folder / f".claim-{name}").open("a")
        except OSError as error:
            raise unwritable(self._folder, error) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            except OSError:  # a file system without locks: at worst the work is done twice
                pass
            yield True

    def _load(self) -> None:
        """Takes up shards that have appeared in the folder; one that does not verify is set aside."""
        if self._folder is None:
            return
        shards = []
        for path in sorted(self._folder.glob("*.safetensors")):
            if path.name in self._seen:
                continue
            self._seen.add(path.name)
            try:
                shard = read_shard(path)
                if shard.digest(self._identity) != path.stem:
                    raise ValueError("its content is not what its name says")
            except FileNotFoundError:
                continue  # another process has set it aside
            except (SafetensorError, OSError, ValueError) as error:
                with contextlib.suppress(OSError):  # a folder that only others may write: passed over every time
                    os.replace(path, path.with_suffix(".damaged"))
                warnings.warn(
                    f"{path}: a damaged part of the cache of reference log-probs, or one of another reference ({error}); "
                    "set aside, its rows are computed again.",
                    stacklevel=2,
                )
                continue
            shards.append(shard)
        self._index.add(shards)


class StartReference(FrozenReference):
    """A policy as the reference that it starts from, until its first update: no copy of the weights is made.

    For runs whose losses and metrics need nothing of the reference but log-probs that are computed ahead.

    Args:
        policy: fully fine-tuned; under LoRA policy and reference share their weights anyway (`build_policy`).

    Raises:
        ConfigError: by every method, once the policy's weights have changed.
    """

    def __init__(self, policy: CausalLMPolicy) -> None:
        if policy.lora is not None:
            raise ConfigError("StartReference is for full fine-tuning; with LoRA build_policy makes no copy either.")
        super().__init__(policy, fingerprint(policy.model))
        self._model = policy.model
        self._start = self._bit_sums()

    def hidden(self, batch: PackedBatch) -> Tensor:
        """As `FrozenReference.hidden`."""
        self._check()
        return super().hidden(batch)

    def rows(self, batch: PackedBatch, quantities: Collection[str]) -> dict[str, Tensor]:
        """As `FrozenReference.rows`."""
        self._check()
        return super().rows(batch, quantities)

    def _bit_sums(self) -> Tensor:
        """[weights] int64: exact in any order. A fused optimizer leaves no other trace, version counters included."""
        integers = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
        return torch.stack([p.detach().view(integers[p.element_size()]).sum() for p in self._model.parameters()])

    def _check(self) -> None:
        if not torch.equal(self._bit_sums(), self._start):
            raise ConfigError(
                "the reference is asked for log-probs that were not computed before the policy's first update, and no copy of "
                "its weights was kept: compute them ahead (reference_pass='ahead', ReferenceCache.prepare), or take the "
                "reference that build_policy returns."
            )


def completion_keys(example: Example) -> list[bytes]:
    """sha256 of prompt and completion ids for each completion; lengths keep "12|3" and "1|23" apart."""
    prompt = hashlib.sha256(_encoded(example.prompt_ids))
    keys = []
    for ids in example.completion_ids:
        key = prompt.copy()
        key.update(_encoded(ids))
        keys.append(key.digest())
    return keys


def _encoded(ids: Sequence[int]) -> bytes:
    return len(ids).to_bytes(8, "little") + array("i", ids).tobytes()  # int32


def _example_key(keys: Sequence[bytes]) -> bytes:
    return hashlib.sha256(b"".join(keys)).digest()[:16]


@dataclass(frozen=True)
class _Missing:
    """[n] index in the sequence, packed tokens and section of examples that are to be computed."""

    indices: np.ndarray
    sizes: np.ndarray
    sections: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)


def _parts(sizes: np.ndarray, budget: int) -> Iterator[slice]:
    """Consecutive items of at most `budget` tokens together; a larger one is a part of its own."""
    begin, used = 0, 0
    for i, size in enumerate(sizes.tolist()):
        if i > begin and used + size > budget:
            yield slice(begin, i)
            begin, used = i, 0
        used += size
    if len(sizes):
        yield slice(begin, len(sizes))
