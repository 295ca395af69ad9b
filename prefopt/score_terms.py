"""One distinct term of the losses that are scored: its values, its gradient with respect to log-probs, its implicit rewards.

P pairs, N = 2P completions (row 2i is chosen, 2i+1 rejected), T tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from losses.registry import BoundLoss, BoundTerm
from losses.types import VOCABULARY, LossOutput, Max
from prefopt.errors import ConfigError
from prefopt.score_pairs import LOGPS

# What the forward pass gives besides log-probs; it becomes a leaf of its own.
_BESIDES = ("token_log_sum_sq",)


def is_leaf(name: str) -> bool:
    """True for policy tensors that are scored with, but are no log-probs of completions."""
    return name.endswith(_BESIDES)


def distinct_terms(losses: Mapping[str, BoundLoss]) -> tuple[list[TermScorer], dict[str, list[tuple[int, float]]]]:
    """Every term once, and by loss which it uses with which coefficient: losses that share a term share its cost."""
    found: dict[object, int] = {}
    scorers: list[TermScorer] = []
    uses: dict[str, list[tuple[int, float]]] = {}
    for label, loss in losses.items():
        for term in loss.terms:
            key = (term.function, tuple(sorted((name, repr(value)) for name, value in term.keywords.items())))
            if key not in found:
                found[key] = len(scorers)
                scorers.append(TermScorer(term, label))
            uses.setdefault(label, []).append((found[key], term.coefficient))
    return scorers, uses


class TermScorer:
    """Sums of one term over batches, before they are divided by its weight.

    Args:
        term: with its hyper-parameters; its coefficient belongs to the losses that use it.
        label: of a loss that has it, for messages.

    Attributes:
        weight: W so far.
        total: (loss*weight).sum() so far.
        values: by batch, [P] mean of the pair's loss under its weights; NaN where no entry is the pair's alone.
        coefficients: by batch, [P, 2] d total / d log-prob, mean over the completion's tokens.
        moved: by batch, [P] bool, some token of the pair has gradient.
        rewards: by batch, [P, 2] the term's own implicit rewards; NaN without.
        outside: policy tensors that are no log-probs and have gradient.
        seconds: spent here.
    """

    def __init__(self, term: BoundTerm, label: str) -> None:
        self.term, self._label = term, label
        self.weight = self.total = self.seconds = 0.0
        self.values: list[Tensor] = []
        self.coefficients: list[Tensor] = []
        self.moved: list[Tensor] = []
        self.rewards: list[Tensor] = []
        self.outside: set[str] = set()
        # name -> (sum, count), as the trainer folds them
        self._running: dict[str, tuple[float, float]] = {}
        shapes = [VOCABULARY[name].shape for name in term.needs]
        self._rows_are_completions = any(shape[:1] == ("N",) for shape in shapes)

    def add(self, tensors: Mapping[str, Tensor], leaves: Mapping[str, Tensor], mask: Tensor) -> Tensor:
        """One batch.

        Args:
            tensors: all that losses name, functions of the leaves.
            leaves: `policy_token_logps` [N, T] and what the forward pass gives besides.
            mask: [N, T].

        Returns:
            d total / d token log-probs, [N*T], detached.

        Raises:
            ConfigError: the term refuses its hyper-parameters on these tensors, or has no gradient.
        """
        begin = time.perf_counter()
        output = self._evaluate(tensors)
        total = (output.loss * output.weight).sum()
        if not total.requires_grad:
            raise ConfigError(f"{self._label}: {self.term.name} is not connected to the policy's log-probs; is one detached?")
        names = [LOGPS, *sorted(name for name in self.term.needs if is_leaf(name))]
        gradient, *others = torch.autograd.grad(
            total, [leaves[name] for name in names], retain_graph=True, allow_unused=True, materialize_grads=True
        )
        gradient = gradient * mask  # a sum over tokens has derivative 1 on padding too
        self.outside |= {name for name, other in zip(names[1:], others, strict=True) if other.any()}
        self.total += float(total.detach())
        self.weight += float(output.weight.double().sum())
        pairs = mask.shape[0] // 2
        by_row = gradient.double().sum(-1) / mask.double().sum(-1).clamp(min=1)
        self.coefficients.append(by_row.view(pairs, 2))
        self.moved.append((gradient != 0).view(pairs, -1).any(-1))
        self.values.append(self._by_pair(output.loss.detach(), output.weight.detach(), pairs))
        self.rewards.append(torch.stack([self._metric(output, f"rewards/{s}", pairs) for s in ("chosen", "rejected")], -1))
        self.seconds += time.perf_counter() - begin
        return gradient.flatten()

    def _evaluate(self, tensors: Mapping[str, Tensor]) -> LossOutput:
        """The term's output; running statistics are those of the batches before, zero at first, as in training."""
        state = {}
        for name in self.term.needs | self.term.optional:
            if VOCABULARY[name].source == "state":
                total, count = self._running.get(name, (0.0, 0.0))
                state[name] = torch.tensor(total / count if count else 0.0)
        try:
            output = self.term({**tensors, **state})
        except ValueError as error:
            raise ConfigError(f"{self._label}: {error}") from error
        for name, (added, number) in output.updates.items():
            total, count = self._running.get(name, (0.0, 0.0))
            self._running[name] = (total + float(added), count + float(number))
        return output

    def _metric(self, output: LossOutput, name: str, pairs: int) -> Tensor:
        metric = output.metrics.get(name)
        if metric is None or isinstance(metric, Max):
            return torch.full((pairs,), math.nan, dtype=torch.float64)
        return self._by_pair(*metric, pairs)

    def _by_pair(self, values: Tensor, weight: Tensor, pairs: int) -> Tensor:
        """[P] weighted mean over the entries that are a pair's alone, float64; NaN where there are none.

        The first dimension counts pairs, or completions where the term takes those; any other layout cannot be told apart.
        """
        count = values.shape[0] if values.dim() else 0
        if count != pairs and not (self._rows_are_completions and count == 2 * pairs):
            return torch.full((pairs,), math.nan, dtype=torch.float64)
        weight = weight.double().reshape(pairs, -1)
        kept = torch.where(weight == 0, 0.0, values.double().reshape(pairs, -1) * weight).sum(-1)
        return kept / weight.sum(-1)
