"""The tests of the report on studies in which nothing differs, with bounds that a right implementation cannot miss."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from benchmarks.null_studies import World, _differences, _end, measure, percentile_bootstrap_rejects, simulate, table

STUDIES = 600
# Two-sided binomial bounds at 1e-6 for the tests of one study's first pair, which are independent over studies.
LOW, HIGH = (float(stats.binom.ppf(q, STUDIES, 0.05)) / STUDIES for q in (1e-6, 1 - 1e-6))


@pytest.fixture(scope="module", params=[3, 5])
def ends(request):
    rng = np.random.default_rng(request.param)
    return [_end(simulate(World(families=2), request.param, rng)) for _ in range(STUDIES)]


def test_true_nulls_are_rejected_one_time_in_twenty_and_intervals_cover(ends) -> None:
    assert all(end.curve == "path" and len(end.compared) == 2 for end in ends)
    pairs = [end.pairs[0] for end in ends]
    assert LOW <= np.mean([pair.p < 0.05 for pair in pairs]) <= HIGH
    assert LOW <= np.mean([end.against[0].p < 0.05 for end in ends]) <= HIGH
    assert 1 - HIGH <= np.mean([abs(pair.difference) <= pair.half_width for pair in pairs]) <= 1 - LOW


def test_the_bound_would_catch_a_percentile_bootstrap(ends) -> None:
    """It rejects a quarter of true nulls at 3 seeds and a sixth at 5: the bounds above are no formality."""
    differences = np.array([_differences(end) for end in ends]).reshape(STUDIES, -1)
    assert percentile_bootstrap_rejects(differences, np.random.default_rng(0)) > HIGH


def test_announced_power_is_found() -> None:
    """400 studies: the standard error is 2 points."""
    rates = measure(World(families=2), 5, 400)
    assert rates.announced == pytest.approx(0.8, abs=1e-6)
    assert rates.found == pytest.approx(0.8, abs=0.1)
    assert rates.against_most > rates.against  # a maximum of noisy numbers is above the truth
    assert [row[0].text for row in table([rates], 400).rows] == ["5"]


def test_the_deviation_is_that_of_the_differences() -> None:
    world, rng = World(families=2), np.random.default_rng(1)
    found = np.concatenate([_differences(_end(simulate(world, 4, rng))) for _ in range(200)]).ravel()
    assert found.std() == pytest.approx(world.deviation, rel=0.12)
