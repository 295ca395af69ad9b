"""Many losses on one shared forward pass: values, implicit rewards, and gradients with respect to log-probs.

P pairs, N = 2P completions (row 2i is chosen, 2i+1 rejected), T tokens.

Each batch is encoded once, without gradient through the model. The per-token log-probs [N, T] then become a leaf, all that a
loss names (sums, pairs, labelled rows, groups of two) is derived from that leaf, and autograd yields the coefficients
g = d objective / d log pi(y_t) by which an algorithm weighs tokens. The gradient of the model's weights is J^T g with a
Jacobian J that all algorithms share, so what tells two algorithms apart is g (the weight in DPO's gradient: Rafailov et al.
2023, section 4 [rafailov2023dpo]); two losses whose g are parallel make the same first step, and the 2nd loss costs next to
nothing.

- The objective is that of one update on the whole data set: (loss*weight).sum() / W, W summed over all batches.
- A completion's coefficient is the mean of g over its tokens, that is d objective / d (summed log-prob) when a change is spread
  evenly over the tokens. For a loss on sums this is its plain derivative: -beta*sigmoid(-margin)/P on chosen for DPO.
- Cosines are taken between the g themselves, over all scored tokens of the data set.
- A coupled loss sees one batch at a time, as in training it sees one update's rows.
- What a loss detaches (WPO's weight, BCO's shift) has no part in g, as it has none in training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from losses.registry import BoundLoss
from losses.types import VOCABULARY
from prefopt.coupled import merge
from prefopt.errors import ConfigError, DataError
from prefopt.evaluate import wilson_interval
from prefopt.models.protocol import Policy
from prefopt.score_pairs import LOGPS, REFERENCE_LOGPS, Step, named_tensors, side_log_ratios
from prefopt.score_terms import distinct_terms, is_leaf

# At the start every margin is zero; another packing moves a float32 sum by less than this many nats.
_TIE = 1e-3


@dataclass(frozen=True)
class Accuracy:
    """Share of pairs whose chosen completion has the higher implicit reward, a tie counted as half.

    Args:
        share: in [0, 1].
        low: lower end of Wilson's 95% interval.
        high: its upper end.
        ties: pairs with equal rewards.
        pairs: pairs that have rewards.
    """

    share: float
    low: float
    high: float
    ties: int
    pairs: int

    @classmethod
    def of(cls, margins: Tensor, tie: float = 0.0) -> Accuracy | None:
        """From [P] chosen minus rejected; NaN where a pair has none. None without any."""
        known = margins[~margins.isnan()]
        if not len(known):
            return None
        ties = int((known.abs() <= tie).sum())
        right = int((known > tie).sum()) + ties / 2
        # Half a point is no count: the interval is the wider of the two counts beside it.
        low, high = wilson_interval(math.floor(right), len(known))[0], wilson_interval(math.ceil(right), len(known))[1]
        return cls(right / len(known), low, high, ties, len(known))


@dataclass(frozen=True)
class PairColumns:
    """One loss on every pair, [P] float64 on the CPU; NaN where the loss does not say.

    Args:
        value: the loss of this pair alone, its weights' mean.
        chosen_coefficient: d objective / d log-prob of the chosen completion; negative pushes it up.
        rejected_coefficient: the same of the rejected one.
        chosen_reward: the loss's own implicit reward (its metric `rewards/chosen`).
        rejected_reward: the same of the rejected one.
    """

    value: Tensor
    chosen_coefficient: Tensor
    rejected_coefficient: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor


@dataclass(frozen=True)
class LossScore:
    """One loss over the data set.

    Args:
        label: its name in the table.
        hyper: every hyper-parameter.
        objective: (loss*weight).sum() / W over all pairs, terms added.
        accuracy: of its implicit rewards; None for a loss without (SFT).
        gradient_norm: |g| over all tokens.
        zero_gradient: share of pairs on whose tokens every term's gradient is exactly zero.
        pairs: the columns by pair.
        coupled: rows interact, so each batch was a loss of its own.
        notes: what else to know.
    """

    label: str
    hyper: Mapping[str, object]
    objective: float
    accuracy: Accuracy | None
    gradient_norm: float
    zero_gradient: float
    pairs: PairColumns
    coupled: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Timing:
    """Seconds of one scoring, and what they were spent on.

    Args:
        forward: of the policy's forward passes.
        first: of the first loss, with the tensors that all share.
        others: of all further losses and the comparison of their gradients.
        batches: how many there were.
        forward_passes: one a micro-batch, whatever the number of losses.
        tokens: encoded.
    """

    forward: float
    first: float
    others: float
    batches: int
    forward_passes: int
    tokens: int

    @property
    def share(self) -> float:
        """What all further losses cost together, as a share of the forward pass with the first loss."""
        return self.others / (self.forward + self.first)


@dataclass(frozen=True)
class ScoreTable:
    """What `score` found.

    Args:
        scores: by label, sorted.
        cosine: [L, L] between the gradients, in the order of `scores`; NaN where a gradient is zero.
        not_scored: why, by label.
        ids: of the P pairs.
        lengths: [P, 2] scored tokens of chosen and rejected.
        log_ratios: [P, 2] log(policy / reference) of chosen and rejected, nats.
        log_ratio_accuracy: of the common log-ratio sum; None at the reference.
        at_reference: the batches brought no reference, so the policy was its own: every log-ratio is zero.
        timing: seconds.
    """

    scores: tuple[LossScore, ...]
    cosine: Tensor
    not_scored: Mapping[str, str]
    ids: tuple[str, ...]
    lengths: Tensor
    log_ratios: Tensor
    log_ratio_accuracy: Accuracy | None
    at_reference: bool
    timing: Timing


def score(
    policy: Policy,
    losses: Mapping[str, BoundLoss],
    batches: Iterable[Step],
    *,
    on_progress: Callable[[int], None] | None = None,
) -> ScoreTable:
    """Evaluates every loss and its gradient with respect to log-probs on one forward pass over the data.

    Args:
        policy: evaluated once per micro-batch, without gradient.
        losses: by label; the first is the one whose time counts as the first.
        batches: of pairs, as `score_pairs.pair_batches` makes them; each is the list of its micro-batches. Without
            `reference_token_logps` the policy is its own reference.
        on_progress: called with the pairs done.

    Raises:
        ConfigError: no loss can be scored, or one refuses its hyper-parameters or has no gradient.
        DataError: no batch.
    """
    reasons = {label: reason for label, loss in losses.items() if (reason := why_not(loss))}
    candidates = {label: loss for label, loss in losses.items() if label not in reasons}
    run: _Run | None = None
    for step in batches:
        if run is None:
            run = _Run(policy, candidates, reasons, step)
        run.add(step)
        if on_progress is not None:
            on_progress(len(run.ids))
    if run is None:
        raise DataError("there is no pair to score: the data set, or the role that was asked for, is empty.")
    return run.table(reasons)


def why_not(loss: BoundLoss) -> str:
    """Why a loss cannot be scored on given completions, as its signature says; "" when it can."""
    rollout = sorted(name for name in loss.needs if VOCABULARY[name].source in ("old", "rollout"))
    if rollout:
        return f"needs rollouts ({', '.join(rollout)})"
    mismatched = sorted(name for name in loss.needs if "M" in VOCABULARY[name].shape)
    if mismatched:
        return f"needs completions of other prompts ({', '.join(mismatched)}), which pairs alone do not have"
    foreign = sorted(
        name for name in loss.needs if VOCABULARY[name].source == "policy" and not name.endswith("logps") and not is_leaf(name)
    )
    return f"needs {', '.join(foreign)}: not log-probs of completions" if foreign else ""


class _Run:
    """The sums over batches."""

    def __init__(self, policy: Policy, losses: Mapping[str, BoundLoss], reasons: dict[str, str], first: Step) -> None:
        self.policy = policy
        provided = _provided(first, frozenset().union(*(loss.needs for loss in losses.values())))
        for label, loss in losses.items():
            missing = sorted(loss.needs - provided)
            if missing:
                reasons[label] = f"needs {', '.join(missing)}, which these pairs do not have"
        self.losses = {label: loss for label, loss in losses.items() if label not in reasons}
        if not self.losses:
            listed = "; ".join(f"{label} {reason}" for label, reason in reasons.items()) or "none was named"
            raise ConfigError(f"no loss can be scored on these pairs: {listed}.")
        self.terms, self.uses = distinct_terms(self.losses)
        names = frozenset().union(*(term.needs | term.optional for term in (scorer.term for scorer in self.terms)))
        self.extra = sorted(name for name in names if is_leaf(name))
        self.names = {name for name in names if VOCABULARY[name].source != "state"} - {*self.extra}
        self.gram = torch.zeros(len(self.terms), len(self.terms), dtype=torch.float64)
        self.ids: list[str] = []
        self.lengths: list[Tensor] = []
        self.log_ratios: list[Tensor] = []
        self.at_reference = all(REFERENCE_LOGPS not in batch.rows for batch in first)
        self.batches = self.forward_passes = self.tokens = 0
        self.forward = self.shared = self.after = 0.0

    def add(self, step: Step) -> None:
        """One batch: a forward pass a micro-batch, then every distinct term on the same tensors."""
        begin = time.perf_counter()
        with torch.no_grad():
            found = [self.policy.evaluate(batch, {LOGPS, *self.extra}) for batch in step]
        # Losses run on the CPU: tensors this small are not worth a kernel launch for each of their operations.
        leaves = {name: merge(name, [part[name] for part in found]).detach().cpu().requires_grad_() for name in found[0]}
        encoded = time.perf_counter()
        tensors = {**named_tensors(step, leaves[LOGPS], self.names), **leaves}
        mask = merge("mask", [batch.mask for batch in step])
        self.lengths.append(mask.sum(-1).view(-1, 2).double())
        self.log_ratios.append(side_log_ratios(step, leaves[LOGPS]))
        prepared = time.perf_counter()
        gradients = [scorer.add(tensors, leaves, mask) for scorer in self.terms]
        after = time.perf_counter()
        stacked = torch.stack(gradients).double()
        self.gram += stacked @ stacked.T
        self.ids.extend(row for batch in step for row in batch.ids)
        self.batches += 1
        self.forward_passes += len(step)
        self.tokens += sum(batch.tokens for batch in step)
        self.forward += encoded - begin
        self.shared += prepared - encoded
        self.after += time.perf_counter() - after

    def table(self, reasons: dict[str, str]) -> ScoreTable:
        """Reduces the sums; a loss on whose pairs no weight fell goes to `reasons`."""
        for label, uses in self.uses.items():
            empty = [self.terms[i].term.name for i, _ in uses if self.terms[i].weight == 0]
            if empty:
                reasons[label] = f"no pair counts: the weights of {', '.join(empty)} sum to 0"
        labels = sorted(label for label in self.losses if label not in reasons)
        scales = torch.zeros(len(labels), len(self.terms), dtype=torch.float64)
        for row, label in enumerate(labels):
            for index, coefficient in self.uses[label]:
                scales[row, index] += coefficient / self.terms[index].weight
        gram = scales @ self.gram @ scales.T
        norms = gram.diagonal().clamp(min=0).sqrt()
        cosine = (gram / norms.outer(norms)).clamp(-1, 1)
        scores = tuple(self._score(label, float(norm)) for label, norm in zip(labels, norms, strict=True))
        log_ratios = torch.cat(self.log_ratios)
        accuracy = None if self.at_reference else Accuracy.of(log_ratios[:, 0] - log_ratios[:, 1], _TIE)
        return ScoreTable(
            scores, cosine, dict(sorted(reasons.items())), tuple(self.ids), torch.cat(self.lengths), log_ratios, accuracy,
            self.at_reference, self._timing(),
        )  # fmt: skip

    def _score(self, label: str, norm: float) -> LossScore:
        parts = [(self.terms[index], coefficient) for index, coefficient in self.uses[label]]
        value = torch.stack([coefficient * torch.cat(scorer.values) for scorer, coefficient in parts]).sum(0)
        objective = sum(coefficient * scorer.total / scorer.weight for scorer, coefficient in parts)
        by_side = torch.stack([c / scorer.weight * torch.cat(scorer.coefficients) for scorer, c in parts]).sum(0)
        moved = torch.stack([torch.cat(scorer.moved) for scorer, _ in parts]).any(0)
        rewards = next(
            (found for scorer, _ in parts if not (found := torch.cat(scorer.rewards)).isnan().all()),
            torch.full_like(by_side, math.nan),
        )
        columns = PairColumns(value, by_side[:, 0], by_side[:, 1], rewards[:, 0], rewards[:, 1])
        outside = sorted({name for scorer, _ in parts for name in scorer.outside})
        notes = (f"a part of its gradient goes through {', '.join(outside)} and is not counted",) if outside else ()
        coupled = any(scorer.term.coupled for scorer, _ in parts)
        hyper = dict(self.losses[label].hyper)
        accuracy = Accuracy.of(rewards[:, 0] - rewards[:, 1])
        return LossScore(
            label, hyper, objective, accuracy, norm, 1 - float(moved.double().mean()), columns, coupled, notes
        )  # fmt: skip

    def _timing(self) -> Timing:
        # Terms stand in the order in which losses asked for them, so the first loss paid for its own.
        own = {index for index, _ in next(iter(self.uses.values()))}
        first = self.shared + sum(scorer.seconds for index, scorer in enumerate(self.terms) if index in own)
        others = self.after + sum(scorer.seconds for index, scorer in enumerate(self.terms) if index not in own)
        return Timing(self.forward, first, others, self.batches, self.forward_passes, self.tokens)


def _provided(step: Step, names: frozenset[str]) -> frozenset[str]:
    """Those of `names` that the batches and the forward pass can give."""
    found = named_tensors(step, merge("mask", [batch.mask for batch in step]), names)
    return frozenset(found) | {name for name in names if is_leaf(name) or VOCABULARY[name].source == "state"}
