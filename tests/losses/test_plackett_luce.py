"""Plackett-Luce reward modelling: closed form, gradient, shift, and what a list weighs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from losses import LossOutput, Max, plackett_luce_loss

RANKS = torch.tensor([[1, 0, 2], [2, 1, 0]])


def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def over_pairs(out: LossOutput, key: str) -> list[float]:
    """The sum of a metric over each prompt's ordered pairs."""
    metric = out.metrics[key]
    assert not isinstance(metric, Max)
    return (metric[0] * metric[1]).sum((1, 2)).tolist()


def test_plackett_luce_closed_form() -> None:
    """Weights exp(r) = 3, 2, 1 ranked second, first, third: 2/6 * 3/4. Weights 1, 4, 5 ranked from the last: 5/10 * 4/5.

    A mean over prompts, not divided by the number of choices: (log 4 + log 5/2)/2. All pairs of
    the second list are in order, two of three of the first.
    """
    out = plackett_luce_loss(tensor([3.0, 2.0, 1.0], [1.0, 4.0, 5.0]).log(), RANKS, torch.ones(2, 3))
    assert out.loss.tolist() == pytest.approx([math.log(4), math.log(5 / 2)])
    assert out.mean().item() == pytest.approx((math.log(4) + math.log(5 / 2)) / 2)
    assert over_pairs(out, "rewards/accuracies") == [2.0, 3.0]
    assert over_pairs(out, "rewards/margins") == pytest.approx([2 * math.log(2), 2 * math.log(5)])


def test_plackett_luce_of_equal_rewards_is_the_logarithm_of_the_number_of_rankings() -> None:
    out = plackett_luce_loss(torch.full((2, 3), 0.7), RANKS, tensor([1.0, 1.0, 1.0], [1.0, 0.0, 1.0]))
    assert out.loss.tolist() == pytest.approx([math.log(6), math.log(2)])
    assert over_pairs(out, "rewards/accuracies") == [1.5, 0.5]


def test_plackett_luce_gradient_is_chosen_shares_minus_choices() -> None:
    """dL/dr_i = sum over the choices that i is part of of its share, minus 1 for its own.

    Weights 3, 2, 1, order second, first, third; shares at the first choice 1/2, 1/3, 1/6, at the second 3/4, -, 1/4.
    """
    rewards = tensor([3.0, 2.0, 1.0]).log().requires_grad_()
    plackett_luce_loss(rewards, RANKS[:1], torch.ones(1, 3)).loss.sum().backward()
    torch.testing.assert_close(rewards.grad, tensor([1 / 2 + 3 / 4 - 1, 1 / 3 - 1, 1 / 6 + 1 / 4]))


def test_plackett_luce_gradcheck() -> None:
    mask = tensor([1.0, 1.0, 1.0], [1.0, 0.0, 1.0])
    rewards = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda r: plackett_luce_loss(r, RANKS, mask).loss, rewards)


@settings(max_examples=15)
@given(st.integers(0, 2**31), st.floats(-50, 50))
def test_plackett_luce_is_convex_and_ignores_a_shift_of_a_prompt(seed: int, shift: float) -> None:
    one, other = 3 * torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ones = torch.ones(2, 3)
    here, there, between = (plackett_luce_loss(r, RANKS, ones).loss for r in (one, other, (one + other) / 2))
    assert (between <= (here + there) / 2 + 1e-12).all()
    torch.testing.assert_close(plackett_luce_loss(one + tensor([shift], [0.0]), RANKS, ones).loss, here, rtol=1e-9, atol=1e-9)


def test_plackett_luce_lists_of_one_do_not_count() -> None:
    rewards = torch.randn(2, 3, dtype=torch.float64)
    out = plackett_luce_loss(rewards, RANKS, tensor([1.0, 1.0, 1.0], [0.0, 1.0, 0.0]))
    torch.testing.assert_close(out.mean(), out.loss[0])
