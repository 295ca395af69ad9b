"""SAPO: the sigmoid gate in value and gradient, tau by the sign of the advantage."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from losses import LossOutput, Max, get, sapo_loss
from losses.advantages import group_baseline
from losses.ops import MAX_LOG_RATIO


def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def reduced(out: LossOutput, key: str) -> float:
    metric = out.metrics[key]
    assert not isinstance(metric, Max)
    return float((metric[0] * metric[1]).sum() / metric[1].sum())


MASK = tensor([1.0, 1.0, 0.0], [1.0, 0.0, 0.0])
OLD, ADVANTAGES = tensor([-1.0, -2.0, 0.0], [-0.5, 0.0, 0.0]), tensor([3.0, 3.0, 9.0], [-1.0, 9.0, 9.0])


def one(ratio: float, advantage: float, **options: float) -> tuple[float, float]:
    """Loss and gradient with respect to the log-prob of one token."""
    logps = tensor([math.log(ratio)]).requires_grad_()
    loss = sapo_loss(logps, tensor([0.0]), tensor([advantage]), tensor([1.0]), **options).mean()
    loss.backward()
    assert logps.grad is not None
    return loss.item(), logps.grad.item()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_sapo_closed_form() -> None:
    """tau 2 for A > 0: ratios 2 and 1 give -(4/2) sigma(2) 3 and -(4/2)(1/2) 3 = -3; tau 4 for A < 0, ratio 1/2: sigma(-2).

    The mean over sequences of their token means.
    """
    policy = OLD + tensor([2.0, 1.0, 9.0], [0.5, 9.0, 9.0]).log()
    out = sapo_loss(policy, OLD, ADVANTAGES, MASK, tau_positive=2.0, tau_negative=4.0)
    assert out.loss.tolist() == pytest.approx([(-6 * sigmoid(2) - 3) / 2, sigmoid(-2)])
    assert out.mean().item() == pytest.approx(((-6 * sigmoid(2) - 3) / 2 + sigmoid(-2)) / 2)
    largest = out.metrics["ratio/max"]
    assert isinstance(largest, Max)
    assert largest.values.max().item() == pytest.approx(2)
    assert reduced(out, "approx_kl") == pytest.approx((2 + 1 + 0.5 - 3) / 3), "log(2 * 1 * 1/2) is 0"


def test_sapo_declaration() -> None:
    """tau 1 above and 1.05 below: at rho 3 the losses are -4 sigma(2) and 4/1.05 sigma(2.1)."""
    assert get("sapo").bind().hyper == {"tau_positive": 1.0, "tau_negative": 1.05}
    assert get("sapo").advantage is group_baseline
    assert get("sapo").defaults == {}
    assert one(3.0, 1.0)[0] == pytest.approx(-4 * sigmoid(2))
    assert one(3.0, -1.0)[0] == pytest.approx(4 / 1.05 * sigmoid(2.1))


@settings(max_examples=20)
@given(st.floats(0.1, 8), st.floats(-3, 3), st.floats(0.1, 5))
def test_sapo_gradient_is_the_gated_one(ratio: float, advantage: float, tau: float) -> None:
    """-4 sigma(x) sigma(-x) rho A with x = tau*(rho - 1): GRPO's times a gate in (0, 1], which is 1 at rho = 1."""
    gate = 4 * sigmoid(tau * (ratio - 1)) * sigmoid(-tau * (ratio - 1))
    _, gradient = one(ratio, advantage, tau_positive=tau, tau_negative=tau)
    assert gradient == pytest.approx(-gate * ratio * advantage, abs=1e-12)
    assert one(1.0, advantage, tau_positive=tau, tau_negative=tau)[1] == pytest.approx(-advantage)


def test_sapo_gradcheck_and_what_receives_none() -> None:
    policy = (OLD + 0.4 * torch.randn(2, 3, dtype=torch.float64)).requires_grad_()
    assert gradcheck(lambda x: sapo_loss(x, OLD, ADVANTAGES, MASK, tau_negative=3.0).mean(), policy)
    leaves = [policy, OLD.clone().requires_grad_(), ADVANTAGES.clone().requires_grad_()]
    gradient, *unused = torch.autograd.grad(sapo_loss(*leaves, MASK).mean(), leaves, allow_unused=True)
    assert unused == [None, None]
    assert (gradient != 0).tolist() == MASK.bool().tolist()


def test_sapo_padding_of_the_sampling_policy_may_hold_anything() -> None:
    """Not even NaN there reaches the objective or its metrics."""
    policy = OLD + 0.1
    out, clean = (sapo_loss(policy, torch.where(MASK.bool(), OLD, padding), ADVANTAGES, MASK) for padding in (math.nan, 0.0))
    torch.testing.assert_close(out.mean(), clean.mean())
    assert reduced(out, "approx_kl") == reduced(clean, "approx_kl")


def test_sapo_is_flat_beyond_the_largest_exponent() -> None:
    """A small tau keeps the sigmoid from saturating, so that the cut of the exponent is what stops the gradient."""
    logps = tensor([MAX_LOG_RATIO + 1, MAX_LOG_RATIO - 1]).requires_grad_()
    loss = sapo_loss(logps, 0 * logps, -torch.ones_like(logps), torch.ones_like(logps), tau_negative=1e-9)
    (gradient,) = torch.autograd.grad(loss.mean(), logps)
    assert gradient[0, 0] == 0
    assert gradient[0, 1] > 0


@pytest.mark.parametrize(("positive", "negative"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0)])
def test_sapo_errors(positive: float, negative: float) -> None:
    message = f"tau_positive and tau_negative must be positive, got {positive} and {negative}"
    with pytest.raises(ValueError, match=message):
        sapo_loss(OLD, OLD, ADVANTAGES, MASK, tau_positive=positive, tau_negative=negative)
