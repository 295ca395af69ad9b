"""Whether the report's tests and intervals are what they say: simulated studies in which the truth is known.

    python -m benchmarks.null_studies [--studies 2000] [--seeds 3 5]

A study has families on shared seeds and shared prompts. At a checkpoint, a cell's score is

    family + prompts + seed + seed-by-family + noise of each prompt, averaged over the prompts,

each normal; the prompts' part is common to all cells and to the reference, and the noise is drawn anew at every checkpoint.
It goes through what the report uses: paths, reading at the KL target, paired t tests, Holm. Null studies have equal families,
equal to the reference: tests must reject 5%, intervals cover 95%, and Holm's family of tests errs in at most 5% of the studies.
A planted difference must be found as often as `prefopt power` announces.

For contrast, the same values under a percentile bootstrap over seeds, and under a reading that takes
the most reward on the path.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from prefopt.report.grid import Column, Entry, Grid
from prefopt.report.matched import Endpoint, curves, endpoint, reward_at, value_at
from prefopt.report.power import LEVEL, detectable_over_seeds, power_of
from prefopt.report.schema import Cell, Metric, Results, Setting

METRIC = Metric("reward", "reward", "up", primary=True)
_BOOTSTRAP_DRAWS = 500


@dataclass(frozen=True)
class World:
    """Standard deviations of the parts of a cell's score, and the sizes of a study.

    Args:
        prompt: of prompts, shared by all cells.
        seed: of seeds, shared by all families.
        interaction: of a seed in one family.
        noise: of one prompt in one cell.
        prompts: shared by all cells.
        families: compared.
        checkpoints: of a path, evenly on the way to twice the target, which lies between two of them.
        target: nats.
    """

    prompt: float = 1.0
    seed: float = 0.5
    interaction: float = 0.2
    noise: float = 2.0
    prompts: int = 100
    families: int = 3
    checkpoints: int = 8
    target: float = 5.0

    @property
    def deviation(self) -> float:
        """Of the difference of two families, paired by seed, where the curves are read."""
        shares = [value_at(list(zip(self.kls, unit, strict=True)), self.target) for unit in np.eye(self.checkpoints).tolist()]
        noise = self.noise**2 / self.prompts * math.fsum(share**2 for share in shares if share is not None)
        return math.sqrt(2 * (self.interaction**2 + noise))

    @property
    def kls(self) -> list[float]:
        return [2 * self.target * (index + 0.5) / self.checkpoints for index in range(self.checkpoints)]


@dataclass(frozen=True)
class Rates:
    """Shares over studies and tests of one number of seeds.

    Args:
        seeds: of each study.
        tests: made, between families.
        rejected: of the tests between families, p < 0.05 before correction.
        family_wise: studies in which any of them is rejected after Holm.
        covered: intervals that hold the true difference.
        against: of the tests against the reference, p < 0.05 before correction.
        against_most: the same, had the most reward on each path been read.
        bootstrap: of the same differences, 95% percentile bootstrap intervals over seeds without 0.
        announced, found: power at a planted difference, by `prefopt power` and here.
        planted: that difference.
    """

    seeds: int
    tests: int
    rejected: float
    family_wise: float
    covered: float
    against: float
    against_most: float
    bootstrap: float
    announced: float
    found: float
    planted: float


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 5])
    arguments = parser.parse_args(argv)
    rates = [measure(World(), seeds, arguments.studies) for seeds in arguments.seeds]
    print(table(rates, arguments.studies))


def measure(world: World, seeds: int, studies: int) -> Rates:
    """Null studies, and as many with a difference that `seeds` are announced to find with probability 0.8."""
    rng = np.random.default_rng([seeds, studies])
    planted = detectable_over_seeds(world.deviation, seeds)
    nulls = [simulate(world, seeds, rng) for _ in range(studies)]
    ends = [_end(null) for null in nulls]
    pairs = [pair for end in ends for pair in end.pairs]
    differences = np.array([_differences(end) for end in ends]).reshape(-1, seeds)
    effects = [(_end(simulate(world, seeds, rng, planted))).pairs[0] for _ in range(studies)]
    return Rates(
        seeds,
        len(pairs),
        _share([pair.p is not None and pair.p < 0.05 for pair in pairs]),
        _share([any(pair.told_apart for pair in end.pairs) for end in ends]),
        _share([abs(pair.difference) <= (pair.half_width or 0.0) for pair in pairs]),
        _share([pair.p is not None and pair.p < 0.05 for end in ends for pair in end.against]),
        _most_rejected(world, nulls),
        percentile_bootstrap_rejects(differences, rng),
        power_of(planted, world.deviation, seeds),
        _share([pair.p is not None and pair.p < 0.05 for pair in effects]),
        planted,
    )


def simulate(world: World, seeds: int, rng: np.random.Generator, planted: float = 0.0) -> Results:
    """One study; the first family is better by `planted`, everything else is null."""
    families = [f"family {index}" for index in range(world.families)]
    reference = float(rng.normal(0, world.prompt / math.sqrt(world.prompts)))
    seed_effects = rng.normal(0, world.seed, seeds)
    cells = seed_effects + rng.normal(0, world.interaction, (world.families, seeds))
    cells[0] += planted
    noise = rng.normal(0, world.noise / math.sqrt(world.prompts), (world.families, seeds, world.checkpoints))
    values = reference + cells[..., None] + noise
    made = []
    for row, family in enumerate(families):
        for seed in range(seeds):
            points = zip(world.kls, values[row, seed].tolist(), strict=True)
            path = tuple({"kl": kl, "reward": value} for kl, value in points)
            made.append(Cell(family, family, seed, "ok", None, path[-1], path))
    settings = tuple(Setting(family, family) for family in families)
    return Results(
        1, "simulated", "text", settings, tuple(range(seeds)), (METRIC,), tuple(made),
        reference={"reward": reference}, kl_targets=(world.target,),
    )  # fmt: skip


def percentile_bootstrap_rejects(differences: np.ndarray, rng: np.random.Generator) -> float:
    """The share of rows whose 95% percentile bootstrap interval of the mean excludes 0; [tests, seeds]."""
    seeds = differences.shape[1]
    draws = rng.integers(0, seeds, (_BOOTSTRAP_DRAWS, seeds))
    means = differences[:, draws].mean(-1)  # [tests, draws]
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)
    return float(((low > 0) | (high < 0)).mean())


def table(rates: Sequence[Rates], studies: int) -> Grid:
    """One row a number of seeds."""
    columns = [
        Column("seeds"), Column("tests"), Column("rejected (5%)"), Column("any after Holm (≤ 5%)"), Column("covered (95%)"),
        Column("vs reference (5%)"), Column("had the most been read"), Column("percentile bootstrap"), Column("planted"),
        Column("power announced"), Column("power found"),
    ]  # fmt: skip
    rows = []
    for rate in rates:
        shares = (rate.rejected, rate.family_wise, rate.covered, rate.against, rate.against_most, rate.bootstrap)
        texts = [str(rate.seeds), f"{rate.tests:,}", *(f"{share:.1%}" for share in shares)]
        texts += [f"{rate.planted:.3f}", f"{rate.announced:.1%}", f"{rate.found:.1%} ± {_error(rate.found, studies):.1%}"]
        rows.append(tuple(Entry(text) for text in texts))
    return Grid(f"{studies:,} null studies, and as many with a planted difference", tuple(columns), tuple(rows))


def _end(results: Results) -> Endpoint:
    end = endpoint(results)
    assert end is not None
    return end


def _differences(end: Endpoint) -> list[list[float]]:
    """Of each pair, left - right by seed."""
    return [[a.values[seed] - b.values[seed] for seed in a.values] for a, b in combinations(end.readings, 2)]


def _most_rejected(world: World, nulls: Sequence[Results]) -> float:
    """Rejections against the reference when the most reward on each path is read."""
    from scipy import stats

    found = []
    for results in nulls:
        for lines in curves(results).lines.values():
            most = [reward_at(line, world.target) for line in lines.values()]
            found.append([value - results.reference["reward"] for value in most if value is not None])
    return float((stats.ttest_1samp(np.array(found), 0.0, axis=1).pvalue < 0.05).mean())


def _share(found: Sequence[bool]) -> float:
    return sum(found) / len(found)


def _error(share: float, n: int) -> float:
    """1.96 standard errors of a share."""
    return 1.96 * math.sqrt(share * (1 - share) / n)


if __name__ == "__main__":
    main()
