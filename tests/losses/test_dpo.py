"""DPO on two numbers, its gradient, its limits and what labels do."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from losses import LossOutput, dpo_loss, get


def pair(margin: float | Tensor, **options: float | Tensor) -> LossOutput:
    """DPO at log-ratio difference `margin`, all of it on the chosen side."""
    chosen = torch.as_tensor(margin, dtype=torch.float64).reshape(-1)
    zero = torch.zeros_like(chosen)
    return dpo_loss(chosen, zero, zero, zero, **options)


def test_dpo_closed_form() -> None:
    """beta 0.5, policy (-1, -4), reference (-2, -3): margin 0.5*((-1+2) - (-4+3)) = 1, loss log(1 + e^-1)."""
    out = dpo_loss(*(torch.tensor([x], dtype=torch.float64) for x in (-1.0, -4.0, -2.0, -3.0)), beta=0.5)
    assert out.mean().item() == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-12)
    rewards = {key: values.item() for key, (values, _) in out.metrics.items()}
    assert rewards == {"rewards/chosen": 0.5, "rewards/rejected": -0.5, "rewards/margins": 1.0, "rewards/accuracies": 1.0}


def test_dpo_defaults() -> None:
    assert {flag: hyper.default for flag, hyper in get("dpo").hyper.items()} == {"beta": 0.1, "label_smoothing": 0.0}


def test_dpo_is_log_2_when_the_policy_is_the_reference() -> None:
    logps = -10 * torch.rand(4, dtype=torch.float64)
    out = dpo_loss(logps, logps - 1, logps, logps - 1)
    torch.testing.assert_close(out.loss, torch.full_like(logps, math.log(2)), rtol=0, atol=1e-15)
    assert out.metrics["rewards/accuracies"][0].tolist() == [0.5] * 4, "a tie is half right"


def test_dpo_gradient_is_beta_sigma_of_minus_margin() -> None:
    """dL/d(chosen) = -beta sigma(-margin), the rejected side's opposite: chosen rises, rejected falls."""
    chosen, rejected = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    reference = torch.randn(5, dtype=torch.float64)
    dpo_loss(chosen, rejected, reference, reference, beta=0.3).loss.sum().backward()
    expected = -0.3 * torch.sigmoid(-0.3 * (chosen - rejected)).detach()
    torch.testing.assert_close(chosen.grad, expected)
    torch.testing.assert_close(rejected.grad, -expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_gradcheck(smoothing: float) -> None:
    tensors = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    labels = torch.rand(3, dtype=torch.float64)
    assert gradcheck(lambda *t: dpo_loss(*t, labels, beta=0.7, label_smoothing=smoothing).loss, tensors)


@given(st.floats(-50, 50), st.floats(0.01, 2))
def test_dpo_odd_part_is_linear(margin: float, beta: float) -> None:
    """log sigma(x) - log sigma(-x) = x, so L(d) - L(-d) = -beta d."""
    difference = pair(margin, beta=beta).loss - pair(-margin, beta=beta).loss
    assert difference.item() == pytest.approx(-beta * margin, abs=1e-9)


@given(st.floats(-20, 20), st.floats(0, 0.49))
def test_dpo_smoothing_adds_a_linear_term_and_is_a_soft_label(margin: float, smoothing: float) -> None:
    """cDPO = DPO + e*beta*d, the soft label 1 - e."""
    smoothed = pair(margin, label_smoothing=smoothing).loss
    assert smoothed.item() == pytest.approx((pair(margin).loss + smoothing * 0.1 * margin).item(), abs=1e-12)
    labels = torch.tensor([1 - smoothing], dtype=torch.float64)
    assert smoothed.item() == pytest.approx(pair(margin, soft_labels=labels).loss.item(), abs=1e-12)


def test_dpo_smoothing_minimum_is_the_binary_entropy() -> None:
    """At sigma(beta d) = 1 - e the gradient vanishes and the loss is H(e)."""
    smoothing = 0.2
    margin = torch.tensor([math.log(0.8 / 0.2) / 0.1], dtype=torch.float64, requires_grad=True)
    loss = pair(margin, label_smoothing=smoothing).loss.sum()
    loss.backward()
    assert margin.grad is not None
    assert margin.grad.abs().item() < 1e-15
    assert loss.item() == pytest.approx(-0.2 * math.log(0.2) - 0.8 * math.log(0.8), abs=1e-12)


def test_dpo_soft_label_is_the_expectation_over_drawn_labels() -> None:
    margin = torch.linspace(-8, 8, 5)
    label = torch.full((5,), 0.3, dtype=torch.float64)
    expected = 0.3 * pair(margin).loss + 0.7 * pair(-margin).loss
    torch.testing.assert_close(pair(margin, soft_labels=label).loss, expected)
    flipped = pair(margin, soft_labels=label, label_smoothing=0.1).loss
    torch.testing.assert_close(flipped, pair(margin, soft_labels=0.9 * label + 0.1 * (1 - label)).loss)


def test_dpo_label_smoothing_out_of_range_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"label_smoothing is 0.5, expected .* in \[0, 0.5\)"):
        pair(1.0, label_smoothing=0.5)
