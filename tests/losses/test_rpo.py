"""RPO is DPO plus a token mean: numbers, gradient, and what the likelihood is there for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from losses import dpo_loss, get, sft_loss


def tensors_of(chosen_tokens: Tensor, rejected_logps: Tensor, **more: Tensor) -> dict[str, Tensor]:
    """Two pairs: the chosen completions have three tokens and one."""
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    return {
        "policy_chosen_token_logps": chosen_tokens,
        "policy_chosen_logps": (chosen_tokens * mask).sum(-1),
        "policy_rejected_logps": rejected_logps,
        "reference_chosen_logps": torch.tensor([-8.0, -5.0], dtype=torch.float64),
        "reference_rejected_logps": torch.tensor([-3.0, -5.0], dtype=torch.float64),
        "chosen_mask": mask,
        **more,
    }


CHOSEN = torch.tensor([[-1.0, -2.0, -3.0], [-6.0, 0.0, 0.0]], dtype=torch.float64)
REJECTED = torch.tensor([-4.0, -5.5], dtype=torch.float64)


def objective(tensors: dict[str, Tensor], **options: float) -> Tensor:
    loss = get("rpo").bind(**options)
    outputs = loss(tensors)
    return sum((term.coefficient * outputs[term.name].mean() for term in loss.terms), torch.zeros(()))


def test_rpo_closed_form() -> None:
    """beta 0.5, smoothing 0.2, nll_coef 0.25.

    Log-ratios (2, -1) chosen and (-1, -0.5) rejected: margins 1.5 and -0.25. Likelihood 12/4 = 3, not (2 + 6)/2.
    """

    def smoothed(margin: float) -> float:
        return 0.8 * math.log(1 + math.exp(-margin)) + 0.2 * math.log(1 + math.exp(margin))

    got = objective(tensors_of(CHOSEN, REJECTED), beta=0.5, label_smoothing=0.2, nll_coef=0.25)
    assert got.item() == pytest.approx((smoothed(1.5) + smoothed(-0.25)) / 2 + 0.25 * 3, abs=1e-12)


def test_rpo_defaults_and_terms() -> None:
    bound = get("rpo").bind()
    assert bound.hyper == {"beta": 0.1, "label_smoothing": 0.0, "nll_coef": 1.0}
    assert [(term.name, term.coefficient) for term in bound.terms] == [("dpo", 1.0), ("sft", 1.0)]


def test_rpo_terms_are_dpo_and_sft() -> None:
    labels = torch.tensor([0.7, 0.2], dtype=torch.float64)
    tensors = tensors_of(CHOSEN, REJECTED, soft_labels=labels)
    out = get("rpo").bind(beta=0.3)(tensors)
    names = ("policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps", "reference_rejected_logps")
    torch.testing.assert_close(out["dpo"].loss, dpo_loss(*(tensors[name] for name in names), labels, beta=0.3).loss)
    torch.testing.assert_close(out["sft"].mean(), sft_loss(CHOSEN, tensors["chosen_mask"]).mean())


def test_rpo_without_its_likelihood_is_dpo_and_needs_no_tokens() -> None:
    bound = get("rpo").bind(nll_coef=0.0)
    assert bound.needs == get("dpo").bind().needs
    assert [term.name for term in bound.terms] == ["dpo"]


def test_rpo_gradcheck() -> None:
    leaves = (CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_())
    assert gradcheck(lambda c, r: objective(tensors_of(c, r), beta=0.6, nll_coef=0.3), leaves)


def test_rpo_still_raises_the_chosen_completions_when_the_pairs_are_won() -> None:
    """DPO's push dies out with the margin and nll_coef/4 a token stays; the rejected side feels DPO alone."""
    chosen = CHOSEN.clone().requires_grad_()
    rejected = (REJECTED - 1e4).requires_grad_()
    tensors = tensors_of(chosen, rejected)
    objective(tensors, nll_coef=0.3).backward()
    torch.testing.assert_close(chosen.grad, -0.3 / 4 * tensors["chosen_mask"].double())
    assert not rejected.grad.any()
