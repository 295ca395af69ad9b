"""Lines through points that are known, and the scaling script on models of one layer; no test reads a clock."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import losses
from benchmarks import scaling
from benchmarks.measuring import Peak
from benchmarks.scaling_fits import Fit, Measured, Point, bytes_per_logit, token_cost
from benchmarks.workloads import exact_rows, measure_steps
from losses.dpo import dpo_loss

SMALL = Point(pairs=2, prompt=6, completion=4, vocabulary=300, hidden=16, layers=1, steps=1)


def measured(point: Point, *, seconds: float = 0.0, mb: float = 0.0) -> Measured:
    return Measured(0.0, point, seconds, mb, None)


def test_a_straight_line_is_found() -> None:
    fit = Fit.of([1, 2, 5], [5, 7, 13])
    assert (fit.slope, fit.intercept, fit.r2) == pytest.approx((2, 3, 1))


def test_r2_of_a_known_scatter() -> None:
    """Points (0,0), (1,1), (2,0): the best line is y = 1/3, which explains nothing."""
    fit = Fit.of([0, 1, 2], [0, 1, 0])
    assert (fit.slope, fit.intercept, fit.r2) == pytest.approx((0, 1 / 3, 0), abs=1e-12)
    assert math.isnan(Fit.of([0, 1, 2], [4, 4, 4]).r2)


def grid(cost: Callable[[Point], float]) -> list[Measured]:
    points = [
        Point(pairs=p, prompt=n, completion=c, completions=k) for p in (1, 4) for n in (10, 90) for c in (5, 20) for k in (2, 8)
    ]
    return [measured(point, seconds=cost(point)) for point in points]


@pytest.mark.parametrize("once", [True, False])
def test_the_cost_of_a_token_tells_how_often_the_prompt_is_paid(once: bool) -> None:
    """Costs made with the prompt counted one way are explained in full that way, and not the other way."""
    points = grid(lambda p: 0.5 + 2e-3 * p.pairs * p.prompt * (1 if once else p.completions) + 3e-3 * p.scored)
    right, wrong = token_cost(points, once=once), token_cost(points, once=not once)
    assert (right.prompt, right.completion, right.intercept, right.r2) == pytest.approx((2e-3, 3e-3, 0.5, 1))
    assert wrong.r2 < 0.99


@pytest.mark.parametrize("per_logit", [0.0, 4.0, 12.0])
def test_bytes_of_a_logit_are_told_from_weights_and_tokens(per_logit: float) -> None:
    """400 MB + 512 bytes a vocabulary entry + 2,000 bytes a token + `per_logit` for each pair of them."""
    points = [
        measured(p, mb=400 + (512 * p.vocabulary + 2000 * p.scored + per_logit * p.vocabulary * p.scored) / 2**20)
        for p in (Point(pairs=pairs, vocabulary=v) for pairs in (4, 8) for v in (1000, 9000, 30_000))
    ]
    assert bytes_per_logit(points) == pytest.approx(per_logit, abs=1e-9)


def test_the_listwise_loss_of_two_completions_is_dpo() -> None:
    policy, reference = torch.randn(5, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    sides: list[Tensor] = [policy[:, 0], policy[:, 1], reference[:, 0], reference[:, 1]]
    ours = scaling.listwise_loss(policy, reference, beta=0.3)
    torch.testing.assert_close(ours.loss, dpo_loss(*sides, beta=0.3).loss)
    assert "listwise" not in losses.names()


def test_packed_tokens_of_a_point_are_what_the_step_encodes() -> None:
    point = replace(SMALL, completions=3)
    policy = scaling.policy_of(point)
    rows = exact_rows(2 * point.pairs, point.prompt, point.completion, vocabulary=policy.vocabulary, completions=3)
    (step,) = measure_steps(policy, scaling.LISTWISE, rows, batch_size=point.pairs, kind="groups")
    assert step.work.tokens == point.tokens
    assert (step.work.prompt_tokens, step.work.completion_tokens) == (point.pairs * point.prompt, point.scored)


def test_random_text_of_every_size_has_the_same_mixture() -> None:
    """A larger data set begins with the smaller one, so time against size compares like with like."""
    shorter, longer = scaling.random_text(24), scaling.random_text(48)
    assert longer[:24] == shorter
    lengths = [len(str(record.prompt).split()) for record in longer]
    assert lengths[:16] == lengths[16:32]


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "peak_memory_of", lambda function, *given: Peak(1.0, None, function(*given)))


@pytest.mark.usefixtures("in_process")
def test_every_sweep_is_written_with_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes: dict[str, Any] = {"pairs": (1, 2, 3), "completions": (2, 3), "data": (12, 24, 36), "vocabulary": (300, 400, 500)}
    scaling.run(SMALL, sizes, tmp_path / "scaling.json")
    written = json.loads((tmp_path / "scaling.json").read_text())
    assert [len(points) for points in written["points"].values()] == [3, 2, 3, 3, 3, 3]
    assert [m["x"] for m in written["points"]["pairs"]] == [1, 2, 3]
    titles = [table["title"] for table in written["tables"]]
    assert len(titles) == 4
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert "R2" in capsys.readouterr().out


@pytest.mark.usefixtures("in_process")
def test_a_real_model_keeps_its_vocabulary(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--model measures that model, in its own words, and leaves the vocabulary's sweep out."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(scaling, "run", lambda base, grid, path: asked.update(base=base, grid=grid))
    scaling.main(["--model", str(tiny_model), "--only", "pairs", "vocabulary", "--steps", "1"])
    assert list(asked["grid"]) == ["pairs"]
    point = replace(asked["base"], pairs=2, prompt=4, completion=3)
    assert scaling.policy_of(point).vocabulary == 6
    assert len(scaling.time_steps(point)) == 1


def test_a_point_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "peak_memory_of", lambda function, *given: Peak(math.nan, None, None, "killed"))
    with pytest.raises(SystemExit, match=r"time_steps.*pairs=3.*killed"):
        scaling.sweep(SMALL, "pairs", [3])
