"""SFT is a mean over tokens, not over completions."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from losses import sft_loss


def test_sft_is_the_mean_over_all_tokens() -> None:
    """Tokens -1, -2, -3 in one completion and -6 in the other: 12/4 = 3; the mean of means would be 4."""
    logps = torch.tensor([[-1.0, -2.0, -3.0], [-6.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    out = sft_loss(logps, mask)
    assert out.mean().item() == 3.0
    per_sequence = (-logps * mask).sum(-1) / mask.sum(-1)
    lengths = mask.sum(-1)
    assert out.mean().item() == pytest.approx(((per_sequence * lengths).sum() / lengths.sum()).item())
    assert per_sequence.mean().item() == 4.0


def test_sft_gradient_raises_unmasked_tokens_only() -> None:
    logps = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    sft_loss(logps, mask).mean().backward()
    torch.testing.assert_close(logps.grad, -mask / 3)


def test_sft_gradcheck() -> None:
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    assert gradcheck(lambda t: sft_loss(t, mask).mean(), torch.randn(2, 2, dtype=torch.float64, requires_grad=True))
