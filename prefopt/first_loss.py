"""The check of a run's first loss: before any update the policy is its reference, so both must give one value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from losses.registry import BoundTerm
from losses.types import VOCABULARY
from prefopt.errors import TrainingError
from prefopt.guard import some_ids
from prefopt.models.protocol import Batch


@torch.no_grad()
def anchor_loss(
    terms: Sequence[BoundTerm], batch: Batch, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> Tensor:
    """The objective with policy := reference (or := the sampling policy on rollouts); NaN where neither is known.

    Args:
        terms: those whose rows interact only where the micro-batch is the whole step.
        batch: one micro-batch.
        tensors: what the terms were called on.
        weights: of the terms, over the whole step.
    """
    swapped = dict(tensors)
    for name in tensors:
        if VOCABULARY[name].source == "policy" and name.startswith("policy_"):
            candidates = [name.replace("policy_", source) for source in ("old_", "reference_")]
            found = batch.tensors(candidates)
            if not found:
                return torch.tensor(math.nan)
            swapped[name] = found[candidates[0] if candidates[0] in found else candidates[1]].to(tensors[name])
    outputs = [(term, term(swapped)) for term in terms]
    return torch.stack([t.coefficient * (o.loss * o.weight).sum() / weights[t.name] for t, o in outputs]).sum().double()


def check_first_loss(got: Tensor, anchor: Tensor, parameter: Tensor, rows: Sequence[str]) -> None:
    """Compares the first loss with the one of policy = reference.

    Args:
        got: scalar; a value that is not finite is left to the guard.
        anchor: scalar, over all micro-batches and ranks.
        parameter: one of the policy's, for the precision to expect.
        rows: record ids, for the message.

    Raises:
        TrainingError: they differ.
    """
    value, expected = float(got), float(anchor)
    tolerance = _tolerance(parameter) * (1 + abs(expected))
    if math.isfinite(value) and not abs(value - expected) <= tolerance:
        raise TrainingError(
            f"the first loss is {value:.6g}, but with policy = reference it is {expected:.6g} (tolerance {tolerance:.1g}). "
            "Before the first update the two must agree. Likely causes: the reference log-probs belong to other weights or "
            "another tokenisation, dropout is active, the adapter does not start at zero, or policy and reference differ "
            f"in precision. Rows: {some_ids(rows)}."
        )


def _tolerance(parameter: Tensor) -> float:
    if parameter.device.type == "cuda" or parameter.dtype in (torch.bfloat16, torch.float16):
        return 5e-2  # bf16 kernels under another packing move a sequence's log-prob by about 1e-2 nats
    return 1e-8 if parameter.dtype == torch.float64 else 1e-3
