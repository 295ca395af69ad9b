"""Steps that do not fit into memory: what is said about them, and how their micro-batches are halved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import singledispatch
from typing import Any, TypeVar

import torch
from torch import Tensor

from losses.types import VOCABULARY
from prefopt.errors import TrainingError
from prefopt.guard import some_ids
from prefopt.models.protocol import Batch
from prefopt.packing import Group, PackedBatch

T = TypeVar("T")

# What torch's allocator for a CPU says, which has no exception of its own.
_CPU_ALLOCATOR = "can't allocate memory"
_LOWER = "Lower --micro-batch-tokens or --max-length, or set --activation-checkpointing or --lora 16"
_LOWER_ALONE = "Lower --max-length, or set --activation-checkpointing or --lora 16"


def is_out_of_memory(error: BaseException) -> bool:
    """True for what torch and Python raise when memory is not enough."""
    cpu = isinstance(error, RuntimeError) and _CPU_ALLOCATOR in str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or cpu


def explain(error: BaseException) -> str:
    """What to do about memory that was not enough somewhere outside of a training step."""
    return f"out of memory ({_first_line(error)}). {_LOWER}; for evaluations, --eval-pairs or --eval-prompts."


@contextmanager
def explained(where: str, micro_batches: Sequence[Batch], *, divisible: bool = True) -> Iterator[None]:
    """Says what a step held that did not fit.

    Args:
        where: the run and its step.
        micro_batches: of the step.
        divisible: the run could go on with halved micro-batches.

    Raises:
        TrainingError: the block ran out of memory.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        alone = isinstance(error, NothingToHalveError)
        parts = error.parts if isinstance(error, NothingToHalveError) else micro_batches
        largest = max(parts, key=lambda batch: batch.tokens)
        offer = "; --on-out-of-memory halve splits what does not fit, and a run may be resumed with it"
        raise TrainingError(
            f"{where}: out of memory ({_first_line(error)}). The step has {len(parts)} micro-batches"
            f"{', halved as far as they can be' if alone else ''}; the largest has {len(largest.ids)} rows of {largest.tokens} "
            f"tokens together, the longest completion {largest.sizes['T']}. Rows: {some_ids(largest.ids)}. "
            f"{_LOWER_ALONE if alone else _LOWER}, in a new run (of these, only --max-length and --lora change the update)"
            f"{offer if divisible and not alone else ''}."
        ) from error


class NothingToHalveError(MemoryError):
    """Memory is not enough for micro-batches that cannot be halved any more.

    Args:
        what: the allocator said.
        parts: the micro-batches of the step.
    """

    def __init__(self, what: str, parts: Sequence[Batch]) -> None:
        super().__init__(what)
        self.parts = parts


class Halver:
    """Splits micro-batches that did not fit, and from then on those of that size.

    Args:
        wanted: False passes everything through.
        say: told when the limit falls.
    """

    def __init__(self, wanted: bool, say: Callable[[str], None]) -> None:
        self._wanted, self._say = wanted, say
        self._limit: float = float("inf")  # tokens of a micro-batch

    def run(
        self, micro_batches: Sequence[Batch], compute: Callable[[Sequence[Batch]], T], undo: Callable[[], Callable[[], None]]
    ) -> tuple[Sequence[Batch], T]:
        """`compute` of the micro-batches, halved as often as memory asks for; what was computed, and on which.

        Args:
            compute: may run out of memory at any point.
            undo: called before `compute`; what it returns takes back what a failed `compute` did.

        Raises:
            NothingToHalveError: out of memory, and nothing is left to halve.
            Exception: as `compute`; so is out of memory where nothing is to be halved.
        """
        if not self._wanted:
            return micro_batches, compute(micro_batches)
        while True:
            parts = [part for batch in micro_batches for part in self._split(batch)]
            take_back = undo()
            try:
                return parts, compute(parts)
            except Exception as error:
                largest = max(part.tokens for part in parts)
                if not is_out_of_memory(error):
                    raise
                if all(halves(part) is None for part in parts if part.tokens == largest):
                    raise NothingToHalveError(_first_line(error), parts) from error
                self._limit = largest - 1
                self._say(f"out of memory ({_first_line(error)}): micro-batches of {largest} tokens and more are halved.")
            # Out of the handler, so that the error no longer holds on to what was computed.
            take_back()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _split(self, batch: Batch) -> list[Batch]:
        parts = None if batch.tokens <= self._limit else halves(batch)
        return [batch] if parts is None else [part for half in parts for part in self._split(half)]


@singledispatch
def halves(batch: Any) -> tuple[Any, Any] | None:
    """A micro-batch in two, rows in order; None for one that cannot be split."""
    return None


@halves.register
def _(batch: PackedBatch) -> tuple[PackedBatch, PackedBatch] | None:
    count = len(batch.groups)
    return None if count < 2 else (_part(batch, 0, count // 2), _part(batch, count // 2, count))


def _part(batch: PackedBatch, begin: int, end: int) -> PackedBatch:
    """The groups [begin, end) of a packed batch as a batch of its own; padded widths stay."""
    branches = [0]
    for group in batch.groups:
        branches.append(branches[-1] + len(group.starts) - 1)
    rows = slice(branches[begin], branches[end])
    groups = batch.groups[begin:end]
    start = groups[0].start
    packed = slice(start, groups[-1].start + groups[-1].length)
    width = batch.mask.shape[1]
    scored = (batch.scatter >= rows.start * width) & (batch.scatter < rows.stop * width)
    kept = {name: _within(index, rows) for name, index in batch.roles.items()}
    support = batch.sampling.support
    return replace(
        batch,
        input_ids=batch.input_ids[packed],
        position_ids=batch.position_ids[packed],
        groups=tuple(Group(group.start - start, group.starts) for group in groups),
        predict=batch.predict[scored] - start,
        targets=batch.targets[scored],
        scatter=batch.scatter[scored] - rows.start * width,
        last=batch.last[rows] - start,
        mask=batch.mask[rows],
        roles={name: _shifted(index[kept[name]], rows.start) for name, index in batch.roles.items()},
        rows={name: values[rows] for name, values in batch.rows.items()},
        data={name: values[_of_items(name, kept)] for name, values in batch.data.items()},
        ids=batch.ids[begin:end],
        sampling=replace(batch.sampling, support=None if support is None else support[scored]),
    )  # fmt: skip


# The role whose items each leading dimension of the vocabulary counts.
_ROLE = {"P": "chosen_", "N": "", "M": "mismatched_", "G": "group_"}


def _within(index: Tensor, rows: slice) -> Tensor:
    """[items] bool: those whose first row is in `rows`; a list's first completion is always there."""
    first = index if index.dim() == 1 else index[:, 0]
    return (first >= rows.start) & (first < rows.stop)


def _shifted(index: Tensor, by: int) -> Tensor:
    """Rows counted from `by` on; -1 stays."""
    return torch.where(index < 0, -1, index - by)


def _of_items(name: str, kept: Mapping[str, Tensor]) -> Any:
    """How a tensor of `data` is cut: by the items that its first dimension counts; a scalar stays whole."""
    shape = VOCABULARY[name].shape
    return kept[_ROLE[shape[0]]] if shape and shape[0] in _ROLE else ...


def _first_line(error: BaseException) -> str:
    line = (str(error).splitlines() or [type(error).__name__])[0]
    # Before it stands the line of torch's source that failed.
    return line[max(line.find(_CPU_ALLOCATOR), 0) :][:160].rstrip(".")
