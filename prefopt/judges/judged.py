"""Pairs with what judges say of them: one call judges them all, and every number of a report follows from the result.

N pairs of our completion and theirs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from prefopt.data.records import Text
from prefopt.errors import DataError
from prefopt.judges.lengths import LENGTHS, Length, LengthControlled, length_controlled, matched_win_rate, measure
from prefopt.judges.verdicts import PairJudge, PositionBias, Verdicts, examine, position_bias
from prefopt.judges.winrate import Agreement, WinRate, agreement, win_rate


@dataclass(frozen=True)
class TemplateSummary:
    """A judge under one of its templates."""

    win_rate: WinRate
    position_bias: PositionBias


@dataclass(frozen=True)
class JudgeSummary:
    """What one judge says of all pairs.

    Args:
        judge: its name.
        win_rate: of ours.
        length_controlled: the rate at equal lengths; None without a verdict.
        length_matched: over pairs of nearly equal lengths.
        templates: of a judge that sees a first and a second completion, by template.
        counts: what the judge counted: calls, replies that could not be read.
    """

    judge: str
    win_rate: WinRate
    length_controlled: LengthControlled | None
    length_matched: WinRate
    templates: Mapping[str, TemplateSummary]
    counts: Mapping[str, int]

    @property
    def spread(self) -> float | None:
        """The largest less the smallest win rate over the templates; None under two of them."""
        rates = [found.win_rate.rate for found in self.templates.values() if not math.isnan(found.win_rate.rate)]
        return max(rates) - min(rates) if len(rates) > 1 else None


@dataclass(frozen=True)
class JudgedPairs:
    """Pairs and their verdicts.

    Args:
        ids: N unique names.
        prompts: N keys: pairs of one prompt share it; prompts are the unit of every interval.
        lengths: [N, 2] of ours and theirs.
        unit: of the lengths.
        verdicts: by the name of the judge.
    """

    ids: tuple[str, ...]
    prompts: tuple[str, ...]
    lengths: Tensor
    unit: str
    verdicts: Mapping[str, Verdicts]

    def summary(self, judge: str) -> JudgeSummary:
        """Everything that one judge says."""
        found = self.verdicts[judge]
        templates = {
            name: TemplateSummary(win_rate(orders.shares, self.prompts), position_bias(orders))
            for name, orders in found.orders.items()
        }
        return JudgeSummary(
            judge,
            win_rate(found.shares, self.prompts),
            length_controlled(found.shares, self.lengths, self.prompts),
            matched_win_rate(found.shares, self.lengths, self.prompts),
            templates,
            found.counts,
        )

    def agreement(self) -> list[Agreement]:
        """Of every two judges."""
        return agreement({name: found.shares for name, found in self.verdicts.items()})

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for every judge and pair, for statistics of one's own; no text. JSON's null is a verdict that is missing."""
        lengths = self.lengths.tolist()
        for judge, found in self.verdicts.items():
            orders = {name: (own.shown_first.tolist(), own.shown_second.tolist()) for name, own in found.orders.items()}
            for i, share in enumerate(found.shares.tolist()):
                row: dict[str, Any] = {"pair": self.ids[i], "prompt": self.prompts[i], "judge": judge, "share": _number(share)}
                row |= {"our_length": lengths[i][0], "their_length": lengths[i][1]}
                if orders:
                    row["orders"] = {name: [_number(side[i]) for side in sides] for name, sides in orders.items()}
                yield row

    def as_dict(self) -> dict[str, Any]:
        """All summaries and agreements as plain values, for JSON."""
        summaries = [self.summary(judge) for judge in self.verdicts]
        return {
            "pairs": len(self.ids),
            "prompts": len({*self.prompts}),
            "length_unit": self.unit,
            "mean_lengths": self.lengths.double().mean(0).tolist(),
            "judges": [finite({**asdict(summary), "spread": summary.spread}) for summary in summaries],
            "agreement": [finite(asdict(found)) for found in self.agreement()],
        }


def judge_samples(
    judges: Mapping[str, PairJudge],
    prompts: Sequence[Text],
    ours: Sequence[str],
    theirs: Sequence[str],
    *,
    ids: Sequence[str] | None = None,
    length: Length = LENGTHS["words"],
    unit: str = "words",
) -> JudgedPairs:
    """Asks every judge about every pair.

    Args:
        judges: by name; `from_scorer` makes one of a reward model, `BothOrders` of a function that sees two completions.
        prompts, ours, theirs: N. Equal prompts are one prompt to the intervals.
        ids: N unique names of the pairs; None numbers them.
        length, unit: how long a completion is, and in what.

    Raises:
        DataError: no pair, different numbers of prompts and completions, or an id twice.
        TrainingError: a judge failed, or returned something else than shares.
    """
    names = tuple(ids) if ids is not None else tuple(str(i) for i in range(len(prompts)))
    if not (len(prompts) == len(ours) == len(theirs) == len(names)) or not prompts:
        raise DataError(
            f"judge_samples: {len(prompts)} prompts, {len(ours)} and {len(theirs)} completions, {len(names)} ids; expected one "
            "of each for every pair, and at least one pair."
        )
    if len({*names}) < len(names):
        raise DataError(f"judge_samples: {len(names) - len({*names})} of {len(names)} ids are repeated; each must be unique.")
    numbers = {prompt: names[i] for i, prompt in reversed(list(enumerate(map(_hashable, prompts))))}
    verdicts = {name: examine(judge, prompts, ours, theirs) for name, judge in judges.items()}
    keys = tuple(numbers[_hashable(prompt)] for prompt in prompts)
    return JudgedPairs(names, keys, measure(length, ours, theirs), unit, verdicts)


def _hashable(prompt: Text) -> object:
    return prompt if isinstance(prompt, str) else tuple((turn["role"], turn["content"]) for turn in prompt)


def finite(value: Any) -> Any:
    """Plain values with None for what is not finite, which JSON does not have."""
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return _number(value) if isinstance(value, float) else value


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
