"""What is known of a reward model on held-out pairs: accuracy, calibration, and how its preferences follow length.

P pairs: every completion of a list with every worse one. A margin is the score of the preferred completion minus the other's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from prefopt.data.records import Example
from prefopt.evaluate import correlation, wilson_interval
from prefopt.rewards.scorers import RewardModelScorer

BINS = 15
MATCHED = 0.1
"""Two completions count as equally long when their lengths differ by at most this share of the longer one's."""


@dataclass(frozen=True)
class Bin:
    """Pairs of similar confidence: how sure the model is of its preference on average, and how often it is right."""

    confidence: float
    accuracy: float
    pairs: int


@dataclass(frozen=True)
class Share:
    """Accuracy on some of the pairs; None when there are none."""

    accuracy: float | None
    pairs: int


@dataclass(frozen=True)
class Quality:
    """A reward model's record. Its probability that the preferred completion is the better one is p = sigma(margin).

    Args:
        pairs: P.
        accuracy: share of positive margins, a tie counts half; `low` and `high` bound it by Wilson's 95% interval.
        ece: expected calibration error: mean distance of accuracy and confidence max(p, 1-p) over bins of equal width in
            [0.5, 1], weighted by their pairs (Naeini et al. 2015 [naeini2015ece]).
        ece_mass: the same over bins of equally many pairs (Nixon et al. 2019 [nixon2019calibration]).
        brier: mean of (1 - p)^2 (Brier 1950 [brier1950verification]).
        nll: mean of -log p, nats; log 2 is a coin's.
        length_correlation: Pearson's, of margins with differences of length in tokens; None where it is undefined.
        by_length: the pairs whose preferred completion is about as long (`matched`), longer, shorter.
        curve: the bins of `ece` that hold pairs.
    """

    pairs: int
    accuracy: float
    low: float
    high: float
    ece: float
    ece_mass: float
    brier: float
    nll: float
    length_correlation: float | None
    by_length: Mapping[str, Share]
    curve: tuple[Bin, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "curve": [asdict(item) for item in self.curve]}


def measure_quality(scorer: RewardModelScorer, examples: Sequence[Example]) -> Quality:
    """The record of a reward model on tokenised pairs or ranked lists; a pair without ranks stands best first."""
    margins, lengths = [], []
    for example, scores in zip(examples, scorer.lists(examples), strict=True):
        for better, worse in ordered_pairs(example):
            margins.append(scores[better] - scores[worse])
            lengths.append([len(example.completion_ids[side]) for side in (better, worse)])
    return quality(torch.stack(margins), torch.tensor(lengths))


def ordered_pairs(example: Example) -> list[tuple[int, int]]:
    """(better, worse) of all completions that the ranks tell apart."""
    ranks = example.labels.ranks or range(len(example.completion_ids))
    return [(i, j) if ranks[i] < ranks[j] else (j, i) for i, j in combinations(range(len(ranks)), 2) if ranks[i] != ranks[j]]


def quality(margins: Tensor, lengths: Tensor) -> Quality:
    """From [P] margins and [P, 2] lengths of the preferred and the other completion, in tokens."""
    margins, lengths = margins.double(), lengths.double()
    right = (margins > 0).double() + 0.5 * (margins == 0).double()
    confidence = torch.sigmoid(margins.abs())
    bins = _equal_width(confidence, right)
    low, high = wilson_interval(float(right.sum()), len(margins))
    gaps = lengths[:, 0] - lengths[:, 1]
    matched = gaps.abs() <= MATCHED * lengths.amax(1)
    groups = {"matched": matched, "longer": ~matched & (gaps > 0), "shorter": ~matched & (gaps < 0)}
    return Quality(
        len(margins),
        float(right.mean()),
        low,
        high,
        ece=_calibration_error(bins),
        ece_mass=_calibration_error(_equal_mass(confidence, right)),
        brier=float((1 - torch.sigmoid(margins)).square().mean()),
        nll=-float(F.logsigmoid(margins).mean()),
        length_correlation=correlation(margins.tolist(), gaps.tolist()),
        by_length={
            name: Share(float(right[group].mean()) if group.any() else None, int(group.sum())) for name, group in groups.items()
        },
        curve=tuple(bins),
    )


def quality_table(found: Quality, title: str) -> Table:
    """The record for people."""
    table = Table(title=title, title_justify="left")
    table.add_column("on held-out pairs")
    table.add_column("value", justify="right")
    table.add_column("what it is")
    correlated = "n/a" if found.length_correlation is None else f"{found.length_correlation:+.3f}"
    table.add_row(
        "accuracy", f"{found.accuracy:.1%}", f"95% interval {found.low:.1%} to {found.high:.1%}, {found.pairs:,} pairs"
    )
    table.add_row(
        "ECE", f"{found.ece:.3f}", f"{BINS} bins of equal width; {found.ece_mass:.3f} with bins of equally many pairs"
    )
    table.add_row("Brier score", f"{found.brier:.3f}", "0.25 for a coin")
    table.add_row("NLL", f"{found.nll:.3f}", "nats; 0.693 for a coin")
    table.add_row("length correlation", correlated, "of score differences with differences of length")
    for name, share in found.by_length.items():
        value = "n/a" if share.accuracy is None else f"{share.accuracy:.1%}"
        about = "about as long" if name == "matched" else name
        table.add_row(f"accuracy, {name}", value, f"{share.pairs:,} pairs whose preferred completion is {about}")
    return table


def _equal_width(confidence: Tensor, right: Tensor) -> list[Bin]:
    place = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    return [_bin(confidence[place == index], right[place == index]) for index in place.unique().tolist()]


def _equal_mass(confidence: Tensor, right: Tensor) -> list[Bin]:
    order = confidence.argsort(stable=True)
    return [_bin(confidence[part], right[part]) for part in order.tensor_split(BINS) if len(part)]


def _bin(confidence: Tensor, right: Tensor) -> Bin:
    return Bin(float(confidence.mean()), float(right.mean()), len(right))


def _calibration_error(bins: Sequence[Bin]) -> float:
    return sum(item.pairs * abs(item.accuracy - item.confidence) for item in bins) / sum(item.pairs for item in bins)
