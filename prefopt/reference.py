"""Reference log-probs per token, computed once per content: weights, token ids and dtype.

A pass over rows is made in parts, one forward pass each. Which rows make a part follows from the set of rows alone, and a part
is kept under the names of all its rows, because a row's last bits depend on what is computed beside it. So a run reads the
same numbers whether it computed them itself, a run beside it did, or an earlier one. The names hold nothing of algorithm,
strength, seed or order: all runs on the same rows and the same reference share the parts.
On disk parts stand in shards that are mapped into memory, named by the sha256 of their content and of the reference that made
them: a shard that was damaged, cut or copied from another reference does not verify, and its parts are computed again.
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
from prefopt.models.packed import PackedPolicy, Reference
from prefopt.packing import PackedBatch, flat_roles, pack
from prefopt.shards import UNKNOWN, Index, Shard, read_shard, unwritable, write_shard

try:
    import fcntl
except ImportError:  # no such locks on this system: processes side by side may compute a row twice, nothing else
    fcntl = None  # type: ignore[assignment]

# What an interrupted pass may lose, and what it holds outside of shards: half a minute of work, 4 MB of float32.
STORE_SECONDS = 30.0
STORE_VALUES = 1 << 20
# Processes that make the same pass at the same time share its parts out in this many sections.
SECTIONS = 16


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
        self._parts = Index()  # every part that is in a shard
        self._rows = Index()  # every row that this object was asked for and that is in a shard
        self._waiting: list[_Part] = []  # asked for, their rows in `_fresh` until the next `store`
        self._fresh: dict[bytes, Tensor] = {}
        self._unstored: dict[bytes, Tensor] = {}  # computed parts that are in no shard yet: bounded by STORE_VALUES
        self._unstored_values = 0
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

    @property
    def policy(self) -> PackedPolicy:
        """Whose weights are read: under LoRA those of the policy that is trained."""
        return self._reference.policy

    def rows(self, examples: Sequence[Example], *, store: bool = True) -> list[Tensor]:
        """[length] float32 (or wider) log-probs of every completion, in row order: example 0's completions first.

        Args:
            examples: those that were not asked for before make a pass of their own.
            store: False leaves what was computed in memory until there is more of it, or until `store` is called: for many
                small calls.
        """
        keys = [completion_keys(example) for example in examples]
        self._count(examples, keys)
        flat = [key for own in keys for key in own]
        if self._unknown(flat).any():
            if store:
                self.prepare(examples)
            else:
                self._ask(examples)
        places = self._rows.find(flat)
        return [
            self._fresh[key] if place == UNKNOWN else self._rows.values(int(place))
            for key, place in zip(flat, places, strict=True)
        ]

    def prepare(self, examples: Sequence[Example], indices: Sequence[int] | None = None) -> None:
        """Computes what is missing ahead of training and stores it as it goes: a process that is killed has lost
        `STORE_SECONDS` of work, one that stops by an error or an interrupt nothing. Processes that make the same pass at the
        same time share the work.

        Args:
            examples: read one by one, so that a lazy sequence is never in memory as a whole.
            indices: those of `examples` that will be asked for, in any order; None is all.

        Raises:
            OutputError: the disk is full, or the folder cannot be written.
        """
        parts = self._split(examples, range(len(examples)) if indices is None else indices)
        missing = [part for part in parts if not self._known(part)]
        done, total = 0, sum(len(part.indices) for part in missing)
        waiting = list(dict.fromkeys(part.section for part in missing))
        for wait in (False, True):  # sections that another process works on come last, and are mostly there by then
            taken = []
            for section in waiting:
                with self._claim(f"{section}of{SECTIONS}", wait=wait) as mine:
                    if not mine:
                        taken.append(section)
                        continue
                    self._load()
                    try:
                        for part in (part for part in missing if part.section == section):
                            self._compute(part, examples)
                            done += len(part.indices)
                            self._tell(done, total)
                            self._store_if_due()
                    finally:
                        self.store()
            waiting = taken
        self._adopt(parts)

    def count(self, examples: Iterable[Example]) -> None:
        """Counts examples as asked for without computing them: those that another process computes."""
        for example in examples:
            self._count([example], [completion_keys(example)])

    def store(self) -> None:
        """Moves what was computed into a shard.

        Raises:
            OutputError: the disk is full, or the folder cannot be written.
        """
        self._stored_at = time.monotonic()
        if self._unstored:
            keys = np.frombuffer(b"".join(self._unstored), dtype=np.uint8).reshape(-1, 32)
            lengths = np.array([len(values) for values in self._unstored.values()], dtype=np.int64)
            shard = Shard(keys, lengths, torch.cat(list(self._unstored.values())))
            if self._folder is not None:
                path = self._folder / f"{shard.digest(self._identity)}.safetensors"
                write_shard(shard, path)
                self._seen.add(path.name)
                shard = read_shard(path)  # from here on the file's pages hold the values, not this process
            self._parts.add([shard])
            self._unstored, self._unstored_values = {}, 0
        self._adopt(self._waiting)
        self._waiting, self._fresh = [], {}

    def _count(self, examples: Sequence[Example], keys: Sequence[Sequence[bytes]]) -> None:
        for example, own in zip(examples, keys, strict=True):
            name = _example_key(own)
            if name not in self._asked:
                self._asked.add(name)
                self.asked_tokens += example.tokens

    def _unknown(self, keys: Sequence[bytes]) -> np.ndarray:
        """[n] whether a row was never asked for."""
        unknown: np.ndarray = self._rows.find(keys) == UNKNOWN
        if self._fresh:
            for i in np.flatnonzero(unknown).tolist():
                unknown[i] = keys[i] not in self._fresh
        return unknown

    def _split(self, examples: Sequence[Example], indices: Iterable[int]) -> list[_Part]:
        """A pass over those with a row that was never asked for, equal ones once, as parts; all are counted as asked for.

        Longest first: similar groups share an attention call, and if memory does not suffice, that shows at once. Of equal
        lengths by content: the order in which rows are asked for changes nothing.
        """
        found: dict[bytes, _Wanted] = {}
        left = iter(indices)
        while chunk := list(islice(left, 1024)):
            own = [examples[int(i)] for i in chunk]
            keys = [completion_keys(example) for example in own]
            self._count(own, keys)
            unknown = iter(self._unknown([key for rows in keys for key in rows]).tolist())
            for index, example, rows in zip(chunk, own, keys, strict=True):
                if any(list(islice(unknown, len(rows)))):
                    lengths = [len(ids) for ids in example.completion_ids]
                    found.setdefault(_example_key(rows), _Wanted(int(index), example.tokens, b"".join(rows), lengths))
        order = sorted(found.items(), key=lambda item: (-item[1].tokens, item[0]))
        return [_Part.of(order[piece]) for piece in _pieces([wanted.tokens for _, wanted in order], self._budget)]

    def _ask(self, examples: Sequence[Example]) -> None:
        """Makes rows known, without storing them at once."""
        for part in self._split(examples, range(len(examples))):
            self._compute(part, examples)
            self._waiting.append(part)
            values = self._unstored[part.key] if part.key in self._unstored else self._stored(part)
            rows = values.split(part.lengths.tolist())
            self._fresh.update({key.tobytes(): row for key, row in zip(part.row_keys, rows, strict=True)})
        self._store_if_due()

    def _adopt(self, parts: Sequence[_Part]) -> None:
        """Makes the rows of parts that are in shards known."""
        self._rows.add([Shard(part.row_keys, part.lengths, self._stored(part)) for part in parts])

    def _known(self, part: _Part) -> bool:
        return part.key in self._unstored or bool(self._parts.find([part.key])[0] != UNKNOWN)

    def _stored(self, part: _Part) -> Tensor:
        return self._parts.values(int(self._parts.find([part.key])[0]))

    def _compute(self, part: _Part, examples: Sequence[Example]) -> None:
        """Nothing, where the part is known."""
        if self._known(part):
            return
        chosen = [examples[int(i)] for i in part.indices]
        rows = self._reference.token_logps(pack(chosen, roles=flat_roles)).cpu()
        values = torch.cat([row[:length] for row, length in zip(rows, part.lengths.tolist(), strict=True)])
        self._unstored[part.key] = values
        self._unstored_values += len(values)
        self.computed_tokens += sum(example.tokens for example in chosen)

    def _store_if_due(self) -> None:
        if self._unstored_values >= STORE_VALUES or time.monotonic() - self._stored_at >= STORE_SECONDS:
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
                    "set aside, what it held is computed again.",
                    stacklevel=2,
                )
                continue
            shards.append(shard)
        self._parts.add(shards)


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
class _Wanted:
    """An example that is to be computed: where it stands, its packed tokens, and its rows' keys and lengths."""

    index: int
    tokens: int
    row_keys: bytes
    lengths: list[int]


@dataclass(frozen=True)
class _Part:
    """Examples that are computed in one forward pass.

    Args:
        key: sha256 of what the examples are, in their order.
        indices: [n] of the examples in the sequence that was asked for.
        row_keys: [rows, 32] uint8.
        lengths: [rows] scored tokens.
    """

    key: bytes
    indices: np.ndarray
    row_keys: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, members: Sequence[tuple[bytes, _Wanted]]) -> _Part:
        """From example keys and what is wanted of them."""
        wanted = [own for _, own in members]
        return cls(
            hashlib.sha256(b"".join(key for key, _ in members)).digest(),
            np.array([own.index for own in wanted], dtype=np.int64),
            np.frombuffer(b"".join(own.row_keys for own in wanted), dtype=np.uint8).reshape(-1, 32),
            np.array([length for own in wanted for length in own.lengths], dtype=np.int64),
        )

    @property
    def section(self) -> int:
        """Which of `SECTIONS` it belongs to."""
        return self.key[0] % SECTIONS


def _pieces(sizes: Sequence[int], budget: int) -> Iterator[slice]:
    """Consecutive items of at most `budget` tokens together; a larger one is a piece of its own."""
    begin, used = 0, 0
    for i, size in enumerate(sizes):
        if i > begin and used + size > budget:
            yield slice(begin, i)
            begin, used = i, 0
        used += size
    if len(sizes):
        yield slice(begin, len(sizes))
