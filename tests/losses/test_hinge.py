"""The hinge on log-ratios: four numbers, where loss and gradient end, and what labels do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from losses import LossOutput, get, hinge_loss


def at(difference: float | Tensor, label: float | None = None, **options: float) -> LossOutput:
    """Hinge at log-ratio difference `difference`, all of it on the chosen side."""
    chosen = torch.as_tensor(difference, dtype=torch.float64).reshape(-1)
    zero = torch.zeros_like(chosen)
    return hinge_loss(chosen, zero, zero, zero, None if label is None else torch.full_like(zero, label), **options)


def slope(difference: float, label: float | None = None, **options: float) -> float:
    """dL/d(difference)."""
    point = torch.tensor([difference], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(at(point, label, **options).loss.sum(), point)
    return float(gradient)


def test_hinge_closed_form() -> None:
    """beta 0.25; log-ratios -1 + 2.5 = 1.5 and -4 + 3.5 = -0.5: rewards 0.375 and -0.125, margin 0.5, loss 0.5.

    With soft label 0.25: 0.25 * 0.5 + 0.75 * 1.5 = 1.25.
    """
    tensors = [torch.tensor([x], dtype=torch.float64) for x in (-1.0, -4.0, -2.5, -3.5)]
    out = hinge_loss(*tensors, beta=0.25)
    assert (out.loss.tolist(), out.weight.tolist()) == ([0.5], [1.0])
    rewards = {key: values.item() for key, (values, _) in out.metrics.items()}
    assert rewards == {"rewards/chosen": 0.375, "rewards/rejected": -0.125, "rewards/margins": 0.5, "rewards/accuracies": 1.0}
    assert hinge_loss(*tensors, torch.tensor([0.25]), beta=0.25).loss.tolist() == [1.25]


def test_hinge_defaults() -> None:
    assert {flag: hyper.default for flag, hyper in get("hinge").hyper.items()} == {"beta": 0.1}


def test_hinge_gradcheck_and_signs() -> None:
    """Below the margin dL/d(chosen) = -beta and dL/d(rejected) = beta, beyond it exactly 0; kinks lie elsewhere."""
    tensors = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in ([4.0, -1.0], [1.0, 0.5], [0.5, 1], [0.0, 2])]
    labels = torch.tensor([0.3, 0.9], dtype=torch.float64)
    assert gradcheck(lambda *t: hinge_loss(*t, labels, beta=0.7).loss, tensors)
    hinge_loss(*tensors, beta=0.7).loss.sum().backward()
    expected = torch.tensor([0.0, 0.7], dtype=torch.float64)
    torch.testing.assert_close(tensors[0].grad, -expected, rtol=0, atol=0)
    torch.testing.assert_close(tensors[1].grad, expected, rtol=0, atol=0)


@given(st.floats(0.01, 5))
def test_hinge_limits(beta: float) -> None:
    """1 when the policy is the reference, whatever the label; nothing from a margin of 1/beta nats on, the kink included."""
    assert at(0.0, beta=beta).loss.item() == 1
    assert at(0.0, 0.3, beta=beta).loss.item() == pytest.approx(1)
    assert at(1.001 / beta, beta=beta).loss.item() == 0
    assert slope(1.001 / beta, beta=beta) == 0
    assert slope(0.999 / beta, beta=beta) == -beta
    assert slope(1.0, beta=1.0) == 0, "the kink belongs to the flat side"


@given(st.floats(-40, 40), st.floats(-40, 40), st.floats(0, 1), st.floats(0, 1))
def test_hinge_is_convex(left: float, right: float, label: float, share: float) -> None:
    between = at(share * left + (1 - share) * right, label).loss.item()
    assert between <= share * at(left, label).loss.item() + (1 - share) * at(right, label).loss.item() + 1e-9


@given(st.floats(-40, 40), st.floats(0, 1))
def test_hinge_swapping_completions_is_swapping_the_label(difference: float, label: float) -> None:
    assert at(difference, label).loss.item() == pytest.approx(at(-difference, 1 - label).loss.item(), abs=1e-12)
    assert at(difference, 1.0).loss.item() == at(difference).loss.item()


@settings(max_examples=10)
@given(st.floats(0.55, 1))
def test_hinge_soft_label_minimum_is_at_the_margin_whatever_the_label(label: float) -> None:
    """p max(0, 1-m) + (1-p) max(0, 1+m) falls with slope 1 - 2p inside (-1, 1) and rises with 1 - p beyond 1."""
    assert slope(0.9, label, beta=1.0) == pytest.approx(1 - 2 * label)
    assert slope(1.1, label, beta=1.0) == pytest.approx(1 - label)
    assert slope(-1.1, label, beta=1.0) == pytest.approx(-label)
    assert slope(-0.9, 1 - label, beta=1.0) == pytest.approx(2 * label - 1)
