"""Length-normalised DPO on six numbers, its gradient per token, and when it is DPO."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from losses import dpo_loss, dpo_norm_loss, get


def drawn() -> tuple[list[Tensor], Tensor, Tensor]:
    """Log-probs of five pairs, with gradient, and their lengths."""
    tensors = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    return tensors, torch.tensor([1.0, 4.0, 2.0, 7.0, 3.0]), torch.tensor([3.0, 1.0, 5.0, 2.0, 2.0])


def test_dpo_norm_closed_form() -> None:
    """beta 2; log-ratios -1 + 4 = 3 over 4 tokens and -5 + 4.5 = -0.5 over 2: rewards 1.5 and -0.5, margin 2."""
    tensors = [torch.tensor([x], dtype=torch.float64) for x in (-1.0, -5.0, -4.0, -4.5)]
    out = dpo_norm_loss(*tensors, torch.tensor([4]), torch.tensor([2]), beta=2.0)
    assert out.loss.tolist() == pytest.approx([math.log(1 + math.exp(-2))], abs=1e-12)
    assert out.weight.tolist() == [1.0]
    rewards = {key: values.item() for key, (values, _) in out.metrics.items()}
    assert rewards == {"rewards/chosen": 1.5, "rewards/rejected": -0.5, "rewards/margins": 2.0, "rewards/accuracies": 1.0}


def test_dpo_norm_defaults() -> None:
    assert {flag: hyper.default for flag, hyper in get("dpo_norm").hyper.items()} == {"beta": 5.0}


def test_dpo_norm_gradient_is_shared_by_the_tokens() -> None:
    """dL/d(chosen) = -(beta / |y_w|) sigma(-m), dL/d(rejected) = (beta / |y_l|) sigma(-m)."""
    tensors, chosen_lengths, rejected_lengths = drawn()
    assert gradcheck(lambda *t: dpo_norm_loss(*t, chosen_lengths, rejected_lengths, beta=1.5).loss, tensors)
    dpo_norm_loss(*tensors, chosen_lengths, rejected_lengths, beta=1.5).loss.sum().backward()
    chosen, rejected, reference_chosen, reference_rejected = (tensor.detach() for tensor in tensors)
    margin = 1.5 * ((chosen - reference_chosen) / chosen_lengths - (rejected - reference_rejected) / rejected_lengths)
    torch.testing.assert_close(tensors[0].grad, -1.5 / chosen_lengths * torch.sigmoid(-margin))
    torch.testing.assert_close(tensors[1].grad, 1.5 / rejected_lengths * torch.sigmoid(-margin))


def test_dpo_norm_is_log_2_when_the_policy_is_the_reference() -> None:
    """Whatever the lengths, an empty completion's 0 among them."""
    logps = [torch.tensor(values, dtype=torch.float64) for values in ([-3.0, 0.0], [-9.0, -2.0])]
    out = dpo_norm_loss(*logps, *logps, torch.tensor([2, 0]), torch.tensor([5, 1]))
    torch.testing.assert_close(out.loss, torch.full((2,), math.log(2), dtype=torch.float64))


@settings(max_examples=10)
@given(st.integers(1, 50), st.floats(0.05, 10))
def test_dpo_norm_with_equal_lengths_is_dpo_with_beta_over_the_length(length: int, beta: float) -> None:
    tensors, _, _ = drawn()
    lengths = torch.full((5,), length)
    normed = dpo_norm_loss(*tensors, lengths, lengths, beta=beta)
    torch.testing.assert_close(normed.loss, dpo_loss(*tensors, beta=beta / length).loss)


@settings(max_examples=10)
@given(st.integers(2, 9))
def test_dpo_norm_does_not_see_length(times: int) -> None:
    """A completion repeated k times, log-probs and length k-fold, has the same reward."""
    tensors, chosen_lengths, rejected_lengths = drawn()
    chosen, rejected, reference_chosen, reference_rejected = tensors
    longer = dpo_norm_loss(
        chosen * times, rejected, reference_chosen * times, reference_rejected, chosen_lengths * times, rejected_lengths
    )
    torch.testing.assert_close(longer.loss, dpo_norm_loss(*tensors, chosen_lengths, rejected_lengths).loss)


def test_dpo_norm_odd_part_is_linear() -> None:
    """Swapping the completions, lengths too, negates the margin: L(m) - L(-m) = -m."""
    tensors, chosen_lengths, rejected_lengths = drawn()
    out = dpo_norm_loss(*tensors, chosen_lengths, rejected_lengths)
    chosen, rejected, reference_chosen, reference_rejected = tensors
    swapped = dpo_norm_loss(rejected, chosen, reference_rejected, reference_chosen, rejected_lengths, chosen_lengths)
    torch.testing.assert_close((out.loss - swapped.loss).detach(), -out.metrics["rewards/margins"][0])
