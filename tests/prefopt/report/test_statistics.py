from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from prefopt.report import statistics
from prefopt.report.schema import PromptRow
from prefopt.report.statistics import (
    against_reference,
    between_settings,
    holm,
    mean_interval,
    smallest_detectable_difference,
    summarise_prompts,
)


@pytest.mark.parametrize("values", [[1.0, 2.0, 4.0], [0.3, -0.1, 0.9, 0.2, 5.0]])
def test_interval_is_students(values: list[float]) -> None:
    interval = mean_interval(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert interval.mean == pytest.approx(np.mean(values))
    assert interval.half_width == pytest.approx((high - low) / 2)


def test_interval_by_hand() -> None:
    """1, 2, 3: s = 1, t_{0.975, 2} = 4.30265, half-width 4.30265 / sqrt(3)."""
    assert mean_interval([1, 2, 3]).half_width == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 2.0]])
def test_no_interval_under_three_seeds(values: list[float]) -> None:
    interval = mean_interval(values)
    assert interval.half_width is None
    assert interval.missing
    assert smallest_detectable_difference(1.0, len(values)) is None


def test_without_scipy_the_interval_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "scipy_installed", lambda: False)
    interval = mean_interval([1.0, 2.0, 3.0])
    assert (interval.mean, interval.half_width) == (2.0, None)
    assert "scipy is not installed" in interval.missing


def test_holm_by_hand() -> None:
    """Sorted 0.01, 0.03, 0.04, 0.2: times 4, 3, 2, 1 gives 0.04, 0.09, 0.08 -> 0.09, 0.2."""
    assert holm([0.04, 0.01, 0.2, 0.03]) == pytest.approx([0.09, 0.04, 0.2, 0.09])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_counts_tests_that_could_not_be_made() -> None:
    """Three tests, one missing: 0.01 * 3, 0.02 * 2."""
    corrected = holm([0.01, None, 0.02])
    assert corrected[1] is None
    assert [corrected[0], corrected[2]] == pytest.approx([0.03, 0.04])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_keeps_the_order_and_corrects_the_smallest_as_bonferroni(p_values: list[float]) -> None:
    pairs = sorted(zip(p_values, [p for p in holm(p_values) if p is not None], strict=True))
    assert pairs[0][1] == min(1.0, len(pairs) * pairs[0][0])
    assert all(raw <= corrected <= 1.0 for raw, corrected in pairs)
    assert [corrected for _, corrected in pairs] == sorted(corrected for _, corrected in pairs)


@pytest.mark.parametrize("n", [3, 5, 34])
def test_detectable_difference_is_found_eight_times_in_ten(n: int) -> None:
    """Independent of the implementation: draw samples with that true difference and run scipy's own test."""
    difference = smallest_detectable_difference(2.0, n)
    assert difference is not None
    draws = np.random.default_rng(0).normal(difference, 2.0, size=(20_000, n))
    share = (stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05).mean()
    assert share == pytest.approx(0.8, abs=0.012)


def test_against_reference_is_scipys_one_sample_test(make_exact) -> None:
    results = make_exact(4, ("dpo", "ipo", "ppo"))
    made = against_reference(results)
    raw = []
    for item in made:
        values = [cell.final["reward"] for cell in results.cells if cell.label == item.left]
        expected = stats.ttest_1samp(values, results.reference["reward"])
        raw.append(expected.pvalue)
        assert item.p == pytest.approx(expected.pvalue)
        low, high = expected.confidence_interval()
        assert item.half_width == pytest.approx((high - low) / 2)
    assert [item.p_holm for item in made] == pytest.approx(holm(raw))


def test_pairs_are_paired_by_seed_over_the_seeds_that_both_finished(make_exact, fail) -> None:
    results = fail(make_exact(5, ("dpo", "ipo", "ppo")), "ipo", 2, "stopped")
    pairs = {(item.left, item.right): item for item in between_settings(results)}
    assert list(pairs) == [("dpo", "ipo"), ("dpo", "ppo"), ("ipo", "ppo")]
    reward = {(cell.label, cell.seed): cell.final.get("reward") for cell in results.cells}
    seeds = [0, 1, 3, 4]
    expected = stats.ttest_rel([reward["dpo", s] for s in seeds], [reward["ipo", s] for s in seeds])
    assert (pairs["dpo", "ipo"].n, pairs["dpo", "ppo"].n) == (4, 5)
    assert pairs["dpo", "ipo"].p == pytest.approx(expected.pvalue)


def test_seeds_that_agree_to_the_last_digit_are_no_sample(make_exact) -> None:
    results = make_exact(3, ("dpo", "ipo"))
    same = [replace(cell, final={"reward": 0.7 if cell.label == "dpo" else 0.1 + 0.2}) for cell in results.cells]
    for item in (
        *against_reference(replace(results, cells=tuple(same))),
        *between_settings(replace(results, cells=tuple(same))),
    ):
        assert (item.p, item.p_holm, item.half_width) == (None, None, None)
        assert item.missing == "all seeds are equal"


def test_too_few_shared_seeds_make_no_test(make_exact, fail) -> None:
    results = fail(make_exact(3, ("dpo", "ipo")), "ipo", 0, "stopped")
    (pair,) = between_settings(results)
    assert (pair.n, pair.p, pair.missing) == (2, None, "under 3 seeds")


def test_332_prompts_resolve_a_win_rate_to_seven_points() -> None:
    rows = [PromptRow("dpo", seed, f"p{i}", "rm", float(i % 2)) for i in range(332) for seed in (0, 1)]
    rows.append(PromptRow("dpo", 0, "broken", "rm", math.nan))
    (summary,) = summarise_prompts(rows)
    assert (summary.prompts, summary.score) == (332, 0.5)
    assert summary.detectable == pytest.approx(0.077, abs=2e-4)
