"""The study with known answers runs, and its checks notice what they are for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import trust
from prefopt.report import load_results
from prefopt.report.schema import Results
from prefopt.study import Study


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("trust")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFOPT_CACHE", str(folder / "cache"))
        assert (
            trust.main(["--quick", "--output-dir", str(folder / "study"), "--workers", "0", "--json", str(folder / "t.json")])
            == 0
        )
    return load_results(folder / "study")


@pytest.mark.slow
def test_checks_hold_and_notice_what_they_are_for(results: Results) -> None:
    assert all(facts["holds"] for facts in trust.checks(results).values())
    moved = tuple(
        replace(cell, final={**cell.final, "reward": cell.final["reward"] + 1e-12}) if cell.label == trust.TWIN else cell
        for cell in results.cells
    )
    first, *_ = trust.checks(replace(results, cells=moved)).values()
    assert not first["holds"]
    slipped = tuple(replace(cell, label=trust.SAME_LOSS) for cell in results.cells_of(trust.SLIP))
    rest = tuple(cell for cell in results.cells if cell.label not in (trust.SAME_LOSS, trust.SLIP))
    _, second, *_ = trust.checks(replace(results, cells=(*rest, *slipped))).values()
    assert not second["holds"]


def test_the_study_is_what_it_says() -> None:
    study = Study.load(trust.STUDY, imports=[str(Path(trust.__file__).with_name("planted.py"))])
    assert len({entry.algorithm for entry in study.entries} - {"dpo_with_a_slip"}) == 8
    assert len(study.seeds) == 5
    assert study.settings()[3].hyper == {"beta": 0.3, "slip": 0.1}
    assert study.kl_targets[0] == 0.5
