"""CISPO: closed form, a gradient for every token, the cut weight."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from losses import LossOutput, Max, cispo_loss, get
from losses.advantages import group_baseline
from losses.ops import MAX_LOG_RATIO


def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def reduced(out: LossOutput, key: str) -> float:
    metric = out.metrics[key]
    assert not isinstance(metric, Max)
    return float((metric[0] * metric[1]).sum() / metric[1].sum())


MASK = tensor([1.0, 1.0, 0.0], [1.0, 0.0, 0.0])
POLICY, ADVANTAGES = tensor([-1.0, -2.0, 0.0], [-0.5, 0.0, 0.0]), tensor([2.0, 2.0, 9.0], [-1.0, 9.0, 9.0])
OLD = POLICY - tensor([0.5, 4.0, 9.0], [3.0, 9.0, 9.0]).log()
"""Ratios 0.5 and 4, and 3."""


def test_cispo_closed_form() -> None:
    """max_ratio 2: -min(rho, 2) A log pi = 0.5*2*1, 2*2*2, 2*(-1)*0.5; the mean of three tokens is (1 + 8 - 1)/3."""
    out = cispo_loss(POLICY, OLD, ADVANTAGES, MASK, max_ratio=2.0)
    assert out.mean().item() == pytest.approx(8 / 3)
    assert reduced(out, "clip_frac") == pytest.approx(2 / 3)
    largest = out.metrics["ratio/max"]
    assert isinstance(largest, Max)
    assert largest.values.max().item() == pytest.approx(4), "before the cut"
    assert reduced(out, "approx_kl") == pytest.approx((0.5 + 4 + 3 - 3 - math.log(0.5 * 4 * 3)) / 3)


def test_cispo_gradient_is_weighted_reinforce_and_never_zero() -> None:
    """-min(rho, max_ratio) A by token, without a gradient through rho, nor to the old policy and the advantages."""
    leaves = [tensor.clone().requires_grad_() for tensor in (POLICY, OLD, ADVANTAGES)]
    out = cispo_loss(*leaves, MASK, max_ratio=2.0)
    gradient, *unused = torch.autograd.grad(out.mean(), leaves, allow_unused=True)
    torch.testing.assert_close(gradient, -tensor([0.5, 2.0, 0.0], [2.0, 0.0, 0.0]) * ADVANTAGES / 3)
    assert unused == [None, None]


def test_cispo_declaration() -> None:
    """max_ratio 5: the ratio 4 counts whole, a ratio of 6 counts 5."""
    assert get("cispo").bind().hyper == {"max_ratio": 5.0}
    assert get("cispo").advantage is group_baseline
    assert get("cispo").defaults == {}
    logps = tensor([-1.0, -1.0])
    out = cispo_loss(logps, logps - tensor([4.0, 6.0]).log(), torch.ones_like(logps), torch.ones_like(logps))
    assert out.loss.tolist() == [pytest.approx([4.0, 5.0])]
    assert out.metrics["clip_frac"][0].tolist() == [[0.0, 1.0]]  # type: ignore[index]


def test_cispo_padding_of_the_sampling_policy_may_hold_anything() -> None:
    """Not even NaN there reaches the objective or its metrics."""
    out, clean = (
        cispo_loss(POLICY, torch.where(MASK.bool(), OLD, padding), ADVANTAGES, MASK, max_ratio=2.0)
        for padding in (math.nan, 0.0)
    )
    torch.testing.assert_close(out.mean(), clean.mean())
    assert [reduced(out, key) for key in ("clip_frac", "approx_kl")] == [
        reduced(clean, key) for key in ("clip_frac", "approx_kl")
    ]  # fmt: skip


def test_cispo_max_ratio_of_1_or_less() -> None:
    """At 1 a token at the sampling policy counts whole and is not cut; 0.5 halves REINFORCE."""
    ones = torch.ones_like(POLICY)
    out = cispo_loss(POLICY, POLICY, ones, MASK, max_ratio=1.0)
    assert reduced(out, "clip_frac") == 0
    torch.testing.assert_close(cispo_loss(POLICY, POLICY, ones, MASK, max_ratio=0.5).loss, out.loss / 2)


def test_cispo_weight_is_finite_whatever_the_ratio() -> None:
    logps = tensor([-1.0])
    loss = cispo_loss(logps, logps - 1e4, torch.ones_like(logps), torch.ones_like(logps), max_ratio=math.inf).mean()
    assert loss.item() == pytest.approx(math.exp(MAX_LOG_RATIO))


@pytest.mark.parametrize("max_ratio", [0.0, -1.0])
def test_cispo_errors(max_ratio: float) -> None:
    with pytest.raises(ValueError, match=f"cispo_loss: max_ratio must be positive, got {max_ratio}"):
        cispo_loss(POLICY, OLD, ADVANTAGES, MASK, max_ratio=max_ratio)
