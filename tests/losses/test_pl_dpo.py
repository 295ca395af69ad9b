"""DPO on ranked lists: closed form, gradient, log K! at the reference, constants of a prompt."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from losses import LossOutput, Max, get, pl_dpo_loss

RANKS = torch.tensor([[1, 0, 2], [2, 1, 0]])


def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def over_pairs(out: LossOutput, key: str) -> list[float]:
    """The sum of a metric over each prompt's ordered pairs."""
    metric = out.metrics[key]
    assert not isinstance(metric, Max)
    return (metric[0] * metric[1]).sum((1, 2)).tolist()


def test_pl_dpo_closed_form() -> None:
    """beta 0.5; log-ratios 2 log 3, 2 log 2, 0 are the weights 3, 2, 1, ranked second, first, third: 2/6 * 3/4."""
    reference = tensor([-5.0, -7.0, -2.0])
    policy = reference + 2 * tensor([3.0, 2.0, 1.0]).log()
    out = pl_dpo_loss(policy, reference, RANKS[:1], torch.ones(1, 3), beta=0.5)
    assert out.mean().item() == pytest.approx(math.log(4))
    assert over_pairs(out, "rewards/margins") == pytest.approx([2 * math.log(2)]), "rewards hold beta"
    assert over_pairs(out, "rewards/accuracies") == [2.0]


def test_pl_dpo_default_beta() -> None:
    """0.1: log-ratios 10 log w are the weights w."""
    assert get("pl_dpo").bind().hyper == {"beta": 0.1}
    out = pl_dpo_loss(10 * tensor([3.0, 2.0, 1.0]).log(), torch.zeros(1, 3), RANKS[:1], torch.ones(1, 3))
    assert out.mean().item() == pytest.approx(math.log(4))


def test_pl_dpo_is_log_k_factorial_when_the_policy_is_the_reference() -> None:
    logps = -10 * torch.rand(2, 3, dtype=torch.float64)
    out = pl_dpo_loss(logps, logps, RANKS, tensor([1.0, 1.0, 1.0], [1.0, 0.0, 1.0]))
    assert out.loss.tolist() == pytest.approx([math.log(6), math.log(2)])
    assert over_pairs(out, "rewards/accuracies") == [1.5, 0.5], "ties are half right"


def test_pl_dpo_gradient_at_the_reference() -> None:
    """beta times shares minus choices: shares 1/3 of three, then 1/2 of two; best -2/3, then -1/6, worst 5/6."""
    policy = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    pl_dpo_loss(policy, torch.zeros(1, 3).double(), RANKS[:1], torch.ones(1, 3), beta=0.3).loss.sum().backward()
    torch.testing.assert_close(policy.grad, 0.3 * tensor([-1 / 6, -2 / 3, 5 / 6]))


def test_pl_dpo_gradcheck() -> None:
    mask = tensor([1.0, 1.0, 1.0], [1.0, 0.0, 1.0])
    policy, reference = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert gradcheck(lambda p, r: pl_dpo_loss(p, r, RANKS, mask, beta=0.7).loss, (policy, reference))


@settings(max_examples=15)
@given(st.integers(0, 2**31), st.floats(-50, 50))
def test_pl_dpo_sees_log_ratios_up_to_a_constant_of_the_prompt(seed: int, shift: float) -> None:
    policy, reference, both = 3 * torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ones = torch.ones(2, 3)
    here = pl_dpo_loss(policy, reference, RANKS, ones, beta=0.3).loss
    per_prompt = tensor([shift], [-shift])
    for moved in ((policy + both, reference + both), (policy + per_prompt, reference)):
        torch.testing.assert_close(pl_dpo_loss(*moved, RANKS, ones, beta=0.3).loss, here, rtol=1e-9, atol=1e-9)


def test_pl_dpo_weighs_lists_as_the_choices_that_they_hold() -> None:
    """One mean over prompts with two items or more, not divided by K - 1."""
    policy, reference = torch.randn(2, 3, 3, dtype=torch.float64)
    ranks, mask = torch.arange(3).expand(3, 3), tensor([1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0])
    out = pl_dpo_loss(policy, reference, ranks, mask)
    torch.testing.assert_close(out.mean(), out.loss[:2].sum() / 2)
