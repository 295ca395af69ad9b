"""Power, seeds needed, and the sentences on pairs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from prefopt.report import save_results
from prefopt.report.power import detectable_over_prompts, detectable_over_seeds, power_of, seeds_needed
from prefopt.report.power_plan import Plan, plan_grid
from prefopt.report.sentences import in_words
from prefopt.report.statistics import between, holm


@pytest.mark.parametrize(("difference", "n"), [(0.5, 5), (1.0, 10), (2.0, 4), (0.0, 6)])
def test_power_is_scipys_noncentral_t(difference: float, n: int) -> None:
    critical, d = stats.t.ppf(0.975, n - 1), difference * math.sqrt(n) / 1.3
    expected = stats.nct.sf(critical, n - 1, d) + stats.nct.cdf(-critical, n - 1, d)
    assert power_of(difference, 1.3, n) == pytest.approx(expected, abs=1e-5)


def test_power_of_three_seeds_is_what_sampling_finds() -> None:
    """Where scipy's noncentral t gives out."""
    draws = np.random.default_rng(0).normal(5.0, 1.0, size=(20_000, 3))
    found = (stats.ttest_1samp(draws, 0.0, axis=1).pvalue < 0.05).mean()
    assert power_of(5.0, 1.0, 3) == pytest.approx(found, abs=0.01)


@pytest.mark.parametrize("difference", [0.3, 1.0, 4.0])
def test_seeds_needed_are_the_fewest_that_suffice(difference: float) -> None:
    count = seeds_needed(1.0, difference)
    assert count is not None
    assert power_of(difference, 1.0, count) >= 0.8
    assert count == 3 or power_of(difference, 1.0, count - 1) < 0.8
    assert detectable_over_seeds(1.0, count) <= difference


@pytest.mark.parametrize(("deviation", "difference"), [(1.0, 0.0), (1.0, 0.1), (math.nan, 1.0)])
def test_more_than_two_hundred_seeds_is_none(deviation: float, difference: float) -> None:
    assert seeds_needed(deviation, difference) is None


def test_equal_seeds_show_any_difference() -> None:
    assert (power_of(0.1, 0.0, 3), seeds_needed(0.0, 0.1)) == (1.0, 3)


def test_332_prompts_resolve_7_point_7_points() -> None:
    assert detectable_over_prompts(0.5, 332) == pytest.approx(0.0769, abs=1e-4)


def test_sentence_of_a_pair_that_is_told_apart() -> None:
    (pair,) = between({"a": {0: 1.0, 1: 1.1, 2: 1.2}, "b": {0: 0.0, 1: 0.2, 2: 0.1}}, ".2f")
    low, high = stats.ttest_rel([1.0, 1.1, 1.2], [0.0, 0.2, 0.1]).confidence_interval()
    p = stats.ttest_rel([1.0, 1.1, 1.2], [0.0, 0.2, 0.1]).pvalue
    assert pair.sentence == f"a is above b by 1.00 (95% interval {low:+.2f} to {high:+.2f}; p = {p:.2g}; 3 seeds)."
    assert pair.turned.sentence.startswith("b is below a by 1.00 (95% interval -")


def test_sentence_of_a_pair_that_cannot_be_told_apart_names_the_seeds() -> None:
    values = {"a": {0: 0.1, 1: 0.0, 2: 0.05}, "b": {0: 0.0, 1: 0.04, 2: 0.02}}
    (pair,) = between(values, "+.3f")
    assert "a and b cannot be told apart at 3 seeds (difference +0.030, 95% interval " in pair.sentence
    assert pair.sentence.endswith(
        f"; {seeds_needed(pair.deviation, pair.difference)} seeds would be needed for a difference of 0.030."
    )
    assert in_words(pair, interest=0.5).endswith("; 3 seeds would be needed for a difference of 0.500.")
    assert in_words(pair, interest=1e-5).endswith("; more than 200 seeds would be needed for a difference of 0.000.")


def test_an_interval_without_0_that_holm_does_not_uphold_says_why() -> None:
    rng = np.random.default_rng(3)
    noise = {name: dict(enumerate(rng.normal(0, 1, 3))) for name in "cdefgh"}
    values = {"a": {0: 1.0, 1: 1.3, 2: 1.2}, "b": {0: 0.0, 1: 0.2, 2: 0.3}, **noise}
    pair = between(values)[0]
    assert pair.p < 0.05 < pair.p_holm
    assert f"which is not corrected for {pair.tests} tests; p = {pair.p_holm:.2g} after Holm" in pair.sentence
    assert pair.tests == 28
    # Its seeds are those of the strictest of Holm's tests.
    assert f"{seeds_needed(pair.deviation, pair.difference, level=1 - 0.05 / 28)} seeds would be needed" in pair.sentence


def test_sentence_without_a_test_says_why() -> None:
    (short,) = between({"a": {0: 1.0}, "b": {0: 0.5}})
    assert short.sentence == "a − b is +0.5; no test: under 3 seeds."
    (equal,) = between({"a": {0: 1.0, 1: 2.0, 2: 3.0}, "b": {0: 1.0, 1: 2.0, 2: 3.0}})
    assert equal.sentence == "a − b is +0; no test: all seeds are equal."


def test_table_of_a_plan_and_holms_strictest_test() -> None:
    rows = plan_grid(Plan(0.05, 6, 0.06)).rows
    assert [row[0].text for row in rows] == ["3", "4", "5", "6"]
    assert rows[0][1].text == f"{detectable_over_seeds(0.05, 3):.3g}"
    assert rows[-1][2].text == f"{power_of(0.06, 0.05, 6):.1%}"
    strict = plan_grid(Plan(0.05, 3, 0.06, tests=10))
    assert strict.rows[0][2].text == f"{power_of(0.06, 0.05, 3, 0.995):.1%}"
    assert "strictest of Holm's 10 tests" in strict.title


def test_command_announces_power_from_a_number_and_from_results(cli, make_exact, tmp_path: Path) -> None:
    figure = tmp_path / "power.svg"
    done = cli("power", "--deviation", 0.05, "--difference", 0.06, "--seeds", 4, "--prompts", 332, "--figure", figure)
    assert done.code == 0, done.err
    assert f"A difference of 0.06 is found with probability 0.8 by {seeds_needed(0.05, 0.06)} seeds." in done.flat
    assert "7.7 points of win rate" in done.flat
    assert figure.read_bytes().lstrip().startswith(b"<?xml")
    results = make_exact(3, ("dpo", "ipo"))
    save_results(results, tmp_path)
    (pair,) = between({label: results.values(label, "reward") for label in ("dpo", "ipo")})
    measured = cli("power", "--results", tmp_path, "--seeds", 3)
    assert f"standard deviation {pair.deviation:.3g} over seeds" in measured.flat


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "power needs a spread"),
        (("--deviation", -1), "--deviation is -1; expected a number above 0"),
        (("--prompts", 10, "--difference", 0.1), "--figure and --difference need the spread over seeds"),
        (("--deviation", 1, "--seeds", 2), "expected 3 to 1000 seeds"),
        (("--deviation", 1, "--figure", "x.pdf"), "expected a name that ends in .png or .svg"),
    ],
)
def test_command_says_what_is_missing(cli, arguments: tuple[object, ...], message: str) -> None:
    done = cli("power", *arguments)
    assert done.code == 2
    assert message in done.err


def test_results_without_pairs_are_named(cli, make_exact, tmp_path: Path) -> None:
    save_results(replace(make_exact(3, ("dpo",))), tmp_path)
    done = cli("power", "--results", tmp_path)
    assert (done.code, "no pair has three seeds" in done.err) == (2, True)


def test_holm_is_uniform_over_a_family() -> None:
    values = {name: dict(enumerate(np.random.default_rng(i).normal(0, 1, 4))) for i, name in enumerate("abc")}
    pairs = between(values)
    assert [pair.p_holm for pair in pairs] == holm([pair.p for pair in pairs])
    assert {pair.tests for pair in pairs} == {3}
