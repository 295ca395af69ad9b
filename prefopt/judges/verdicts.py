"""What a judge says of pairs of completions. N pairs; a share is the probability that the first (ours) is preferred."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from prefopt.data.records import Text
from prefopt.errors import TrainingError
from prefopt.rewards import Scorer, score

TIE = 1e-6
"""A share this near to one half prefers neither."""


class PairJudge(Protocol):
    """Compares two completions of each prompt."""

    def __call__(self, prompts: Sequence[Text], first: Sequence[str], second: Sequence[str]) -> Tensor:
        """[N] shares in [0, 1] that `first` is preferred; one half is a tie, NaN a verdict that could not be read."""


@dataclass(frozen=True)
class Orders:
    """Shares of one judge in both orders: [N] that ours is preferred when it is shown first, and when it is shown second."""

    shown_first: Tensor
    shown_second: Tensor

    @property
    def shares(self) -> Tensor:
        """[N] means over the orders, which take out what a place adds to either side; NaN where one order was not read."""
        return (self.shown_first + self.shown_second) / 2


@dataclass(frozen=True)
class Verdicts:
    """A judge's answer.

    Args:
        shares: [N] float64 that ours is preferred; NaN where nothing could be read.
        orders: both orders by the name of the template, for judges that see a first and a second.
        counts: what else there is to say, as the calls that it took.
    """

    shares: Tensor
    orders: Mapping[str, Orders] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)


@runtime_checkable
class ExaminingJudge(Protocol):
    """A judge that has more to say than shares."""

    def examine(self, prompts: Sequence[Text], first: Sequence[str], second: Sequence[str]) -> Verdicts:
        """The verdicts with how they came about."""


class ScorerJudge:
    """A scorer as a judge: the higher score wins, equal scores tie.

    Args:
        scorer: of completions one by one, so that there is no first and no second.
        log_odds: differences of scores are log-odds of preference, as Bradley-Terry models have them; only then is there a
            calibration to measure.
    """

    def __init__(self, scorer: Scorer, *, log_odds: bool = False) -> None:
        self.scorer, self.log_odds = scorer, log_odds

    def __call__(self, prompts: Sequence[Text], first: Sequence[str], second: Sequence[str]) -> Tensor:
        return 0.5 + 0.5 * self.margins(prompts, first, second).sign()

    def margins(self, prompts: Sequence[Text], first: Sequence[str], second: Sequence[str]) -> Tensor:
        """[N] float64, score of the first minus score of the second.

        Raises:
            TrainingError: as `prefopt.rewards.score`.
        """
        ids = [f"pair {i}" for i in range(len(prompts))]
        both = score(self.scorer, [*prompts, *prompts], [*first, *second], ids + ids).double()
        return both[: len(prompts)] - both[len(prompts) :]


def from_scorer(scorer: Scorer, *, log_odds: bool = False) -> ScorerJudge:
    """A judge of any scorer: a reward model (`log_odds`), a classifier, a function."""
    return ScorerJudge(scorer, log_odds=log_odds)


class BothOrders:
    """A judge that sees a first and a second completion, asked in both orders.

    Args:
        judge: asked twice for each pair.
        name: of it, for the record of its orders.
    """

    def __init__(self, judge: PairJudge, name: str = "judge") -> None:
        self._judge, self._name = judge, name

    def __call__(self, prompts: Sequence[Text], first: Sequence[str], second: Sequence[str]) -> Tensor:
        return self.examine(prompts, first, second).shares

    def examine(self, prompts: Sequence[Text], first: Sequence[str], second: Sequence[str]) -> Verdicts:
        orders = Orders(
            check_shares(self._judge(prompts, first, second), len(prompts)),
            1 - check_shares(self._judge(prompts, second, first), len(prompts)),
        )
        return Verdicts(orders.shares, {self._name: orders})


def examine(judge: PairJudge, prompts: Sequence[Text], first: Sequence[str], second: Sequence[str]) -> Verdicts:
    """The checked verdicts of any judge.

    Raises:
        TrainingError: not one share in [0, 1] (or NaN) for each pair.
    """
    found = (
        judge.examine(prompts, first, second)
        if isinstance(judge, ExaminingJudge)
        else Verdicts(torch.as_tensor(judge(prompts, first, second)))
    )
    return Verdicts(check_shares(found.shares, len(prompts)), found.orders, found.counts)


def check_shares(shares: Tensor, pairs: int) -> Tensor:
    """[N] float64.

    Raises:
        TrainingError: another number of shares, or one outside [0, 1].
    """
    shares = torch.as_tensor(shares).detach().double().cpu()
    if shares.shape != (pairs,):
        raise TrainingError(
            f"the judge returned values of shape {list(shares.shape)} for {pairs} pairs; expected [{pairs}]: for each pair the "
            "probability that the first completion is preferred."
        )
    outside = ((shares < 0) | (shares > 1)).nonzero().squeeze(-1).tolist()
    if outside:
        raise TrainingError(
            f"the judge returned {float(shares[outside[0]]):g} for pair {outside[0]}; expected the probability that the first "
            "completion is preferred, from 0 to 1, or NaN where there is no verdict. Scores of single completions are a "
            "scorer: f(prompts, completions)."
        )
    return shares


def outcomes(shares: Tensor) -> Tensor:
    """[N] 1 for a win, 0 for a tie, -1 for a loss, NaN without a verdict."""
    gaps = shares - 0.5
    # The sign of NaN is 0 to torch, which would make a tie of what is no verdict.
    return torch.where(gaps.isnan(), gaps, torch.where(gaps.abs() <= TIE, 0.0, gaps.sign()))


@dataclass(frozen=True)
class PositionBias:
    """How often the place decided (Zheng et al. 2023 [zheng2023judging]).

    Args:
        rate: share of the pairs read in both orders in which the same position won twice.
        first: the part of them in which it was the first position.
        pairs: read in both orders.
    """

    rate: float
    first: float
    pairs: int


def position_bias(orders: Orders) -> PositionBias:
    """Of verdicts in both orders; a tie in either order is no win of a position."""
    one, other = outcomes(orders.shown_first), outcomes(orders.shown_second)
    read = ~(one.isnan() | other.isnan())
    count = int(read.sum())
    first = float(((one > 0) & (other < 0)).sum()) / count if count else float("nan")
    second = float(((one < 0) & (other > 0)).sum()) / count if count else float("nan")
    return PositionBias(first + second, first, count)
