"""Win rates over pairs with their intervals, and the agreement of judges. N pairs, J judges."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from prefopt.evaluate import wilson_interval
from prefopt.judges.verdicts import outcomes

RESAMPLES = 2_000
_SEED = 11


@dataclass(frozen=True)
class WinRate:
    """The mean share of ours.

    Args:
        rate: wins plus half of the ties, over the pairs with a verdict; of soft verdicts the mean probability. NaN without any.
        low, high: 95% interval.
        interval: how it was made: "wilson" over pairs, "bootstrap" over prompts, or "none".
        pairs: with a verdict.
        prompts: of these pairs.
        wins, ties, losses: of these pairs.
        unread: pairs without a verdict, which the rate leaves out.
    """

    rate: float
    low: float
    high: float
    interval: Literal["wilson", "bootstrap", "none"]
    pairs: int
    prompts: int
    wins: int
    ties: int
    losses: int
    unread: int

    @property
    def bounds(self) -> tuple[float, float]:
        """The rate had all unread pairs been losses, and had they all been wins."""
        total = self.pairs + self.unread
        won = 0.0 if self.pairs == 0 else self.rate * self.pairs
        return (won / total, (won + self.unread) / total) if total else (math.nan, math.nan)


def win_rate(shares: Tensor, prompts: Sequence[str] | None = None) -> WinRate:
    """The win rate of [N] shares.

    Prompts are the unit of the interval. Where each has one pair and verdicts are wins, ties and losses, it is Wilson's (a tie
    varies less than it assumes). Where a prompt has several pairs, or verdicts are probabilities, prompts are resampled with
    all of their pairs, and the interval is the percentile one; where they all agree that has no width, and Wilson's over
    prompts stands in.

    Args:
        shares: that ours is preferred; NaN is no verdict.
        prompts: [N] which prompt a pair belongs to; None: each has its own.
    """
    read = ~shares.isnan()
    kept = shares[read].double()
    groups = clusters(prompts, read)
    sides = outcomes(kept)
    wins, ties, losses = (int((sides == side).sum()) for side in (1, 0, -1))
    unread = int((~read).sum())
    if not len(kept):
        return WinRate(math.nan, math.nan, math.nan, "none", 0, 0, 0, 0, 0, unread)
    rate, count = float(kept.mean()), int(groups.max()) + 1
    low, high, how = _interval(kept, groups, count)
    return WinRate(rate, low, high, how, len(kept), count, wins, ties, losses, unread)


def clusters(prompts: Sequence[str] | None, read: Tensor) -> Tensor:
    """[n] numbers from 0 of the prompts of the pairs that `read` [N] keeps."""
    if prompts is None:
        return torch.arange(int(read.sum()))
    kept = [prompt for prompt, keep in zip(prompts, read.tolist(), strict=True) if keep]
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(kept))}
    return torch.tensor([numbers[prompt] for prompt in kept], dtype=torch.long)


def hard(shares: Tensor) -> bool:
    """Whether all verdicts are wins, ties and losses."""
    return bool(torch.isin(shares, torch.tensor([0.0, 0.5, 1.0], dtype=shares.dtype)).all())


def _interval(shares: Tensor, groups: Tensor, count: int) -> tuple[float, float, Literal["wilson", "bootstrap"]]:
    if count == len(shares) and hard(shares):
        return *wilson_interval(float(shares.sum()), len(shares)), "wilson"
    sums = torch.zeros(count, dtype=torch.float64).index_add(0, groups, shares).numpy()
    sizes = torch.bincount(groups, minlength=count).double().numpy()
    if np.ptp(sums / sizes) == 0:
        return *wilson_interval(float(sums[0] / sizes[0]) * count, count), "wilson"
    weights = np.random.default_rng(_SEED).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    low, high = np.quantile((weights @ sums) / (weights @ sizes), [0.025, 0.975])
    return float(low), float(high), "bootstrap"


@dataclass(frozen=True)
class Agreement:
    """How two judges agree over the pairs on which both have a verdict; win, tie and loss are three categories.

    Args:
        one, other: judges.
        pairs: with a verdict of both.
        same: share with the same verdict; NaN without pairs.
        kappa: Cohen's (Cohen 1960 [cohen1960kappa]): the agreement beyond what the two judges' rates alone give, over the
            most there could be; NaN where both always say one and the same.
        decided: share with the same verdict among the pairs where neither ties; NaN without such pairs.
    """

    one: str
    other: str
    pairs: int
    same: float
    kappa: float
    decided: float


def agreement(shares: Mapping[str, Tensor]) -> list[Agreement]:
    """Of every pair of judges, by the [N] shares of each on the same pairs."""
    sides = {name: outcomes(values) for name, values in shares.items()}
    names = list(sides)
    return [_agree(one, other, sides[one], sides[other]) for i, one in enumerate(names) for other in names[i + 1 :]]


def _agree(one: str, other: str, left: Tensor, right: Tensor) -> Agreement:
    read = ~(left.isnan() | right.isnan())
    left, right = left[read], right[read]
    if not len(left):
        return Agreement(one, other, 0, math.nan, math.nan, math.nan)
    same = float((left == right).double().mean())
    chance = sum(float((left == side).double().mean() * (right == side).double().mean()) for side in (-1, 0, 1))
    kappa = (same - chance) / (1 - chance) if chance < 1 else math.nan
    both = (left != 0) & (right != 0)
    decided = float((left == right)[both].double().mean()) if both.any() else math.nan
    return Agreement(one, other, len(left), same, kappa, decided)
