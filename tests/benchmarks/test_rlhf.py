"""bench-rlhf: its arithmetic by hand, its study against the registry, and, slowly, that every algorithm comes to its rest."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import rlhf
from benchmarks.rlhf_cells import BestOfNRow, RlhfResult, run_best_of_n, run_cells, run_spec, share_closed
from benchmarks.rlhf_config import ModelBudget, RlhfStudy, load_study
from prefopt import algorithms
from prefopt.errors import ConfigError
from prefopt.tasks import exact

CONFIG = Path(rlhf.__file__).with_name("rlhf.yaml")


@pytest.fixture
def study() -> RlhfStudy:
    return load_study(CONFIG)


@pytest.fixture
def small(study: RlhfStudy, monkeypatch: pytest.MonkeyPatch) -> RlhfStudy:
    """The world of 4 prompts with 40 completions; any reference will do."""
    monkeypatch.setattr(exact, "START_BUDGET", replace(exact.START_BUDGET, max_steps=3))
    monkeypatch.setattr(exact, "START_SAMPLES", 768)
    longer = {"tabular": {"updates": 400, "samples": 512}}  # for those that have a longer budget in the study
    settings = {name: replace(setting, budget=longer if setting.budget else {}) for name, setting in study.settings.items()}
    return replace(
        study, small=True, seeds=(0,), pairs=256, models={"tabular": ModelBudget(200, 256, 0.97)}, settings=settings,
        learned={}, best_of_n={"n": [2, 16], "choices": 800},
    )  # fmt: skip


def done(spec: Any, share: float, **more: Any) -> RlhfResult:
    path = ({"step": 0.0, "share": 0.0, "kl": 0.0, "reward": 0.1}, {"step": 9.0, "share": share, "kl": 1.5, "reward": 1.0})
    return RlhfResult(spec, path, 1.0, 0.02, 2.4, seconds=3.0, **more)


def test_the_share_of_the_gap_by_hand() -> None:
    """ref = (1/2, 1/2), r = (1, 0), beta = 1: J(ref) = 1/2, J* = log((e + 1)/2); (3/4, 1/4) has J = 3/4 - KL."""
    reference = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    policy = torch.tensor([[0.75, 0.25]], dtype=torch.float64).log()
    rewards = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    wanted = (0.75 - divergence - 0.5) / (math.log((math.e + 1) / 2) - 0.5)
    assert share_closed(policy, reference, rewards, 1.0) == pytest.approx(wanted)
    assert share_closed(reference, reference, rewards, 1.0) == 0.0


def test_the_study_prices_a_nat_alike_everywhere(study: RlhfStudy) -> None:
    """KL is paid once: in the reward, in DPO's margin or in k3's loss, and always at the study's beta."""
    for spec in study.specs():
        hyper = algorithms.get(spec.setting.algorithm).setting(**spec.hyper).hyper
        prices = [hyper.get("kl_coef", 0.0), hyper.get("beta", 0.0) * hyper.get("ranking_temperature", 1.0)]
        assert sorted(prices) == pytest.approx([0.0, study.beta])
        assert hyper.get("temperature", 1.0) == 1.0
        assert hyper.get("top_p", 1.0) == 1.0
    assert len({spec.file for spec in study.specs()}) == len(study.specs())


def test_both_models_run_the_five_that_must_arrive(study: RlhfStudy) -> None:
    asked = {setting.algorithm for setting in study.settings.values() if setting.point == "optimum" and not setting.reported}
    assert asked == {"ppo", "rloo", "a2c", "grpo", "online_dpo"}
    for setting in study.settings.values():
        if setting.point == "optimum" and not setting.reported:
            assert setting.learning_rate.keys() == study.models.keys()
    assert {name: budget.target for name, budget in study.models.items()} == {"lm": 0.85, "tabular": 0.97}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("point: k3\n", "point: k4\n", "point must be one of"),
        ("learning_rate: {tabular: 0.1}", "learning_rate: {table: 0.1}", "name models of lm, tabular"),
        ("algorithm: rloo", "algorithm: rlo", "unknown algorithm 'rlo'"),
        ("scale: none", "scales: none", "scales"),
    ],
)
def test_a_slip_in_the_study_is_named(old: str, new: str, said: str, tmp_path: Path) -> None:
    text = CONFIG.read_text()
    assert old in text
    (tmp_path / "rlhf.yaml").write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=said):
        load_study(tmp_path / "rlhf.yaml")


def test_the_page_says_what_was_met_and_what_failed(study: RlhfStudy) -> None:
    specs = [spec for spec in study.specs() if spec.model == "tabular"]
    shares = {"ppo": [0.98, 0.99, 0.97], "rloo": [0.96, 0.96, 0.96]}
    results = [
        done(spec, shares[spec.label][spec.seed]) if spec.label in shares else RlhfResult(spec, error="ValueError: no")
        for spec in specs
    ]
    learned = [done(spec, 0.5, proxy=1.2, true=0.9) for spec in study.learned_specs()]
    page = rlhf.markdown(study, [*results, *learned], [BestOfNRow(4, 0.63, 0.002, 0.632, 0.631, 0.6363, 0.5, 0.4)])
    # t_{0.975, 2} = 4.303; s = 0.01.
    assert "| ppo | tabular | 98.0% ± 2.5% | 97% | the optimum |" in page
    assert "| rloo | tabular | 96.0% ± 0.0% | 97% missed |" in page
    assert "| +1.200 ± 0.000 | +0.900 ± 0.000 | 50.0% ± 0.0% |" in page
    assert "| 4 | 0.6300 ± 0.0020 | 0.6320 | 0.6310 | 0.6363 | +0.500 | 40.0% |" in page
    assert "- a2c, tabular, seed 0: ValueError: no" in page
    met = {row["setting"]: row["met"] for row in rlhf.lines(study, results)}
    assert met == {"ppo": True, "rloo": False}
    json.dumps(rlhf.as_dict(study, [*results, *learned], []), allow_nan=False, default=float)


def test_narrowing_refuses_what_is_not_there(study: RlhfStudy) -> None:
    part = rlhf.narrowed(study, ["rloo"], ["tabular"], [7])
    assert [(spec.label, spec.model, spec.seed) for spec in part.specs()] == [("rloo", "tabular", 7)]
    assert not part.learned_specs()
    with pytest.raises(ConfigError, match="no 'dpo' among the settings"):
        rlhf.narrowed(study, ["dpo"], None, None)


def test_a_cell_that_fails_is_a_result_and_is_not_kept(small: RlhfStudy, shared_cache: Path, tmp_path: Path) -> None:
    spec = replace(small.spec("rloo", "tabular", 0), budget=ModelBudget(1, 12, 0.97))
    (result,) = run_cells([spec], tmp_path, shared_cache, 0, lambda _: None)
    assert "rollout_size must be a multiple of samples_per_prompt" in result.error
    assert not list(tmp_path.iterdir())


def test_a_finished_cell_is_read_back(small: RlhfStudy, shared_cache: Path, tmp_path: Path) -> None:
    spec = replace(small.spec("online dpo (hard ranking)", "tabular", 0), budget=ModelBudget(5, 64, 0.97))
    seen: list[RlhfResult] = []
    (first,) = run_cells([spec], tmp_path, shared_cache, 0, seen.append)
    (again,) = run_cells([spec], tmp_path, shared_cache, 0, seen.append)
    assert not first.error, first.error
    assert len(seen) == 1
    assert again.share == first.share > 0
    assert first.to_point is None, "the best completion alone excludes the others"


@pytest.mark.slow
def test_best_of_n_matches_enumeration(small: RlhfStudy, shared_cache: Path) -> None:
    for row in run_best_of_n(small, shared_cache):
        assert abs(row.sampled - row.exact) < 3 * row.error
        assert row.ranks == pytest.approx(row.exact, rel=0.03)
        assert max(row.ranks, row.exact) < row.bound


@pytest.mark.slow
def test_every_algorithm_comes_to_rest_where_it_should(small: RlhfStudy, shared_cache: Path) -> None:
    """The issue's bar in a world that takes seconds: 97% of the gap; other points of rest are reached as nearly."""
    for spec in small.specs():
        result = run_spec(spec, shared_cache)
        assert not result.error, result.error
        if spec.setting.point == "optimum":
            assert result.share >= 0.97, spec.label
        if result.to_point is not None:
            assert result.to_point < 0.1 * (result.start_to_point or 0), spec.label
            assert abs(result.share - (result.point_share or 0)) < 0.03, spec.label
