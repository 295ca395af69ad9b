"""What benchmarks.abc reads off learning curves: mean score, and collections until a level is reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from prefopt.report.schema import Results
from prefopt.report.statistics import Interval, mean_interval
from prefopt.tasks.sentiment import GOLD

WINDOW, LAST = 5, 10
"""Collections of the running mean that has to pass the level, and those at the end whose mean is the level."""

DEFINITION = (
    "Score: the reward model's, mean of the rollouts of a collection before any update on them. Level: the sparse run's mean "
    f"over its last {LAST} collections, for each seed its own: every seed has a reward model of its own, and the scores of two "
    f"models have no common scale. Steps: collections until the mean of the last {WINDOW} first passes the level, for the "
    "sparse run too. Intervals: 95%, Student's t over seeds; differences are paired by seed."
)

Curve = Sequence[float]


@dataclass(frozen=True)
class Row:
    """One setting against the sparse run of the same seed.

    Args:
        setting: its label.
        score: mean over training.
        gain: the same minus the sparse run's.
        steps: by seed, collections to the level; None where it is never passed.
        saved: the sparse run's steps minus these, over seeds where both pass.
        gold, kl: after training, the known reward and the distance to the reference.
    """

    setting: str
    score: Interval
    gain: Interval
    steps: Mapping[int, int | None]
    saved: Interval
    gold: Interval
    kl: Interval

    def shown(self) -> dict[str, Any]:
        """For the table: numbers with half-widths, and words where a level was not reached."""
        reached = [steps for steps in self.steps.values() if steps is not None]
        missing = len(self.steps) - len(reached)
        found = mean_interval(reached)
        return {
            "setting": self.setting,
            "mean score": _pair(self.score),
            "over sparse": _pair(self.gain),
            "steps to level": f"not reached by {missing} of {len(self.steps)}" if missing else _pair(found),
            "steps saved": _pair(self.saved) if not missing else f"{self.saved.n} seeds only",
            "gold reward": _pair(self.gold),
            "KL": _pair(self.kl),
        }


def running_mean(curve: Curve, window: int = WINDOW) -> list[float]:
    """Means of `window` neighbouring values; the first is of values 1 to `window`. [n] -> [n - window + 1], none if shorter."""
    sums = list(accumulate(curve, initial=0.0))
    return [(after - before) / window for before, after in zip(sums, sums[window:], strict=False)]


def steps_to(curve: Curve, level: float, window: int = WINDOW) -> int | None:
    """Values seen when the mean of the last `window` first passes `level`; None if it never does."""
    return next((place + window for place, mean in enumerate(running_mean(curve, window)) if mean > level), None)


def final_level(curve: Curve, last: int = LAST) -> float:
    """Mean of the last values, of all where there are fewer."""
    tail = curve[-last:]
    return sum(tail) / len(tail)


def read_curves(results: Results, key: str = "score") -> dict[str, dict[int, list[float]]]:
    """By setting and seed, one value for each collection of rollouts."""
    return {
        setting.label: {
            cell.seed: [line[key] for line in cell.curve if key in line] for cell in results.cells_of(setting.label)
        }
        for setting in results.settings
    }


def compare_with(
    curves: Mapping[str, Mapping[int, Curve]], base: str, final: Mapping[str, Mapping[str, Mapping[int, float]]]
) -> list[Row]:
    """A row for each setting, over the seeds that it and the base setting both finished.

    Args:
        curves: by setting and seed.
        base: the setting whose end is the level.
        final: by setting, metrics of the trained policy by seed.
    """
    rows = []
    for setting, own in curves.items():
        seeds = [seed for seed in curves[base] if seed in own]
        levels = {seed: final_level(curves[base][seed]) for seed in seeds}
        steps = {seed: steps_to(own[seed], levels[seed]) for seed in seeds}
        known = {seed: steps_to(curves[base][seed], levels[seed]) for seed in seeds}
        both = [(known[seed], steps[seed]) for seed in seeds]
        saved = [theirs - mine for theirs, mine in both if theirs is not None and mine is not None]
        mean = {seed: final_level(own[seed], len(own[seed])) for seed in seeds}
        gain = [mean[seed] - final_level(curves[base][seed], len(curves[base][seed])) for seed in seeds]
        rows.append(
            Row(
                setting, mean_interval(list(mean.values())), mean_interval(gain), steps, mean_interval(saved),
                *(mean_interval(list(final[setting][key].values())) for key in (f"score/{GOLD}", "kl")),
            )
        )  # fmt: skip
    return rows


def _pair(interval: Interval) -> list[float | None]:
    return [interval.mean, interval.half_width]
