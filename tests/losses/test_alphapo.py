"""AlphaPO on numbers, the shape of its reward, its cut exponent, and SimPO as its limit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from losses import LossOutput, alphapo_loss, get, simpo_loss
from losses.ops import MAX_LOG_RATIO


def at(chosen: float | Tensor, rejected: float | Tensor, **options: float) -> LossOutput:
    """AlphaPO at these mean log-probs, completions of one token."""
    sides = [torch.as_tensor(side, dtype=torch.float64).reshape(-1) for side in (chosen, rejected)]
    return alphapo_loss(*sides, *map(torch.ones_like, sides), **options)


def reward(mean_logp: float, alpha: float) -> float:
    return at(mean_logp, 0.0, beta=1.0, alpha=alpha).metrics["rewards/chosen"][0].item()


@pytest.mark.parametrize(
    ("alpha", "chosen_reward", "rejected_reward"),
    [
        (0.5, 2 * (1 - math.e), 2 * (1 - math.exp(2))),  # p = e^-2 and e^-4, p^-1/2 = e and e^2
        (-0.5, 2 * (math.exp(-1) - 1), 2 * (math.exp(-2) - 1)),
        (0.0, -2.0, -4.0),
    ],
)
def test_alphapo_closed_form(alpha: float, chosen_reward: float, rejected_reward: float) -> None:
    """-6 over 3 tokens and -8 over 2: mean log-probs -2 and -4; beta 0.3, gamma 0.7."""
    tensors = [torch.tensor([x], dtype=torch.float64) for x in (-6.0, -8.0, 3.0, 2.0)]
    out = alphapo_loss(*tensors, beta=0.3, gamma=0.7, alpha=alpha)
    margin = 0.3 * (chosen_reward - rejected_reward)
    assert out.loss.item() == pytest.approx(math.log(1 + math.exp(0.7 - margin)), abs=1e-12)
    assert {key: values.item() for key, (values, _) in out.metrics.items()} == pytest.approx({
        "rewards/chosen": 0.3 * chosen_reward, "rewards/rejected": 0.3 * rejected_reward,
        "rewards/margins": margin, "rewards/accuracies": 1.0,
    })  # fmt: skip


def test_alphapo_defaults() -> None:
    assert get("alphapo").bind().hyper == {"beta": 2.0, "gamma": 0.5, "alpha": 0.25}


@pytest.mark.parametrize("alpha", [0.4, -0.4, 0.0])
def test_alphapo_gradient(alpha: float) -> None:
    """dr/d(log p) = p^-alpha, so dL/d(chosen) = -beta sigma(-margin) p_w^-alpha/|y_w|, the rejected side's the other way."""
    chosen, rejected = (-5 * torch.rand(4, dtype=torch.float64) for _ in range(2))
    lengths = torch.tensor([[1, 4, 2, 7], [3, 1, 5, 2]])
    leaves = (chosen.requires_grad_(), rejected.requires_grad_())
    options = {"beta": 0.7, "gamma": 0.3, "alpha": alpha}
    assert gradcheck(lambda c, r: alphapo_loss(c, r, *lengths, **options).loss, leaves)
    loss = alphapo_loss(*leaves, *lengths, **options).loss
    loss.sum().backward()
    push = 0.7 * -torch.expm1(-loss.detach())  # sigma(-m) = 1 - exp(-L)
    chosen_slope, rejected_slope = ((-alpha * leaf.detach() / n).exp() / n for leaf, n in zip(leaves, lengths, strict=True))
    torch.testing.assert_close(chosen.grad, -push * chosen_slope)
    torch.testing.assert_close(rejected.grad, push * rejected_slope)


def test_alphapo_at_alpha_0_is_simpo_and_near_it_nearly() -> None:
    logps = -9 * torch.rand(2, 5, dtype=torch.float64)
    lengths = torch.randint(1, 8, (2, 5))
    simpo = simpo_loss(*logps, *lengths, beta=1.5, gamma=0.3).loss
    assert torch.equal(alphapo_loss(*logps, *lengths, beta=1.5, gamma=0.3, alpha=0.0).loss, simpo)
    for alpha in (1e-7, -1e-7):
        near = alphapo_loss(*logps, *lengths, beta=1.5, gamma=0.3, alpha=alpha).loss
        torch.testing.assert_close(near, simpo, rtol=1e-5, atol=0)


@settings(max_examples=15)
@given(st.floats(-4, -0.1), st.floats(0.05, 2))
def test_alphapo_reward_punishes_unlikely_completions_harder_for_positive_alpha(mean_logp: float, alpha: float) -> None:
    """r_alpha < log p < r_-alpha < 0, all rising with p, all 0 at p = 1."""
    assert reward(mean_logp, alpha) < mean_logp < reward(mean_logp, -alpha) < 0
    for signed in (alpha, -alpha):
        assert reward(mean_logp, signed) < reward(mean_logp + 0.05, signed)
        assert reward(0.0, signed) == 0


def test_alphapo_of_equals_is_above_log_2_by_gamma() -> None:
    assert at(-2.0, -2.0, gamma=0.8).loss.item() == pytest.approx(math.log(1 + math.exp(0.8)))


def test_alphapo_is_flat_beyond_its_largest_exponent() -> None:
    """-alpha log p = 19 has a gradient and 21 the value of 20 and none."""
    rejected = torch.tensor([-MAX_LOG_RATIO + 1, -MAX_LOG_RATIO - 1], dtype=torch.float64, requires_grad=True)
    chosen = torch.full((2,), -MAX_LOG_RATIO - 9, dtype=torch.float64)
    out = at(chosen, rejected, alpha=1.0, beta=1e-9, gamma=0.0)
    rewards = out.metrics["rewards/rejected"][0]
    assert rewards.tolist() == pytest.approx([1e-9 * (1 - math.exp(19)), 1e-9 * (1 - math.exp(20))])
    out.loss.sum().backward()
    assert rejected.grad is not None
    assert rejected.grad[0] > 0
    assert rejected.grad[1] == 0
