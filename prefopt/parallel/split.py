"""Which rows of a step each rank takes: balanced by tokens, as many micro-batches on every rank, the same at every start."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from typing import Protocol

from prefopt.communicator import Communicator
from prefopt.data.records import Example
from prefopt.packing import PackedBatch


class Splitting(Protocol):
    """The limits of a forward pass; `Budget` is one."""

    @property
    def micro_batch_size(self) -> int:
        """Examples at most; 0 leaves it to tokens."""

    @property
    def micro_batch_tokens(self) -> int:
        """Packed tokens at most, unless one example has more."""

    def split(self, examples: Sequence[Example]) -> list[Sequence[Example]]:
        """One process's micro-batches, order kept."""


Part = Sequence[Example]


def own_parts(examples: Sequence[Example], budget: Splitting, communicator: Communicator) -> list[Part]:
    """This rank's micro-batches of a step that all ranks know; empty where there are fewer rows than passes."""
    if communicator.world_size == 1:
        return budget.split(examples)
    dealt = deal(
        [example.tokens for example in examples], communicator.world_size, tokens=budget.micro_batch_tokens,
        rows=budget.micro_batch_size,
    )  # fmt: skip
    return [[examples[i] for i in part] for part in dealt[communicator.rank]]


def build_parts(
    parts: Sequence[Part], examples: Sequence[Example], build: Callable[[Sequence[Example]], PackedBatch]
) -> list[PackedBatch]:
    """A batch for each part. An empty one encodes the step's shortest example without counting it, because ranks gather
    weights and gradients together and so must make equally many passes."""
    shortest = min(examples, key=lambda example: example.tokens)
    return [build(part) if part else build([shortest]).without_rows() for part in parts]


def deal(sizes: Sequence[int], ranks: int, *, tokens: int, rows: int = 0) -> list[list[list[int]]]:
    """[ranks][micro-batches] -> indices of a step's rows, ascending.

    The largest row goes to the micro-batch that is the emptiest, and so on (Graham 1969): within 4/3 of the best balance.
    The n-th micro-batches of all ranks are neighbours in size, so that ranks which work in lockstep wait for one another
    little. There are as few micro-batches as keep to the limits.

    Args:
        sizes: tokens of each row.
        ranks: how many take part.
        tokens: of a micro-batch at most, unless a single row has more.
        rows: of a micro-batch at most, instead of `tokens`; 0 sets no limit.
    """
    count = max(1, math.ceil(len(sizes) / (ranks * rows)) if rows else math.ceil(sum(sizes) / (ranks * tokens)))
    while True:
        bins = _fill(sizes, count * ranks, rows)
        if rows or count * ranks >= len(sizes) or all(_load(sizes, own) <= tokens or len(own) == 1 for own in bins):
            break
        count += 1
    bins.sort(key=lambda own: (-_load(sizes, own), own))
    return [[bins[place] for place in range(rank, count * ranks, ranks)] for rank in range(ranks)]


def _fill(sizes: Sequence[int], count: int, rows: int) -> list[list[int]]:
    bins: list[list[int]] = [[] for _ in range(count)]
    emptiest = [(0, number) for number in range(count)]
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        load, number = heapq.heappop(emptiest)
        bins[number].append(index)
        if not rows or len(bins[number]) < rows:
            heapq.heappush(emptiest, (load + sizes[index], number))
    return [sorted(own) for own in bins]


def _load(sizes: Sequence[int], own: Sequence[int]) -> int:
    return sum(sizes[i] for i in own)
