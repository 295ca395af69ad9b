"""Utilities of reward differences: closed forms, their tangents, and the optima that show reward collapse."""

from __future__ import annotations

import math
import re
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from losses import LossOutput, Max, get, rank_utility_loss
from losses.rank_utility import parse_utility

RANKS = torch.tensor([[1, 0, 2], [2, 1, 0]])
UTILITIES = ("linear", "log", "inverse", "log_sigmoid")
EVERY = (*UTILITIES, "log_sigmoid:4", "power:0.5", "inverse_power:0.5")


def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def over_pairs(out: LossOutput, key: str) -> list[float]:
    """The sum of a metric over each prompt's ordered pairs."""
    metric = out.metrics[key]
    assert not isinstance(metric, Max)
    return (metric[0] * metric[1]).sum((1, 2)).tolist()


def utility_of(difference: float, utility: str) -> tuple[float, float]:
    """U and its slope at a difference of two rewards, the better one's first."""
    rewards = tensor([difference, 0.0]).requires_grad_()
    loss = rank_utility_loss(rewards, torch.tensor([[0, 1]]), torch.ones(1, 2), utility=utility, bounded=False).mean()
    (gradient,) = torch.autograd.grad(loss, rewards)
    assert gradient.sum().abs() < 1e-12
    return -loss.item(), -gradient[0, 0].item()


@pytest.mark.parametrize(
    ("utility", "difference", "value", "slope"),
    [
        ("linear", 0.4, 0.4, 1.0),
        ("linear", -0.4, -0.4, 1.0),
        ("log", 0.3, math.log(4), 2.5),  # log(0.3 + 0.1) - log 0.1, slope 1/0.4
        ("log", 0.0, 0.0, 10.0),
        ("log", -0.3, -3.0, 10.0),  # its tangent at 0
        ("log", -0.1, -1.0, 10.0),  # also where the logarithm itself would be infinite
        ("inverse", 0.3, 7.5, 6.25),  # 1/0.1 - 1/0.4, slope 1/0.4^2
        ("inverse", 0.0, 0.0, 100.0),
        ("inverse", -0.3, -30.0, 100.0),
        ("inverse", -0.1, -10.0, 100.0),
        ("log_sigmoid", 0.3, -math.log1p(math.exp(-0.3)), 1 / (1 + math.exp(0.3))),
        ("log_sigmoid", -40.0, -40.0, 1.0),
        ("log_sigmoid:4", -0.5, -math.log1p(math.exp(2)), 4 / (1 + math.exp(-2))),
        ("power:0.5", 0.8, math.sqrt(0.9) - math.sqrt(0.1), 0.5 / math.sqrt(0.9)),
        ("power:0.5", -0.2, -0.1 / math.sqrt(0.1), 0.5 / math.sqrt(0.1)),
        ("inverse_power:0.5", 0.8, 1 / math.sqrt(0.1) - 1 / math.sqrt(0.9), 0.5 * 0.9**-1.5),
        ("inverse_power:0.5", -0.2, -0.1 * 0.1**-1.5, 0.5 * 0.1**-1.5),
    ],
)
def test_rank_utility_closed_forms(utility: str, difference: float, value: float, slope: float) -> None:
    assert utility_of(difference, utility) == pytest.approx((value, slope), abs=1e-12)


@pytest.mark.parametrize(
    ("one", "other"), [("power:1", "linear"), ("inverse_power:1", "inverse"), ("log_sigmoid:1", "log_sigmoid")]
)
def test_rank_utility_two_names_of_one_utility(one: str, other: str) -> None:
    rewards, mask = torch.randn(2, 3, dtype=torch.float64), torch.ones(2, 3)
    torch.testing.assert_close(
        rank_utility_loss(rewards, RANKS, mask, utility=one).loss, rank_utility_loss(rewards, RANKS, mask, utility=other).loss
    )


@pytest.mark.parametrize("exponent", [1e-3, -1e-3])
def test_rank_utility_log_is_the_power_between(exponent: float) -> None:
    """(x^g - 1)/g -> log x from above, and (1 - x^-s)/s from below."""
    x = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    power = parse_utility(f"power:{exponent}" if exponent > 0 else f"inverse_power:{-exponent}")
    torch.testing.assert_close(power(x, 0.1) / 1e-3, parse_utility("log")(x, 0.1), rtol=2e-3, atol=0)


@pytest.mark.parametrize("utility", EVERY)
def test_utility_without_offset_is_its_limit(utility: str) -> None:
    """Slopes and differences of U, since U(offset) itself goes to minus infinity for some."""
    x = torch.linspace(0.2, 1.0, 5, dtype=torch.float64, requires_grad=True)
    exact, near = (parse_utility(utility)(x, offset) for offset in (0.0, 1e-7))
    torch.testing.assert_close(near.diff(), exact.diff(), rtol=1e-4, atol=0)
    slopes = [torch.autograd.grad(values.sum(), x)[0] for values in (near, exact)]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=0)


def test_rank_utility_offset_is_where_the_slope_is_cut() -> None:
    """log(0.3 + 0.2) - log 0.2; and float32 sees ties as exactly 0, whatever the offset."""
    rewards = tensor([0.3, 0.0])
    loss = rank_utility_loss(rewards, torch.tensor([[0, 1]]), torch.ones(1, 2), utility="log", offset=0.2, bounded=False)
    assert -loss.mean().item() == pytest.approx(math.log(2.5))
    assert all(parse_utility(name)(torch.zeros(1), 0.1).item() == 0 for name in EVERY if "sigmoid" not in name)


def test_rank_utility_default_is_log_of_sigmoid_rewards_averaged_by_prompt() -> None:
    """Rewards 0.9, 0.2, 0.5 after the sigmoid, ranked first to third: differences 0.7, 0.4 and -0.3.

    U = log 8, log 5 and -3. The second list has one pair, 0.5 - 0.2: log 4. A prompt is a prompt.
    """
    assert get("rank_utility").bind().hyper == {"utility": "log", "offset": 0.1, "bounded": True}
    rewards = tensor([0.9, 0.2, 0.5], [0.2, 0.5, 0.7]).logit()
    out = rank_utility_loss(rewards, torch.tensor([[0, 1, 2], [1, 0, 2]]), tensor([1.0, 1.0, 1.0], [1.0, 1.0, 0.0]))
    first = -(math.log(8) + math.log(5) - 3) / 3
    assert out.loss.tolist() == pytest.approx([first, -math.log(4)])
    assert out.mean().item() == pytest.approx((first - math.log(4)) / 2)
    assert over_pairs(out, "rewards/margins") == pytest.approx([0.8, 0.3]), "of rewards in (0, 1)"
    assert over_pairs(out, "rewards/accuracies") == [2.0, 1.0]


def test_rank_utility_prompts_without_a_pair_do_not_count() -> None:
    out = rank_utility_loss(torch.randn(2, 3), torch.tensor([[0, 1, 2], [0, 0, 0]]), torch.ones(2, 3))
    assert out.weight.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("utility", EVERY)
def test_rank_utility_gradcheck(utility: str) -> None:
    mask = tensor([1.0, 1.0, 1.0], [1.0, 0.0, 1.0])
    rewards = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda r: rank_utility_loss(r, RANKS, mask, utility=utility).loss, rewards)


def test_rank_utility_picks_by_prompt() -> None:
    """Names are numbered in their order; each prompt has the loss and gradient of its own utility alone."""
    rewards = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    ranks, mask = RANKS[[0, 1, 0]], torch.ones(3, 3)
    ids = torch.tensor([2, 0, 1])
    mixed = rank_utility_loss(rewards, ranks, mask, ids, utility="linear,inverse,log_sigmoid")
    alone = torch.stack([
        rank_utility_loss(rewards, ranks, mask, utility=name).loss[row]
        for row, name in enumerate(("log_sigmoid", "linear", "inverse"))
    ])  # fmt: skip
    torch.testing.assert_close(mixed.loss, alone)
    torch.testing.assert_close(
        torch.autograd.grad(mixed.mean(), rewards)[0], torch.autograd.grad(alone.mean(), rewards)[0]
    )  # fmt: skip


@cache
def optimum(utility: str) -> Tensor:
    """Rewards in [0, 1] of six completions from best to worst where the loss is least."""
    logits = torch.linspace(1.5, -0.7, 6, dtype=torch.float64)[None].requires_grad_()
    optimiser = torch.optim.LBFGS(
        [logits], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-9, tolerance_change=1e-14
    )  # fmt: skip

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = rank_utility_loss(logits, torch.arange(6)[None], torch.ones(1, 6), utility=utility).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    return logits.detach().sigmoid()[0]


def test_rank_utility_linear_collapses_to_two_rewards() -> None:
    """Half at 1 and half at 0: only a reward's rank decides which, whatever the prompt."""
    torch.testing.assert_close(optimum("linear"), torch.tensor([1.0, 1, 1, 0, 0, 0]).double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("utility", sorted(set(EVERY) - {"linear"}))
def test_rank_utility_concave_optimum_is_symmetric(utility: str) -> None:
    """r_1 = 1, r_n = 0 and r_i + r_{n+1-i} = 1, from a start that is not; strictly between in the middle."""
    rewards = optimum(utility)
    assert rewards[0].item() == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(rewards + rewards.flip(0), torch.ones_like(rewards), rtol=0, atol=1e-3)
    assert 0.01 < rewards[3] < rewards[2] < 0.99


def test_rank_utility_inverse_spreads_rewards_evenly() -> None:
    """Near 1, 4/5, …, 0 (the offset of 0.1 keeps it from there), nearer than log, which is nearer than log-sigmoid."""
    uniform = torch.linspace(1, 0, 6, dtype=torch.float64)
    distance = {utility: (optimum(utility) - uniform).abs().max().item() for utility in UTILITIES}
    assert distance["inverse"] < 0.05
    assert 2 * distance["inverse"] < distance["log"] < distance["log_sigmoid"] < distance["linear"]


def test_rank_utility_optimum_solves_its_stationarity() -> None:
    """With n = 6 and rewards 1, 1-a, 1-b, b, a, 0 the slopes at a (towards better minus towards worse) balance.

    U = -1/(x + 0.1): sum over the better of U'(r_j - a) = U'(a), with U' = 1/(x + 0.1)^2.
    """
    rewards = optimum("inverse").tolist()
    slope = [1 / (other - rewards[4] + 0.1) ** 2 for other in rewards[:4]]
    assert sum(slope) == pytest.approx(1 / (rewards[4] + 0.1) ** 2, rel=1e-3)


def test_rank_utility_errors() -> None:
    arguments = torch.zeros(1, 2), torch.tensor([[0, 1]]), torch.ones(1, 2)
    expected = re.escape("linear, log, inverse, log_sigmoid[:k], power:g, inverse_power:s.")
    with pytest.raises(ValueError, match=f"unknown utility 'sqrt'; expected {expected}"):
        rank_utility_loss(*arguments, torch.tensor([0]), utility="log,sqrt")
    with pytest.raises(ValueError, match="utility 'log,linear' names 2; give utility_ids, or name one"):
        rank_utility_loss(*arguments, utility="log,linear")
    with pytest.raises(ValueError, match="utility_ids go up to 2, but utility 'log,linear' names 2"):
        rank_utility_loss(*arguments, torch.tensor([2]), utility="log,linear")
    with pytest.raises(ValueError, match=r"offset is 0\.0; expected > 0"):
        rank_utility_loss(*arguments, offset=0.0)


@pytest.mark.parametrize(
    ("utility", "limit"),
    [
        ("power", r"in \(0, 1\]"),
        ("power:1.5", r"in \(0, 1\]"),
        ("power:0", r"in \(0, 1\]"),
        ("power:half", r"in \(0, 1\]"),
        ("inverse_power:-1", "> 0"),
        ("inverse_power:inf", "> 0"),
        ("log_sigmoid:nan", "> 0"),
    ],
)
def test_rank_utility_parameters_out_of_range(utility: str, limit: str) -> None:
    with pytest.raises(ValueError, match=f"utility '{utility}' needs a number {limit} behind its colon"):
        rank_utility_loss(torch.zeros(1, 2), torch.tensor([[0, 1]]), torch.ones(1, 2), utility=utility)
    with pytest.raises(ValueError, match="unknown utility 'log:2'"):
        parse_utility("log:2")
