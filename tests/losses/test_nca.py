"""NCA on four numbers, each completion by itself, and where its optimum is."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from losses import LossOutput, bco_pair_loss, get, nca_loss


def at(chosen: float | Tensor, rejected: float | Tensor = 0.0) -> LossOutput:
    """NCA at rewards `chosen` and `rejected` (beta 1)."""
    rewards = [torch.as_tensor(reward, dtype=torch.float64).reshape(-1) for reward in (chosen, rejected)]
    return nca_loss(*rewards, *map(torch.zeros_like, rewards), beta=1.0)


def test_nca_closed_form() -> None:
    """beta 0.5; log-ratios 1.5 and -0.5: rewards 0.75 and -0.25.

    log(1 + e^-0.75) + log(1 + e^0.75)/2 + log(1 + e^-0.25)/2.
    """
    tensors = [torch.tensor([x], dtype=torch.float64) for x in (-1.0, -4.0, -2.5, -3.5)]
    out = nca_loss(*tensors, beta=0.5)
    expected = math.log(1 + math.exp(-0.75)) + math.log(1 + math.exp(0.75)) / 2 + math.log(1 + math.exp(-0.25)) / 2
    assert out.loss.tolist() == pytest.approx([expected], abs=1e-12)
    assert out.weight.tolist() == [1.0]
    rewards = {key: values.item() for key, (values, _) in out.metrics.items()}
    assert rewards == {"rewards/chosen": 0.75, "rewards/rejected": -0.25, "rewards/margins": 1.0, "rewards/accuracies": 1.0}


def test_nca_defaults() -> None:
    assert {flag: hyper.default for flag, hyper in get("nca").hyper.items()} == {"beta": 0.1}


def test_nca_gradient() -> None:
    """dL/dr_w = -sigma(-r_w) + sigma(r_w)/2, of either sign; dL/dr_l = sigma(r_l)/2: rejected always falls."""
    tensors = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert gradcheck(lambda *t: nca_loss(*t, beta=0.7).loss, tensors)
    nca_loss(*tensors, beta=0.7).loss.sum().backward()
    chosen, rejected, reference_chosen, reference_rejected = (tensor.detach() for tensor in tensors)
    chosen_rewards, rejected_rewards = 0.7 * (chosen - reference_chosen), 0.7 * (rejected - reference_rejected)
    torch.testing.assert_close(tensors[0].grad, 0.7 * (torch.sigmoid(chosen_rewards) / 2 - torch.sigmoid(-chosen_rewards)))
    torch.testing.assert_close(tensors[1].grad, 0.7 * torch.sigmoid(rejected_rewards) / 2)


def test_nca_is_2_log_2_when_the_policy_is_the_reference() -> None:
    assert at(0.0).loss.item() == pytest.approx(2 * math.log(2), abs=1e-15)


def test_nca_holds_the_chosen_completion_at_log_2() -> None:
    """sigma(r) = 2/3 where sigma(-r) = sigma(r)/2: r = log 2, whatever the rejected one; below it rises, above it falls."""
    rewards = torch.tensor([math.log(2) - 0.1, math.log(2), math.log(2) + 0.1], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(at(rewards, torch.tensor([-3.0, 0.0, 5.0])).loss.sum(), rewards)
    assert slope[0] < 0 < slope[2]
    assert abs(slope[1].item()) < 1e-15
    assert at(math.log(2), -800.0).loss.item() == pytest.approx(1.5 * math.log(3) - math.log(2)), "log(3/2) + log(3)/2"


@given(st.floats(-20, 20), st.floats(-20, 20))
def test_nca_is_separable_and_half_a_swap_away_from_bco_pair(chosen: float, rejected: float) -> None:
    """L(a, b) + L(0, 0) = L(a, 0) + L(0, b): no term has both. L = bco_pair + (log sigma(-r_l) - log sigma(-r_w)) / 2."""
    together, apart = at(chosen, rejected).loss + at(0.0).loss, at(chosen).loss + at(0.0, rejected).loss
    assert together.item() == pytest.approx(apart.item(), abs=1e-9)
    zero = torch.zeros(1, dtype=torch.float64)
    bco = bco_pair_loss(zero + chosen, zero + rejected, zero, zero, beta=1.0).loss.item()
    half = (math.log1p(math.exp(chosen)) - math.log1p(math.exp(rejected))) / 2
    assert at(chosen, rejected).loss.item() == pytest.approx(bco + half, abs=1e-9)


@given(*(st.floats(-20, 20) for _ in range(4)))
def test_nca_is_convex(chosen: float, rejected: float, other_chosen: float, other_rejected: float) -> None:
    middle = at((chosen + other_chosen) / 2, (rejected + other_rejected) / 2).loss.item()
    assert middle <= (at(chosen, rejected).loss.item() + at(other_chosen, other_rejected).loss.item()) / 2 + 1e-9
