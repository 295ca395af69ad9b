"""Unlikelihood training and its term on rejected tokens: numbers, gradient, the cut near probability 1, padding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from losses import get, sft_loss, unlikelihood_rejected_loss
from losses.ops import MIN_NEGATIVE

ONE = torch.ones(1, 1, dtype=torch.float64)


def of_probability(p: float) -> float:
    return unlikelihood_rejected_loss(math.log(p) * ONE, ONE).mean().item()


def test_unlikelihood_rejected_is_a_mean_over_tokens() -> None:
    """Probabilities 1/2, 3/4 and 1/5: log 2, log 4 and log 5/4 over three tokens, not the mean of means; padding, at
    probability 1, does not count."""
    logps = torch.tensor([[1 / 2, 3 / 4], [1 / 5, 1.0]], dtype=torch.float64).log()
    for mask in (torch.tensor([[1.0, 1.0], [1.0, 0.0]]), torch.tensor([[True, True], [True, False]])):
        out = unlikelihood_rejected_loss(logps, mask)
        expected = [math.log(2), math.log(4), math.log(5 / 4)]
        assert out.loss[mask.bool()].tolist() == pytest.approx(expected, abs=1e-12)
        assert out.mean().item() == pytest.approx(sum(expected) / 3, abs=1e-12)
        values, weight = out.metrics["unlikelihood"]
        assert torch.equal(values, out.loss)
        assert weight.tolist() == mask.double().tolist()


def test_unlikelihood_rejected_gradient_is_the_odds() -> None:
    """d/d(log p) of -log(1 - p) is p/(1 - p): every rejected token falls, likely ones faster; padding gets nothing."""
    probabilities = torch.tensor([[1 / 2, 3 / 4], [1 / 5, 1.0]], dtype=torch.float64)
    logps = probabilities.log().requires_grad_()
    unlikelihood_rejected_loss(logps, torch.tensor([[1, 1], [1, 0]])).mean().backward()
    torch.testing.assert_close(logps.grad, torch.tensor([[1.0, 3.0], [0.25, 0.0]], dtype=torch.float64) / 3)
    leaf = (-0.05 - torch.rand(2, 3, dtype=torch.float64)).requires_grad_()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert gradcheck(lambda t: unlikelihood_rejected_loss(t, mask).mean(), leaf)


def test_unlikelihood_rejected_does_not_see_what_stands_in_padding() -> None:
    logps = torch.tensor([[-1.0, float("nan")]], dtype=torch.float64, requires_grad=True)
    loss = unlikelihood_rejected_loss(logps, torch.tensor([[1, 0]])).mean()
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(1 - math.exp(-1)))
    assert logps.grad is not None
    assert logps.grad[0, 1] == 0


def test_unlikelihood_rejected_is_flat_above_its_cut() -> None:
    logps = torch.tensor([[-2 * MIN_NEGATIVE, -MIN_NEGATIVE / 2, 0.0]], dtype=torch.float64, requires_grad=True)
    out = unlikelihood_rejected_loss(logps, torch.ones(1, 3))
    out.loss.sum().backward()
    assert out.loss[0].tolist() == pytest.approx([-math.log(2e-6), -math.log(1e-6), -math.log(1e-6)], abs=1e-5)
    assert logps.grad is not None
    assert logps.grad[0, 0].item() == pytest.approx(1 / 2e-6, rel=1e-5)
    assert logps.grad[0, 1:].tolist() == [0.0, 0.0]


@settings(max_examples=15)
@given(st.floats(1e-6, 0.999), st.floats(1e-6, 0.999))
def test_unlikelihood_rejected_is_positive_and_convex_and_rises_with_the_log_prob(p: float, q: float) -> None:
    low, high = sorted((p, q))
    assert 0 < of_probability(low) <= of_probability(high)
    middle = of_probability(math.sqrt(low * high))  # halfway between the log-probs
    assert middle <= (of_probability(low) + of_probability(high)) / 2 + 1e-12


def test_unlikelihood_rejected_vanishes_with_the_probability() -> None:
    assert of_probability(1e-12) == pytest.approx(1e-12)


def test_unlikelihood_defaults_and_terms() -> None:
    bound = get("unlikelihood").bind()
    assert bound.hyper == {"coef": 1.0}
    assert [(term.name, term.coefficient) for term in bound.terms] == [("sft", 1.0), ("unlikelihood_rejected", 1.0)]
    assert get("unlikelihood").bind(coef=0.0).needs == get("sft").bind().needs


def test_unlikelihood_closed_form() -> None:
    """coef 0.4: chosen tokens 1/2, 1/4 and 1/8 have likelihood 6 log 2/3, rejected 1/2 and 3/4 unlikelihood 3 log 2/2."""
    chosen = torch.tensor([[1 / 2, 1 / 4], [1 / 8, 1.0]], dtype=torch.float64).log().requires_grad_()
    rejected = torch.tensor([[1 / 2, 1.0], [3 / 4, 1.0]], dtype=torch.float64).log().requires_grad_()
    masks = torch.tensor([[[1, 1], [1, 0]], [[1, 0], [1, 0]]])
    loss = get("unlikelihood").bind(coef=0.4)
    out = loss({
        "policy_chosen_token_logps": chosen, "chosen_mask": masks[0],
        "policy_rejected_token_logps": rejected, "rejected_mask": masks[1],
    })  # fmt: skip
    objective = sum(term.coefficient * out[term.name].mean() for term in loss.terms)
    assert objective.item() == pytest.approx((2 + 0.4 * 1.5) * math.log(2), abs=1e-12)
    torch.testing.assert_close(out["sft"].mean(), sft_loss(chosen, masks[0]).mean())
    objective.backward()
    torch.testing.assert_close(chosen.grad, -masks[0].double() / 3)
    torch.testing.assert_close(rejected.grad, 0.4 / 2 * torch.tensor([[1.0, 0.0], [3.0, 0.0]], dtype=torch.float64))
