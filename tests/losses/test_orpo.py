"""ORPO and its odds ratio: numbers, gradient, the cut near probability 1, and its limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from losses import LossOutput, cpo_preference_loss, get, odds_ratio_loss
from losses.ops import MIN_NEGATIVE


def at(chosen: float | Tensor, rejected: float | Tensor) -> LossOutput:
    """The odds ratio at these mean log-probs, completions of one token."""
    sides = [torch.as_tensor(side, dtype=torch.float64).reshape(-1) for side in (chosen, rejected)]
    return odds_ratio_loss(*sides, *map(torch.ones_like, sides))


def test_odds_ratio_closed_form() -> None:
    """Mean probabilities 1/2 (3 tokens) against 1/4 (2 tokens): odds 1 and 1/3, loss -log(3/(3 + 1)) = log(4/3).

    Then 1/5 (4 tokens) against 3/4 (1 token): odds 1/4 and 3, loss log(1 + 12).
    """
    chosen = torch.tensor([3 * math.log(1 / 2), 4 * math.log(1 / 5)], dtype=torch.float64)
    rejected = torch.tensor([2 * math.log(1 / 4), math.log(3 / 4)], dtype=torch.float64)
    out = odds_ratio_loss(chosen, rejected, torch.tensor([3, 4]), torch.tensor([2, 1]))
    assert out.loss.tolist() == pytest.approx([math.log(4 / 3), math.log(13)], abs=1e-12)
    assert out.metrics["rewards/chosen"][0].tolist() == pytest.approx([0, -math.log(4)])
    assert out.metrics["rewards/rejected"][0].tolist() == pytest.approx([-math.log(3), math.log(3)])
    assert out.metrics["rewards/margins"][0].tolist() == pytest.approx([math.log(3), -math.log(12)])
    assert out.metrics["rewards/accuracies"][0].tolist() == [1.0, 0.0]


def test_odds_ratio_gradient() -> None:
    """d log odds/d log p = 1/(1 - p): dL/d(chosen) = -sigma(-x)/(1 - p_w)/|y_w|, the rejected side's the other way."""
    chosen, rejected = (-0.01 - 5 * torch.rand(4, dtype=torch.float64) for _ in range(2))
    lengths = torch.tensor([[1, 4, 2, 7], [3, 1, 5, 2]])
    leaves = (chosen.requires_grad_(), rejected.requires_grad_())
    assert gradcheck(lambda c, r: odds_ratio_loss(c, r, *lengths).loss, leaves)
    loss = odds_ratio_loss(*leaves, *lengths).loss
    loss.sum().backward()
    push = -torch.expm1(-loss.detach())  # sigma(-x) = 1 - exp(-L)
    slopes = [1 / (1 - (leaf.detach() / n).exp()) / n for leaf, n in zip(leaves, lengths, strict=True)]
    torch.testing.assert_close(chosen.grad, -push * slopes[0])
    torch.testing.assert_close(rejected.grad, push * slopes[1])


@settings(max_examples=15)
@given(st.floats(-12, -0.01), st.floats(-12, -0.01))
def test_odds_ratio_limits(chosen: float, rejected: float) -> None:
    """log 2 for equals; L(w, l) - L(l, w) = log odds(y_l) - log odds(y_w); a likelier chosen completion lowers it."""
    assert at(chosen, chosen).loss.item() == pytest.approx(math.log(2))
    odds = [logp - math.log(1 - math.exp(logp)) for logp in (chosen, rejected)]
    assert (at(chosen, rejected).loss - at(rejected, chosen).loss).item() == pytest.approx(odds[1] - odds[0], abs=1e-9)
    assert at(chosen + 0.005, rejected).loss.item() < at(chosen, rejected).loss.item()
    assert at(chosen, rejected + 0.005).loss.item() > at(chosen, rejected).loss.item()


def test_odds_ratio_of_unlikely_completions_is_the_ratio_of_probabilities() -> None:
    """1 - p tends to 1, which leaves the term of CPO with beta 1 on mean log-probs."""
    chosen, rejected = torch.tensor([-30.0, -33.0]).double(), torch.tensor([-32.0, -30.5]).double()
    torch.testing.assert_close(at(chosen, rejected).loss, cpo_preference_loss(chosen, rejected, beta=1.0).loss)


def test_odds_ratio_is_flat_above_its_cut() -> None:
    """Mean log-probs -2e-6, -1e-6/2 and 0: odds of half a million to one, then a million to one without gradient."""
    chosen = torch.tensor([-2 * MIN_NEGATIVE, -MIN_NEGATIVE / 2, 0.0], dtype=torch.float64, requires_grad=True)
    out = at(chosen, torch.full((3,), -1.0))
    out.loss.sum().backward()
    odds = out.metrics["rewards/chosen"][0].exp()
    torch.testing.assert_close(odds, torch.tensor([5e5, 1e6, 1e6], dtype=torch.float64), rtol=1e-5, atol=0)
    assert odds[1] == odds[2]
    assert chosen.grad is not None
    assert chosen.grad[0] < 0
    assert chosen.grad[1:].tolist() == [0.0, 0.0]


def test_orpo_defaults_and_terms() -> None:
    bound = get("orpo").bind()
    assert bound.hyper == {"lam": 0.1}
    assert [(term.name, term.coefficient) for term in bound.terms] == [("sft", 1.0), ("odds_ratio", 0.1)]
    assert get("odds_ratio").bind().hyper == {}


def test_orpo_closed_form() -> None:
    """lam 0.4; chosen probabilities (1/2, 1/2) and (1/5), rejected 1/4 and 3/4: likelihood (2 log 2 + log 5)/3, odds ratios
    as above."""
    tokens = torch.tensor([[0.5, 0.5], [0.2, 1.0]], dtype=torch.float64).log()
    mask = torch.tensor([[1, 1], [1, 0]])
    loss = get("orpo").bind(lam=0.4)
    out = loss({
        "policy_chosen_token_logps": tokens, "chosen_mask": mask, "policy_chosen_logps": tokens.sum(-1),
        "policy_rejected_logps": torch.tensor([3 * math.log(1 / 4), math.log(3 / 4)], dtype=torch.float64),
        "chosen_lengths": mask.sum(-1), "rejected_lengths": torch.tensor([3, 1]),
    })  # fmt: skip
    objective = sum(term.coefficient * out[term.name].mean() for term in loss.terms)
    odds_ratio = (math.log(4 / 3) + math.log(13)) / 2
    assert objective.item() == pytest.approx((2 * math.log(2) + math.log(5)) / 3 + 0.4 * odds_ratio, abs=1e-12)


def test_orpo_without_its_odds_ratio_is_sft() -> None:
    assert get("orpo").bind(lam=0.0).needs == get("sft").bind().needs
