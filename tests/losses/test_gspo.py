"""GSPO and LUSPO: one ratio a sequence, closed forms, gradients, lengths."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from losses import LossOutput, Max, get, gspo_loss, luspo_loss
from losses.advantages import group_baseline
from losses.ops import MAX_LOG_RATIO

BOTH = pytest.mark.parametrize("function", [gspo_loss, luspo_loss])
Loss = Callable[..., LossOutput]


def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def reduced(out: LossOutput, key: str) -> float:
    metric = out.metrics[key]
    assert not isinstance(metric, Max)
    return float((metric[0] * metric[1]).sum() / metric[1].sum())


MASK = tensor([1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0])
OLD = tensor([-1.0, -2.0, 0.0], [-0.5, 0.0, 0.0], [-3.0, -0.1, -0.7])
ADVANTAGES = torch.where(MASK.bool(), tensor([2.0], [-1.0], [0.5]), 9.0)


def test_gspo_closed_form() -> None:
    """Mean log-ratios (0.3 - 0.1)/2 = 0.1, -0.2 and (0.1 + 0.2 - 0.6)/3 = -0.1; clip [0.9, 1.05].

    A = 2: clipped, -2.1; A = -1: clipped, 0.9; A = 0.5: -0.5 exp(-0.1). LUSPO multiplies them by 2, 1 and 3.
    """
    policy = OLD + tensor([0.3, -0.1, 9.0], [-0.2, 9.0, 9.0], [0.1, 0.2, -0.6])
    expected = tensor([-2.1, 0.9, -0.5 * math.exp(-0.1)])[0]
    for function, length in ((gspo_loss, 1), (luspo_loss, MASK.sum(-1))):
        out = function(policy, OLD, ADVANTAGES, MASK, clip_low=0.1, clip_high=0.05)
        torch.testing.assert_close(out.loss, expected * length)
        torch.testing.assert_close(out.mean(), (expected * length).sum() / 3)
        assert reduced(out, "clip_frac") == pytest.approx(3 / 6), "the tokens of the two"
        kls = [math.exp(log_ratio) - 1 - log_ratio for log_ratio in (0.1, -0.2, -0.1)]
        assert reduced(out, "approx_kl") == pytest.approx((2 * kls[0] + kls[1] + 3 * kls[2]) / 6)


@BOTH
def test_gspo_defaults(function: Loss) -> None:
    """3e-4 and 4e-4: a rise of 0.01 of a good completion counts 1.0004, a fall of a bad one 0.9997."""
    ones = torch.ones(2, 1, dtype=torch.float64)
    loss = function(tensor([0.01], [-0.01]), 0 * ones, tensor([1.0], [-1.0]), ones).loss
    assert loss.tolist() == pytest.approx([-1.0004, 0.9997], abs=1e-12)
    name = function.__name__.removesuffix("_loss")
    assert get(name).bind().hyper == {"clip_low": 3e-4, "clip_high": 4e-4}
    assert get(name).advantage is group_baseline
    assert get(name).defaults == {}


@BOTH
def test_gspo_gradient_at_ratio_1(function: Loss) -> None:
    """GSPO: -A/(|y| N), a token of a long completion counts less; LUSPO: -A/N, each token the same."""
    leaves = [tensor.clone().requires_grad_() for tensor in (OLD, OLD, ADVANTAGES)]
    out = function(*leaves, MASK)
    policy, *unused = torch.autograd.grad(out.mean(), leaves, allow_unused=True)
    length = MASK.sum(-1, keepdim=True) if function is gspo_loss else 1
    torch.testing.assert_close(policy, -ADVANTAGES * MASK / length / 3)
    assert unused == [None, None]


@BOTH
def test_gspo_gradcheck(function: Loss) -> None:
    policy = (OLD + 0.3 * torch.randn(3, 3, dtype=torch.float64)).requires_grad_()
    assert gradcheck(lambda x: function(x, OLD, ADVANTAGES, MASK, clip_low=0.2, clip_high=0.2).mean(), policy)


@BOTH
def test_gspo_gradient_is_zero_beyond_the_largest_exponent(function: Loss) -> None:
    policy = tensor([2 * MAX_LOG_RATIO + 3, -1.0], [MAX_LOG_RATIO, MAX_LOG_RATIO - 2]).requires_grad_()
    old, ones = torch.zeros(2, 2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(function(policy, old, -ones, ones).mean(), policy)
    assert gradient[0].tolist() == [0.0, 0.0]
    assert (gradient[1] > 0).all()


@settings(max_examples=15)
@given(st.integers(0, 2**31))
def test_gspo_sees_only_the_mean_log_ratio_of_a_sequence(seed: int) -> None:
    """Moving log-ratio from one token to another changes nothing."""
    noise = 0.2 * torch.randn(3, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    moved = torch.cat([noise, -noise, 0 * noise], dim=-1)
    mask, policy, advantages = torch.ones(3, 3), OLD - 0.05, ADVANTAGES[:, :1].expand(3, 3)
    for function in (gspo_loss, luspo_loss):
        here = function(policy, OLD, advantages, mask, clip_low=0.1).loss
        torch.testing.assert_close(function(policy + moved, OLD, advantages, mask, clip_low=0.1).loss, here)


@BOTH
def test_gspo_errors(function: Loss) -> None:
    with pytest.raises(ValueError, match=f"^{function.__name__}: clip_low and clip_high must be at least 0, got 0.1 and -1"):
        function(OLD, OLD, ADVANTAGES, MASK, clip_low=0.1, clip_high=-1.0)
