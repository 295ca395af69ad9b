"""Preference pairs in every form that an offline loss asks for, so that one forward pass serves all of them.

P pairs, N = 2P completions (row 2i is chosen, 2i+1 rejected), T tokens. The same rows are pairs ([P], chosen and rejected),
labelled completions ([N], chosen ones desirable) and groups of two ([P, 2], ranks 0 and 1).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from prefopt.coupled import merge
from prefopt.data.records import Example
from prefopt.errors import DataError
from prefopt.packing import PackedBatch, flat_roles, group_roles, pack, pair_roles
from prefopt.reference import ReferenceCache
from prefopt.streams import Budget

LOGPS, REFERENCE_LOGPS = "policy_token_logps", "reference_token_logps"
Step = Sequence[PackedBatch]


def pair_batches(
    examples: Sequence[Example],
    budget: Budget,
    *,
    reference: ReferenceCache | None = None,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Step]:
    """Batches in the data set's order, each as the list of its micro-batches; the last may be smaller.

    Args:
        examples: pairs, the preferred completion first.
        budget: `batch_size` pairs a batch, which is what coupled losses see at once; micro-batches as in training.
        reference: attaches its log-probs; None makes the policy its own reference.
        dtype: of masks and labels.

    Raises:
        DataError: a row that is no pair, or a label that only some rows have.
    """
    for example in examples:
        if len(example.completion_ids) != 2 or example.labels.ranks not in (None, (0, 1)):
            raise DataError(f"{example.id} is no pair: expected two completions, the preferred one first.")
    fields = {"soft_label": "soft_labels", "margin": "margins"}
    known = {name for field, name in fields.items() if _all_have(examples, field)}
    scored = _all_have(examples, "scores")
    if reference is not None:
        reference.rows(examples)  # computed now: sorted by length, and stored as one file
    for begin in range(0, len(examples), budget.batch_size):
        step = []
        for part in budget.split(examples[begin : begin + budget.batch_size]):
            rows: dict[str, Sequence[Tensor]] = {}
            if reference is not None:
                rows[REFERENCE_LOGPS] = reference.rows(part)
            if scored:
                rows["scores"] = [torch.tensor(value) for example in part for value in example.labels.scores or ()]
            data = {
                name: torch.tensor([getattr(example.labels, field) for example in part], dtype=dtype)
                for field, name in fields.items()
                if name in known
            }
            step.append(pack(part, roles=_every_role, rows=rows, data={**data, **_pair_labels(len(part))}, dtype=dtype))
        yield step


def named_tensors(step: Step, logps: Tensor, names: Collection[str]) -> dict[str, Tensor]:
    """What a batch provides of `names`, as functions of `logps` [N, T]; names that it cannot provide are left out.

    A batch without reference rows takes the policy's own log-probs, without gradient.
    """
    parts = [batch.tensors(names, rows) for batch, rows in zip(step, _log_probs(step, logps), strict=True)]
    return {name: merge(name, [part[name] for part in parts]) for name in parts[0]}


def side_log_ratios(step: Step, logps: Tensor) -> Tensor:
    """[P, 2] log(policy / reference) of chosen and rejected, summed over tokens; float64, without gradient."""
    names = ("policy_logps", "reference_logps")
    found = named_tensors(step, logps.detach(), names)
    return (found[names[0]] - found[names[1]]).view(-1, 2).double()


def _log_probs(step: Step, logps: Tensor) -> Iterator[Mapping[str, Tensor]]:
    """Each micro-batch's rows of `logps`, cut to its own width."""
    begin = 0
    for batch in step:
        count, width = batch.mask.shape
        own = logps[begin : begin + count, :width]
        begin += count
        yield {LOGPS: own} if REFERENCE_LOGPS in batch.rows else {LOGPS: own, REFERENCE_LOGPS: own.detach()}


def _every_role(examples: Sequence[Example]) -> Mapping[str, Tensor]:
    return {**pair_roles(examples), **flat_roles(examples), **group_roles(examples)}


def _pair_labels(count: int) -> dict[str, Tensor]:
    """What the order of a pair says to losses on single completions and on groups."""
    return {
        "desirable": torch.tensor([True, False]).repeat(count),
        "ranks": torch.tensor([[0, 1]]).repeat(count, 1),
    }


def _all_have(examples: Sequence[Example], field: str) -> bool:
    has = [getattr(example.labels, field) is not None for example in examples]
    if any(has) and not all(has):
        without = examples[has.index(False)].id
        raise DataError(f"{without} has no {field}, but other rows have one: give every row a {field}, or none.")
    return bool(has) and has[0]
