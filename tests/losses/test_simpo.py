"""SimPO on numbers, its gradient per token, what gamma does, and what it becomes on equal lengths."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from losses import LossOutput, cpo_preference_loss, get, simpo_loss


def at(chosen: float | Tensor, rejected: float | Tensor, **options: float) -> LossOutput:
    """SimPO at these mean log-probs, completions of one token."""
    sides = [torch.as_tensor(side, dtype=torch.float64).reshape(-1) for side in (chosen, rejected)]
    return simpo_loss(*sides, *map(torch.ones_like, sides), **options)


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


def test_simpo_closed_form() -> None:
    """-6 over 4 tokens and -5 over 2, beta 3, gamma 0.75: margin 3*(-1.5 + 2.5) - 0.75 = 2.25; rewards are without gamma."""
    tensors = [torch.tensor([x], dtype=torch.float64) for x in (-6.0, -5.0, 4.0, 2.0)]
    out = simpo_loss(*tensors, beta=3.0, gamma=0.75)
    assert out.loss.item() == pytest.approx(softplus(-2.25), abs=1e-12)
    assert {key: values.item() for key, (values, _) in out.metrics.items()} == {
        "rewards/chosen": -4.5, "rewards/rejected": -7.5, "rewards/margins": 3.0, "rewards/accuracies": 1.0,
    }  # fmt: skip
    smoothed = simpo_loss(*tensors, beta=3.0, gamma=0.75, label_smoothing=0.2)
    assert smoothed.loss.item() == pytest.approx(0.8 * softplus(-2.25) + 0.2 * softplus(2.25), abs=1e-12)


def test_simpo_defaults() -> None:
    assert get("simpo").bind().hyper == {"beta": 2.0, "gamma": 0.5, "label_smoothing": 0.0}


def test_simpo_gradient_is_shared_by_the_tokens() -> None:
    """dL/d(chosen) = -beta sigma(-margin)/|y_w|, dL/d(rejected) = beta sigma(-margin)/|y_l|."""
    chosen, rejected = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    lengths = torch.tensor([[1, 4, 2, 7], [3, 1, 5, 2]])
    for smoothing in (0.0, 0.2):
        options = {"beta": 0.7, "gamma": 0.4, "label_smoothing": smoothing}
        assert gradcheck(lambda c, r, options=options: simpo_loss(c, r, *lengths, **options).loss, (chosen, rejected))
    loss = simpo_loss(chosen, rejected, *lengths, beta=0.7, gamma=0.4).loss
    loss.sum().backward()
    push = 0.7 * -torch.expm1(-loss.detach())  # sigma(-m) = 1 - exp(-L)
    torch.testing.assert_close(chosen.grad, -push / lengths[0])
    torch.testing.assert_close(rejected.grad, push / lengths[1])


@settings(max_examples=15)
@given(st.floats(-20, 0), st.floats(0, 5))
def test_simpo_of_equals_is_above_log_2_by_gamma(mean_logp: float, gamma: float) -> None:
    """A pair is even only when the chosen completion leads by gamma/beta."""
    assert at(mean_logp, mean_logp, gamma=gamma).loss.item() == pytest.approx(softplus(gamma))
    even = at(mean_logp + gamma / 4, mean_logp, beta=4.0, gamma=gamma)
    assert even.loss.item() == pytest.approx(math.log(2))


@settings(max_examples=15)
@given(st.integers(1, 9), st.integers(0, 2**31))
def test_simpo_on_equal_lengths_is_the_term_of_cpo_with_another_beta(length: int, seed: int) -> None:
    """Without gamma: averages of n tokens with beta are sums with beta/n."""
    logps = -9 * torch.rand(2, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    lengths = torch.full((5,), length)
    cpo = cpo_preference_loss(*logps, beta=3.0 / length, label_smoothing=0.1)
    torch.testing.assert_close(simpo_loss(*logps, lengths, lengths, beta=3.0, gamma=0.0, label_smoothing=0.1).loss, cpo.loss)


@settings(max_examples=15)
@given(st.floats(-20, 0), st.floats(-20, 0), st.integers(1, 9), st.integers(1, 9))
def test_simpo_sees_means_alone(chosen: float, rejected: float, chosen_length: int, rejected_length: int) -> None:
    lengths = torch.tensor([[chosen_length], [rejected_length]])
    sums = torch.tensor([[chosen], [rejected]], dtype=torch.float64) * lengths
    torch.testing.assert_close(simpo_loss(*sums, *lengths).loss, at(chosen, rejected).loss)


@settings(max_examples=15)
@given(st.floats(-20, 20), st.floats(-20, 20), st.floats(0, 2))
def test_simpo_is_convex_and_falls_with_the_margin(a: float, b: float, gamma: float) -> None:
    loss = at(torch.tensor([a, b, (a + b) / 2, a + 0.1]), torch.zeros(4), gamma=gamma).loss
    assert loss[2] <= (loss[0] + loss[1]) / 2 + 1e-12
    assert loss[3] < loss[0]


def test_simpo_label_smoothing_out_of_range_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"simpo_loss: label_smoothing is 0.5, expected .* in \[0, 0.5\)"):
        at(-1.0, -2.0, label_smoothing=0.5)
