"""The zoo's statistics on layouts whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import studentized_range
from scipy.stats import tukey_hsd as scipy_tukey

from benchmarks.zoo_statistics import compact_letters, compare, lowest_regret, tukey_hsd


def path(*points: tuple[float, float]) -> list[dict[str, float]]:
    return [{"kl": kl, "reward": reward, "regret": 1 - reward + kl / 2} for kl, reward in points]


def test_the_reference_is_no_result() -> None:
    assert lowest_regret(path((0, 0), (10, 1), (8, 1))) == pytest.approx(4.0)


def test_hsd_is_scipys_in_a_one_way_layout() -> None:
    """scipy's simultaneous interval of a difference has the half-width HSD with MSE over groups and a(n - 1) degrees."""
    groups = np.random.default_rng(1).normal(size=(4, 6)) + np.arange(4)[:, None]
    interval = scipy_tukey(*groups).confidence_interval(0.95)
    half = (interval.high - interval.low)[0, 1] / 2
    mse = float(groups.var(axis=1, ddof=1).mean())
    assert tukey_hsd(mse, 4 * 5, 4, 6) == pytest.approx(half, rel=1e-4)


def test_a_two_way_layout_by_hand() -> None:
    """Worlds add 0, 10, 20; losses 3, 2, 0; residuals +-0.1 in a pattern whose rows and columns sum to 0.

    SS = 4 * 0.01, df = 2 * 2, MSE = 0.01, HSD = q(3, 4) * 0.1 / sqrt(3) = 0.29: every loss differs from the others.
    """
    residual = 0.1 * np.array([[1, -1, 0], [-1, 1, 0], [0, 0, 0]])
    table = np.array([3.0, 2.0, 0.0])[:, None] + np.array([0.0, 10.0, 20.0]) + residual
    found = compare(dict(zip("abc", table.tolist(), strict=True)))
    assert found.degrees == 4
    assert found.deviation == pytest.approx(0.1)
    assert found.hsd == pytest.approx(studentized_range.ppf(0.95, 3, 4) * 0.1 / math.sqrt(3))
    assert [(s.name, s.best_rank, s.worst_rank, s.letters) for s in found.standings] == [
        ("a", 1, 1, "a"),
        ("b", 2, 2, "b"),
        ("c", 3, 3, "c"),
    ]


def test_what_cannot_be_told_apart_shares_ranks_and_a_letter() -> None:
    """Means 3, 2.9, 0 with the residuals above: the first two are closer than HSD 0.29."""
    residual = 0.1 * np.array([[1, -1, 0], [-1, 1, 0], [0, 0, 0]])
    table = np.array([2.9, 3.0, 0.0])[:, None] + np.array([0.0, 10.0, 20.0]) + residual
    values = dict(zip("abc", table.tolist(), strict=True))
    found = compare(values)
    assert [(s.name, s.best_rank, s.worst_rank, s.letters) for s in found.standings] == [
        ("b", 1, 2, "a"),
        ("a", 1, 2, "a"),
        ("c", 3, 3, "b"),
    ]
    lower = compare(values, lower_is_better=True)
    assert [(s.name, s.best_rank, s.worst_rank) for s in lower.standings] == [("c", 1, 1), ("a", 2, 3), ("b", 2, 3)]


def test_letters_overlap_where_neighbours_do() -> None:
    """5, 4, 3 with HSD 1.5: the ends differ, the middle differs from neither."""
    assert compact_letters([5, 4, 3, 0], 1.5) == ["a", "ab", "b", "c"]
    assert compact_letters([5, 4.5], 1.0) == ["a", "a"]


def test_letters_say_exactly_what_the_distances_say() -> None:
    means = list(np.random.default_rng(2).uniform(0, 1, 40) - np.arange(40))
    letters = compact_letters(means, 2.0)  # many short runs: letters go past z
    sets = [set(text.split(",")) for text in letters]
    assert any("," in text for text in letters)
    for i, one in enumerate(means):
        for j, other in enumerate(means):
            assert bool(sets[i] & sets[j]) == (abs(one - other) <= 2.0)
    assert compact_letters(means, 100.0) == ["a"] * 40


def test_type_one_errors_stay_at_their_level() -> None:
    """Equal losses in 500 layouts of 5 x 4: some pair is called different in about 5% of them."""
    rng = np.random.default_rng(3)
    wrong = 0
    for table in rng.normal(size=(500, 5, 4)) + 3 * rng.normal(size=(500, 1, 4)):
        found = compare(dict(zip("abcde", table.tolist(), strict=True)))
        wrong += found.standings[0].mean - found.standings[-1].mean > found.hsd
    assert 0.025 < wrong / 500 < 0.08


def test_two_worlds_give_no_ranking() -> None:
    found = compare({"a": [1.0, 2.0], "b": [0.0, 1.5]})
    assert not found.standings
    assert "fewer than 3 worlds" in found.missing
    with pytest.raises(ValueError, match="inhomogeneous"):
        compare({"a": [1.0, 2.0, 3.0], "b": [0.0, 1.0]})
