"""EXO on four numbers, where its minimum is, that it is the other direction of cDPO's KL, and that its gradient vanishes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from losses import LossOutput, dpo_loss, exo_loss, get


def at(margin: float | Tensor, **options: float) -> LossOutput:
    """EXO at reward difference `margin` (beta 1), all of it on the chosen side."""
    chosen = torch.as_tensor(margin, dtype=torch.float64).reshape(-1)
    zero = torch.zeros_like(chosen)
    return exo_loss(chosen, zero, zero, zero, beta=1.0, **options)


def test_exo_closed_form() -> None:
    """beta 0.5, e 0.2; log-ratios 1.5 and -0.5: rewards 0.75 and -0.25, margin 1, q = sigma(1) = 1/(1 + e^-1).

    q log(q/0.8) + (1-q) log((1-q)/0.2).
    """
    tensors = [torch.tensor([x], dtype=torch.float64) for x in (-1.0, -4.0, -2.5, -3.5)]
    out = exo_loss(*tensors, beta=0.5, label_smoothing=0.2)
    q = 1 / (1 + math.exp(-1))
    assert out.loss.tolist() == pytest.approx([q * math.log(q / 0.8) + (1 - q) * math.log((1 - q) / 0.2)], abs=1e-12)
    assert out.weight.tolist() == [1.0]
    rewards = {key: values.item() for key, (values, _) in out.metrics.items()}
    assert rewards == {"rewards/chosen": 0.75, "rewards/rejected": -0.25, "rewards/margins": 1.0, "rewards/accuracies": 1.0}


def test_exo_defaults() -> None:
    assert {flag: hyper.default for flag, hyper in get("exo").hyper.items()} == {"beta": 0.1, "label_smoothing": 1e-3}


@given(st.floats(0.001, 0.49))
def test_exo_limits(smoothing: float) -> None:
    """Policy == reference: KL([1/2, 1/2] || [1-e, e]) = -log 2 - log(e(1-e))/2. Far out: -log e, and -log(1-e)."""
    start = -math.log(2) - math.log(smoothing * (1 - smoothing)) / 2
    assert at(0.0, label_smoothing=smoothing).loss.item() == pytest.approx(start, abs=1e-12)
    assert at(-500.0, label_smoothing=smoothing).loss.item() == pytest.approx(-math.log(smoothing))
    assert at(500.0, label_smoothing=smoothing).loss.item() == pytest.approx(-math.log(1 - smoothing))


@given(st.floats(0.001, 0.49), st.floats(0.05, 5))
def test_exo_minimum_is_0_at_the_smoothed_label(smoothing: float, beta: float) -> None:
    optimum = torch.tensor([math.log((1 - smoothing) / smoothing) / beta], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    loss = exo_loss(optimum, zero, zero, zero, beta=beta, label_smoothing=smoothing).loss.sum()
    (slope,) = torch.autograd.grad(loss, optimum)
    assert abs(loss.item()) < 1e-12
    assert abs(slope.item()) < 1e-12


@given(st.floats(-30, 30), st.floats(0.01, 0.49))
def test_exo_is_between_0_and_minus_log_e(margin: float, smoothing: float) -> None:
    assert -1e-12 <= at(margin, label_smoothing=smoothing).loss.item() <= -math.log(smoothing) + 1e-12


def test_exo_gradient() -> None:
    """dL/dq = logit q - logit(1-e) and dq/dm = q(1-q), so dL/dm = sigma(m) sigma(-m) (m - logit(1-e))."""
    tensors = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert gradcheck(lambda *t: exo_loss(*t, beta=0.7, label_smoothing=0.2).loss, tensors)
    exo_loss(*tensors, beta=0.7, label_smoothing=0.2).loss.sum().backward()
    chosen, rejected, reference_chosen, reference_rejected = (tensor.detach() for tensor in tensors)
    margin = 0.7 * (chosen - reference_chosen - rejected + reference_rejected)
    expected = 0.7 * torch.sigmoid(margin) * torch.sigmoid(-margin) * (margin - math.log(4))
    torch.testing.assert_close(tensors[0].grad, expected)
    torch.testing.assert_close(tensors[1].grad, -expected)


def test_exo_is_not_convex_and_gives_up_far_pairs() -> None:
    """Three equally spaced points on the wrong side lie on a concave arc; at -100 the gradient is below 1e-40."""
    low, middle, high = at(torch.tensor([-6.0, -4.0, -2.0]), label_smoothing=0.1).loss.tolist()
    assert middle > (low + high) / 2
    far = torch.tensor([-100.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(at(far, label_smoothing=0.1).loss.sum(), far)
    assert -1e-40 < slope.item() < 0


@given(st.floats(-20, 20), st.floats(0.01, 0.49))
def test_exo_and_cdpo_are_the_two_directions_of_one_kl(margin: float, smoothing: float) -> None:
    """cDPO - H(e) = KL([1-e, e] || q), EXO = KL(q || [1-e, e]); their sum is (q - (1-e)) (m - logit(1-e))."""
    zero = torch.zeros(1, dtype=torch.float64)
    entropy = -smoothing * math.log(smoothing) - (1 - smoothing) * math.log(1 - smoothing)
    cdpo = dpo_loss(zero + margin, zero, zero, zero, beta=1.0, label_smoothing=smoothing).loss.item() - entropy
    gaps = (1 / (1 + math.exp(-margin)) - (1 - smoothing)) * (margin - math.log((1 - smoothing) / smoothing))
    assert at(margin, label_smoothing=smoothing).loss.item() + cdpo == pytest.approx(gaps, abs=1e-9)


@pytest.mark.parametrize("smoothing", [0.0, 0.5, -0.1])
def test_exo_label_smoothing_out_of_range_is_an_error(smoothing: float) -> None:
    with pytest.raises(ValueError, match=rf"exo_loss: label_smoothing is {smoothing}, expected .* in \(0, 0.5\)"):
        at(1.0, label_smoothing=smoothing)
