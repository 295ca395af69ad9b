"""LD-DPO on two pairs, the weight of the tail in value and gradient, and when it is DPO."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from losses import dpo_loss, get, ld_dpo_loss


def drawn(chosen_lengths: list[int], rejected_lengths: list[int], tokens: int = 5, seed: int = 0) -> list[Tensor]:
    """The loss's tensors: log-probs of tokens, 0 beyond the lengths, and masks."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.arange(tokens)
    masks = [(steps < torch.tensor(lengths)[:, None]).double() for lengths in (chosen_lengths, rejected_lengths)]
    logps = -2 * torch.rand(4, len(chosen_lengths), tokens, generator=generator, dtype=torch.float64)
    return [*(logps * torch.stack([*masks, *masks])), *masks]


def dpo_of(tensors: list[Tensor], beta: float) -> Tensor:
    return dpo_loss(*(token_logps.sum(-1) for token_logps in tensors[:4]), beta=beta).loss


def test_ld_dpo_closed_form() -> None:
    """beta 0.5, ld_alpha 0.25; log-ratios of the tokens, 9 where masked:

    chosen (1, 2, -1), rejected (-1): n = 1, s_w = 1 + (2 - 1)/4 = 1.25, s_l = -1, margin 0.5*2.25 = 1.125.
    chosen (2, -1), rejected (-2, 1, 4): n = 2, s_w = 1, s_l = -1 + 4/4 = 0, margin 0.5.
    """
    chosen, rejected = torch.tensor([[[1, 2, -1], [2, -1, 9]], [[-1, 9, 9], [-2, 1, 4]]], dtype=torch.float64)
    reference_chosen, reference_rejected = torch.tensor([[[-2, -4, -3], [-1, -5, 0]], [[-3, 0, 0], [-2, -6, -7]]]).double()
    chosen_mask, rejected_mask = torch.tensor([[[1, 1, 1], [1, 1, 0]], [[1, 0, 0], [1, 1, 1]]])
    policies = chosen + reference_chosen, rejected + reference_rejected
    out = ld_dpo_loss(*policies, reference_chosen, reference_rejected, chosen_mask, rejected_mask, beta=0.5, ld_alpha=0.25)
    assert out.loss.tolist() == pytest.approx([math.log(1 + math.exp(-1.125)), math.log(1 + math.exp(-0.5))], abs=1e-12)
    assert {key: values.tolist() for key, (values, _) in out.metrics.items()} == {
        "rewards/chosen": [0.625, 0.5], "rewards/rejected": [-0.5, 0.0],
        "rewards/margins": [1.125, 0.5], "rewards/accuracies": [1.0, 1.0],
    }  # fmt: skip


def test_ld_dpo_defaults() -> None:
    assert get("ld_dpo").bind().hyper == {"beta": 0.1, "ld_alpha": 0.5}


def test_ld_dpo_gradient_weighs_the_tail_by_ld_alpha() -> None:
    """-beta sigma(-margin) on a common token of the chosen side, ld_alpha times that on its tail, 0 on padding; the rejected
    side the other way."""
    chosen, rejected, *rest = drawn([5, 2, 3], [2, 4, 3])
    chosen.requires_grad_()
    rejected.requires_grad_()
    assert gradcheck(lambda c, r: ld_dpo_loss(c, r, *rest, beta=0.7, ld_alpha=0.3).loss, (chosen, rejected))
    out = ld_dpo_loss(chosen, rejected, *rest, beta=0.7, ld_alpha=0.3)
    out.loss.sum().backward()
    push = 0.7 * torch.sigmoid(-out.metrics["rewards/margins"][0])[:, None]
    steps = torch.arange(5)
    weight = torch.where(steps < torch.tensor([2, 2, 3])[:, None], 1.0, 0.3).double()
    torch.testing.assert_close(chosen.grad, -push * weight * rest[2])
    torch.testing.assert_close(rejected.grad, push * weight * rest[3])


def test_ld_dpo_without_a_tail_trains_nothing_beyond_the_shorter_completion() -> None:
    chosen, rejected, *rest = drawn([5, 2], [2, 4])
    chosen.requires_grad_()
    rejected.requires_grad_()
    loss = ld_dpo_loss(chosen, rejected, *rest, beta=0.4, ld_alpha=0.0).loss
    loss.sum().backward()
    for tensor in (chosen, rejected):
        assert tensor.grad[:, :2].all()
        assert not tensor.grad[:, 2:].any()
    cut = [tensor.detach()[:, :2] for tensor in (chosen, rejected, *rest)]
    torch.testing.assert_close(loss, dpo_of(cut, 0.4), msg="ld_alpha 0 is DPO on what both have")


@settings(max_examples=10)
@given(st.floats(0, 1), st.integers(0, 2**31))
def test_ld_dpo_on_equal_lengths_is_dpo_for_every_ld_alpha(ld_alpha: float, seed: int) -> None:
    tensors = drawn([4, 2, 5], [4, 2, 5], seed=seed)
    torch.testing.assert_close(ld_dpo_loss(*tensors, beta=0.6, ld_alpha=ld_alpha).loss, dpo_of(tensors, 0.6))


def test_ld_dpo_at_ld_alpha_1_is_dpo_and_below_it_is_not() -> None:
    tensors = drawn([5, 1], [2, 4])
    torch.testing.assert_close(ld_dpo_loss(*tensors, beta=0.6, ld_alpha=1.0).loss, dpo_of(tensors, 0.6))
    assert ((ld_dpo_loss(*tensors, beta=0.6, ld_alpha=0.9).loss - dpo_of(tensors, 0.6)).abs() > 1e-3).all()


def test_ld_dpo_is_log_2_when_the_policy_is_the_reference() -> None:
    chosen, rejected, _, _, *masks = drawn([5, 1], [2, 4])
    loss = ld_dpo_loss(chosen, rejected, chosen, rejected, *masks).loss
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)), rtol=0, atol=1e-15)


@settings(max_examples=15)
@given(st.floats(0.01, 2), st.floats(0, 1), st.integers(0, 2**31))
def test_ld_dpo_with_sides_swapped_differs_by_the_margin(beta: float, ld_alpha: float, seed: int) -> None:
    """log sigma(x) - log sigma(-x) = x, and the common length knows no sides."""
    chosen, rejected, reference_chosen, reference_rejected, *masks = drawn([5, 2, 3], [1, 4, 3], seed=seed)
    here = ld_dpo_loss(chosen, rejected, reference_chosen, reference_rejected, *masks, beta=beta, ld_alpha=ld_alpha)
    there = ld_dpo_loss(rejected, chosen, reference_rejected, reference_chosen, *masks[::-1], beta=beta, ld_alpha=ld_alpha)
    torch.testing.assert_close(there.loss - here.loss, here.metrics["rewards/margins"][0])


def test_ld_dpo_counts_steps_from_the_start_of_the_completion() -> None:
    """Padding on the left moves no token into the tail."""
    tensors = drawn([5, 2], [2, 4])
    left = [torch.cat([torch.zeros(2, 2).double(), tensor], dim=-1) for tensor in tensors]
    torch.testing.assert_close(ld_dpo_loss(*left).loss, ld_dpo_loss(*tensors).loss)


@pytest.mark.parametrize("ld_alpha", [-0.1, 1.1])
def test_ld_dpo_ld_alpha_out_of_range_is_an_error(ld_alpha: float) -> None:
    with pytest.raises(ValueError, match=rf"ld_dpo_loss: ld_alpha is {ld_alpha}, expected a weight in \[0, 1\]"):
        ld_dpo_loss(*drawn([2], [1]), ld_alpha=ld_alpha)
