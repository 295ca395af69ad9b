"""The clipped value loss: closed form and where its gradient is zero."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from losses import get, value_loss
from losses.advantages import gae


def test_value_closed_form() -> None:
    """Old value 0, clip 0.2, return 1. V = 0.1: 0.5*0.9^2. V = 0.5: the clip leaves 0.2, 0.5*0.8^2. V = -1: 0.5*2^2."""
    values = torch.tensor([[0.1, 0.5, -1.0]], dtype=torch.float64)
    zero, one = torch.zeros_like(values), torch.ones_like(values)
    out = value_loss(values, zero, one, one)
    torch.testing.assert_close(out.loss, torch.tensor([[0.405, 0.32, 2.0]], dtype=torch.float64))
    assert out.metrics["value/clip_frac"][0].tolist() == [[0.0, 1.0, 0.0]]


def test_value_gradient_stops_only_where_the_clip_decides() -> None:
    """Moving on towards the return beyond the clip is not rewarded; away from it is punished."""
    values = torch.tensor([[0.1, 0.5, -1.0]], dtype=torch.float64, requires_grad=True)
    zero, one = torch.zeros(1, 3, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64)
    value_loss(values, zero, one, one).loss.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([[-0.9, 0.0, -2.0]], dtype=torch.float64))


def test_value_without_clip_is_half_the_squared_error() -> None:
    values, old_values, returns = torch.randn(3, 2, 4, dtype=torch.float64)
    mask = torch.ones(2, 4)
    loss = value_loss(values, old_values, returns, mask, value_clip=None).loss
    torch.testing.assert_close(loss, (values - returns).square() / 2)
    assert (value_loss(values, old_values, returns, mask).loss >= loss).all()
    wide = value_loss(values, old_values, returns, mask, value_clip=1e6)
    torch.testing.assert_close(wide.loss, loss)


def test_value_gradcheck() -> None:
    values, old_values, returns = torch.randn(3, 2, 4, dtype=torch.float64)
    assert gradcheck(lambda v: value_loss(v, old_values, returns, torch.ones(2, 4)).loss, values.requires_grad_())


def test_value_negative_clip_is_an_error() -> None:
    with pytest.raises(ValueError, match="value_clip must be at least 0, got -1"):
        value_loss(*torch.zeros(4, 1, 1), value_clip=-1.0)


def test_value_is_a_mean_over_unmasked_tokens_with_metrics_of_its_own() -> None:
    """Old value 1, clip 0.5, return 2. V = 1.4: error 0.36. V = 1.8: the clip leaves 1.5, 0.25. A masked token is left out."""
    values, old_values = torch.tensor([[1.4, 1.8, 9.0]], dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64)
    leaves = [values.requires_grad_(), old_values.requires_grad_(), (2 * torch.ones(1, 3).double()).requires_grad_()]
    out = value_loss(*leaves, torch.tensor([[1, 1, 0]]), value_clip=0.5)
    assert out.mean().item() == pytest.approx((0.18 + 0.125) / 2)
    gradient, *unused = torch.autograd.grad(out.mean(), leaves, allow_unused=True)
    torch.testing.assert_close(gradient, torch.tensor([[-0.3, 0.0, 0.0]], dtype=torch.float64))
    assert unused == [None, None]
    reduced = {key: ((value * weight).sum() / weight.sum()).item() for key, (value, weight) in out.metrics.items()}
    assert reduced == pytest.approx({"value/clip_frac": 0.5, "value/mean": 1.6, "value/error": (0.36 + 0.04) / 2})
    assert not any(part.requires_grad for metric in out.metrics.values() for part in metric)


def test_value_clip_of_0_trusts_old_values_alone() -> None:
    """The loss is at least that of the old value; only moving away from the return is seen."""
    values = torch.tensor([[0.5, -0.5]], dtype=torch.float64)
    loss = value_loss(values, torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2), value_clip=0.0).loss
    assert loss.tolist() == [[0.5, 1.125]]


def test_value_declaration() -> None:
    assert get("value").bind().hyper == {"value_clip": 0.2}
    assert get("value").advantage is gae
