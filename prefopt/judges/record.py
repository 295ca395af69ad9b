"""A judge's own record on pairs that people labelled (protocol, rule 7): accuracy, calibration, length bias. P pairs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch

from prefopt.data.records import Record, Text
from prefopt.data.rows import content
from prefopt.errors import DataError
from prefopt.evaluate import correlation, wilson_interval
from prefopt.judges.lengths import Length, measure
from prefopt.judges.verdicts import PairJudge, ScorerJudge, examine
from prefopt.judges.winrate import hard
from prefopt.report.schema import Judge
from prefopt.rewards.quality import quality

_SURE = 1e-6


@dataclass(frozen=True)
class LabelledPairs:
    """Pairs of texts, the preferred one first.

    Args:
        prompts: P.
        chosen, rejected: P texts.
        soft_labels: P probabilities that chosen is preferred; 1 where nothing else is known.
        keys: P keys of the prompts, as the split of roles hashes them.
    """

    prompts: tuple[Text, ...]
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    soft_labels: tuple[float, ...]
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def first(self, count: int) -> LabelledPairs:
        """The first pairs."""
        return self._take(range(min(count, len(self))))

    def without(self, keys: Collection[str]) -> LabelledPairs:
        """The pairs whose prompt is none of these.

        Raises:
            DataError: none is left.
        """
        kept = [i for i, key in enumerate(self.keys) if key not in keys]
        if not kept:
            raise DataError(f"all {len(self)} held-out pairs have prompts that the judge was fitted on; name other pairs.")
        return self if len(kept) == len(self) else self._take(kept)

    def _take(self, places: Sequence[int]) -> LabelledPairs:
        columns = (self.prompts, self.chosen, self.rejected, self.soft_labels, self.keys)
        return LabelledPairs(*(tuple(column[i] for i in places) for column in columns))  # type: ignore[arg-type]


def labelled_pairs(records: Iterable[Record]) -> LabelledPairs:
    """Every two completions that the ranks tell apart; rows without an order have none.

    Raises:
        DataError: no pair at all.
    """
    rows = [
        (record.prompt, content(record.completions[i]), content(record.completions[j]), soft, record.key)
        for record in records
        if record.labels.ranks is not None
        for i, j, soft in _ordered(record)
    ]
    if not rows:
        raise DataError("no pair in an order was found among the rows: a judge learns from, and is measured on, preferences.")
    prompts, chosen, rejected, soft_labels, keys = zip(*rows, strict=True)
    return LabelledPairs(prompts, chosen, rejected, soft_labels, keys)


def _ordered(record: Record) -> list[tuple[int, int, float]]:
    """(better, worse, probability) by the record's ranks; a pair whose soft label is under one half is turned round."""
    ranks, soft = record.labels.ranks or (), record.labels.soft_label
    if soft is not None:
        return [(0, 1, soft)] if soft >= 0.5 else [(1, 0, 1 - soft)]
    pairs = ((i, j) if ranks[i] < ranks[j] else (j, i) for i, j in combinations(range(len(ranks)), 2) if ranks[i] != ranks[j])
    return [(i, j, 1.0) for i, j in pairs]


def judge_record(name: str, judge: PairJudge, pairs: LabelledPairs, length: Length, note: str = "") -> Judge:
    """What a judge is worth on held-out pairs.

    Accuracy counts a tie half and leaves out labels that are ties and verdicts that could not be read (the note counts
    them). Length bias is the correlation of the judge's margin with the difference of lengths: of a scorer's scores, else of
    its shares. Only log-odds and probabilities have a calibration.

    Raises:
        DataError: no pair is left.
    """
    decided = [i for i, soft in enumerate(pairs.soft_labels) if soft != 0.5]
    prompts = [pairs.prompts[i] for i in decided]
    chosen, rejected = [pairs.chosen[i] for i in decided], [pairs.rejected[i] for i in decided]
    lengths = measure(length, chosen, rejected)
    if isinstance(judge, ScorerJudge):
        found = from_margins(name, judge.margins(prompts, chosen, rejected), lengths, note)
        return found if judge.log_odds else replace(found, ece=None)
    shares = examine(judge, prompts, chosen, rejected).shares
    read = ~shares.isnan()
    if not read.any():
        raise DataError(f"judge {name}: none of its verdicts on {len(shares)} held-out pairs could be read.")
    if not read.all():
        note = f"{note}; {int((~read).sum())} of {len(shares)} verdicts could not be read".removeprefix("; ")
    shares, lengths = shares[read], lengths[read]
    if not hard(shares):
        return from_margins(name, torch.logit(shares.clamp(_SURE, 1 - _SURE)), lengths, note)
    low, high = wilson_interval(float(shares.sum()), len(shares))
    return Judge(name, float(shares.mean()), low, high, len(shares), length_bias=_bias(shares.tolist(), lengths), note=note)


def from_margins(name: str, margins: torch.Tensor, lengths: torch.Tensor, note: str = "") -> Judge:
    """The record from [P] margins (log-odds that chosen is preferred) and [P, 2] lengths of chosen and rejected."""
    found = quality(margins, lengths)
    return Judge(
        name, found.accuracy, found.low, found.high, found.pairs, length_bias=found.length_correlation, ece=found.ece, note=note
    )


def _bias(shares: Sequence[float], lengths: torch.Tensor) -> float | None:
    return correlation(shares, (lengths[:, 0] - lengths[:, 1]).tolist())
