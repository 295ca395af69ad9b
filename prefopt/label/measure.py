"""How good labels are: position bias, agreement with people in each order and averaged, confidence. N pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from prefopt.data.records import Record
from prefopt.data.rows import content
from prefopt.evaluate import wilson_interval
from prefopt.label.labellers import Labeller
from prefopt.label.probabilities import is_right, same_place_wins
from prefopt.label.run import Labelled

ORDER_1, ORDER_2, AVERAGED = "order 1", "order 2", "both orders"


@dataclass(frozen=True)
class Share:
    """A share of n pairs with Wilson's 95% interval; ties count half."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, ones: Tensor) -> Share | None:
        """From [n] values 0, 1/2 or 1; None for none."""
        n = len(ones)
        return None if n == 0 else cls(float(ones.mean()), *wilson_interval(float(ones.sum()), n), n)

    def __str__(self) -> str:
        return f"{self.value:.1%} [{self.low:.0%}, {self.high:.0%}]"


@dataclass(frozen=True)
class Difference:
    """A mean of n paired differences with its normal 95% interval."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, differences: Tensor) -> Difference | None:
        """From [n] differences; None for fewer than two."""
        n = len(differences)
        if n < 2:
            return None
        mean, half = float(differences.mean()), 1.96 * float(differences.std()) / math.sqrt(n)
        return cls(mean, mean - half, mean + half, n)

    def __str__(self) -> str:
        return f"{100 * self.value:+.1f} points [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


@dataclass(frozen=True)
class LabelReport:
    """What is known of one labeller's labels. None where there is nothing to measure.

    Args:
        labeller: its name.
        parameters: the number of its weights, where it is known.
        pairs: N.
        unreadable: pairs without a label, because a reply could not be read.
        ties: labels of exactly 1/2.
        position_bias: pairs in which the same place wins both orders; None for a labeller that sees no places.
        first_place: of those, the share in which it is the first place.
        agreement: with the human labels, by `ORDER_1` (the order drawn first), `ORDER_2` (the other) and `AVERAGED`; only
            `AVERAGED` for a labeller that sees no places, and none where the data's order means nothing.
        averaging: agreement of both orders minus the mean of the two single ones, paired by pair.
        longer: labels that prefer the longer completion.
        confidence: mean of max(p, 1 - p).
        nll: mean of -log p of the human choice, nats; log 2 is a coin's. Infinite where a sure label is wrong.
        usage: what a chat model was asked.
        notes: what to know of how it was asked.
    """

    labeller: str
    parameters: int | None
    pairs: int
    unreadable: int
    ties: int
    position_bias: Share | None
    first_place: Share | None
    agreement: Mapping[str, Share]
    averaging: Difference | None
    longer: Share | None
    confidence: float | None
    nll: float | None
    usage: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON, which has no infinity."""
        nll = self.nll if self.nll is None or math.isfinite(self.nll) else None
        return {**asdict(self), "nll": nll, "notes": list(self.notes)}


def measure_labels(labelled: Labelled, labeller: Labeller, *, human: bool = True) -> LabelReport:
    """The record of one labeller on pairs.

    Args:
        labelled: what it said.
        labeller: for its name, size, counts and notes.
        human: the data's completions stand in the order of a human label; otherwise agreement is not measured.
    """
    a_is_better = torch.tensor(labelled.firsts) == 0
    p = torch.tensor([judgement.p for judgement in labelled.judgements], dtype=torch.float64)
    known = ~p.isnan()
    soft = known & torch.tensor([not judgement.hard for judgement in labelled.judgements])
    orders = _orders(labelled)[known]
    sees_places = not bool(orders.isnan().any()) and len(orders) > 0
    same = same_place_wins(orders)
    agreement, averaging = {}, None
    if human and bool(known.any()):
        right = is_right(p[known], a_is_better[known])
        by_order = {}
        if sees_places:
            single = (orders[:, 0], 1 - orders[:, 1])
            by_order = {name: is_right(q, a_is_better[known]) for name, q in zip((ORDER_1, ORDER_2), single, strict=True)}
            averaging = Difference.of(right - torch.stack(list(by_order.values())).mean(0))
        found = {name: Share.of(values) for name, values in {**by_order, AVERAGED: right}.items()}
        agreement = {name: share for name, share in found.items() if share is not None}
    chosen = torch.where(a_is_better, p, 1 - p)
    return LabelReport(
        labeller.name,
        labeller.parameters,
        pairs=len(p),
        unreadable=int((~known).sum()),
        ties=int((p == 0.5).sum()),
        position_bias=Share.of((same != 0).double()) if sees_places else None,
        first_place=Share.of((same[same != 0] > 0).double()) if sees_places else None,
        agreement=agreement,
        averaging=averaging,
        longer=_longer(labelled, p),
        confidence=float(torch.maximum(p, 1 - p)[soft].mean()) if bool(soft.any()) else None,
        nll=float(-chosen[soft].log().mean()) if human and bool(soft.any()) else None,
        usage=labeller.usage.as_dict(),
        notes=tuple(labeller.notes),
    )


def length_baseline(records: Sequence[Record]) -> Share | None:
    """The share of pairs whose human choice is the longer completion, in characters: what "longer wins" would score."""
    return Share.of(0.5 + 0.5 * _length_gaps(records).sign())


def _orders(labelled: Labelled) -> Tensor:
    """[N, 2] probability of the first place in each order; NaN where it is not known."""
    rows = [judgement.orders or (math.nan, math.nan) for judgement in labelled.judgements]
    return torch.tensor(rows, dtype=torch.float64).view(-1, 2)


def _length_gaps(records: Sequence[Record]) -> Tensor:
    """[N] characters of completion 0 minus those of completion 1."""
    lengths = [[len(content(text).strip()) for text in record.completions] for record in records]
    return torch.tensor([one - other for one, other in lengths], dtype=torch.float64)


def _longer(labelled: Labelled, p: Tensor) -> Share | None:
    """The share of labels that prefer the longer completion, among pairs of two lengths with a label that is no tie."""
    gaps = _length_gaps(labelled.records)
    a_gaps = torch.where(torch.tensor(labelled.firsts) == 0, gaps, -gaps)
    wins = (p - 0.5).sign() * a_gaps.sign()
    return Share.of((wins[(wins == 1) | (wins == -1)] > 0).double())
