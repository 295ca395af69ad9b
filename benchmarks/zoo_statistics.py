"""What benchmarks.zoo may say about an order: a two-way layout loss x world, Tukey's comparisons, rank intervals, letters.

Worlds are blocks. x_ij = mean + loss_i + world_j + residual_ij; the residual (interaction and noise, one cell each) has
(a - 1)(b - 1) degrees of freedom for a losses in b worlds. All pairs of losses are compared at once by the studentized range:
two means differ if they are further apart than HSD = q_{0.95; a, df} sqrt(MSE / b)  (Tukey 1953; the layout is balanced).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, product
from string import ascii_lowercase

import numpy as np

from prefopt.report.schema import MINIMUM_SEEDS
from prefopt.report.statistics import LEVEL, NO_SCIPY, scipy_installed

ASSUMPTIONS = (
    "worlds are drawn at random and shift all losses alike (additive blocks)",
    "what is left (how a loss and a world suit each other, labels, order of the pairs) is normal with one variance, and "
    "independent from cell to cell",
    "settings are taken as given: that another tuning might have chosen others is not in the intervals",
    "only losses that reach a target in every world are compared there, and each column is a family of its own",
)


def lowest_regret(path: Sequence[Mapping[str, float]]) -> float:
    """The least regret at any checkpoint; the reference, where every path begins, is none."""
    return min(point["regret"] for point in path[1:])


@dataclass(frozen=True)
class Standing:
    """One loss among those compared; the best has the highest (or, where less is better, the lowest) mean.

    Args:
        name: the loss.
        mean: over worlds.
        best_rank, worst_rank: 1 + losses that are significantly better, and their number less those significantly worse.
        letters: losses that share one cannot be told apart.
    """

    name: str
    mean: float
    best_rank: int
    worst_rank: int
    letters: str


@dataclass(frozen=True)
class Comparison:
    """All losses of a two-way layout, best first.

    Args:
        standings: empty where nothing can be said; `missing` then says why.
        hsd: means that are further apart differ significantly, all pairs at once.
        deviation: of the residuals.
        degrees: their degrees of freedom.
        worlds: blocks.
    """

    standings: tuple[Standing, ...]
    hsd: float = math.nan
    deviation: float = math.nan
    degrees: int = 0
    worlds: int = 0
    missing: str = ""


def compare(values: Mapping[str, Sequence[float]], *, lower_is_better: bool = False) -> Comparison:
    """Tukey's comparisons of all losses.

    Args:
        values: by loss, one number for each world, the worlds in one order for all.
        lower_is_better: as in regret.

    Raises:
        ValueError: losses with different numbers of worlds.
    """
    names = list(values)
    table = np.array([list(values[name]) for name in names], dtype=float)  # [a, b]; ragged rows are an error
    if len(names) < 2:
        return Comparison((), missing="fewer than 2 losses to compare")
    losses, worlds = table.shape
    if worlds < MINIMUM_SEEDS:
        return Comparison((), worlds=worlds, missing=f"fewer than {MINIMUM_SEEDS} worlds: no ranking")
    if not scipy_installed():
        return Comparison((), worlds=worlds, missing=NO_SCIPY)
    residual = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean()
    degrees = (losses - 1) * (worlds - 1)
    variance = float((residual**2).sum() / degrees)
    hsd = tukey_hsd(variance, degrees, losses, worlds)
    sign = -1.0 if lower_is_better else 1.0
    order = sorted(range(losses), key=lambda i: -sign * table[i].mean())
    means = [float(table[i].mean()) for i in order]
    letters = compact_letters([sign * mean for mean in means], hsd)
    standings: list[Standing] = []
    for place, mean in zip(order, means, strict=True):
        better = sum(sign * (other - mean) > hsd for other in means)
        worse = sum(sign * (mean - other) > hsd for other in means)
        standings.append(Standing(names[place], mean, 1 + better, losses - worse, letters[len(standings)]))
    return Comparison(tuple(standings), hsd, math.sqrt(variance), degrees, worlds)


def tukey_hsd(variance: float, degrees: int, groups: int, size: int) -> float:
    """The honestly significant difference of `groups` means of `size` values: q sqrt(variance / size)."""
    return _range_quantile(groups, degrees) * math.sqrt(variance / size)


@lru_cache(maxsize=64)
def _range_quantile(groups: int, degrees: int) -> float:
    """A fifth of a second each; the layouts of one study have few sizes."""
    from scipy.stats import studentized_range

    return float(studentized_range.ppf(LEVEL, groups, degrees))


def compact_letters(means: Sequence[float], hsd: float) -> list[str]:
    """Letters for means in falling order; two share a letter if and only if they are at most `hsd` apart.

    With one HSD for all pairs the sets that cannot be told apart are runs of neighbours; each longest run gets a letter. Past
    z names have two letters, and all are separated by commas.
    """
    names = ("".join(letter) for length in count(1) for letter in product(ascii_lowercase, repeat=length))
    letters: list[list[str]] = [[] for _ in means]
    reached = -1
    for first in range(len(means)):
        last = max(i for i in range(first, len(means)) if means[first] - means[i] <= hsd)
        if last > reached:
            name = next(names)
            for own in letters[first : last + 1]:
                own.append(name)
            reached = last
    comma = "," if any(len(name) > 1 for own in letters for name in own) else ""
    return [comma.join(own) for own in letters]
