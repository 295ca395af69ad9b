"""The laws that every registered loss obeys, as functions that anyone can run on a loss of their own.

    for result in check("ipo", seed=0):
        print(result.law, result.outcome, result.detail)

A law draws tensors from the vocabulary, changes them in a way that must not matter, and compares objective, gradients,
metrics and updates. It raises `LawViolation` if they differ and `NotApplicable` if the loss gives it nothing to test.
Shapes: P pairs, N sequences, T tokens, G prompts, K completions, M mismatched prompts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.registry import BoundLoss, get
from losses.sampling import draw_garbage, mask_of, sample_tensors
from losses.types import VOCABULARY, LossOutput, Max

Tensors = dict[str, Tensor]
Law = Callable[[BoundLoss, torch.Generator, bool], None]

EXTREME = 1e4
"""The |log-prob| of a token at which values and gradients must still be finite in float32."""


class LawViolation(AssertionError):
    """The loss breaks a law; the message says which quantity differs and by how much."""


class NotApplicable(Exception):
    """The law has nothing to test in this loss; the message says why."""


@dataclass(frozen=True)
class LawResult:
    """What became of one law: `detail` is the violation or the reason for skipping, empty if it passed."""

    law: str
    outcome: Literal["passed", "failed", "skipped"]
    detail: str = ""


@dataclass(frozen=True)
class Measured:
    """Everything that a step reads from a loss, over one or several parts of a batch."""

    objective: Tensor
    gradients: Tensors
    metrics: Tensors
    updates: Tensors


def check(name: str, seed: int = 0, *, optional: bool = True, **hyper: Any) -> list[LawResult]:
    """Runs every law on the loss registered under `name`.

    Args:
        name: a registered loss.
        seed: the tensors that are drawn depend on it alone.
        optional: give the loss its optional tensors (soft labels, margins, …).
        hyper: hyper-parameters; those not named keep their defaults.
    """
    loss = get(name).bind(**hyper)
    results = []
    for law in LAWS:
        try:
            law(loss, torch.Generator().manual_seed(seed), optional)
        except LawViolation as violation:
            results.append(LawResult(law.__name__, "failed", str(violation)))
        except NotApplicable as reason:
            results.append(LawResult(law.__name__, "skipped", str(reason)))
        else:
            results.append(LawResult(law.__name__, "passed"))
    return results


def padding_invariant(loss: BoundLoss, generator: torch.Generator, optional: bool = True) -> None:
    """More masked tokens (and, for groups, more masked completions) change nothing, whatever stands in them.

    Nor does a masked position receive gradient.
    """
    # A batch without padding shows what padding does to a maximum; a ragged one, what stands in it.
    for ragged in (False, True):
        tensors = sample_tensors(loss, generator, optional=optional, ragged=ragged)
        masks = [name for name in tensors if VOCABULARY[name].kind == "mask"]
        if not masks:
            raise NotApplicable("no tensor of this loss has padding")
        leaves = _leaves(tensors)
        whole = measure(loss, [leaves], leaves)
        more = 2 if any("K" in VOCABULARY[name].shape for name in masks) else 0
        padded = {name: _pad(name, tensor, generator, tokens=3, completions=more) for name, tensor in leaves.items()}
        _compare("with more padding", measure(loss, [padded], leaves), whole)
        for name, gradient in whole.gradients.items():
            mask = mask_of(name, tensors)
            if mask is not None and gradient[~mask.bool()].any():
                raise LawViolation(f"{name} receives gradient where its mask is 0; multiply by the mask or use it as weight.")


def permutation_invariant(loss: BoundLoss, generator: torch.Generator, optional: bool = True) -> None:
    """The order of pairs, sequences or prompts in a batch does not matter."""
    leaves = _leaves(sample_tensors(loss, generator, optional=optional))
    orders = {letter: torch.randperm(size, generator=generator) for letter, size in _rows(leaves).items()}
    permuted = {name: tensor[orders[VOCABULARY[name].shape[0]]] if tensor.ndim else tensor for name, tensor in leaves.items()}
    _compare("with rows permuted", measure(loss, [permuted], leaves), measure(loss, [leaves], leaves))


def split_equals_whole(loss: BoundLoss, generator: torch.Generator, optional: bool = True) -> None:
    """Micro-batches, each cut to its own longest completion, give the gradient of the whole batch.

    Weights are summed over all parts before dividing, as the trainer does. Coupled losses are exempt by their flag.
    """
    if any(term.coupled for term in loss.terms):
        raise NotApplicable("the loss is registered as coupled: its rows interact")
    leaves = _leaves(sample_tensors(loss, generator, optional=optional))
    parts: list[Tensors] = [{}, {}]
    for name, tensor in leaves.items():
        cut = len(tensor) // 3 if tensor.ndim else 0
        parts[0][name], parts[1][name] = (tensor[:cut], tensor[cut:]) if tensor.ndim else (tensor, tensor)
    _compare("split in two", measure(loss, [_trim(part) for part in parts], leaves), measure(loss, [leaves], leaves))


def weights_ignore_policy(loss: BoundLoss, generator: torch.Generator, optional: bool = True) -> None:
    """Weights at zero policy tensors equal those at real ones, so every denominator is known before the first backward."""
    tensors = sample_tensors(loss, generator, optional=optional)
    blank = {
        name: torch.zeros_like(tensor) if VOCABULARY[name].source == "policy" else tensor for name, tensor in tensors.items()
    }
    real, zero = loss(tensors), loss(blank)
    for term, out in real.items():
        if not torch.equal(out.weight, zero[term].weight):
            raise LawViolation(f"the weight of {term} depends on the policy; make it of masks, labels and detached inputs.")
    tracked = [f"{term}: {key}" for term, out in loss(_leaves(tensors)).items() for key in _tracked(out)]
    if tracked:
        raise LawViolation(f"{', '.join(tracked)} carries gradient; detach it.")


def finite_at_extremes(loss: BoundLoss, generator: torch.Generator, optional: bool = True) -> None:
    """Objective, gradients and metrics are finite where tokens have log-prob 0 or -1e4 and reals reach 1e4.

    In float32 and with bf16 inputs.
    """
    for dtype in (torch.float32, torch.float32, torch.float32, torch.bfloat16):
        tensors = sample_tensors(loss, generator, optional=optional, dtype=dtype, extreme=EXTREME)
        leaves = _leaves(tensors)
        got = measure(loss, [leaves], leaves)
        for what, value in _flat(got).items():
            if not value.isfinite().all():
                raise LawViolation(
                    f"{what} is not finite at |log-prob| = {EXTREME:g}; clamp exponents or use logsigmoid, expm1."
                )


def finite_at_reference(loss: BoundLoss, generator: torch.Generator, optional: bool = True) -> None:
    """Objective and gradients are finite where a run starts, at policy = reference = sampling policy, whatever the lengths.

    Ratios are 1 and margins 0 there, and completions of one token leave sums, means and lengths nothing to hide behind.
    """
    for tokens, ragged in ((1, True), (4, False), (4, True)):
        sizes = {"T": tokens}
        tensors = sample_tensors(loss, generator, sizes=sizes, optional=optional, ragged=ragged, dtype=torch.float32)
        for name in tensors:
            twin = re.sub("^(reference|old)_", "policy_", name)
            if VOCABULARY[name].kind in ("logps", "token_logps") and twin in tensors:
                tensors[name] = tensors[twin].clone()
        leaves = _leaves(tensors)
        for what, value in _flat(measure(loss, [leaves], leaves)).items():
            if not value.isfinite().all():
                raise LawViolation(f"{what} is not finite at policy = reference with completions of {tokens} tokens.")


def gradients_reach_policy(loss: BoundLoss, generator: torch.Generator, optional: bool = True) -> None:
    """Every term trains: each side that it takes from the policy (chosen, rejected, group, …) receives gradient.

    One tensor of a side is enough, since others may be detached weights (WPO); mismatched completions are exempt, being
    a baseline without gradient (KTO).
    """
    tensors = sample_tensors(loss, generator, optional=optional)
    for term in loss.terms:
        leaves = _leaves(tensors)
        out = term(leaves)
        names = [name for name in sorted(term.needs) if leaves[name].requires_grad and "mismatched" not in name]
        if not names or not out.loss.requires_grad:
            raise LawViolation(f"{term.name} is not connected to any policy tensor; is something detached?")
        gradients = torch.autograd.grad((out.loss * out.weight).sum(), [leaves[name] for name in names], allow_unused=True)
        reached: dict[str, bool] = {}
        for name, gradient in zip(names, gradients, strict=True):
            side = next((side for side in ("chosen", "rejected", "group") if side in name.split("_")), "unpaired")
            reached[side] = reached.get(side, False) or (gradient is not None and bool(gradient.any()))
        for side, is_reached in reached.items():
            if not is_reached:
                raise LawViolation(f"{term.name}: no gradient reaches the policy's {side} tensors.")


LAWS: tuple[Law, ...] = (
    padding_invariant,
    permutation_invariant,
    split_equals_whole,
    weights_ignore_policy,
    finite_at_extremes,
    finite_at_reference,
    gradients_reach_policy,
)


def measure(loss: BoundLoss, parts: Sequence[Mapping[str, Tensor]], leaves: Mapping[str, Tensor]) -> Measured:
    """Objective of all parts with one denominator per term, its gradients at `leaves`, metrics and updates reduced."""
    outputs = [loss(part) for part in parts]
    objective = torch.zeros((), dtype=torch.float64)
    metrics: Tensors = {}
    updates: Tensors = {}
    for term in loss.terms:
        outs = [output[term.name] for output in outputs]
        total = torch.stack([(out.loss * out.weight).sum() for out in outs]).sum()
        objective = objective + term.coefficient * total / torch.stack([out.weight.sum() for out in outs]).sum()
        for key in outs[0].metrics:
            metrics[f"{term.name}: {key}"] = _reduce([out.metrics[key] for out in outs])
        for key in outs[0].updates:
            for which, index in (("sum", 0), ("count", 1)):
                updates[f"{term.name}: {which} of {key}"] = torch.stack([out.updates[key][index] for out in outs]).sum()
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if not objective.requires_grad:
        raise LawViolation(f"{loss.name} is not connected to any policy tensor; is something detached?")
    gradients = torch.autograd.grad(objective, list(wanted.values()), allow_unused=True, materialize_grads=True)
    return Measured(objective.detach(), dict(zip(wanted, gradients, strict=True)), metrics, updates)


def _reduce(metrics: Sequence[tuple[Tensor, Tensor] | Max]) -> Tensor:
    maxima = [metric.values.max() for metric in metrics if isinstance(metric, Max)]
    if maxima:
        return torch.stack(maxima).max()
    pairs = [metric for metric in metrics if not isinstance(metric, Max)]
    weight = torch.stack([weight.sum() for _, weight in pairs]).sum()
    # A metric over an empty set (no undesirable rows, say) is 0/0 by definition of the reduction; it is compared as 0.
    return torch.stack([(values * weight).sum() for values, weight in pairs]).sum() / torch.where(weight == 0, 1, weight)


def _compare(how: str, got: Measured, expected: Measured) -> None:
    got_values, expected_values = _flat(got), _flat(expected)
    if got_values.keys() != expected_values.keys():
        odd = ", ".join(sorted(got_values.keys() ^ expected_values.keys()))
        raise LawViolation(f"{how}, these are reported in one case only: {odd}.")
    for what, value in expected_values.items():
        other = got_values[what].to(value.dtype)
        if not torch.allclose(other, value, rtol=1e-9, atol=1e-11):
            difference = (other - value).abs().max()
            raise LawViolation(f"{how}, {what} differs by {difference:.3g}: {other.tolist()} instead of {value.tolist()}.")


def _flat(measured: Measured) -> Tensors:
    gradients = {f"the gradient of {name}": gradient for name, gradient in measured.gradients.items()}
    return {"the objective": measured.objective, **gradients, **measured.metrics, **measured.updates}


def _leaves(tensors: Mapping[str, Tensor]) -> Tensors:
    """Copies of the tensors, those of the policy with gradient."""
    return {name: tensor.clone().requires_grad_(VOCABULARY[name].source == "policy") for name, tensor in tensors.items()}


def _tracked(out: LossOutput) -> list[str]:
    """Names of the metrics and updates that still carry gradient."""
    metrics = {key: [metric.values] if isinstance(metric, Max) else [*metric] for key, metric in out.metrics.items()}
    return [key for key, values in {**metrics, **out.updates}.items() if any(value.requires_grad for value in values)]


def _rows(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    return {VOCABULARY[name].shape[0]: len(tensor) for name, tensor in tensors.items() if tensor.ndim}


def _pad(name: str, tensor: Tensor, generator: torch.Generator, *, tokens: int, completions: int) -> Tensor:
    """Appends masked positions: zeros where the vocabulary promises zeros, else garbage."""
    spec = VOCABULARY[name]
    for letter, extra in (("T", tokens), ("K", completions)):
        if letter not in spec.shape or extra == 0:
            continue
        axis = spec.shape.index(letter)
        shape = [extra if index == axis else size for index, size in enumerate(tensor.shape)]
        if spec.kind == "index":
            new = (tensor.shape[axis] + torch.arange(extra)).expand(shape).to(tensor.dtype)
        else:
            new = draw_garbage(spec.kind, shape, generator).to(tensor.dtype)
        tensor = torch.cat([tensor, new], dim=axis)
    return tensor


def _trim(part: Tensors) -> Tensors:
    """Cuts the token axis to the longest completion of this part."""
    masks = [tensor for name, tensor in part.items() if VOCABULARY[name].kind == "mask" and VOCABULARY[name].shape[-1] == "T"]
    if not masks:
        return part
    longest = max(int(mask.bool().flatten(0, -2).any(0).nonzero().max()) + 1 for mask in masks)
    return {name: F.pad(t, (0, longest - t.shape[-1])) if "T" in VOCABULARY[name].shape else t for name, t in part.items()}
