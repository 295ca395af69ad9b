"""Hydra's joint SFT: two heads' losses with a denominator each, and what either of them can move."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from losses import bradley_terry_loss, get, sft_loss

TOKENS = torch.tensor([[-1.0, -2.0, -3.0], [-6.0, 0.0, 0.0]], dtype=torch.float64)
CHOSEN = torch.tensor([1.5, -0.25], dtype=torch.float64)
REJECTED = torch.tensor([0.5, 0.25], dtype=torch.float64)


def tensors_of(tokens: Tensor, chosen: Tensor, rejected: Tensor, **more: Tensor) -> dict[str, Tensor]:
    """Two pairs: the chosen completions have three tokens and one."""
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    return {
        "policy_chosen_token_logps": tokens,
        "chosen_mask": mask,
        "chosen_rewards": chosen,
        "rejected_rewards": rejected,
        **more,
    }


def objective(tensors: dict[str, Tensor], **options: float) -> Tensor:
    loss = get("hydra_sft").bind(**options)
    outputs = loss(tensors)
    return sum((term.coefficient * outputs[term.name].mean() for term in loss.terms), torch.zeros(()))


def test_closed_form() -> None:
    """Likelihood 12/4 = 3, a mean over tokens; reward margins 1 and -0.5, a mean over pairs; reward_coef 0.3."""
    judged = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(0.5))) / 2
    got = objective(tensors_of(TOKENS, CHOSEN, REJECTED), reward_coef=0.3)
    assert got.item() == pytest.approx(3 + 0.3 * judged, abs=1e-12)


def test_a_fresh_reward_head_starts_at_log_two() -> None:
    """The head starts at zero: whatever the LM says, the pairs cost reward_coef*log 2."""
    zero = torch.zeros(2, dtype=torch.float64)
    got = objective(tensors_of(TOKENS, zero, zero), reward_coef=2.0)
    assert got.item() == pytest.approx(3 + 2 * math.log(2), abs=1e-12)


def test_terms_are_sft_and_bradley_terry_with_all_that_pairs_may_hold() -> None:
    margins, labels = torch.tensor([0.5, 0.0]).double(), torch.tensor([0.7, 1.0]).double()
    tensors = tensors_of(TOKENS, CHOSEN, REJECTED, margins=margins, soft_labels=labels)
    out = get("hydra_sft").bind(center_coef=0.01)(tensors)
    torch.testing.assert_close(out["sft"].mean(), sft_loss(TOKENS, tensors["chosen_mask"]).mean())
    judged = bradley_terry_loss(CHOSEN, REJECTED, margins, labels, center_coef=0.01)
    torch.testing.assert_close(out["bradley_terry"].loss, judged.loss)


def test_defaults() -> None:
    bound = get("hydra_sft").bind()
    assert bound.hyper == {"reward_coef": 1.0, "center_coef": 0.0}
    assert [(term.name, term.coefficient) for term in bound.terms] == [("sft", 1.0), ("bradley_terry", 1.0)]


def test_without_its_judge_it_is_sft_and_needs_no_reward_head() -> None:
    assert get("hydra_sft").bind(reward_coef=0.0).needs == get("sft").bind().needs


def test_gradcheck() -> None:
    leaves = tuple(tensor.clone().requires_grad_() for tensor in (TOKENS, CHOSEN, REJECTED))
    assert gradcheck(lambda *t: objective(tensors_of(*t), reward_coef=0.4), leaves)


def test_each_head_feels_its_own_term_alone() -> None:
    """The likelihood pushes 1/4 on each of four chosen tokens and nothing on rewards; the pairs push both rewards apart."""
    tokens, chosen, rejected = (tensor.clone().requires_grad_() for tensor in (TOKENS, CHOSEN, REJECTED))
    tensors = tensors_of(tokens, chosen, rejected)
    objective(tensors, reward_coef=0.5).backward()
    torch.testing.assert_close(tokens.grad, -0.25 * tensors["chosen_mask"].double())
    assert chosen.grad is not None
    assert (chosen.grad < 0).all()
    torch.testing.assert_close(chosen.grad, -rejected.grad if rejected.grad is not None else None)
