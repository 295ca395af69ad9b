"""Segments of offline data, and preferences between them as examples. E episodes, K segments of L steps, P pairs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from prefopt.control.steps import Steps
from prefopt.data.exact_world.labels import LabelModel
from prefopt.data.records import Example, Labels
from prefopt.errors import ConfigError, DataError

Preferences = Literal["regret", "return"]

# One stream of random numbers per purpose: changing how one is used leaves the others as they were.
_SEGMENTS, _PAIRS, _LABELS = range(3)
# Label models that need what segments do not have: lengths that differ, or a reference that they are sampled from.
_TEXT_ONLY = ("length_biased", "shifted")


class Comparisons(Sequence[Example]):
    """Labelled pairs of segments, chosen first; an example is made when it is asked for, its completions step numbers.

    Args:
        chosen, rejected: [P] first step of each segment.
        length: L, of every segment.
        scores: [P, 2] what the labeller saw of chosen and rejected.
        soft_labels: [P] probability that chosen is preferred, or None.
        name: heads the examples' ids.
    """

    def __init__(
        self, chosen: Tensor, rejected: Tensor, length: int, scores: Tensor, soft_labels: Tensor | None, name: str
    ) -> None:
        self.chosen, self.rejected, self.length, self.scores = chosen, rejected, length, scores
        self._soft_labels, self._name = soft_labels, name

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        sides = tuple(
            tuple(range(start, start + self.length)) for start in (int(self.chosen[index]), int(self.rejected[index]))
        )
        soft = None if self._soft_labels is None else float(self._soft_labels[index])
        return Example(f"{self._name} {index}", (), sides, Labels(ranks=(0, 1), soft_label=soft))

    @property
    def margins(self) -> Tensor:
        """[P] by how much the labeller's score of chosen is higher."""
        return self.scores[:, 0] - self.scores[:, 1]


@dataclass(frozen=True)
class Labelling:
    """How segments are compared.

    Args:
        preferences: by "regret", the discounted sum of advantages, or by "return", that of rewards.
        model: how scores become labels.
        discount: of both sums, over the steps of the segment.

    Raises:
        ConfigError: a label model that segments cannot have.
    """

    preferences: Preferences
    model: LabelModel
    discount: float = 1.0

    def __post_init__(self) -> None:
        if self.preferences not in ("regret", "return"):
            raise ConfigError(f"preferences must be 'regret' or 'return', got {self.preferences!r}.")
        if self.model.name in _TEXT_ONLY:
            raise ConfigError(f"labels {self.model.name!r} need completions of a language model; segments take bt, soft, ….")
        if not 0 < self.discount <= 1:
            raise ConfigError(f"the labeller's discount must be in (0, 1], got {self.discount}.")

    def score(self, steps: Steps, starts: Tensor, length: int) -> Tensor:
        """[K] float64 score of the segments that begin at `starts`."""
        values = (steps.advantages if self.preferences == "regret" else steps.rewards).double()
        discounts = self.discount ** torch.arange(length, dtype=torch.float64)
        return values.unfold(0, length, 1)[starts] @ discounts


def compare_segments(
    steps: Steps,
    labelling: Labelling,
    *,
    pairs: int,
    length: int,
    seed: int,
    segments: int = 0,
    keep_best: float = 1.0,
    episodes: Collection[int] | None = None,
    name: str = "pair",
) -> Comparisons:
    """Labelled pairs of segments of one table.

    Args:
        pairs: P; each compares two different segments.
        length: L steps.
        seed: of the draw of segments, of who meets whom, and of the labels.
        segments: 0 takes two segments of its own for each pair (the paper's sparse comparisons); K lets P different pairs of K
            segments meet, so that a segment is compared many times (dense: P up to K(K-1)/2).
        keep_best: leaves out pairs whose chosen segment is not in this share of the segments, by the labeller's score. What
            imitates chosen segments then is %BC (Hejna et al. 2023, section 4 [hejna2023cpl]).
        episodes: those that segments are cut from; None is all.
        name: heads the examples' ids.

    Raises:
        DataError: the episodes have too few segments of this length.
        ConfigError: more pairs than the segments have.
    """
    wanted = segments or 2 * pairs
    possible = admissible_starts(steps, length, episodes)
    if len(possible) < wanted or pairs < 1:
        raise DataError(
            f"{pairs} pairs need {wanted} different segments of {length} steps; the {len(steps.ends)} episodes have "
            f"{len(possible)}. Ask for fewer or shorter ones, or make more data."
        )
    starts = possible[_generator(seed, _SEGMENTS).permutation(len(possible))[:wanted]]
    if segments:
        first, second = _distinct_pairs(segments, pairs, _generator(seed, _PAIRS))
    else:
        first, second = 2 * np.arange(pairs), 2 * np.arange(pairs) + 1
    scores = labelling.score(steps, starts, length)
    gap = scores[first] - scores[second]
    model = labelling.model
    soft: Tensor | None = None
    if model.name == "soft":
        first_wins, soft = gap >= 0, model.probability(gap.abs(), torch.zeros_like(gap))
    else:
        coins = torch.from_numpy(_generator(seed, _LABELS).random(pairs))
        first_wins = coins < model.probability(gap, torch.zeros_like(gap))
    a, b = torch.from_numpy(first), torch.from_numpy(second)
    chosen, rejected = torch.where(first_wins, a, b), torch.where(first_wins, b, a)
    if keep_best < 1:
        kept = scores[chosen] >= scores.quantile(1 - keep_best)
        chosen, rejected, soft = chosen[kept], rejected[kept], None if soft is None else soft[kept]
        if not len(chosen):
            raise DataError(f"none of {pairs} pairs has a chosen segment in the best {keep_best:.0%}: ask for more pairs.")
    seen = torch.stack([scores[chosen], scores[rejected]], dim=-1)
    return Comparisons(starts[chosen], starts[rejected], length, seen, soft, name)


def admissible_starts(steps: Steps, length: int, episodes: Collection[int] | None = None) -> Tensor:
    """[K] every step that a segment of `length` steps of one episode can begin at, in order."""
    chosen = range(len(steps.ends)) if episodes is None else sorted(episodes)
    starts, ends = steps.starts.tolist(), steps.ends.tolist()
    found = [torch.arange(starts[e], max(starts[e], ends[e] - length + 1)) for e in chosen]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.long)


def _distinct_pairs(segments: int, pairs: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """[P] twice: different unordered pairs of segments, in random order."""
    possible = segments * (segments - 1) // 2
    if pairs > possible:
        raise ConfigError(f"{segments} segments have {possible:,} different pairs, {pairs:,} were asked for: lower --pairs.")
    number = generator.choice(possible, size=pairs, replace=False)
    # Pair (i, j), i < j, is number j(j-1)/2 + i. The root can be off by one in floating point.
    second = ((1 + np.sqrt(1 + 8 * number.astype(np.float64))) / 2).astype(np.int64)
    second -= second * (second - 1) // 2 > number
    second += second * (second + 1) // 2 <= number
    return number - second * (second - 1) // 2, second


def _generator(seed: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose,)))
