"""CPL on log-ratios: numbers, gradient, what bias does, and when it is DPO."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from losses import cpl_kl_loss, cpl_loss, dpo_loss, get


def at(chosen: float | Tensor, rejected: float | Tensor, **options: float | Tensor) -> Tensor:
    """The loss [P] of these log-ratios."""
    tensors = [torch.as_tensor(side, dtype=torch.float64).reshape(-1) for side in (chosen, rejected)]
    return cpl_kl_loss(*tensors, *map(torch.zeros_like, tensors), **options).loss


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


def test_cpl_kl_closed_form() -> None:
    """alpha 0.5, bias 0.25; policy (-1, -4), reference (-3, -3): S_w = 1, S_l = -0.5.

    The argument is S_w - 0.25 S_l = 1.125, and S_l - 0.25 S_w = -0.75 with the completions swapped.
    """
    tensors = [torch.tensor([x], dtype=torch.float64) for x in (-1.0, -4.0, -3.0, -3.0)]
    out = cpl_kl_loss(*tensors, alpha=0.5, bias=0.25)
    assert out.loss.item() == pytest.approx(softplus(-1.125), abs=1e-12)
    assert {key: values.item() for key, (values, _) in out.metrics.items()} == {
        "rewards/chosen": 1.0, "rewards/rejected": -0.5, "rewards/margins": 1.5, "rewards/accuracies": 1.0,
    }  # fmt: skip
    labelled = cpl_kl_loss(*tensors, torch.tensor([0.3], dtype=torch.float64), alpha=0.5, bias=0.25)
    assert labelled.loss.item() == pytest.approx(0.3 * softplus(-1.125) + 0.7 * softplus(0.75), abs=1e-12)


def test_cpl_kl_defaults() -> None:
    assert get("cpl_kl").bind().hyper == {"alpha": 0.1, "bias": 0.5}


def test_cpl_kl_gradient() -> None:
    """dL/d(chosen) = -alpha sigma(-x), dL/d(rejected) = bias alpha sigma(-x): the rejected side falls more slowly."""
    tensors = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    labels = torch.rand(4, dtype=torch.float64)
    assert gradcheck(lambda *t: cpl_kl_loss(*t, labels, alpha=0.7, bias=0.3).loss, tensors)
    loss = cpl_kl_loss(*tensors, alpha=0.7, bias=0.3).loss
    loss.sum().backward()
    push = 0.7 * -torch.expm1(-loss.detach())  # sigma(-x) = 1 - exp(-L)
    torch.testing.assert_close(tensors[0].grad, -push)
    torch.testing.assert_close(tensors[1].grad, 0.3 * push)


def test_cpl_kl_is_log_2_when_the_policy_is_the_reference() -> None:
    logps = -10 * torch.rand(2, 4, dtype=torch.float64)
    loss = cpl_kl_loss(*logps, *logps).loss
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)), rtol=0, atol=1e-15)


def test_cpl_kl_with_bias_1_is_dpo() -> None:
    tensors = torch.randn(4, 5, dtype=torch.float64)
    labels = torch.rand(5, dtype=torch.float64)
    for optional in ([], [labels]):
        got = cpl_kl_loss(*tensors, *optional, alpha=0.3, bias=1.0).loss
        torch.testing.assert_close(got, dpo_loss(*tensors, *optional, beta=0.3).loss)


def test_cpl_kl_is_cpl_of_log_ratios() -> None:
    chosen, rejected, reference_chosen, reference_rejected = torch.randn(4, 3, 5, dtype=torch.float64)
    ones, labels = torch.ones(3, 5), torch.rand(3, dtype=torch.float64)
    cpl = cpl_loss(chosen - reference_chosen, rejected - reference_rejected, ones, ones, labels, alpha=0.2, bias=0.7)
    sums = [tensor.sum(-1) for tensor in (chosen, rejected, reference_chosen, reference_rejected)]
    torch.testing.assert_close(cpl_kl_loss(*sums, labels, alpha=0.2, bias=0.7).loss, cpl.loss)


@settings(max_examples=15)
@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(0.1, 5), st.floats(0.1, 0.9))
def test_cpl_kl_bias_breaks_the_shift(chosen: float, rejected: float, shift: float, bias: float) -> None:
    """Making both completions likelier by the same amount does nothing at bias 1 and lowers the loss below 1."""
    shifted, here = (at(chosen + k, rejected + k, bias=1.0).item() for k in (shift, 0.0))
    assert shifted == pytest.approx(here, abs=1e-12)
    assert at(chosen + shift, rejected + shift, bias=bias).item() < at(chosen, rejected, bias=bias).item()


@settings(max_examples=15)
@given(*[st.floats(-30, 30)] * 4, st.floats(0, 1), st.floats(0.01, 1))
def test_cpl_kl_is_convex(a: float, b: float, c: float, d: float, label: float, bias: float) -> None:
    """In both log-ratios jointly, whatever the label."""
    options = {"soft_labels": torch.tensor([label], dtype=torch.float64), "bias": bias}
    middle = at((a + c) / 2, (b + d) / 2, **options)
    assert (middle <= (at(a, b, **options) + at(c, d, **options)) / 2 + 1e-12).all()


@settings(max_examples=15)
@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(0, 1))
def test_cpl_kl_swapping_completions_and_label_changes_nothing(chosen: float, rejected: float, label: float) -> None:
    here = at(chosen, rejected, soft_labels=torch.tensor([label], dtype=torch.float64), bias=0.3)
    there = at(rejected, chosen, soft_labels=torch.tensor([1 - label], dtype=torch.float64), bias=0.3)
    torch.testing.assert_close(here, there)
