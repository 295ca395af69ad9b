"""All pairs of ranked lists: closed form, a prompt weighs as a prompt, ties and invalid items."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from losses import LossOutput, Max, pairwise_ranking_loss

RANKS = torch.tensor([[1, 0, 2], [2, 1, 0]])


def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def over_pairs(out: LossOutput, key: str) -> list[float]:
    """The sum of a metric over each prompt's ordered pairs."""
    metric = out.metrics[key]
    assert not isinstance(metric, Max)
    return (metric[0] * metric[1]).sum((1, 2)).tolist()


def logistic(difference: float) -> float:
    return math.log1p(math.exp(-difference))


def test_pairwise_ranking_closed_form() -> None:
    """Rewards 3, 1, 4 ranked second, first, third: differences 1 - 3, 1 - 4, 3 - 4. Of the second list two are valid: 2 - (-1).

    The mean of a prompt's pairs, then of the prompts: three pairs weigh as much as the one.
    """
    out = pairwise_ranking_loss(
        tensor([3.0, 1.0, 4.0], [-1.0, 50.0, 2.0]), RANKS, tensor([1.0, 1.0, 1.0], [1.0, 0.0, 1.0])
    )  # fmt: skip
    first = (logistic(-2) + logistic(-3) + logistic(-1)) / 3
    assert out.loss.tolist() == pytest.approx([first, logistic(3)])
    assert out.mean().item() == pytest.approx((first + logistic(3)) / 2)
    assert over_pairs(out, "rewards/margins") == [-6.0, 3.0]
    assert over_pairs(out, "rewards/accuracies") == [0.0, 1.0]


def test_pairwise_ranking_of_equal_rewards_is_log_2() -> None:
    out = pairwise_ranking_loss(torch.full((2, 3), 0.7), RANKS, torch.ones(2, 3))
    assert out.loss.tolist() == pytest.approx([math.log(2)] * 2)


def test_pairwise_ranking_ties_are_in_no_pair_and_prompts_without_one_do_not_count() -> None:
    rewards = torch.randn(3, 3, dtype=torch.float64)
    ranks = torch.tensor([[0, 0, 1], [2, 2, 2], [0, 1, 2]])
    out = pairwise_ranking_loss(rewards, ranks, tensor([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0]))
    assert out.weight.tolist() == [1.0, 0.0, 0.0]
    a, b, c = rewards[0].tolist()
    assert out.mean().item() == pytest.approx((logistic(a - c) + logistic(b - c)) / 2)


def test_pairwise_ranking_gradient_raises_the_best_and_lowers_the_worst() -> None:
    """At equal rewards each pair gives 1/2 to either side, over 3 pairs: -1/3 for the best, 0 between, 1/3 for the worst."""
    rewards = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    pairwise_ranking_loss(rewards, RANKS[:1], torch.ones(1, 3)).loss.sum().backward()
    torch.testing.assert_close(rewards.grad, tensor([0.0, -1 / 3, 1 / 3]))


def test_pairwise_ranking_gradcheck() -> None:
    mask = tensor([1.0, 1.0, 1.0], [1.0, 0.0, 1.0])
    rewards = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda r: pairwise_ranking_loss(r, RANKS, mask).loss, rewards)


@settings(max_examples=15)
@given(st.integers(0, 2**31), st.floats(-50, 50))
def test_pairwise_ranking_is_convex_and_ignores_a_shift_of_a_prompt(seed: int, shift: float) -> None:
    one, other = 3 * torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ones = torch.ones(2, 3)
    here, there, between = (pairwise_ranking_loss(r, RANKS, ones).loss for r in (one, other, (one + other) / 2))
    assert (between <= (here + there) / 2 + 1e-12).all()
    moved = pairwise_ranking_loss(one + tensor([shift], [0.0]), RANKS, ones).loss
    torch.testing.assert_close(moved, here, rtol=1e-9, atol=1e-9)
