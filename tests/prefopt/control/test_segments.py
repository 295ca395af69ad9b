"""Segments, who meets whom, and what the labeller says: by closed forms and by counting."""

from __future__ import annotations

import math

import pytest
import torch

from prefopt.control.segments import Comparisons, Labelling, admissible_starts, compare_segments
from prefopt.control.steps import Steps, joined, steps_key
from prefopt.data.exact_world.labels import parse_labels
from prefopt.errors import ConfigError, DataError


def table(lengths: tuple[int, ...] = (6, 3, 9), seed: int = 0) -> Steps:
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)
    return Steps(
        torch.randn(count, 4, generator=generator),
        torch.randn(count, 2, generator=generator),
        torch.randn(count, generator=generator),
        -torch.rand(count, generator=generator),
        torch.tensor(lengths).cumsum(0),
    )


def compare(steps: Steps, labels: str = "deterministic", preferences: str = "regret", **changes: object) -> Comparisons:
    asked = {"pairs": 4, "length": 2, "seed": 0, **changes}
    discount = float(asked.pop("discount", 1.0))  # type: ignore[arg-type]
    return compare_segments(steps, Labelling(preferences, parse_labels(labels), discount), **asked)  # type: ignore[arg-type]


def test_segments_stay_within_an_episode() -> None:
    assert admissible_starts(table(), 4).tolist() == [0, 1, 2, *range(9, 15)]  # the second episode is too short
    assert admissible_starts(table(), 4, {2}).tolist() == list(range(9, 15))
    assert admissible_starts(table(), 10).tolist() == []


@pytest.mark.parametrize(("preferences", "column"), [("regret", "advantages"), ("return", "rewards")])
def test_scores_are_discounted_sums_of_the_right_column(preferences: str, column: str) -> None:
    steps = table()
    found = Labelling(preferences, parse_labels("bt"), 0.5).score(steps, torch.tensor([1, 9]), 3)  # type: ignore[arg-type]
    values = getattr(steps, column).double()
    for start, score in zip((1, 9), found, strict=True):
        assert float(score) == pytest.approx(float(values[start] + 0.5 * values[start + 1] + 0.25 * values[start + 2]))


def test_chosen_stands_first_and_scores_higher() -> None:
    steps = table((30, 30))
    found = compare(steps, pairs=12, discount=0.9)
    assert (found.margins > 0).all()
    for index, example in enumerate(found):
        assert example.prompt_ids == ()
        assert example.completion_ids[0] == tuple(range(int(found.chosen[index]), int(found.chosen[index]) + 2))
        assert example.labels.ranks == (0, 1)
        assert example.labels.soft_label is None


def test_sparse_comparisons_use_every_segment_once() -> None:
    found = compare(table((30, 30)), pairs=20)
    assert len({*found.chosen.tolist(), *found.rejected.tolist()}) == 40


def test_dense_comparisons_are_different_pairs_of_few_segments() -> None:
    found = compare(table((30, 30)), pairs=28, segments=8)  # all of them
    met = {frozenset(pair) for pair in zip(found.chosen.tolist(), found.rejected.tolist(), strict=True)}
    assert len(met) == 28
    assert len({start for pair in met for start in pair}) == 8
    assert all(len(pair) == 2 for pair in met)


def test_keep_best_leaves_the_pairs_whose_chosen_segment_is_among_the_best() -> None:
    steps = table((400,))
    everything, best = compare(steps, pairs=100), compare(steps, pairs=100, keep_best=0.1)
    assert 10 <= len(best) <= 20  # of 200 segments 20 are the best, and two of them may have met
    kept = [i for i, start in enumerate(everything.chosen.tolist()) if start in set(best.chosen.tolist())]
    assert [everything[i].completion_ids for i in kept] == [example.completion_ids for example in best]
    left_out = [float(everything.scores[i, 0]) for i in range(100) if i not in kept]
    assert float(best.scores[:, 0].min()) > max(left_out)


def test_pairs_by_number_cover_a_large_triangle() -> None:
    found = compare(table((5000,)), pairs=5000, segments=3000)
    assert len({frozenset(pair) for pair in zip(found.chosen.tolist(), found.rejected.tolist(), strict=True)}) == 5000


def test_labels_have_bradley_terry_frequencies() -> None:
    """Chosen scores higher as often as the probabilities say, within 4 standard errors."""
    steps = table((9000,))
    found = compare(steps, "bt", pairs=4000)
    probabilities = torch.sigmoid(found.margins.abs())
    wins = (found.margins > 0).double()
    error = float((probabilities * (1 - probabilities)).sum().sqrt())
    assert abs(float((wins - probabilities).sum())) < 4 * error
    assert 0 < float(wins.mean()) < 1


def test_soft_labels_are_the_probabilities() -> None:
    found = compare(table((60,)), "soft", pairs=10)
    for index, example in enumerate(found):
        assert example.labels.soft_label == pytest.approx(1 / (1 + math.exp(-float(found.margins[index]))))


def test_return_and_regret_rank_segments_differently() -> None:
    steps = table((200,))
    by_regret, by_return = (compare(steps, pairs=50, preferences=name) for name in ("regret", "return"))
    same = sum(a == b for a, b in zip(by_regret.chosen.tolist(), by_return.chosen.tolist(), strict=True))
    assert 10 < same < 40


def test_equal_seeds_give_equal_pairs() -> None:
    steps = table((60,))
    first, again, other = (list(compare(steps, "bt", pairs=10, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_examples_are_read_like_a_list() -> None:
    found = compare(table((60,)), pairs=5)
    assert found[1:3] == [found[1], found[2]]
    with pytest.raises(IndexError):
        found[5]


def test_too_few_segments_and_too_many_pairs_are_refused() -> None:
    with pytest.raises(DataError, match="20 different segments of 2 steps; the 1 episodes have 5"):
        compare(table((6,)), pairs=10)
    with pytest.raises(ConfigError, match="4 segments have 6 different pairs, 7 were asked for"):
        compare(table((60,)), pairs=7, segments=4)


@pytest.mark.parametrize("labels", ["length_biased:0.5", "shifted:2"])
def test_label_models_of_text_are_refused(labels: str) -> None:
    with pytest.raises(ConfigError, match="segments take bt"):
        compare(table((60,)), labels)


def test_joined_tables_keep_their_episodes() -> None:
    parts = [table((2, 3), seed=1), table((4,), seed=2)]
    whole = joined(parts)
    assert whole.ends.tolist() == [2, 5, 9]
    assert torch.equal(whole.rewards, torch.cat([part.rewards for part in parts]))
    assert steps_key(whole) == steps_key(joined(parts))
    assert steps_key(whole) != steps_key(joined(parts[::-1]))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("actions", torch.zeros(4, 2), "5 observations, but 4 actions"),
        ("ends", torch.tensor([2, 2, 5]), "must rise"),
        ("ends", torch.tensor([2, 4]), "number of steps, 5"),
        ("rewards", torch.tensor([0.0, 1.0, math.nan, 0.0, 0.0]), "rewards of step 2 are not finite"),
        ("observations", torch.zeros(5), r"observations \[M, O\]"),
    ],
)
def test_contradictory_tables_are_refused(column: str, value: torch.Tensor, message: str) -> None:
    whole = table((2, 3))
    with pytest.raises(DataError, match=message):
        Steps(**{name: value if name == column else getattr(whole, name) for name in vars(whole) if name != "lengths"})
