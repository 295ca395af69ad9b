"""Robust DPO on four numbers, what it takes from DPO, its expectation over flipped labels, and that nothing bounds it below."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from losses import LossOutput, dpo_loss, get, robust_dpo_loss


def at(margin: float | Tensor, **options: float) -> LossOutput:
    """Robust DPO at log-ratio difference `margin`, all of it on the chosen side."""
    chosen = torch.as_tensor(margin, dtype=torch.float64).reshape(-1)
    zero = torch.zeros_like(chosen)
    return robust_dpo_loss(chosen, zero, zero, zero, **options)


def test_robust_dpo_closed_form() -> None:
    """beta 0.5, e 0.2; log-ratios -1 + 2.5 = 1.5 and -4 + 3.5 = -0.5: rewards 0.75 and -0.25, margin 1.

    [0.8 log(1 + e^-1) - 0.2 log(1 + e)] / 0.6.
    """
    tensors = [torch.tensor([x], dtype=torch.float64) for x in (-1.0, -4.0, -2.5, -3.5)]
    out = robust_dpo_loss(*tensors, beta=0.5, label_smoothing=0.2)
    expected = (0.8 * math.log(1 + math.exp(-1)) - 0.2 * math.log(1 + math.e)) / 0.6
    assert out.loss.tolist() == pytest.approx([expected], abs=1e-12)
    assert out.weight.tolist() == [1.0]
    rewards = {key: values.item() for key, (values, _) in out.metrics.items()}
    assert rewards == {"rewards/chosen": 0.75, "rewards/rejected": -0.25, "rewards/margins": 1.0, "rewards/accuracies": 1.0}


def test_robust_dpo_defaults() -> None:
    assert {flag: hyper.default for flag, hyper in get("robust_dpo").hyper.items()} == {"beta": 0.1, "label_smoothing": 0.1}


@given(st.floats(-50, 50), st.floats(0, 0.45), st.floats(0.05, 2))
def test_robust_dpo_is_dpo_less_a_linear_term(difference: float, smoothing: float, beta: float) -> None:
    """log sigma(-m) = log sigma(m) - m, so L = -log sigma(m) - e m/(1 - 2e): DPO at e = 0, log 2 at m = 0."""
    chosen = torch.tensor([difference], dtype=torch.float64)
    zero = torch.zeros_like(chosen)
    dpo = dpo_loss(chosen, zero, zero, zero, beta=beta).loss.item()
    linear = smoothing * beta * difference / (1 - 2 * smoothing)
    assert at(chosen, beta=beta, label_smoothing=smoothing).loss.item() == pytest.approx(dpo - linear, abs=1e-9)


@given(st.floats(-30, 30), st.floats(0, 0.45))
def test_robust_dpo_over_flipped_labels_is_dpo_on_clean_ones(difference: float, smoothing: float) -> None:
    """(1 - e) L(m) + e L(-m) = -log sigma(m): a flipped label swaps the completions."""
    right, wrong = at(difference, label_smoothing=smoothing).loss, at(-difference, label_smoothing=smoothing).loss
    zero = torch.zeros(1, dtype=torch.float64)
    clean = dpo_loss(zero + difference, zero, zero, zero).loss
    assert ((1 - smoothing) * right + smoothing * wrong).item() == pytest.approx(clean.item(), abs=1e-9)


def test_robust_dpo_gradient() -> None:
    """dL/dm = -[(1-e) sigma(-m) + e sigma(m)] / (1-2e): negative everywhere, chosen rises and rejected falls."""
    tensors = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert gradcheck(lambda *t: robust_dpo_loss(*t, beta=0.7, label_smoothing=0.2).loss, tensors)
    robust_dpo_loss(*tensors, beta=0.7, label_smoothing=0.2).loss.sum().backward()
    chosen, rejected, reference_chosen, reference_rejected = (tensor.detach() for tensor in tensors)
    margin = 0.7 * (chosen - reference_chosen - rejected + reference_rejected)
    expected = -0.7 * (0.8 * torch.sigmoid(-margin) + 0.2 * torch.sigmoid(margin)) / 0.6
    torch.testing.assert_close(tensors[0].grad, expected)
    torch.testing.assert_close(tensors[1].grad, -expected)
    assert (expected < 0).all()


def test_robust_dpo_is_not_bounded_below() -> None:
    """Far out the loss falls with slope -e/(1-2e) per nat of margin: at e = 0.2 and m = 300 it is -100."""
    difference = torch.tensor([3000.0], dtype=torch.float64, requires_grad=True)
    loss = at(difference, label_smoothing=0.2).loss
    assert loss.item() == pytest.approx(-100.0)
    (slope,) = torch.autograd.grad(loss.sum(), difference)
    assert slope.item() == pytest.approx(-0.1 * 0.2 / 0.6)


@pytest.mark.parametrize("smoothing", [-0.1, 0.5])
def test_robust_dpo_label_smoothing_out_of_range_is_an_error(smoothing: float) -> None:
    with pytest.raises(ValueError, match=rf"robust_dpo_loss: label_smoothing is {smoothing}, expected .* in \[0, 0.5\)"):
        at(1.0, label_smoothing=smoothing)
