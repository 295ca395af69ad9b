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
        values: each term's part of the objective, without gradient.
        coefficients: for each micro-batch, d objective / d tensor by policy tensor name.
    """

    values: Sequence[Tensor] = ()
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
        record: receives each term's output once.
    """
    if not terms:
        return Surrogates()
    names = frozenset().union(*(term.needs | term.optional for term in terms))
    from_policy = {name for term in terms for name in term.needs if VOCABULARY[name].source == "policy"}
    with torch.no_grad():
        parts = [{**given(batch, names), **policy.evaluate(batch, from_policy)} for batch in micro_batches]
    merged: dict[str, Tensor] = {}
    offset = 0
    for name in parts[0]:
        own = merge(name, [part[name] for part in parts])
        everyone = communicator.gather(own)
        offset = sum(piece.shape[0] for piece in everyone[: communicator.rank]) if own.dim() else 0
        merged[name] = merge(name, everyone).requires_grad_(name in from_policy)
    values = []
    for term in terms:
        output = term(merged)
        values.append(term.coefficient * (output.loss * output.weight).sum() / output.weight.sum())
        record(term, output)
    leaves = sorted(from_policy)
    gradients = torch.autograd.grad(torch.stack(values).sum(), [merged[name] for name in leaves])
    coefficients: list[dict[str, Tensor]] = []
    for part in parts:
        size = part[leaves[0]].shape[0]
        coefficients.append(
            {name: _crop(g[offset : offset + size], part[name]) for name, g in zip(leaves, gradients, strict=True)}
        )
        offset += size
    return Surrogates([value.detach() for value in values], coefficients)


def merge(name: str, parts: Sequence[Tensor]) -> Tensor:
    """One named tensor of several batches, joined along its first dimension; T is padded with zeros. Scalars must agree."""
    shape = VOCABULARY[name].shape
    if not shape:
        return parts[0]
    if "T" not in shape:
        return torch.cat(list(parts))
    width = max(part.shape[-1] for part in parts)
    return torch.cat([F.pad(part, (0, width - part.shape[-1])) for part in parts])


def _crop(gradient: Tensor, like: Tensor) -> Tensor:
    return gradient[..., : like.shape[-1]] if gradient.shape != like.shape else gradient
