"""What a loss takes and what it returns: the tensor vocabulary and `LossOutput`.

Shapes: P pairs, N sequences, T tokens (or MDP steps), G prompts, K completions, M mismatched prompts.
A name means one thing everywhere: a loss asks for a tensor by naming a positional parameter after it, and the
trainer reads the signature to know what the forward pass has to provide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Source = Literal["policy", "reference", "old", "batch", "rollout", "state"]
Kind = Literal["logps", "token_logps", "mask", "lengths", "nonnegative", "real", "probability", "boolean", "index"]


@dataclass(frozen=True)
class TensorSpec:
    """One name of the vocabulary.

    Args:
        shape: dimensions by letter, for example ("P", "T"); () is a scalar.
        source: who provides it. "policy" tensors carry gradient; "reference" comes from the reference cache, "old" from
            the sampling policy, "batch" from the data, "rollout" from advantage functions, "state" from running statistics.
        kind: the range of its values, which the law tests draw from.
        meaning: one line for people.
    """

    shape: tuple[str, ...]
    source: Source
    kind: Kind
    meaning: str


def _build_vocabulary() -> dict[str, TensorSpec]:
    names: dict[str, TensorSpec] = {}
    models: tuple[tuple[Source, str], ...] = (("policy", "policy"), ("reference", "reference"), ("old", "sampling policy"))
    layouts = {"chosen_": ("P",), "rejected_": ("P",), "": ("N",), "group_": ("G", "K")}
    for source, who in models:
        for infix, rows in layouts.items():
            of = {"": "a completion", "group_": "each of K completions"}.get(infix, f"the {infix.rstrip('_')} completion")
            names[f"{source}_{infix}logps"] = TensorSpec(rows, source, "logps", f"log-prob of {of}, {who}, summed over tokens")
            names[f"{source}_{infix}token_logps"] = TensorSpec(
                (*rows, "T"), source, "token_logps", f"per-token log-prob of {of} under the {who}, 0 where the mask is 0"
            )
    for source, who in models[:2]:
        names[f"{source}_mismatched_logps"] = TensorSpec(
            ("M",), source, "logps", f"log-prob of another prompt's completion, {who}"
        )
    for infix in ("chosen_", "rejected_"):
        side = infix.rstrip("_")
        names[f"{infix}mask"] = TensorSpec(("P", "T"), "batch", "mask", f"1 on scored tokens, EOS included, {side}")
        names[f"{infix}lengths"] = TensorSpec(("P",), "batch", "lengths", f"{infix}mask.sum(-1)")
        names[f"{infix}token_kls"] = TensorSpec(
            ("P", "T"), "policy", "nonnegative", f"KL(reference || policy) per {side} token"
        )
        names[f"{infix}token_log_sum_sq"] = TensorSpec(
            ("P", "T"), "policy", "token_logps", f"log of sum of squared probs, {side}"
        )
        names[f"{infix}rewards"] = TensorSpec(("P",), "policy", "real", f"trained reward head on the {side} completion")
        names[f"{infix}scores"] = TensorSpec(("P",), "batch", "real", f"a frozen scorer's value of the {side} completion")
    more: dict[str, tuple[tuple[str, ...], Source, Kind, str]] = {
        "mask": (("N", "T"), "batch", "mask", "1 on scored tokens, EOS included; the only source of lengths"),
        "lengths": (("N",), "batch", "lengths", "mask.sum(-1)"),
        "mismatched_mask": (("M", "T"), "batch", "mask", "1 on scored tokens of the mismatched completion"),
        "group_mask": (("G", "K"), "batch", "mask", "1 on valid completions of a prompt"),
        "group_token_mask": (("G", "K", "T"), "batch", "mask", "1 on scored tokens of each completion"),
        "group_lengths": (("G", "K"), "batch", "lengths", "group_token_mask.sum(-1)"),
        "max_completion_length": ((), "batch", "lengths", "the limit of a rollout's length"),
        "ranks": (("G", "K"), "batch", "index", "rank of each completion, 0 = best"),
        "desirable": (("N",), "batch", "boolean", "the label of an unpaired completion"),
        "soft_labels": (("P",), "batch", "probability", "probability that chosen is preferred (optional data)"),
        "margins": (("P",), "batch", "nonnegative", "annotated margin of a pair (optional data)"),
        "advantages": (("N", "T"), "rollout", "real", "advantage of each token"),
        "returns": (("N", "T"), "rollout", "real", "regression target of the value head"),
        "values": (("N", "T"), "policy", "real", "value head before each token"),
        "old_values": (("N", "T"), "old", "real", "value head when the rollout was sampled"),
        "rewards": (("N", "T"), "rollout", "real", "reward of each token, KL penalty included"),
        "group_ids": (("N",), "rollout", "index", "which prompt a rollout belongs to"),
        "entropies": (("N", "T"), "policy", "nonnegative", "entropy of the next-token distribution before each token"),
        "group_rewards": (("G", "K"), "policy", "real", "trained reward head on each completion"),
        "group_scores": (("G", "K"), "batch", "real", "a frozen scorer's values"),
        "utility_ids": (("G",), "batch", "index", "which utility a prompt uses"),
        "reward_shift": ((), "state", "real", "running mean of implicit rewards"),
    }
    names.update({name: TensorSpec(*spec) for name, spec in more.items()})
    return names


VOCABULARY: Mapping[str, TensorSpec] = _build_vocabulary()


def check_shapes(owner: str, tensors: Mapping[str, Tensor]) -> None:
    """Every letter of the vocabulary's shapes has one size.

    A wrong shape would broadcast silently: [P] against [P, 1] is a [P, P] loss.

    Raises:
        ValueError: a tensor with the wrong number of dimensions, or two that disagree about a size.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for name, tensor in tensors.items():
        letters = VOCABULARY[name].shape
        expected = f"[{', '.join(letters)}]"
        if tensor.ndim != len(letters):
            raise ValueError(f"{owner}: {name} is {list(tensor.shape)}; it must be {expected}.")
        for letter, size in zip(letters, tensor.shape, strict=True):
            known, where = sizes.setdefault(letter, (size, name))
            if known != size:
                raise ValueError(
                    f"{owner}: {where} is {list(tensors[where].shape)}, {name} is {list(tensor.shape)}; "
                    f"{letter} of {expected} must be the same in both."
                )


@dataclass(frozen=True)
class Max:
    """A metric that is reduced by its maximum instead of its weighted mean. `values` has any shape and no gradient."""

    values: Tensor


Metric = tuple[Tensor, Tensor] | Max
"""(values, weight) of one shape, reduced as sum(values*weight)/sum(weight) over everything in a step; or `Max`."""


@dataclass(frozen=True)
class LossOutput:
    """An unreduced loss.

    The objective is `(loss * weight).sum() / W` where W is the weight summed over all micro-batches and ranks: one
    division by one global count, so that 8x1, 4x2 and 1x8 accumulation and several processes give the same gradient.

    Args:
        loss: any shape; gradient flows through it.
        weight: the same shape; depends on masks, labels and detached inputs only, never on policy values.
        metrics: detached `(values, weight)` pairs, or `Max(values)`.
        updates: `(sum, count)` scalars by running-statistic name (`reward_shift`), folded by the trainer.
    """

    loss: Tensor
    weight: Tensor
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    updates: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.loss.shape != self.weight.shape:
            raise ValueError(
                f"LossOutput: loss is {list(self.loss.shape)}, weight is {list(self.weight.shape)}; both must have one shape."
            )

    def mean(self) -> Tensor:
        """The objective of this batch alone, for users who call a loss by hand. A scalar."""
        return (self.loss * self.weight).sum() / self.weight.sum()
