"""APO-zero, APO-down and the labelled form: numbers, ranges, symmetries, which way completions move."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from losses import LossOutput, apo_down_loss, apo_zero_loss, apo_zero_unpaired_loss, get, kto_loss

REWARD = st.floats(-20, 20)
Loss = Callable[..., LossOutput]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def at(loss: Loss, chosen: float, rejected: float) -> float:
    """A paired loss at two rewards (beta 1)."""
    zero = torch.zeros(1, dtype=torch.float64)
    return loss(zero + chosen, zero + rejected, zero, zero, beta=1.0).loss.item()


def drawn() -> list[Tensor]:
    return [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(4)]


def rewards_of(tensors: list[Tensor], beta: float) -> tuple[Tensor, Tensor]:
    chosen, rejected, reference_chosen, reference_rejected = (tensor.detach() for tensor in tensors)
    return beta * (chosen - reference_chosen), beta * (rejected - reference_rejected)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [(apo_zero_loss, 1 - sigmoid(0.75) + sigmoid(-0.25)), (apo_down_loss, sigmoid(0.75) + 1 - sigmoid(1.0))],
)
def test_apo_closed_form(loss: Loss, expected: float) -> None:
    """beta 0.5; log-ratios 1.5 and -0.5: rewards 0.75 and -0.25, margin 1."""
    out = loss(*(torch.tensor([x], dtype=torch.float64) for x in (-1.0, -4.0, -2.5, -3.5)), beta=0.5)
    assert out.loss.tolist() == pytest.approx([expected], abs=1e-12)
    assert out.weight.tolist() == [1.0]
    rewards = {key: values.item() for key, (values, _) in out.metrics.items()}
    assert rewards == {"rewards/chosen": 0.75, "rewards/rejected": -0.25, "rewards/margins": 1.0, "rewards/accuracies": 1.0}


@pytest.mark.parametrize("name", ["apo_zero", "apo_down", "apo_zero_unpaired"])
def test_apo_defaults(name: str) -> None:
    assert {flag: hyper.default for flag, hyper in get(name).hyper.items()} == {"beta": 0.1}


def test_apo_zero_gradient() -> None:
    """s(r) = sigma(r) sigma(-r): dL/dr_w = -s(r_w), dL/dr_l = s(r_l), so chosen rises and rejected falls."""
    tensors = drawn()
    assert gradcheck(lambda *t: apo_zero_loss(*t, beta=0.7).loss, tensors)
    apo_zero_loss(*tensors, beta=0.7).loss.sum().backward()
    chosen, rejected = rewards_of(tensors, 0.7)
    torch.testing.assert_close(tensors[0].grad, -0.7 * torch.sigmoid(chosen) * torch.sigmoid(-chosen))
    torch.testing.assert_close(tensors[1].grad, 0.7 * torch.sigmoid(rejected) * torch.sigmoid(-rejected))


def test_apo_down_gradient() -> None:
    """dL/dr_w = s(r_w) - s(r_w - r_l), dL/dr_l = s(r_w - r_l): rejected falls, chosen too where its margin is larger."""
    tensors = drawn()
    assert gradcheck(lambda *t: apo_down_loss(*t, beta=0.7).loss, tensors)
    apo_down_loss(*tensors, beta=0.7).loss.sum().backward()
    chosen, rejected = rewards_of(tensors, 0.7)
    margin = chosen - rejected
    slope, pull = torch.sigmoid(chosen) * torch.sigmoid(-chosen), torch.sigmoid(margin) * torch.sigmoid(-margin)
    torch.testing.assert_close(tensors[0].grad, 0.7 * (slope - pull))
    torch.testing.assert_close(tensors[1].grad, 0.7 * pull)


@pytest.mark.parametrize(("loss", "optimum"), [(apo_zero_loss, (900.0, -900.0)), (apo_down_loss, (-900.0, -1800.0))])
def test_apo_limits(loss: Loss, optimum: tuple[float, float]) -> None:
    """1 when the policy is the reference; 0 far apart for zero, far down and apart for down; 2 at the mirror image."""
    assert at(loss, 0.0, 0.0) == 1
    assert at(loss, *optimum) == 0
    assert at(loss, -optimum[0], -optimum[1]) == 2


@given(REWARD, REWARD)
def test_apo_symmetries(chosen: float, rejected: float) -> None:
    """sigma(x) + sigma(-x) = 1: negated rewards mirror both losses at 1, swapped completions mirror zero only."""
    for loss in (apo_zero_loss, apo_down_loss):
        assert 0 < at(loss, chosen, rejected) < 2
        assert at(loss, chosen, rejected) + at(loss, -chosen, -rejected) == pytest.approx(2)
    assert at(apo_zero_loss, chosen, rejected) + at(apo_zero_loss, rejected, chosen) == pytest.approx(2)
    swapped = at(apo_down_loss, chosen, rejected) + at(apo_down_loss, rejected, chosen)
    assert swapped == pytest.approx(1 + sigmoid(chosen) + sigmoid(rejected))


@given(REWARD, st.floats(0.1, 5))
def test_apo_down_rewards_a_common_fall_and_zero_does_not(chosen: float, shift: float) -> None:
    """A shift of both rewards leaves the margin: down falls as they fall, zero at r_w = r_l stays at 1."""
    assert at(apo_down_loss, chosen - shift, chosen - 1 - shift) < at(apo_down_loss, chosen, chosen - 1)
    assert at(apo_zero_loss, chosen - shift, chosen - shift) == pytest.approx(1)


def labelled() -> tuple[Tensor, Tensor, Tensor]:
    """Log-ratios 1.5, -0.5 and 1, the second undesirable."""
    policy = torch.tensor([-1.0, -4.0, -3.0], dtype=torch.float64)
    return policy, torch.tensor([-2.5, -3.5, -4.0], dtype=torch.float64), torch.tensor([True, False, True])


def test_apo_zero_unpaired_closed_form() -> None:
    """beta 0.5: rewards 0.75, -0.25, 0.5; 1 - sigma(0.75), sigma(-0.25), 1 - sigma(0.5). Labels may be numbers."""
    out = apo_zero_unpaired_loss(*labelled(), beta=0.5)
    assert out.loss.tolist() == pytest.approx([1 - sigmoid(0.75), sigmoid(-0.25), 1 - sigmoid(0.5)], abs=1e-12)
    assert out.weight.tolist() == [1.0] * 3
    metrics = {key: (values.tolist(), weight.tolist()) for key, (values, weight) in out.metrics.items()}
    assert metrics == {
        "rewards/chosen": ([0.75, -0.25, 0.5], [1.0, 0.0, 1.0]),
        "rewards/rejected": ([0.75, -0.25, 0.5], [0.0, 1.0, 0.0]),
    }
    policy, reference, desirable = labelled()
    torch.testing.assert_close(apo_zero_unpaired_loss(policy, reference, desirable.long(), beta=0.5).loss, out.loss)


def test_apo_zero_unpaired_gradient() -> None:
    """dL/dr = -y s(r), y = +1 or -1: largest at the reference, nothing far from it on either side."""
    policy, reference, desirable = labelled()
    policy = policy.requires_grad_()
    assert gradcheck(lambda p: apo_zero_unpaired_loss(p, reference, desirable, beta=0.7).loss, policy)
    (gradient,) = torch.autograd.grad(apo_zero_unpaired_loss(policy, policy.detach(), desirable, beta=0.7).loss.sum(), policy)
    torch.testing.assert_close(gradient, torch.tensor([-0.7, 0.7, -0.7], dtype=torch.float64) / 4)
    far = reference + torch.tensor([2000.0, 2000.0, -2000.0])
    (gradient,) = torch.autograd.grad(apo_zero_unpaired_loss(policy, far, desirable, beta=0.7).loss.sum(), policy)
    assert gradient.tolist() == [0, 0, 0]


@given(REWARD, REWARD)
def test_apo_zero_is_its_unpaired_form_on_both_completions(chosen: float, rejected: float) -> None:
    rewards = torch.tensor([chosen, rejected], dtype=torch.float64)
    halves = apo_zero_unpaired_loss(rewards, torch.zeros_like(rewards), torch.tensor([True, False]), beta=1.0).loss
    assert halves.sum().item() == pytest.approx(at(apo_zero_loss, chosen, rejected), abs=1e-12)


def test_apo_zero_unpaired_is_kto_with_a_baseline_of_0() -> None:
    policy, reference, desirable = labelled()
    kto = kto_loss(policy, reference, reference, reference, desirable, beta=0.7)
    torch.testing.assert_close(apo_zero_unpaired_loss(policy, reference, desirable, beta=0.7).loss, kto.loss)
