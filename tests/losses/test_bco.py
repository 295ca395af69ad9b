"""BCO on pairs and on labelled completions: numbers, its bound on DPO, and what the reward shift does."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from losses import LossOutput, bco_loss, bco_pair_loss, dpo_loss, get

REWARD = st.floats(-20, 20)


def pair_at(chosen: float, rejected: float) -> float:
    """`bco_pair` at two rewards (beta 1)."""
    zero = torch.zeros(1, dtype=torch.float64)
    return bco_pair_loss(zero + chosen, zero + rejected, zero, zero, beta=1.0).loss.item()


def dpo_at(chosen: float, rejected: float) -> float:
    zero = torch.zeros(1, dtype=torch.float64)
    return dpo_loss(zero + chosen, zero + rejected, zero, zero, beta=1.0).loss.item()


def unpaired_at(chosen: float, rejected: float, shift: float) -> Tensor:
    """`bco` on one desirable and one undesirable completion (beta 1). [2]"""
    rewards = torch.tensor([chosen, rejected], dtype=torch.float64)
    labels, moved = torch.tensor([True, False]), torch.tensor(shift, dtype=torch.float64)
    return bco_loss(rewards, torch.zeros_like(rewards), labels, moved, beta=1.0).loss


def labelled() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-ratios 1.5, -0.5 and 1, the second undesirable, and a shift of 0.25."""
    policy = torch.tensor([-1.0, -4.0, -3.0], dtype=torch.float64)
    reference = torch.tensor([-2.5, -3.5, -4.0], dtype=torch.float64)
    return policy, reference, torch.tensor([True, False, True]), torch.tensor(0.25, dtype=torch.float64)


def test_bco_pair_closed_form() -> None:
    """beta 0.5; log-ratios 1.5 and -0.5: rewards 0.75 and -0.25, log(1 + e^-0.75) + log(1 + e^-0.25)."""
    tensors = [torch.tensor([x], dtype=torch.float64) for x in (-1.0, -4.0, -2.5, -3.5)]
    out = bco_pair_loss(*tensors, beta=0.5)
    assert out.loss.tolist() == pytest.approx([math.log(1 + math.exp(-0.75)) + math.log(1 + math.exp(-0.25))], abs=1e-12)
    assert out.weight.tolist() == [1.0]
    rewards = {key: values.item() for key, (values, _) in out.metrics.items()}
    assert rewards == {"rewards/chosen": 0.75, "rewards/rejected": -0.25, "rewards/margins": 1.0, "rewards/accuracies": 1.0}


@pytest.mark.parametrize("name", ["bco_pair", "bco"])
def test_bco_defaults(name: str) -> None:
    assert {flag: hyper.default for flag, hyper in get(name).hyper.items()} == {"beta": 0.1}


def test_bco_pair_gradient() -> None:
    """dL/dr_w = -sigma(-r_w), dL/dr_l = sigma(r_l): each side by its own reward, chosen up, rejected down."""
    tensors = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert gradcheck(lambda *t: bco_pair_loss(*t, beta=0.7).loss, tensors)
    bco_pair_loss(*tensors, beta=0.7).loss.sum().backward()
    chosen, rejected, reference_chosen, reference_rejected = (tensor.detach() for tensor in tensors)
    torch.testing.assert_close(tensors[0].grad, -0.7 * torch.sigmoid(-0.7 * (chosen - reference_chosen)))
    torch.testing.assert_close(tensors[1].grad, 0.7 * torch.sigmoid(0.7 * (rejected - reference_rejected)))


@given(REWARD, REWARD)
def test_bco_pair_bounds_dpo_and_has_its_odd_part(chosen: float, rejected: float) -> None:
    """(1 + e^-a)(1 + e^b) >= 1 + e^(b-a). Swapping the completions adds r_w - r_l, as for DPO."""
    assert pair_at(chosen, rejected) >= dpo_at(chosen, rejected) - 1e-9
    assert pair_at(chosen, rejected) - pair_at(rejected, chosen) == pytest.approx(rejected - chosen, abs=1e-9)


@given(REWARD, REWARD)
def test_bco_pair_is_bco_without_a_shift(chosen: float, rejected: float) -> None:
    """2 log 2 when the policy is the reference."""
    assert unpaired_at(chosen, rejected, 0.0).sum().item() == pytest.approx(pair_at(chosen, rejected), abs=1e-9)
    assert pair_at(0.0, 0.0) == pytest.approx(2 * math.log(2), abs=1e-15)


@given(REWARD, REWARD, REWARD)
def test_bco_bounds_dpo_whatever_the_shift_and_best_between_the_rewards(chosen: float, rejected: float, shift: float) -> None:
    """softplus(s - a) + softplus(b - s) is convex in s and symmetric about (a + b)/2."""
    moved, middle = (unpaired_at(chosen, rejected, s).sum().item() for s in (shift, (chosen + rejected) / 2))
    assert moved >= middle - 1e-9
    assert middle >= dpo_at(chosen, rejected) - 1e-9


def test_bco_closed_form() -> None:
    """beta 0.5, shift 0.25: rewards 0.75, -0.25, 0.5, shifted 0.5, -0.5, 0.25; the second is undesirable.

    log(1 + e^-0.5), log(1 + e^-0.5), log(1 + e^-0.25); the rewards' sum 1 and number 3 go to the running mean unshifted.
    """
    out = bco_loss(*labelled(), beta=0.5)
    assert out.loss.tolist() == pytest.approx([math.log(1 + math.exp(-x)) for x in (0.5, 0.5, 0.25)], abs=1e-12)
    assert out.weight.tolist() == [1.0] * 3
    assert {key: (total.item(), count.item()) for key, (total, count) in out.updates.items()} == {"reward_shift": (1.0, 3.0)}
    metrics = {key: (values.tolist(), weight.tolist()) for key, (values, weight) in out.metrics.items()}
    assert metrics == {
        "rewards/chosen": ([0.75, -0.25, 0.5], [1.0, 0.0, 1.0]),
        "rewards/rejected": ([0.75, -0.25, 0.5], [0.0, 1.0, 0.0]),
    }


def test_bco_labels_may_be_numbers() -> None:
    policy, reference, desirable, shift = labelled()
    boolean: LossOutput = bco_loss(policy, reference, desirable, shift)
    torch.testing.assert_close(bco_loss(policy, reference, desirable.long(), shift).loss, boolean.loss)


def test_bco_gradient_does_not_reach_the_shift() -> None:
    """dL/dr = -y sigma(-y (r - shift)), y = +1 or -1; the shift and the sum for the running mean are constants."""
    policy, reference, desirable, shift = labelled()
    policy, shift = policy.requires_grad_(), shift.requires_grad_()
    assert gradcheck(lambda p: bco_loss(p, reference, desirable, shift, beta=0.7).loss, policy)
    out = bco_loss(policy, reference, desirable, shift, beta=0.7)
    out.loss.sum().backward()
    sign = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    shifted = 0.7 * (policy.detach() - reference) - 0.25
    torch.testing.assert_close(policy.grad, -0.7 * sign * torch.sigmoid(-sign * shifted))
    assert shift.grad is None
    assert not any(tensor.requires_grad for tensor in out.updates["reward_shift"])
