"""Reading of benchmarks.abc: running means, steps to a level and paired intervals, on curves made by hand."""

from __future__ import annotations

import math

import pytest

from benchmarks.abc import CREDITS, SPARSE, quick, study
from benchmarks.abc_curves import compare_with, final_level, read_curves, running_mean, steps_to
from benchmarks.abc_figure import draw_credit
from prefopt.report.schema import Cell, Results, Setting
from prefopt.tasks.sentiment import GOLD


def test_running_means_begin_where_the_window_is_full() -> None:
    assert running_mean([1, 2, 3, 4, 5, 9], 5) == pytest.approx([3.0, 4.6])
    assert running_mean([1.0, 2.0], 5) == []
    assert running_mean([0.5, 1.5], 1) == [0.5, 1.5]


def test_steps_count_the_values_seen_when_the_mean_first_passes() -> None:
    """Means of 2: 0.5, 2, 3, 1, 5. A peak of one value passes no level that the mean does not."""
    curve = [0, 1, 3, 3, -1, 11]
    assert running_mean(curve, 2) == [0.5, 2.0, 3.0, 1.0, 5.0]
    assert steps_to(curve, 1.9, 2) == 3
    assert steps_to(curve, 2.0, 2) == 4, "passes, not meets"
    assert steps_to(curve, 3.0, 2) == 6
    assert steps_to(curve, 5.0, 2) is None
    assert steps_to([9.0], 0.0, 2) is None


def test_the_level_is_the_mean_of_the_last_values() -> None:
    assert final_level([100.0, *range(10)], 10) == 4.5
    assert final_level([1.0, 2.0], 10) == 1.5


def ramp(slope: float, length: int = 40, offset: float = 0.0) -> list[float]:
    return [offset + slope * place for place in range(length)]


def results() -> Results:
    """Three seeds on scales of their own. Sparse climbs by 1 a collection, fast by 2, slow by a quarter."""
    slopes = {"sparse": 1.0, "fast": 2.0, "slow": 0.25}
    cells = tuple(
        Cell(
            "ppo", label, seed, "ok", None, {f"score/{GOLD}": 1.0 + seed, "kl": 2.0 * slope},
            curve=tuple(
                {"step": float(2 * i + half), "loss": 0.0, **({"score": value} if half == 0 else {})}
                for i, value in enumerate(ramp(slope + 0.02 * seed, offset=100.0 * seed))
                for half in (0, 1)
            ),
        )
        for label, slope in slopes.items()
        for seed in (0, 1, 2)
    )  # fmt: skip
    settings = tuple(Setting("ppo", label, {}) for label in slopes)
    return Results(2, "made", "sentiment", settings, (0, 1, 2), (), cells)


def test_settings_are_compared_with_the_sparse_run_of_their_seed() -> None:
    """Sparse ends at 34.5 slopes on average over its last ten, which its mean of five passes at collection 38 (its mean is 35
    there) and a run of twice the slope at collection 21 (its mean is 36)."""
    found = results()
    curves = read_curves(found)
    assert curves["fast"][1][:3] == pytest.approx([100.0, 102.02, 104.04])
    assert {len(curve) for own in curves.values() for curve in own.values()} == {40}, "one value a collection"
    final = {label: {key: found.values(label, key) for key in (f"score/{GOLD}", "kl")} for label in curves}
    rows = {row.setting: row for row in compare_with(curves, "sparse", final)}
    assert rows["sparse"].steps == {0: 38, 1: 38, 2: 38}
    assert rows["fast"].steps == {0: 21, 1: 21, 2: 21}
    assert rows["fast"].saved.mean == 17
    assert rows["fast"].saved.half_width == 0
    assert rows["fast"].gain.mean == pytest.approx(19.5), "mean place 19.5, one slope more"
    assert rows["fast"].gain.half_width == pytest.approx(0, abs=1e-9), "the scales of the seeds cancel"
    assert rows["sparse"].gain.mean == 0
    assert rows["slow"].steps == {0: None, 1: None, 2: None}
    assert math.isnan(rows["slow"].saved.mean)
    # t_{0.975, 2} = 4.3027 times s / sqrt(3) of 19.5 (1, 1.02, 1.04) + 100 (0, 1, 2): s = 100.39.
    assert rows["sparse"].score.half_width == pytest.approx(4.302653 * 100.39 / math.sqrt(3), rel=1e-5)
    assert rows["slow"].gold.mean == 2.0
    assert rows["slow"].kl.mean == 0.5


def test_the_table_says_where_a_level_was_not_reached() -> None:
    curves = {"sparse": {0: ramp(1.0), 1: ramp(1.0), 2: ramp(1.0)}, "half": {0: ramp(2.0), 1: ramp(2.0), 2: ramp(0.1)}}
    final = {label: {f"score/{GOLD}": dict.fromkeys(range(3), 1.0), "kl": dict.fromkeys(range(3), 1.0)} for label in curves}
    sparse, half = (row.shown() for row in compare_with(curves, "sparse", final))
    assert sparse["steps to level"] == [38, 0]
    assert half["steps to level"] == "not reached by 1 of 3"
    assert half["steps saved"] == "2 seeds only"


def test_two_seeds_have_no_interval() -> None:
    curves = {"sparse": {0: ramp(1.0), 1: ramp(1.0)}}
    (row,) = compare_with(curves, "sparse", {"sparse": {f"score/{GOLD}": {0: 1.0, 1: 1.0}, "kl": {0: 1.0, 1: 1.0}}})
    assert row.shown()["mean score"] == [19.5, None]


def test_the_picture_draws_every_setting() -> None:
    found = results()
    picture = draw_credit(found, read_curves(found), "sparse")
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


def test_settings_differ_in_their_credit_alone() -> None:
    full = study("sentiment:somewhere")
    assert [entry.label for entry in full.entries] == list(CREDITS)
    assert full.entries[0].label == SPARSE
    for entry in full.entries:
        rest = {name: value for name, value in entry.hyper.items() if not name.startswith("credit")}
        assert rest == {name: value for name, value in full.entries[0].hyper.items() if name != "credit"}
    assert len(full.settings()) == 5, "every option exists"
    assert len(full.seeds) == 5
    assert len(quick(full).seeds) == 1
    assert quick(full).options.budget.max_steps < full.options.budget.max_steps
