"""Bradley-Terry: closed form, shifts, margins, centring, labels."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from losses import bradley_terry_loss, get


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_bradley_terry_closed_form() -> None:
    """Rewards 2 and 1, margin 1, centring 0.1: log 2 + 0.1*(2 + 1)^2 = log 2 + 0.9."""
    out = bradley_terry_loss(tensor(2.0), tensor(1.0), tensor(1.0), center_coef=0.1)
    assert out.mean().item() == pytest.approx(math.log(2) + 0.9)
    assert out.metrics["rewards/accuracies"][0].item() == 1.0


@given(st.floats(-10, 10), st.floats(-10, 10), st.floats(-100, 100))
def test_bradley_terry_ignores_a_shift_until_it_is_centred(chosen: float, rejected: float, shift: float) -> None:
    here = bradley_terry_loss(tensor(chosen), tensor(rejected)).loss
    moved = bradley_terry_loss(tensor(chosen + shift), tensor(rejected + shift)).loss
    torch.testing.assert_close(here, moved, rtol=1e-9, atol=1e-9)
    centred = bradley_terry_loss(tensor(chosen), tensor(rejected), center_coef=0.5).loss
    assert (centred - here).item() == pytest.approx(0.5 * (chosen + rejected) ** 2, abs=1e-9)


@given(st.floats(0.02, 0.98))
def test_bradley_terry_soft_label_minimum_is_its_logit(label: float) -> None:
    """-p log sigma(x) - (1-p) log sigma(-x) has its minimum at x = log(p/(1-p))."""
    chosen = tensor(math.log(label / (1 - label))).requires_grad_()
    bradley_terry_loss(chosen, tensor(0.0), soft_labels=tensor(label)).mean().backward()
    assert chosen.grad is not None
    assert abs(chosen.grad.item()) < 1e-12


def test_bradley_terry_soft_label_0_swaps_the_pair_and_keeps_the_margin() -> None:
    chosen, rejected, margins = tensor(0.3, -1.0), tensor(1.1, 0.4), tensor(0.5, 2.0)
    swapped = bradley_terry_loss(rejected, chosen, margins).loss
    torch.testing.assert_close(bradley_terry_loss(chosen, rejected, margins, tensor(0.0, 0.0)).loss, swapped)


def test_bradley_terry_gradcheck_and_sign() -> None:
    chosen, rejected = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    margins, labels = torch.rand(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    assert gradcheck(lambda c, r: bradley_terry_loss(c, r, margins, labels, center_coef=0.1).loss, (chosen, rejected))
    bradley_terry_loss(chosen, rejected, margins).loss.sum().backward()
    assert chosen.grad is not None
    assert (chosen.grad < 0).all()
    torch.testing.assert_close(rejected.grad, -chosen.grad)


def test_bradley_terry_soft_labels_and_margins_together() -> None:
    """x = 1.5 - 0.25, m = 0.5, p = 0.7: -0.7 log sigma(0.75) - 0.3 log sigma(-1.75); rewards do not hold the margin."""
    out = bradley_terry_loss(tensor(1.5), tensor(0.25), tensor(0.5), tensor(0.7))
    expected = 0.7 * math.log1p(math.exp(-0.75)) + 0.3 * math.log1p(math.exp(1.75))
    assert out.mean().item() == pytest.approx(expected)
    rewards = {key: values.item() for key, (values, _) in out.metrics.items()}
    assert rewards == {"rewards/chosen": 1.5, "rewards/rejected": 0.25, "rewards/margins": 1.25, "rewards/accuracies": 1.0}


def test_bradley_terry_is_not_centred_by_default_and_a_mean_over_pairs() -> None:
    assert get("bradley_terry").bind().hyper == {"center_coef": 0.0}
    out = bradley_terry_loss(tensor(5.0, 3.0), tensor(5.0, 2.0))
    assert out.mean().item() == pytest.approx((math.log(2) + math.log1p(math.exp(-1))) / 2)


def test_bradley_terry_centring_pulls_the_sum_of_rewards_to_0() -> None:
    """Gradients -sigma(-x) + 2c(r_w + r_l) and sigma(-x) + 2c(r_w + r_l)."""
    chosen, rejected = tensor(2.0).requires_grad_(), tensor(1.0).requires_grad_()
    bradley_terry_loss(chosen, rejected, center_coef=1.0).mean().backward()
    share = 1 / (1 + math.e)
    torch.testing.assert_close(chosen.grad, tensor(6 - share))
    torch.testing.assert_close(rejected.grad, tensor(6 + share))
