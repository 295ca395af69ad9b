"""DiscoPOP on four numbers, the two losses that it blends, its dent, and exponents that would overflow."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from losses import LossOutput, discopop_loss, get


def at(margin: float | Tensor, **options: float) -> LossOutput:
    """DiscoPOP at reward difference `margin` (beta 1), all of it on the chosen side."""
    chosen = torch.as_tensor(margin, dtype=torch.float64).reshape(-1)
    zero = torch.zeros_like(chosen)
    return discopop_loss(chosen, zero, zero, zero, beta=1.0, **options)


def slope(margin: float, **options: float) -> float:
    """dL/d(margin)."""
    point = torch.tensor([margin], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(at(point, **options).loss.sum(), point)
    return float(gradient)


def test_discopop_closed_form() -> None:
    """beta 0.5, tau 0.5; log-ratios 1.5 and -0.5: rewards 0.75 and -0.25, margin 1, w = sigma(2).

    (1 - w) log(1 + e^-1) + w e^-1.
    """
    tensors = [torch.tensor([x], dtype=torch.float64) for x in (-1.0, -4.0, -2.5, -3.5)]
    out = discopop_loss(*tensors, beta=0.5, tau=0.5)
    w = 1 / (1 + math.exp(-2))
    assert out.loss.tolist() == pytest.approx([(1 - w) * math.log(1 + math.exp(-1)) + w * math.exp(-1)], abs=1e-12)
    assert out.weight.tolist() == [1.0]
    rewards = {key: values.item() for key, (values, _) in out.metrics.items()}
    assert rewards == {"rewards/chosen": 0.75, "rewards/rejected": -0.25, "rewards/margins": 1.0, "rewards/accuracies": 1.0}


def test_discopop_defaults() -> None:
    assert {flag: hyper.default for flag, hyper in get("discopop").hyper.items()} == {"beta": 0.1, "tau": 0.05}


@given(st.floats(0.01, 100))
def test_discopop_is_half_of_each_when_the_policy_is_the_reference(tau: float) -> None:
    """(log 2 + 1)/2 for every tau."""
    assert at(0.0, tau=tau).loss.item() == pytest.approx((math.log(2) + 1) / 2, abs=1e-12)


@given(st.floats(-15, 15), st.floats(0.05, 5))
def test_discopop_lies_between_the_losses_that_it_blends(margin: float, tau: float) -> None:
    """Mostly logistic below 0 and mostly exponential above it: the share of the exponential is sigma(m/tau)."""
    logistic, exponential = math.log1p(math.exp(-margin)), math.exp(-margin)
    share = (at(margin, tau=tau).loss.item() - logistic) / (exponential - logistic)
    assert share == pytest.approx(1 / (1 + math.exp(-margin / tau)), abs=1e-6)


def test_discopop_gradient() -> None:
    """With w' = w(1-w)/tau: dL/dm = w' (e^-m - softplus(-m)) - (1-w) sigma(-m) - w e^-m."""
    tensors = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert gradcheck(lambda *t: discopop_loss(*t, beta=0.7, tau=0.3).loss, tensors)
    discopop_loss(*tensors, beta=0.7, tau=0.3).loss.sum().backward()
    chosen, rejected, reference_chosen, reference_rejected = (tensor.detach() for tensor in tensors)
    margin = 0.7 * (chosen - reference_chosen - rejected + reference_rejected)
    w, exponential = torch.sigmoid(margin / 0.3), torch.exp(-margin)
    gap = exponential - torch.nn.functional.softplus(-margin)
    expected = 0.7 * (w * (1 - w) / 0.3 * gap - (1 - w) * torch.sigmoid(-margin) - w * exponential)
    torch.testing.assert_close(tensors[0].grad, expected)
    torch.testing.assert_close(tensors[1].grad, -expected)


def test_discopop_has_a_dent_near_0() -> None:
    """At tau 0.05 the switch to the larger loss outweighs the fall of both: the loss rises there, and falls on either side."""
    assert slope(0.0, tau=0.05) > 0 > max(slope(-0.5, tau=0.05), slope(0.5, tau=0.05))


def test_discopop_far_out() -> None:
    """Logistic with slope -1 on the wrong side, no overflow of e^-m; e^-m on the right one."""
    assert at(-1000.0, tau=0.05).loss.item() == 1000
    assert slope(-1000.0, tau=0.05) == -1
    assert at(30.0, tau=0.05).loss.item() == pytest.approx(math.exp(-30), rel=1e-9)


def test_discopop_exponent_is_cut_at_20() -> None:
    """tau 2: the exponent log sigma(-500) + 1000 = 500 is held at 20, so only the logistic half has a gradient."""
    assert at(-1000.0, tau=2.0).loss.item() == pytest.approx(1000 + math.exp(20), rel=1e-12)
    assert slope(-1000.0, tau=2.0) == -1


@pytest.mark.parametrize("tau", [0.0, -0.5])
def test_discopop_tau_out_of_range_is_an_error(tau: float) -> None:
    with pytest.raises(ValueError, match=f"discopop_loss: tau is {tau}, expected a positive width"):
        at(1.0, tau=tau)
