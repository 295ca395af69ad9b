"""SLiC and its calibration term: numbers, where it stops, and the hinge that it equals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from losses import get, hinge_loss, slic_calibration_loss


def at(chosen: float | Tensor, rejected: float | Tensor, **options: float) -> Tensor:
    """The calibration loss [P] at these log-probs."""
    sides = [torch.as_tensor(side, dtype=torch.float64).reshape(-1) for side in (chosen, rejected)]
    return slic_calibration_loss(*sides, **options).loss


def test_slic_calibration_closed_form() -> None:
    """delta 2.5: log-probs -3 and -4 lead by 1, loss 1.5; -1 and -9 lead by 8, loss 0; -5 and -2 trail by 3, loss 5.5."""
    logps = torch.tensor([[-3.0, -1.0, -5.0], [-4.0, -9.0, -2.0]], dtype=torch.float64)
    out = slic_calibration_loss(*logps, delta=2.5)
    assert out.loss.tolist() == [1.5, 0.0, 5.5]
    assert {key: values.tolist() for key, (values, _) in out.metrics.items()} == {
        "rewards/chosen": [-3.0, -1.0, -5.0], "rewards/rejected": [-4.0, -9.0, -2.0],
        "rewards/margins": [1.0, 8.0, -3.0], "rewards/accuracies": [1.0, 1.0, 0.0],
    }  # fmt: skip


def test_slic_calibration_gradient_is_1_until_the_lead_is_there_and_0_from_then_on() -> None:
    chosen = torch.tensor([-3.0, -1.75, -1.5, -1.25], dtype=torch.float64, requires_grad=True)
    rejected = torch.full((4,), -4.0, dtype=torch.float64, requires_grad=True)
    slic_calibration_loss(chosen, rejected, delta=2.5).loss.sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.tolist() == [-1.0, -1.0, 0.0, 0.0]
    assert rejected.grad.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_slic_calibration_gradcheck() -> None:
    chosen = torch.tensor([-3.0, -1.0, -5.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-4.0, -9.0, -2.0], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda *t: slic_calibration_loss(*t, delta=2.5).loss, (chosen, rejected))


@settings(max_examples=15)
@given(st.floats(-30, 0), st.floats(-30, 0), st.floats(0.1, 5), st.floats(-10, 10))
def test_slic_calibration_is_delta_times_a_hinge_without_reference(
    chosen: float, rejected: float, delta: float, shift: float
) -> None:
    """max(0, delta - d) = delta max(0, 1 - d/delta); delta at equality; a shift of both sides does nothing."""
    zero = torch.zeros(1, dtype=torch.float64)
    hinge = hinge_loss(zero + chosen, zero + rejected, zero, zero, beta=1 / delta).loss
    torch.testing.assert_close(at(chosen, rejected, delta=delta), delta * hinge, rtol=1e-9, atol=1e-12)
    assert at(chosen, chosen, delta=delta).item() == pytest.approx(delta)
    shifted = at(chosen + shift, rejected + shift, delta=delta)
    torch.testing.assert_close(shifted, at(chosen, rejected, delta=delta), rtol=0, atol=1e-12)


@settings(max_examples=15)
@given(*[st.floats(-30, 0)] * 4)
def test_slic_calibration_is_convex(a: float, b: float, c: float, d: float) -> None:
    assert (at((a + c) / 2, (b + d) / 2) <= (at(a, b) + at(c, d)) / 2 + 1e-12).all()


def test_slic_defaults_and_terms() -> None:
    bound = get("slic").bind()
    assert bound.hyper == {"delta": 1.0, "nll_coef": 0.1}
    assert [(term.name, term.coefficient) for term in bound.terms] == [("slic_calibration", 1.0), ("sft", 0.1)]
    assert get("slic_calibration").bind().hyper == {"delta": 1.0}


def test_slic_closed_form() -> None:
    """delta 2.5, nll_coef 0.3: calibration (1.5 + 0)/2 as above, likelihood of tokens (-2, -1) and (-1) 4/3."""
    tokens = torch.tensor([[-2.0, -1.0], [-1.0, 0.0]], dtype=torch.float64)
    loss = get("slic").bind(delta=2.5, nll_coef=0.3)
    out = loss({
        "policy_chosen_token_logps": tokens, "policy_chosen_logps": tokens.sum(-1),
        "policy_rejected_logps": torch.tensor([-4.0, -9.0], dtype=torch.float64), "chosen_mask": torch.tensor([[1, 1], [1, 0]]),
    })  # fmt: skip
    objective = sum(term.coefficient * out[term.name].mean() for term in loss.terms)
    assert math.isclose(objective.item(), 1.5 / 2 + 0.3 * 4 / 3, abs_tol=1e-12)


def test_slic_without_its_likelihood_is_its_calibration() -> None:
    assert get("slic").bind(nll_coef=0.0).needs == {"policy_chosen_logps", "policy_rejected_logps"}
