"""IPO on two numbers, where its gradient vanishes, averages against sums, and labels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from losses import LossOutput, get, ipo_loss


def at(margin: float | Tensor, **options: object) -> LossOutput:
    """IPO at log-ratio difference `margin`, completions of one token."""
    chosen = torch.as_tensor(margin, dtype=torch.float64).reshape(-1)
    zero, one = torch.zeros_like(chosen), torch.ones_like(chosen)
    return ipo_loss(chosen, zero, zero, zero, one, one, **options)


def test_ipo_closed_form_with_averages_and_sums() -> None:
    """Log-ratios +2 over 4 tokens and -3 over 2; tau 0.5, target 1.

    Averages: h = 2/4 + 3/2 = 2, loss (2 - 1)^2 = 1. Sums: h = 5, loss 16.
    """
    tensors = [torch.tensor([x], dtype=torch.float64) for x in (-1.0, -5.0, -3.0, -2.0, 4.0, 2.0)]
    averaged = ipo_loss(*tensors, tau=0.5)
    assert averaged.loss.item() == 1.0
    assert averaged.metrics["rewards/margins"][0].item() == 1.0
    assert ipo_loss(*tensors, tau=0.5, average_log_prob=False).loss.item() == 16.0


def test_ipo_defaults() -> None:
    assert {flag: hyper.default for flag, hyper in get("ipo").hyper.items()} == {"tau": 0.1, "average_log_prob": True}


@given(st.floats(0.01, 5))
def test_ipo_limits(tau: float) -> None:
    """1/(4 tau^2) when the policy is the reference; loss and gradient vanish at h = 1/(2 tau)."""
    assert at(0.0, tau=tau).loss.item() == pytest.approx(1 / (4 * tau**2))
    optimum = torch.tensor([1 / (2 * tau)], dtype=torch.float64, requires_grad=True)
    loss = at(optimum, tau=tau).loss.sum()
    loss.backward()
    assert optimum.grad is not None
    assert loss.item() == 0
    assert optimum.grad.item() == 0


def test_ipo_pulls_back_beyond_its_target() -> None:
    """Unlike DPO: below the target chosen rises, above it falls."""
    margin = torch.tensor([4.9, 5.1], dtype=torch.float64, requires_grad=True)
    at(margin, tau=0.1).loss.sum().backward()
    assert margin.grad is not None
    assert margin.grad[0] < 0 < margin.grad[1]


def test_ipo_gradcheck() -> None:
    tensors = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    lengths = torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64)
    labels = torch.rand(3, dtype=torch.float64)
    assert gradcheck(lambda *t: ipo_loss(*t, lengths, lengths.flip(0), labels, tau=0.3).loss, tensors)


def test_ipo_average_with_equal_lengths_is_the_sum_with_another_tau() -> None:
    """(h/n - 1/(2 tau))^2 = (h - 1/(2 tau/n))^2 / n^2: averaging with tau is summing with tau/n, scaled by 1/n^2."""
    logps = [torch.randn(6, dtype=torch.float64) for _ in range(4)]
    lengths = torch.full((6,), 5.0, dtype=torch.float64)
    averaged = ipo_loss(*logps, lengths, lengths, tau=0.1).loss
    summed = ipo_loss(*logps, lengths, lengths, tau=0.1 / 5, average_log_prob=False).loss
    torch.testing.assert_close(averaged, summed / 25)


def test_ipo_lengths_may_be_integers() -> None:
    logps = [torch.randn(2) for _ in range(4)]
    lengths = torch.tensor([3, 5])
    torch.testing.assert_close(ipo_loss(*logps, lengths, lengths).loss, ipo_loss(*logps, lengths.float(), lengths.float()).loss)


@given(st.floats(0, 1), st.floats(0.05, 2))
def test_ipo_soft_label_minimum(label: float, tau: float) -> None:
    """p (h - c)^2 + (1-p)(h + c)^2 with c = 1/(2 tau) has its minimum at (2p - 1) c = (p - 1/2)/tau."""
    optimum = torch.tensor([(label - 0.5) / tau], dtype=torch.float64, requires_grad=True)
    at(optimum, tau=tau, soft_labels=torch.tensor([label], dtype=torch.float64)).loss.sum().backward()
    assert optimum.grad is not None
    assert abs(optimum.grad.item()) < 1e-9
