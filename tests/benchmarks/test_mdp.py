"""benchmarks.mdp: its exact numbers against other derivations, CPL's consistency through the trainer, and what it prints."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import mdp as benchmark
from benchmarks import mdp_exact
from benchmarks.mdp import BIASES, LABELS, Scale, cpl, curve_table, draws, figure, findings, limit_table, method_table, shown
from benchmarks.mdp_cells import Draw, Method, Outcome, sample_optimum, train_all
from benchmarks.mdp_exact import Exact, kl
from losses.cpl import cpl_loss
from prefopt.control.gridworld import draw_layout, gridworld
from prefopt.control.mdp import TabularMDP, policy_kl, sample_steps
from prefopt.control.population import population_loss
from prefopt.tasks.gridworld import GridworldTask

SMALL = gridworld(3, traps=1)


class SmallTask(GridworldTask):
    """The same task in a world of 9 states."""

    @property
    def mdp(self) -> TabularMDP:
        return SMALL


@cache
def exact() -> Exact:
    return Exact(SMALL)


@pytest.fixture(autouse=True)
def few_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mdp_exact, "_STARTS", 2)


def trained(tmp_path: Path, pairs: int, *methods: Method, updates: int = 120, seed: int = 0) -> list[Outcome]:
    draw = Draw("regret", pairs, seed, methods, updates)
    return train_all(SmallTask(draw.options, tmp_path), draw, tmp_path)


def test_the_world_is_that_of_the_task(tmp_path: Path) -> None:
    mdp = GridworldTask(draws(benchmark.QUICK, gridworld())[0].options, tmp_path).mdp
    torch.testing.assert_close(mdp.transitions, gridworld().transitions)
    torch.testing.assert_close(mdp.rewards, gridworld().rewards)
    method = cpl(mdp, 1.0)
    assert method.hyper == {"alpha": mdp.temperature, "gamma": mdp.discount, "bias": 1.0}


def test_cpl_is_consistent_with_bias_1_and_levels_off_below(tmp_path: Path) -> None:
    """Twenty times the pairs: a KL that falls like 1 / pairs, and one that stays at the plateau of the infinite-data loss."""
    (few,) = trained(tmp_path, 200, cpl(SMALL, 1.0))
    many, level = trained(tmp_path, 4_000, cpl(SMALL, 1.0), cpl(SMALL, 0.5))
    plateau = kl(exact().limits("regret", 0.5)[0].logps, exact().best)
    assert few.metrics["kl_optimal"] > 8 * many.metrics["kl_optimal"]
    assert many.metrics["kl_optimal"] < min(0.02, plateau / 5)
    assert level.metrics["kl_optimal"] == pytest.approx(plateau, rel=0.25)
    assert exact().to_limit(level.logps, "regret", 0.5) < plateau / 10
    for outcome, bias in ((many, 1.0), (level, 0.5)):  # the trainer ends at what minimises the loss on these pairs
        assert outcome.to_sample is not None
        assert outcome.to_sample < 0.1 * exact().to_limit(outcome.logps, "regret", bias)


def test_dpo_with_a_uniform_reference_is_cpl_without_discount(tmp_path: Path) -> None:
    hyper = {"alpha": 0.5, "gamma": 1.0, "bias": 1.0}
    dpo, alike, discounted = trained(
        tmp_path, 300, Method("dpo", {"beta": 0.5}), Method("cpl", hyper), cpl(SMALL, 1.0), updates=10
    )
    torch.testing.assert_close(dpo.logps, alike.logps, rtol=0, atol=1e-6)
    assert kl(dpo.logps, discounted.logps) > 1e-4
    assert dpo.to_sample is None


def test_the_sample_optimum_has_the_least_loss_on_the_pairs(tmp_path: Path) -> None:
    hyper = cpl(SMALL, 0.5).hyper
    task = SmallTask(Draw("return", 500, 0, (), 1).options, tmp_path)
    steps, pairs = task.offline(0).steps, task.pairs(0)

    def loss(logps: Tensor) -> float:
        """Step by step from the table of steps: no index arithmetic of the benchmark's."""
        states = steps.observations.double() @ logps
        per_step = states[torch.arange(len(steps)), steps.actions]
        sides = [torch.stack([per_step[side], per_step[side + 1]], dim=-1) for side in (pairs.chosen, pairs.rejected)]
        mask = torch.ones_like(sides[0])
        return float(cpl_loss(*sides, mask, mask, **hyper).mean())

    best = sample_optimum(task, 0, hyper)
    assert best is not None
    for seed in range(10):
        noise = torch.randn(best.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert loss((best + 0.02 * noise).log_softmax(-1)) > loss(best)


def test_few_pairs_have_no_best_policy(tmp_path: Path) -> None:
    """Ten pairs of 9 x 4 choices: some action is only ever rejected, and the loss falls as it becomes ever rarer."""
    task = SmallTask(Draw("regret", 10, 0, (), 1).options, tmp_path)
    assert sample_optimum(task, 0, cpl(SMALL, 1.0).hyper) is None


def test_the_rate_is_that_of_the_curvature_of_the_infinite_data_loss() -> None:
    """For a likelihood the Fisher information is the Hessian of the expected loss: by finite differences of its gradient."""
    known, scores = exact(), exact().scores("regret")

    def slope(logits: Tensor) -> Tensor:
        leaf = logits.clone().requires_grad_()
        loss = population_loss(
            leaf.view_as(known.best).log_softmax(-1), known.population, scores,
            alpha=SMALL.temperature, bias=1.0, gamma=SMALL.discount,
        )  # fmt: skip
        return torch.autograd.grad(loss, leaf)[0]

    truth, step = known.best.flatten(), 1e-4
    information = torch.stack(
        [(slope(truth + step * unit) - slope(truth - step * unit)) / (2 * step) for unit in torch.eye(len(truth)).double()]
    )
    curvature = torch.autograd.functional.hessian(
        lambda x: policy_kl(x.view_as(known.best).log_softmax(-1), known.best, SMALL.uniform_states), truth
    )
    expected = 0.5 * float(torch.trace(curvature @ torch.linalg.pinv(information, rtol=1e-6)))
    assert known.constant() == pytest.approx(expected, rel=1e-4)


def test_limits() -> None:
    """One for regret labels (with bias 1 pi* itself), several for returns with bias 1; distances are to the nearest."""
    known = exact()
    (best,), (pulled,), several = (known.limits(*key) for key in (("regret", 1.0), ("regret", 0.5), ("return", 1.0)))
    assert kl(best.logps, known.best) < 1e-6 < 0.1 < kl(pulled.logps, known.best)
    assert len(several) > 1
    assert [limit.loss for limit in several] == sorted(limit.loss for limit in several)
    for limit in several:
        assert known.to_limit(limit.logps, "return", 1.0) == 0
    assert known.measures(known.best) | {"return": 0.0} == pytest.approx(
        {
            "KL_to_optimum": 0.0,
            "KL_to_myopic": kl(known.best, (SMALL.rewards / SMALL.temperature).log_softmax(-1)),
            "KL_to_behaviour": math.log(4) + float((known.best.exp() * known.best).sum(-1).mean()),
            "regret": 0.0,
            "return": 0.0,
        },
        abs=1e-12,
    )


def test_segments_of_the_exact_part_are_those_of_the_task(tmp_path: Path) -> None:
    """Same policy, same starts: frequencies of first states and actions."""
    listed = torch.zeros(9, 4, dtype=torch.float64)
    found = exact().population
    listed.index_put_((found.states[:, 0], found.actions[:, 0]), found.probabilities, accumulate=True)
    torch.testing.assert_close(listed, torch.full((9, 4), 1 / 36, dtype=torch.float64))
    steps = SmallTask(Draw("regret", 500, 0, (), 1).options, tmp_path).offline(0).steps
    drawn = sample_steps(SMALL, exact().behaviour, len(steps.ends), mdp_exact.LENGTH, 0)
    torch.testing.assert_close(drawn.observations, steps.observations)


# -- What is printed, from policies made by hand ----------------------------------------------------------------------------

SCALE = Scale((100, 400), 400, (0, 1, 2), 1)


def made() -> list[Outcome]:
    """Policies on the way from their limit to the uniform policy: by 1 / sqrt(pairs), a little more with every seed."""
    outcomes = []
    for draw in draws(SCALE, SMALL):
        for method in draw.methods:
            goal = exact().limits(draw.preferences, method.hyper.get("bias", 0.5))[0].logps
            logps = (goal * (1 - (1 + 0.1 * draw.seed) / draw.pairs**0.5)).log_softmax(-1)
            found = {"kl_optimal": kl(logps, exact().best), "kl": kl(logps, exact().behaviour), "regret": 0.25, "return": 1.0}
            left = 1e-4 if method.algorithm == "cpl" and draw.pairs > 100 else None
            outcomes.append(Outcome(method.label, draw.preferences, draw.pairs, draw.seed, found, logps, left, 0.0))
    return outcomes


def test_tables_and_findings() -> None:
    outcomes = made()
    curves = curve_table(outcomes, SCALE, exact()).rows
    assert [(row["labels"], row["bias"], row["pairs"]) for row in curves] == [
        (labels, bias, pairs) for labels in LABELS for bias in BIASES for pairs in ("100", "400")
    ]
    assert curves[0]["KL_to_optimum"] == curves[0]["KL_to_limit"], "pi* is the limit"
    assert [row["KL_to_sample"] for row in curves[:2]] == [None, "0.0001"]
    limits = limit_table(exact()).rows
    assert [row["policy"] for row in limits[:4]] == ["soft-optimal", "myopic", "behaviour", "cpl, regret labels, bias 1"]
    assert limits[1]["KL_to_myopic"] == limits[2]["KL_to_behaviour"] == 0
    undiscounted = next(row for row in limits if row["policy"] == "dpo, regret labels")
    assert limits[3]["KL_to_optimum"] < 1e-6 < 1e-4 < undiscounted["KL_to_optimum"]
    methods = method_table(outcomes, SCALE, SMALL).rows
    assert len(methods) == len(LABELS) * 6
    assert {row["regret"] for row in methods} == {"0.25 ± 0"}
    said = findings(outcomes, SCALE, exact())
    own = [o for o in outcomes if (o.method, o.preferences, o.pairs) == (cpl(SMALL, 1.0).label, "regret", 400)]
    mean = sum(kl(o.logps, exact().best) for o in own) / 3
    assert f"to {mean:.2g} with 400." in said[0]
    assert f"says {exact().constant():.0f} / pairs in the end, {exact().constant() / 400:.2g} there" in said[0]
    assert f"infinitely many pairs {kl(exact().limits('regret', 0.5)[0].logps, exact().best):.3f}." in said[1]
    assert f"lead {kl(exact().limits('return', 1.0)[0].logps, exact().best):.3f} from the soft-optimal policy" in said[2]


def test_numbers_are_shown_with_their_interval() -> None:
    assert shown([1.0, 2.0]) == "1.5"
    # t_{0.975, 2} = 4.303, s = 1: 4.303 / sqrt(3) = 2.48.
    assert shown([1.0, 2.0, 3.0]) == "2 ± 2"


def test_the_figure_is_drawn_with_all_curves_and_pictures() -> None:
    drawn = figure(made(), SCALE, exact(), draw_layout(3, traps=1))
    assert drawn.startswith(b"\x89PNG")
    assert len(drawn) > 50_000


def test_every_size_is_drawn_for_every_label_and_seed() -> None:
    planned = draws(SCALE, SMALL)
    assert {(draw.preferences, draw.pairs, draw.seed) for draw in planned} == {
        (labels, pairs, seed) for labels in LABELS for pairs in SCALE.sizes for seed in SCALE.seeds
    }
    assert [draw.pairs for draw in planned] == sorted((draw.pairs for draw in planned), reverse=True)
    assert {len(draw.methods) for draw in planned if draw.pairs == 100} == {2}
    assert {len(draw.methods) for draw in planned if draw.pairs == 400} == {6}


@pytest.mark.slow
def test_quick_runs_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    benchmark.main(["--quick", "--workers", "0", "--figures", str(tmp_path), "--json", str(tmp_path / "mdp.json")])
    written = json.loads((tmp_path / "mdp.json").read_text())
    assert len(written["tables"]) == 3
    assert len(written["cells"]) == sum(len(draw.methods) for draw in draws(benchmark.QUICK, gridworld()))
    assert written["findings"][0] in capsys.readouterr().out
    assert (tmp_path / "mdp.png").stat().st_size > 20_000
