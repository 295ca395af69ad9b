"""The entropy bonus is minus the token mean of entropies."""

from __future__ import annotations

import torch
from torch.autograd import gradcheck

from losses import entropy_loss


def test_entropy_closed_form() -> None:
    out = entropy_loss(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[1.0, 1.0, 0.0]]))
    assert out.mean().item() == -2.0
    values, weight = out.metrics["entropy"]
    assert ((values * weight).sum() / weight.sum()).item() == 2.0


def test_entropy_gradient_raises_it() -> None:
    entropies = torch.rand(2, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    assert gradcheck(lambda h: entropy_loss(h, mask).mean(), entropies)
    entropy_loss(entropies, mask).mean().backward()
    torch.testing.assert_close(entropies.grad, -mask / 3)
    assert not any(part.requires_grad for part in entropy_loss(entropies, mask).metrics["entropy"])
