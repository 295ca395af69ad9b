"""RLOO's loss: the completion is one action; closed form, gradient, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from losses import LossOutput, Max, get, rloo_loss
from losses.advantages import leave_one_out
from losses.ops import MAX_LOG_RATIO


def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def reduced(out: LossOutput, key: str) -> float:
    metric = out.metrics[key]
    assert not isinstance(metric, Max)
    return float((metric[0] * metric[1]).sum() / metric[1].sum())


MASK = tensor([1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0])
OLD = tensor([-1.0, -2.0, 0.0], [-0.5, 0.0, 0.0], [-3.0, -0.1, -0.7])
ADVANTAGES = torch.where(MASK.bool(), tensor([2.0], [-1.0], [0.5]), 9.0)


def test_rloo_closed_form() -> None:
    """Log-ratios sum to 0.4, -0.5 and -0.1; clip [0.7, 1.1].

    A = 2: clipped, -2.2; A = -1: clipped, 0.7; A = 0.5: -0.5 exp(-0.1). A mean over the three sequences; an empty one does
    not count.
    """
    policy = OLD + tensor([0.5, -0.1, 9.0], [-0.5, 9.0, 9.0], [0.1, 0.2, -0.4])
    empty = torch.zeros(1, 3)
    given = (torch.cat([tensor, empty]) for tensor in (policy, OLD, ADVANTAGES, MASK))
    out = rloo_loss(*given, clip_low=0.3, clip_high=0.1)
    expected = [-2.2, 0.7, -0.5 * math.exp(-0.1)]
    assert out.loss.tolist() == pytest.approx([*expected, 0.0])
    assert out.mean().item() == pytest.approx(sum(expected) / 3)
    assert reduced(out, "clip_frac") == pytest.approx(3 / 6), "the tokens of the two"
    kls = [math.exp(log_ratio) - 1 - log_ratio for log_ratio in (0.4, -0.5, -0.1)]
    assert reduced(out, "approx_kl") == pytest.approx((2 * kls[0] + kls[1] + 3 * kls[2]) / 6)


def test_rloo_declaration() -> None:
    """Clips of 0.2: a ratio of e counts 1.2 where A > 0, one of 1/e counts 0.8 where A < 0."""
    assert get("rloo").bind().hyper == {"clip_low": 0.2, "clip_high": 0.2}
    assert get("rloo").advantage is leave_one_out
    assert get("rloo").defaults == {}
    loss = rloo_loss(tensor([1.0], [-1.0]), torch.zeros(2, 1), tensor([1.0], [-1.0]), torch.ones(2, 1)).loss
    assert loss.tolist() == pytest.approx([-1.2, 0.8])


def test_rloo_gradient_at_ratio_1_is_that_of_the_completions_likelihood() -> None:
    """d/d theta of -A log pi(y), a mean over completions: -A/N at every token, whatever the length."""
    leaves = [tensor.clone().requires_grad_() for tensor in (OLD, OLD, ADVANTAGES)]
    policy, *unused = torch.autograd.grad(rloo_loss(*leaves, MASK).mean(), leaves, allow_unused=True)
    torch.testing.assert_close(policy, -ADVANTAGES * MASK / 3)
    assert unused == [None, None]


def test_rloo_gradient_stops_at_the_clip_and_beyond_the_largest_exponent() -> None:
    """All tokens of a sequence stop together: a good one at 1.2, a bad one at 0.8; a bad one beyond exp(20) as well."""
    sums = tensor([0.19, 0.17, -0.23, -0.21, MAX_LOG_RATIO + 0.1, MAX_LOG_RATIO - 0.1])[0]
    policy = torch.stack([sums - 1, torch.ones_like(sums)], dim=-1).requires_grad_()
    advantages = tensor([1.0], [1.0], [-1.0], [-1.0], [-1.0], [-1.0]).expand(6, 2)
    out = rloo_loss(policy, torch.zeros(6, 2, dtype=torch.float64), advantages, torch.ones(6, 2))
    (gradient,) = torch.autograd.grad(out.mean(), policy)
    assert (gradient != 0).tolist() == [[moves] * 2 for moves in (False, True, False, True, False, True)]


def test_rloo_gradcheck() -> None:
    policy = (OLD + 0.3 * torch.randn(3, 3, dtype=torch.float64)).requires_grad_()
    assert gradcheck(lambda x: rloo_loss(x, OLD, ADVANTAGES, MASK).mean(), policy)


def test_rloo_errors() -> None:
    with pytest.raises(ValueError, match=r"^rloo_loss: clip_low and clip_high must be at least 0, got -0.1 and 0.3"):
        rloo_loss(OLD, OLD, ADVANTAGES, MASK, clip_low=-0.1, clip_high=0.3)
