"""Losses whose rows interact (AOT's sort, KTO's baseline): computed once over all micro-batches and ranks.

Log-probs are gathered without gradient, the loss and its derivative with respect to them are computed once, and those
coefficients are then backpropagated micro-batch by micro-batch. Memory stays that of one micro-batch's activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from losses.registry import BoundTerm
from losses.types import VOCABULARY, LossOutput
from prefopt.communicator import Communicator
from prefopt.models.protocol import Batch, Policy


@dataclass(frozen=True)
class Surrogates:
    """What coupled terms ask of each micro-batch.

    Args:
        values: each term's part of the objective, over all ranks, without gradient.
        weights: of each term by name, over all ranks.
        coefficients: for each micro-batch, d objective / d tensor by the names of policy tensors that have a gradient.
    """

    values: Sequence[Tensor] = ()
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    coefficients: Sequence[Mapping[str, Tensor]] = field(default_factory=tuple)

    def objectives(self, index: int, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Scalars whose gradient is that of the coupled terms with respect to this micro-batch's policy tensors."""
        if not self.coefficients:
            return []
        return [(tensors[name] * coefficient).sum() for name, coefficient in self.coefficients[index].items()]


def coupled_objectives(
    terms: Sequence[BoundTerm],
    given: Callable[[Batch, frozenset[str]], dict[str, Tensor]],
    policy: Policy,
    micro_batches: Sequence[Batch],
    communicator: Communicator,
    record: Callable[[BoundTerm, LossOutput], None],
) -> Surrogates:
    """Evaluates coupled terms over a whole step.

    Args:
        terms: the coupled ones; nothing is computed when there are none.
        given: a batch's own tensors.
        policy: evaluated once without gradient here, and again with gradient by the caller.
        micro_batches: of this rank.
        communicator: gathers over ranks.
        record: receives each term's output, which is of all ranks, once.
    """
    if not terms:
        return Surrogates()
    names = frozenset().union(*(term.needs | term.optional for term in terms))
    from_policy = {name for term in terms for name in term.needs if VOCABULARY[name].source == "policy"}
    with torch.no_grad():
        parts = [{**given(batch, names), **policy.evaluate(batch, from_policy)} for batch in micro_batches]
    merged: dict[str, Tensor] = {}
    begins: dict[str, int] = {}  # where this rank's rows stand: P, N and M rows are counted apart
    for name in sorted(parts[0]):  # ranks exchange in one order; that of sets differs between processes
        everyone = communicator.gather(merge(name, [part[name] for part in parts]))
        begins[name] = sum(piece.shape[0] for piece in everyone[: communicator.rank]) if everyone[0].dim() else 0
        merged[name] = merge(name, everyone).requires_grad_(name in from_policy)
    values, weights = [], {}
    for term in terms:
        output = term(merged)
        weights[term.name] = output.weight.detach().double().sum()
        values.append(term.coefficient * (output.loss * output.weight).sum() / weights[term.name])
        record(term, output)
    leaves = sorted(from_policy)
    # A tensor that is only looked at (KTO's baseline, which is detached) has no gradient.
    found = torch.autograd.grad(torch.stack(values).sum(), [merged[name] for name in leaves], allow_unused=True)
    gradients = {name: gradient for name, gradient in zip(leaves, found, strict=True) if gradient is not None}
    coefficients: list[dict[str, Tensor]] = []
    for part in parts:
        coefficients.append({name: _crop(g[begins[name] :], part[name]) for name, g in gradients.items()})
        begins = {name: begin + part[name].shape[0] for name, begin in begins.items() if name in gradients}
    return Surrogates([value.detach() for value in values], weights, coefficients)


def merge(name: str, parts: Sequence[Tensor]) -> Tensor:
    """One named tensor of several batches, joined along its first dimension. Scalars must agree.

    K and T are padded with zeros; ranks go on behind the valid ones.
    """
    if not VOCABULARY[name].shape:
        return parts[0]
    sizes = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    return torch.cat([_pad(name, part, sizes) for part in parts])


def _pad(name: str, part: Tensor, sizes: Sequence[int]) -> Tensor:
    missing = [size - own for size, own in zip(sizes, part.shape[1:], strict=True)]
    if not any(missing):
        return part
    if name == "ranks":
        return torch.cat([part, torch.arange(part.shape[1], sizes[0]).to(part).expand(part.shape[0], -1)], dim=1)
    return F.pad(part, [width for size in reversed(missing) for width in (0, size)])


def _crop(gradient: Tensor, like: Tensor) -> Tensor:
    """The first rows of [rows, ...], in the shape that the batch has them."""
    return gradient[tuple(slice(size) for size in like.shape)]
