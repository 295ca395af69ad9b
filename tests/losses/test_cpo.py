"""CPO and its contrastive term: numbers, gradient, labels, and DPO with a constant reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from losses import LossOutput, cpo_preference_loss, dpo_loss, get, sft_loss


def pair(margin: float | Tensor, **options: float | Tensor) -> LossOutput:
    """The contrastive term where the chosen completion leads by `margin` nats."""
    chosen = torch.as_tensor(margin, dtype=torch.float64).reshape(-1)
    return cpo_preference_loss(chosen, torch.zeros_like(chosen), **options)


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


def test_cpo_preference_closed_form() -> None:
    """beta 0.5, log-probs -1 and -4: margin 1.5. Label 0.7 and smoothing 0.1 make the label 0.7*0.9 + 0.3*0.1 = 0.66."""
    chosen, rejected = (torch.tensor([x], dtype=torch.float64) for x in (-1.0, -4.0))
    out = cpo_preference_loss(chosen, rejected, beta=0.5)
    assert out.loss.item() == pytest.approx(softplus(-1.5), abs=1e-12)
    assert {key: values.item() for key, (values, _) in out.metrics.items()} == {
        "rewards/chosen": -0.5, "rewards/rejected": -2.0, "rewards/margins": 1.5, "rewards/accuracies": 1.0,
    }  # fmt: skip
    label = torch.tensor([0.7], dtype=torch.float64)
    labelled = cpo_preference_loss(chosen, rejected, label, beta=0.5, label_smoothing=0.1)
    assert labelled.loss.item() == pytest.approx(0.66 * softplus(-1.5) + 0.34 * softplus(1.5), abs=1e-12)


def test_cpo_preference_gradient() -> None:
    """dL/d(chosen) = -beta sigma(-margin), the rejected side's opposite."""
    chosen, rejected = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    labels = torch.rand(4, dtype=torch.float64)
    assert gradcheck(lambda *t: cpo_preference_loss(*t, labels, beta=0.7, label_smoothing=0.1).loss, (chosen, rejected))
    cpo_preference_loss(chosen, rejected, beta=0.3).loss.sum().backward()
    expected = -0.3 * torch.sigmoid(-0.3 * (chosen - rejected)).detach()
    torch.testing.assert_close(chosen.grad, expected)
    torch.testing.assert_close(rejected.grad, -expected)


@settings(max_examples=15)
@given(st.floats(-20, 20), st.floats(0.01, 2), st.floats(0, 1), st.floats(0, 0.49))
def test_cpo_preference_is_dpo_with_a_constant_reference(shift: float, beta: float, label: float, smoothing: float) -> None:
    """The reference may be any number that all completions share."""
    logps = torch.linspace(-6, 0, 5, dtype=torch.float64), torch.linspace(-1, -7, 5, dtype=torch.float64)
    labels, constant = (torch.full((5,), x, dtype=torch.float64) for x in (label, shift))
    options = {"beta": beta, "label_smoothing": smoothing}
    dpo = dpo_loss(*logps, constant, constant, labels, **options)
    torch.testing.assert_close(cpo_preference_loss(*logps, labels, **options).loss, dpo.loss)


@settings(max_examples=15)
@given(st.floats(-50, 50), st.floats(0.01, 2))
def test_cpo_preference_limits(margin: float, beta: float) -> None:
    """log 2 for equals, L(d) - L(-d) = -beta d, falling in d."""
    assert pair(0.0, beta=beta).loss.item() == pytest.approx(math.log(2))
    difference = pair(margin, beta=beta).loss - pair(-margin, beta=beta).loss
    assert difference.item() == pytest.approx(-beta * margin, abs=1e-9)
    assert pair(margin + 1, beta=beta).loss.item() < pair(margin, beta=beta).loss.item()


def test_cpo_preference_smoothing_minimum() -> None:
    """sigma(beta d) = 1 - e."""
    margin = torch.tensor([math.log(0.8 / 0.2) / 0.1], dtype=torch.float64, requires_grad=True)
    pair(margin, label_smoothing=0.2).loss.sum().backward()
    assert margin.grad is not None
    assert margin.grad.abs().item() < 1e-15


def test_cpo_preference_label_smoothing_out_of_range_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"cpo_preference_loss: label_smoothing is 0.5, expected .* in \[0, 0.5\)"):
        pair(1.0, label_smoothing=0.5)


def test_cpo_defaults_and_terms() -> None:
    bound = get("cpo").bind()
    assert bound.hyper == {"beta": 0.1, "label_smoothing": 0.0, "nll_coef": 1.0}
    assert [(term.name, term.coefficient) for term in bound.terms] == [("cpo_preference", 1.0), ("sft", 1.0)]
    assert get("cpo_preference").bind().hyper == {"beta": 0.1, "label_smoothing": 0.0}


def test_cpo_closed_form() -> None:
    """beta 0.5, nll_coef 0.25; chosen tokens (-1, -2, -3) and (-6), rejected sums -8 and -5.

    Margins 0.5*(-6 + 8) = 1 and 0.5*(-6 + 5) = -0.5; likelihood 12/4 = 3.
    """
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    tokens = torch.tensor([[-1.0, -2.0, -3.0], [-6.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-8.0, -5.0], dtype=torch.float64, requires_grad=True)
    loss = get("cpo").bind(beta=0.5, nll_coef=0.25)
    tensors = {
        "policy_chosen_token_logps": tokens, "policy_chosen_logps": tokens.sum(-1),
        "policy_rejected_logps": rejected, "chosen_mask": mask,
    }  # fmt: skip
    out = loss(tensors)
    objective = sum(term.coefficient * out[term.name].mean() for term in loss.terms)
    assert objective.item() == pytest.approx((softplus(-1) + softplus(0.5)) / 2 + 0.25 * 3, abs=1e-12)
    torch.testing.assert_close(out["sft"].mean(), sft_loss(tokens, mask).mean())
    objective.backward()
    push = 0.25 * torch.sigmoid(torch.tensor([-1.0, 0.5], dtype=torch.float64))  # beta/P sigma(-margin)
    torch.testing.assert_close(tokens.grad * mask, (-push[:, None] - 0.25 / 4) * mask)
    torch.testing.assert_close(rejected.grad, push)


def test_cpo_without_its_likelihood_is_its_contrastive_term() -> None:
    bound = get("cpo").bind(nll_coef=0.0)
    assert [term.name for term in bound.terms] == ["cpo_preference"]
    assert bound.needs == {"policy_chosen_logps", "policy_rejected_logps"}
