"""DPOP on four numbers, when it is DPO, and how much harder it holds a chosen completion."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from losses import dpo_loss, dpop_loss, get

LOG_RATIO = st.floats(-10, 10)


def at(chosen: float, rejected: float, **options: float) -> float:
    """DPOP at two log-ratios (beta 1)."""
    zero = torch.zeros(1, dtype=torch.float64)
    return dpop_loss(zero + chosen, zero + rejected, zero, zero, beta=1.0, **options).loss.item()


def dpo_at(chosen: float, rejected: float) -> float:
    zero = torch.zeros(1, dtype=torch.float64)
    return dpo_loss(zero + chosen, zero + rejected, zero, zero, beta=1.0).loss.item()


def test_dpop_closed_form() -> None:
    """beta 0.5, penalty 4; log-ratios -1.5 and -3.5: margin 0.5*(-1.5 + 3.5 - 4*1.5) = -2, loss log(1 + e^2).

    The rewards are those of the log-ratios, the penalty is none: -0.75, -1.75, margin 1.
    """
    tensors = [torch.tensor([x], dtype=torch.float64) for x in (-4.0, -8.0, -2.5, -4.5)]
    out = dpop_loss(*tensors, beta=0.5, penalty=4.0)
    assert out.loss.tolist() == pytest.approx([math.log(1 + math.exp(2))], abs=1e-12)
    assert out.weight.tolist() == [1.0]
    rewards = {key: values.item() for key, (values, _) in out.metrics.items()}
    assert rewards == {"rewards/chosen": -0.75, "rewards/rejected": -1.75, "rewards/margins": 1.0, "rewards/accuracies": 1.0}


def test_dpop_defaults() -> None:
    assert {flag: hyper.default for flag, hyper in get("dpop").hyper.items()} == {"beta": 0.3, "penalty": 50.0}


def test_dpop_gradient() -> None:
    """dL/dC = -beta (1 + penalty [C < 0]) sigma(-m), dL/dR = beta sigma(-m): rejected gets DPO's share of the margin."""
    values = ([-4.0, -1.0], [-8.0, -3.0], [-2.5, -1.5], [-4.5, -2.0])
    tensors = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in values]
    assert gradcheck(lambda *t: dpop_loss(*t, beta=0.5, penalty=4.0).loss, tensors)
    dpop_loss(*tensors, beta=0.5, penalty=4.0).loss.sum().backward()
    margin = torch.tensor([-2.0, 0.75], dtype=torch.float64)
    pull = 0.5 * torch.sigmoid(-margin)
    torch.testing.assert_close(tensors[0].grad, -pull * torch.tensor([5.0, 1.0]))
    torch.testing.assert_close(tensors[1].grad, pull)


@given(LOG_RATIO, LOG_RATIO, st.floats(0, 100))
def test_dpop_is_dpo_on_the_penalised_chosen_completion(chosen: float, rejected: float, penalty: float) -> None:
    """The same above the reference and without a penalty, never below DPO elsewhere."""
    penalised = chosen if chosen >= 0 else chosen * (1 + penalty)
    assert at(chosen, rejected, penalty=penalty) == pytest.approx(dpo_at(penalised, rejected), abs=1e-9)
    assert at(chosen, rejected, penalty=0.0) == pytest.approx(dpo_at(chosen, rejected), abs=1e-12)
    assert at(chosen, rejected, penalty=penalty) >= dpo_at(chosen, rejected) - 1e-9


def test_dpop_at_the_reference_has_the_value_and_gradient_of_dpo() -> None:
    """log 2, and the kink belongs to the side without penalty: training starts as DPO."""
    chosen: Tensor = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    loss = dpop_loss(chosen, zero, zero, zero, beta=0.5).loss
    assert loss.item() == pytest.approx(math.log(2), abs=1e-15)
    (slope,) = torch.autograd.grad(loss.sum(), chosen)
    assert slope.item() == -0.25


@given(LOG_RATIO, LOG_RATIO, st.floats(0.1, 5))
def test_dpop_pays_for_lowering_both(chosen: float, rejected: float, shift: float) -> None:
    """DPO sees only the difference of log-ratios; with the penalty a common fall below the reference costs."""
    assert at(chosen, rejected, penalty=0.0) == pytest.approx(at(chosen - shift, rejected - shift, penalty=0.0), abs=1e-9)
    below = min(chosen, 0.0)
    assert at(below - shift, rejected - shift, penalty=2.0) > at(below, rejected, penalty=2.0)


@given(*(LOG_RATIO for _ in range(4)))
def test_dpop_is_convex(chosen: float, rejected: float, other_chosen: float, other_rejected: float) -> None:
    middle = at((chosen + other_chosen) / 2, (rejected + other_rejected) / 2, penalty=3.0)
    assert middle <= (at(chosen, rejected, penalty=3.0) + at(other_chosen, other_rejected, penalty=3.0)) / 2 + 1e-9
