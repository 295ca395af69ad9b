"""REINFORCE: closed form under each normalisation, its gradient, what receives none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from losses import get, reinforce_loss
from losses.advantages import discounted_returns


def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


LOGPS, ADVANTAGES = tensor([-1.0, -2.0, -5.0], [-0.5, 0.0, 0.0]), tensor([2.0, -1.0, 3.0], [4.0, 9.0, 9.0])
MASK = tensor([1.0, 1.0, 1.0], [1.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("length_norm", "expected"),
    [
        ("token", (2 - 2 + 15 + 2) / 4),
        ("seq_mean", (15 / 3 + 2) / 2),
        ("seq_sum", (15 + 2) / 2),
        ("constant", (15 + 2) / 10 / 2),
    ],
)
def test_reinforce_closed_form(length_norm: str, expected: float) -> None:
    """-A log pi: 2, -2, 15, and 2; the limit of lengths is 10."""
    out = reinforce_loss(LOGPS, ADVANTAGES, MASK, torch.tensor(10.0), length_norm=length_norm)
    assert out.mean().item() == pytest.approx(expected)
    nll, weight = out.metrics["nll"]  # type: ignore[misc]
    assert ((nll * weight).sum() / weight.sum()).item() == pytest.approx(8.5 / 4)


def test_reinforce_declaration() -> None:
    assert get("reinforce").bind().hyper == {"length_norm": "token"}
    assert get("reinforce").advantage is discounted_returns
    assert get("reinforce").defaults == {}
    assert reinforce_loss(LOGPS, ADVANTAGES, MASK).mean().item() == pytest.approx(17 / 4)


def test_reinforce_gradient_is_minus_the_advantage_and_advantages_receive_none() -> None:
    """Good actions become likelier, bad ones less likely, by as much as they are good or bad."""
    logps, advantages = LOGPS.clone().requires_grad_(), ADVANTAGES.clone().requires_grad_()
    out = reinforce_loss(logps, advantages, MASK)
    gradient, unused = torch.autograd.grad(out.mean(), (logps, advantages), allow_unused=True)
    torch.testing.assert_close(gradient, -ADVANTAGES * MASK / 4)
    assert unused is None
    assert not any(part.requires_grad for part in out.metrics["nll"])


def test_reinforce_gradcheck() -> None:
    logps = LOGPS.clone().requires_grad_()
    assert gradcheck(lambda x: reinforce_loss(x, ADVANTAGES, MASK, length_norm="seq_mean").mean(), logps)


def test_reinforce_errors() -> None:
    with pytest.raises(ValueError, match=r"^reinforce_loss: length_norm='constant' divides by max_completion_length"):
        reinforce_loss(LOGPS, ADVANTAGES, MASK, length_norm="constant")
    with pytest.raises(ValueError, match=r"^reinforce_loss: unknown length_norm 'mean'"):
        reinforce_loss(LOGPS, ADVANTAGES, MASK, length_norm="mean")
