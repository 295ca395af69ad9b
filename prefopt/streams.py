"""Streams of batches over a data set. On-policy streams live in rollouts.py; the trainer cannot tell them apart.

A stream is an iterable of steps; a step is the list of micro-batches of one optimizer update. Its `state_dict` is all that
is needed to go on from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from losses.types import Metric
from prefopt.data.records import Example, Labels
from prefopt.errors import ConfigError, DataError
from prefopt.models.protocol import Batch
from prefopt.packing import (
    PackedBatch,
    chosen_roles,
    flat_roles,
    group_roles,
    mismatched_roles,
    pack,
    pair_roles,
    split_by_tokens,
)
from prefopt.parallel.split import build_parts, own_parts
from prefopt.parallel.strategy import Strategy
from prefopt.reference import ReferenceCache

Step = list[Batch]


class Stream(Protocol):
    """An iterable of steps that can be continued."""

    @property
    def total_steps(self) -> int:
        """How many optimizer updates the stream holds."""

    def __iter__(self) -> Iterator[Any]:
        """Steps from the current position on."""

    def metrics(self) -> Mapping[str, Metric]:
        """What the stream has to report since the last call (rollouts: score, KL, lengths)."""

    def after_update(self, metrics: Mapping[str, Sequence[Metric]]) -> None:
        """Told of every update by its losses' metrics, one of each micro-batch; rollouts may leave their buffer for it."""

    def state_dict(self) -> Any:
        """The position after the last step that was yielded: a tree for checkpoint.save."""

    def load_state_dict(self, state: Any) -> None:
        """The inverse."""


@dataclass(frozen=True)
class Budget:
    """How much data makes a step, a pass and a run.

    Args:
        batch_size: prompts of one optimizer update.
        micro_batch_size: prompts of one forward pass; 0 leaves it to micro_batch_tokens.
        micro_batch_tokens: at most this many packed tokens in one forward pass.
        epochs: passes over the data.
        max_steps: updates at most; 0 leaves it to epochs.
        seed: of the order.
        reference_pass: when an offline run computes the reference log-probs that the cache lacks. ahead: those of every row
            that the run will see, before the first step; in-loop: those of a step's rows just before that step, through the
            first epoch, so that a short run on large data starts at once.
    """

    batch_size: int = 16
    micro_batch_size: int = 0
    micro_batch_tokens: int = 8192
    epochs: float = 1.0
    max_steps: int = 0
    seed: int = 0
    reference_pass: Literal["ahead", "in-loop"] = "ahead"

    def __post_init__(self) -> None:
        for name in ("batch_size", "micro_batch_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.epochs <= 0 or self.max_steps < 0 or self.micro_batch_size < 0:
            raise ConfigError(f"epochs must be positive, max_steps and micro_batch_size not negative; got {self}.")
        if self.reference_pass not in ("ahead", "in-loop"):
            raise ConfigError(f"reference_pass must be 'ahead' or 'in-loop', got {self.reference_pass!r}.")

    def steps(self, examples: int) -> int:
        """Optimizer updates over a data set of this size."""
        by_epochs = max(1, math.ceil(examples * self.epochs / self.batch_size))
        return min(by_epochs, self.max_steps) if self.max_steps else by_epochs

    def split(self, examples: Sequence[Example]) -> list[Sequence[Example]]:
        """A step's examples as micro-batches, order kept."""
        size = self.micro_batch_size
        if size:
            return [examples[i : i + size] for i in range(0, len(examples), size)]
        return list(split_by_tokens(examples, self.micro_batch_tokens))


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of rows in one epoch: a function of seed and epoch alone, so all algorithms see the same."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


_ROLES: Mapping[str, Callable[[Sequence[Example]], Mapping[str, Tensor]]] = {
    "pairs": pair_roles,
    "completions": chosen_roles,
    "labelled": flat_roles,
    "groups": group_roles,
}


class OfflineStream:
    """Batches over a fixed data set; epochs follow each other without a gap, so that every step is full.

    Args:
        examples: the data set, in its order; rows are read when their step comes, so a lazy sequence stays lazy.
        kind: "pairs", "completions" (the best completion alone), "labelled" (every completion by itself, good or bad) or
            "groups", as algorithms.py derives it.
        budget: batch sizes, epochs, seed of the order, and when reference log-probs are computed.
        needs: tensors that the loss names; where a mismatched completion is among them, every prompt gets one.
        reference: attaches `reference_token_logps`; None when no loss asks for them.
        dtype: of masks.
        strategy: the processes that the rows of a step are shared out between.
    """

    prefetchable = True  # no step depends on the update before it

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        kind: str,
        budget: Budget,
        needs: Collection[str] = (),
        reference: ReferenceCache | None = None,
        dtype: torch.dtype = torch.float32,
        strategy: Strategy | None = None,
    ) -> None:
        if not len(examples):
            raise DataError(
                "the data set is empty: no row is left to train on. See the data report for what was dropped and why."
            )
        self._kind = kind
        self._examples = _Best(examples) if kind == "completions" else examples
        self._mismatched = any("mismatched" in name for name in needs)
        if self._mismatched:
            self._examples = WithMismatched(examples)
        self._budget = budget
        self._reference = reference
        self._in_loop = reference is not None and budget.reference_pass == "in-loop"
        self._dtype = dtype
        self._strategy = strategy or Strategy()
        self._step = 0
        self._order: tuple[int, list[int]] = (-1, [])
        if reference is not None and not self._in_loop:
            reference.prepare(self._examples, self._rows_until(self.total_steps))

    @property
    def total_steps(self) -> int:
        return self._budget.steps(len(self._examples))

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        try:
            while self._step < self.total_steps:
                examples = self._rows_of(self._step)
                self._step += 1
                parts = own_parts(examples, self._budget, self._strategy.communicator)
                if self._in_loop:
                    self._ask(examples, parts)
                yield build_parts(parts, examples, self.build)
        finally:
            if self._reference is not None and self._in_loop:
                self._reference.store()

    def _ask(self, examples: Sequence[Example], parts: Sequence[Sequence[Example]]) -> None:
        """Has the reference log-probs of a step's own parts computed at once, sorted by length."""
        assert self._reference is not None
        self._reference.count(examples)
        with self._strategy.whole(self._reference.policy):
            if own := [example for part in parts for example in part]:
                self._reference.rows(own, store=False)

    def _rows_of(self, step: int) -> list[Example]:
        begin = step * self._budget.batch_size
        return [self._examples[self._row(position)] for position in range(begin, begin + self._budget.batch_size)]

    def _row(self, position: int) -> int:
        epoch, index = divmod(position, len(self._examples))
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(len(self._examples), self._budget.seed, epoch))
        return self._order[1][index]

    def _rows_until(self, step: int) -> Sequence[int]:
        """The rows that the steps before `step` hold, each once."""
        count, seen = len(self._examples), step * self._budget.batch_size
        return range(count) if seen >= count else [self._row(position) for position in range(seen)]

    def build(self, examples: Sequence[Example]) -> PackedBatch:
        """One micro-batch, reference log-probs and labels attached."""
        reference = None if self._reference is None else self._reference.rows(examples)
        return build_batch(examples, kind=self._kind, reference=reference, dtype=self._dtype, mismatched=self._mismatched)

    def metrics(self) -> Mapping[str, Metric]:
        """A fixed data set has nothing to report."""
        return {}

    def after_update(self, metrics: Mapping[str, Sequence[Metric]]) -> None:
        """A fixed data set stays what it is."""

    def state_dict(self) -> Any:
        return {"step": self._step}

    def load_state_dict(self, state: Any) -> None:
        self._step = state["step"]
        if self._in_loop:  # asked for step by step as before, rows have the same numbers as in a run that was never stopped
            for step in range(self._step):
                examples = self._rows_of(step)
                self._ask(examples, own_parts(examples, self._budget, self._strategy.communicator))


def build_batch(
    examples: Sequence[Example],
    *,
    kind: str,
    reference: Sequence[Tensor] | None,
    dtype: torch.dtype,
    mismatched: bool = False,
) -> PackedBatch:
    """One micro-batch of rows that have completions and labels, from a data set or fresh from the policy.

    Args:
        examples: its rows.
        kind: as `OfflineStream`.
        reference: [length] reference log-probs of each completion, None when no loss asks for them.
        dtype: of masks and labels.
        mismatched: each row's last completion belongs to another prompt.
    """
    rows: dict[str, Sequence[Tensor]] = {} if reference is None else {"reference_token_logps": reference}
    scores = _all_or_none(examples, "scores") if kind in ("pairs", "groups") else None
    if scores is not None:
        rows["scores"] = [torch.tensor(value) for values in scores for value in values]
    data = _labels(examples, kind, mismatched=mismatched, dtype=dtype)
    return pack(examples, roles=mismatched_roles if mismatched else _ROLES[kind], rows=rows, data=data, dtype=dtype)


def _labels(examples: Sequence[Example], kind: str, *, mismatched: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Labels under their vocabulary names."""
    data: dict[str, Tensor]
    if kind == "labelled":
        good = [label for example in examples for label in _desirable(example, len(example.completion_ids) - mismatched)]
        return {"desirable": torch.tensor(good)}
    if kind == "groups":
        ranks = [_ranks(example, len(example.completion_ids)) for example in examples]
        longest = max(map(len, ranks))
        data = {"ranks": torch.tensor([[*own, *range(len(own), longest)] for own in ranks])}
        utilities = _all_or_none(examples, "utility_id")
        return data if utilities is None else {**data, "utility_ids": torch.tensor(utilities)}
    data = {}
    for field, name in (("soft_label", "soft_labels"), ("margin", "margins")):
        values = _all_or_none(examples, field)
        if values is not None:
            data[name] = torch.tensor(values, dtype=dtype)
    return data


def _all_or_none(examples: Sequence[Example], field: str) -> list[Any] | None:
    values = [getattr(example.labels, field) for example in examples]
    known = [value is not None for value in values]
    if any(known) and not all(known):
        without = examples[known.index(False)].id
        raise DataError(f"{without} has no {field}, but other rows have one: give every row a {field}, or none.")
    return values if all(known) else None


class _Best(Sequence[Example]):
    """The completions to be imitated: of each pair or list the first, which is the best."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        example = self._examples[index]
        return replace(example, completion_ids=example.completion_ids[:1], labels=Labels())


def _ranks(example: Example, count: int) -> tuple[int, ...]:
    """The ranks of `count` completions; a pair without ranks stands best first.

    Raises:
        DataError: a longer list without ranks, or a single completion.
    """
    ranks = example.labels.ranks if example.labels.ranks is not None or count != 2 else (0, 1)
    if ranks is None or count < 2:
        raise DataError(f"{example.id}: expected at least two completions in an order, got {count} without one; add ranks.")
    return ranks


def _desirable(example: Example, count: int) -> list[bool]:
    """The label of a single completion; of a list's `count` completions the better half is desirable (rank < K/2)."""
    if count > 1:
        return [rank < count / 2 for rank in _ranks(example, count)]
    if example.labels.desirable is None:
        raise DataError(f"{example.id}: expected a label for its single completion (desirable or not), got none.")
    return [example.labels.desirable]


class WithMismatched(Sequence[Example]):
    """Each prompt with another prompt's completion as one branch more: KTO's baseline (Ethayarajh 2024, section 4.1).

    The partner is the next row in the data's order (after the last comes the first) whose prompt differs; rows take turns in
    which of the partner's completions they get. So a row has the same mismatched completion in every epoch, and its
    reference log-prob can be computed ahead.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        example = self._examples[index]
        others = self._partner(index, example).completion_ids
        return replace(example, completion_ids=(*example.completion_ids, others[index % len(others)]))

    def _partner(self, index: int, example: Example) -> Example:
        for step in range(1, len(self)):
            other: Example = self._examples[(index + step) % len(self)]
            if other.prompt_ids != example.prompt_ids:
                return other
        raise DataError(
            f"all {len(self)} rows have the same prompt: mismatched completions (KTO's baseline) need at least two prompts."
        )
