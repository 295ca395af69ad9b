"""Reading at equal KL on curves whose answer is known."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from prefopt.errors import ConfigError
from prefopt.report.matched import curves, endpoint, frontiers, hypervolume, hypervolumes, paths, reward_at, value_at
from prefopt.report.matched_tables import matched_grid, paired_grids
from prefopt.report.schema import Results


def line(*points: tuple[float, float]) -> list[tuple[float, float]]:
    return [(float(kl), float(value)) for kl, value in points]


def with_strengths(results: Results) -> Results:
    """dpo and "dpo beta=0.5" as one family, ipo and cpl as another."""
    groups = {"dpo": "dpo", "dpo beta=0.5": "dpo", "ipo": "other", "cpl": "other"}
    return replace(results, settings=tuple(replace(s, group=groups.get(s.label, "")) for s in results.settings))


def test_value_is_interpolated_in_the_root_of_kl() -> None:
    """From (0, 0) to (4, 2): at KL 1 half the way in sqrt(KL), so 1; a quarter in KL would give 0.5."""
    assert value_at(line((0, 0), (4, 2)), 1.0) == pytest.approx(1.0)
    assert value_at(line((-1e-9, 0), (4, 2)), 1.0) == pytest.approx(1.0)  # an estimate below 0 is the reference


def test_a_curve_is_read_where_it_first_reaches_the_target_and_no_maximum_is_taken() -> None:
    """Out through KL 1 at reward 1, back through it at 3; and a better point before the target does not count."""
    assert value_at(line((0, 0), (4, 2), (4, 4), (0, 2)), 1.0) == pytest.approx(1.0)
    assert value_at(line((0, 0), (0.25, 5), (1, -3), (4, -4)), 1.0) == pytest.approx(-3.0)


@pytest.mark.parametrize("points", [line((0, 0), (0.9, 1), (0.5, 1)), line((1.1, 1), (2, 1)), line((1.1, 1), (0.5, 1), (2, 3))])
def test_a_curve_that_ends_before_the_target_or_begins_beyond_has_no_value(points) -> None:
    assert value_at(points, 1.0) is None


def test_most_reward_is_interpolated_in_the_root_of_kl() -> None:
    """From (0, 0) to (4, 2): at KL 1 half the way in sqrt(KL), so reward 1; a quarter in KL would give 0.5."""
    assert reward_at(line((0, 0), (4, 2)), 1.0) == pytest.approx(1.0)
    assert reward_at(line((0, 0), (1, 0.7), (4, 2)), 1.0) == pytest.approx(0.7)


def test_the_most_reward_outside_of_the_path_is_none() -> None:
    assert reward_at(line((0, 0), (0.9, 1), (0.5, 1)), 1.0) is None


def test_of_two_crossings_the_better_counts_and_a_point_below_the_target_may() -> None:
    """Up through KL 1 at reward 1, back down through it at reward 3, and a last point inside at 2.8."""
    there_and_back = line((0, 0), (4, 2), (4, 4), (0, 2))
    assert reward_at(there_and_back, 1.0) == pytest.approx(3.0)
    assert reward_at(line((0, 0), (4, 1), (0.25, 2.8)), 1.0) == pytest.approx(2.8)


def test_more_kl_never_gives_less() -> None:
    rng = np.random.default_rng(0)
    wild = line((0, 0), *zip(rng.uniform(0, 3, 9), rng.uniform(0, 2, 9), strict=True), (3, 0))
    rewards = [reward_at(wild, target) for target in np.linspace(0.1, 3, 40)]
    assert all(value is not None for value in rewards)
    assert all(later >= earlier for earlier, later in pairwise(rewards))


def test_least_is_most_upside_down() -> None:
    points = line((0, 1), (0.5, 0.2), (2, 0.7))
    mirrored = [(kl, -value) for kl, value in points]
    assert reward_at(points, 1.0, "down") == pytest.approx(-reward_at(mirrored, 1.0))


def test_hypervolume_by_hand() -> None:
    """reward = 2 sqrt(k) over a reference of 0: the integral from 0 to 4 is 4/3 k^1.5 = 32/3; a dip adds nothing."""
    assert hypervolume(line((0, 0), (4, 4)), 0.0, 4.0) == pytest.approx(32 / 3, rel=1e-4)
    assert hypervolume(line((0, 1), (4, -3)), 1.0, 4.0, "down") == pytest.approx(32 / 3, rel=1e-4)
    assert hypervolume(line((0, 0), (1, -1), (4, -2)), 0.0, 4.0) == pytest.approx(0.0)
    assert hypervolume(line((0, 0), (3.9, 4)), 0.0, 4.0) is None
    assert hypervolume(line((0.5, 0), (4, 4)), 0.0, 4.0) is None


def test_paths_are_read_and_tested_as_scipy_does(make_exact) -> None:
    """Independent of the module: interpolate the conftest's increasing paths with numpy, test with scipy."""
    results = replace(make_exact(4, ("dpo", "ppo", "ipo")), kl_targets=(0.5, 0.1))
    end = endpoint(results)
    at = {}
    for label in ("dpo", "ppo"):
        cells = [cell for cell in results.cells if cell.label == label]
        xs = [[math.sqrt(point["kl"]) for point in cell.path] for cell in cells]
        # The first checkpoint stands at KL 0, beside the reference: the later of the two is the neighbour.
        at[label] = [np.interp(math.sqrt(0.5), x, [p["reward"] for p in c.path]) for x, c in zip(xs, cells, strict=True)]
    (pair,) = end.pairs
    assert (pair.left, pair.right, end.place, end.curve) == ("dpo", "ppo", "at 0.5 nats", "path")
    assert pair.p == pytest.approx(stats.ttest_rel(at["dpo"], at["ppo"]).pvalue)
    assert end.against[1].p == pytest.approx(stats.ttest_1samp(at["ppo"], results.reference["reward"]).pvalue)
    (ipo,) = end.left_out
    assert ipo.name == "ipo"
    assert ipo.missing == f"not reached ({ipo.kl:.3g} nats)"
    assert ipo.kl == pytest.approx(min(cell.path[-1]["kl"] for cell in results.cells if cell.label == "ipo"))


def test_without_targets_the_end_point_is_the_end_of_training(make_exact) -> None:
    results = make_exact(3, ("dpo", "ipo"))
    end = endpoint(results)
    assert (end.place, end.how) == ("at the end of training", "")
    assert end.readings[0].values == results.values("dpo", "reward")
    assert matched_grid(results).rows == ()


def test_one_seed_that_falls_short_takes_the_setting_out(make_exact) -> None:
    results = make_exact(3, ("dpo", "ppo"))
    cells = [replace(cell, path=cell.path[:3]) if (cell.label, cell.seed) == ("ppo", 1) else cell for cell in results.cells]
    results = replace(results, cells=tuple(cells), kl_targets=(0.5,))
    assert [reading.name for reading in endpoint(results).compared] == ["dpo"]
    assert "not reached" in matched_grid(results).rows[2][1].text


def test_a_failed_seed_leaves_the_others(make_exact, fail) -> None:
    results = replace(fail(make_exact(4, ("dpo", "ppo")), "ppo", 1, "boom"), kl_targets=(0.5,))
    end = endpoint(results)
    assert sorted(end.readings[1].values) == [0, 2, 3]
    assert end.pairs[0].n == 3
    for seed in (0, 2, 3):
        results = fail(results, "ppo", seed, "boom")
    assert endpoint(results).left_out[0].missing == "failed"


def test_frontiers_join_the_ends_of_all_strengths_and_are_never_mixed_with_paths(make_exact, fail) -> None:
    results = replace(with_strengths(make_exact(3, ("dpo", "ipo", "cpl", "dpo beta=0.5"))), kl_targets=(0.25,))
    found = frontiers(results)
    assert list(found.lines) == ["dpo", "other"]
    ends = sorted(
        (cell.final["kl"], cell.final["reward"]) for cell in results.cells if cell.algorithm == "dpo" and cell.seed == 2
    )
    assert list(found.lines["dpo"][2]) == [(0.0, results.reference["reward"]), *ends]
    assert curves(results) == found
    assert endpoint(results).curve == "frontier"
    assert list(paths(results).lines) == ["dpo", "ipo", "cpl", "dpo beta=0.5"]
    broken = frontiers(fail(results, "dpo beta=0.5", 1, "boom"))
    assert sorted(broken.lines["dpo"]) == [0, 2]  # a frontier with a strength missing is another frontier


def test_with_few_families_of_several_strengths_paths_are_compared(make_exact) -> None:
    results = replace(with_strengths(make_exact(3)), kl_targets=(0.1,))
    assert curves(results).kind == "path"
    half = replace(with_strengths(make_exact(3, ("dpo", "dpo beta=0.5", "ipo", "cpl", "kto"))), kl_targets=(0.1,))
    assert endpoint(half).left_out[0].missing == "one strength is no frontier"


def test_hypervolumes_only_where_the_largest_target_is_reached(make_exact) -> None:
    results = replace(make_exact(3, ("dpo", "ipo")), kl_targets=(0.1, 0.5))
    areas = hypervolumes(results)
    assert list(areas) == ["dpo"]
    assert len(areas["dpo"]) == 3
    assert all(0 < area < 0.5 * 1.0 for area in areas["dpo"].values())


def test_metrics_where_less_is_better_are_read_the_same(make_exact) -> None:
    results = make_exact(3, ("dpo", "ppo"))
    metrics = tuple(
        replace(m, primary=m.key == "reward", better="down" if m.key == "reward" else m.better) for m in results.metrics
    )
    down = replace(results, metrics=metrics, kl_targets=(0.5,))
    up = replace(results, kl_targets=(0.5,))
    assert endpoint(down).readings == endpoint(up).readings
    assert all(area <= 0 for area in hypervolumes(down)["dpo"].values())


def test_api_tables_and_pairs(make_exact) -> None:
    results = replace(make_exact(4, ("dpo", "ppo", "ipo")), kl_targets=(0.5,))
    pair = results.compare("ppo", "dpo")
    other = results.compare("dpo", "ppo", kl=0.5)
    assert pair.difference == -other.difference
    assert pair.sentence.startswith("ppo is above dpo by ")
    assert other.sentence.startswith("dpo is below ppo by ")
    assert results.compare("ppo", "reference").right == "reference"
    printed = str(results.table(kl=0.1))
    assert "hidden reward at 0.1 nats" in printed
    assert "0.1 nats is not the KL that was fixed before the run: exploratory." in " ".join(printed.split())
    assert "exploratory" not in str(results.table(kl=0.5))
    assert str(results.table()).startswith("eight settings")


@pytest.mark.parametrize(
    ("left", "right", "kl", "message"),
    [
        ("dpo", "grpo", None, "'grpo' was not compared at 0.5 nats; there are dpo, ppo, ipo and reference"),
        ("dpo", "ipo", None, r"'ipo' has no value at 0.5 nats: not reached \(0.1"),
        ("dpo", "dpo", None, "make no pair"),
        ("dpo", "ppo", -1.0, "expected a number above 0"),
    ],
)
def test_what_cannot_be_compared_is_said(make_exact, left: str, right: str, kl: float | None, message: str) -> None:
    results = replace(make_exact(3, ("dpo", "ppo", "ipo")), kl_targets=(0.5,))
    with pytest.raises(ConfigError, match=message):
        results.compare(left, right, kl)


def test_captions_say_what_was_done(make_exact) -> None:
    results = replace(make_exact(3, ("dpo", "ppo", "ipo")), kl_targets=(0.5, 1.5))
    captions = " ".join(matched_grid(results).captions)
    for fact in ("no maximum is taken", "Primary: 0.5 nats; other columns are exploratory", "lies above the truth"):
        assert fact in captions
    reference, _ = paired_grids(results)
    assert reference.title == "hidden reward at 0.5 nats, each against the reference"
    assert any("Not compared: ipo, not reached" in caption for caption in reference.captions)
