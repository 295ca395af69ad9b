"""KTO on numbers, its baseline, its gradient, bounds, and what the two labels mean to one another."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from losses import LossOutput, get, kto_loss


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def at(log_ratio: float | Tensor, desirable: bool, mismatched: tuple[float, ...] = (0.0,), **options: float) -> LossOutput:
    """KTO at these log-ratios of completions and of mismatched ones."""
    ratios = torch.as_tensor(log_ratio, dtype=torch.float64).reshape(-1)
    others = torch.tensor(mismatched, dtype=torch.float64)
    labels = torch.full_like(ratios, desirable, dtype=torch.bool)
    return kto_loss(ratios, torch.zeros_like(ratios), others, torch.zeros_like(others), labels, **options)


def test_kto_closed_form() -> None:
    """beta 0.5, weights 1.5 and 0.75; log-ratios 0.8 (desirable) and -0.4 (not); mismatched 0.9 and -0.5: z = 0.2.

    1.5 sigma(0.5*(0.2 - 0.8)) and 0.75 sigma(0.5*(-0.4 - 0.2)), both at -0.3; a third, undesirable at 1.2: sigma(0.5).
    """
    policy, reference = torch.tensor([[-1.2, -3.4, -0.8], [-2.0, -3.0, -2.0]], dtype=torch.float64)
    mismatched, reference_mismatched = torch.tensor([[-5.1, -7.5], [-6.0, -7.0]], dtype=torch.float64)
    desirable = torch.tensor([True, False, False])
    options = {"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.75}
    out = kto_loss(policy, reference, mismatched, reference_mismatched, desirable, **options)
    assert out.loss.tolist() == pytest.approx([1.5 * sigmoid(-0.3), 0.75 * sigmoid(-0.3), 0.75 * sigmoid(0.5)], abs=1e-12)
    assert out.weight.tolist() == [1.0, 1.0, 1.0], "the weights of labels are no denominator"
    rewards = pytest.approx([0.4, -0.2, 0.6])
    assert [tensor.tolist() for tensor in out.metrics["rewards/chosen"]] == [rewards, [1.0, 0.0, 0.0]]
    assert [tensor.tolist() for tensor in out.metrics["rewards/rejected"]] == [rewards, [0.0, 1.0, 1.0]]
    assert [tensor.tolist() for tensor in out.metrics["kl/mismatched"]] == [pytest.approx([0.2]), [1.0]]
    numbers = kto_loss(policy, reference, mismatched, reference_mismatched, desirable.double(), **options)
    assert torch.equal(numbers.loss, out.loss), "labels may be 0 and 1"


def test_kto_defaults() -> None:
    assert get("kto").bind().hyper == {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    assert get("kto").coupled


def test_kto_baseline_is_cut_at_0_after_averaging() -> None:
    """Mismatched (-1, 0.5) average to -0.25, so z = 0 and not the 0.25 of each cut alone; (-0.5, 1) average to 0.25."""
    assert at(0.3, True, (-1.0, 0.5), beta=2.0).loss.item() == pytest.approx(sigmoid(-0.6))
    assert at(0.3, True, (-0.5, 1.0), beta=2.0).loss.item() == pytest.approx(sigmoid(-0.1))


@pytest.mark.parametrize("desirable", [True, False])
def test_kto_gradient(desirable: bool) -> None:
    """-/+ w beta s (1 - s), w of the label and s its sigmoid; none into the baseline."""
    policy, mismatched = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (4, 3))
    reference, reference_mismatched = torch.randn(4, dtype=torch.float64), torch.randn(3, dtype=torch.float64) - 3
    labels = torch.full((4,), desirable)
    options = {"beta": 0.7, "desirable_weight": 1.5, "undesirable_weight": 0.75}
    fixed = (reference, mismatched.detach(), reference_mismatched, labels)
    assert gradcheck(lambda p: kto_loss(p, *fixed, **options).loss, policy)
    loss = kto_loss(policy, reference, mismatched, reference_mismatched, labels, **options).loss
    loss.sum().backward()
    sign, weight = (-1, 1.5) if desirable else (1, 0.75)
    share = loss.detach() / weight
    torch.testing.assert_close(policy.grad, sign * weight * 0.7 * share * (1 - share))
    assert mismatched.grad is None


def test_kto_pushes_hardest_at_the_baseline_and_not_at_all_far_from_it() -> None:
    log_ratios = torch.tensor([-1e3, -2.0, 0.5, 3.0, 1e3], dtype=torch.float64, requires_grad=True)
    at(log_ratios, True, (0.5,), beta=1.0).loss.sum().backward()
    assert log_ratios.grad is not None
    assert log_ratios.grad[[0, 4]].tolist() == [0.0, 0.0]
    assert log_ratios.grad.argmin().item() == 2
    assert log_ratios.grad[2].item() == -0.25  # beta/4


def test_kto_is_half_the_weight_when_the_policy_is_the_reference() -> None:
    assert at(0.0, True, (0.0, 0.0), desirable_weight=1.5).loss.item() == 0.75
    assert at(0.0, False, (0.0, 0.0), undesirable_weight=0.5).loss.item() == 0.25


@settings(max_examples=15)
@given(st.floats(-20, 20), st.floats(0, 3), st.floats(0.05, 1), st.floats(0.1, 3))
def test_kto_is_bounded_and_the_labels_mirror_one_another(offset: float, baseline: float, beta: float, weight: float) -> None:
    """Desirable at z + d is undesirable at z - d, and both labels at one place sum to the weight."""
    options = {"beta": beta, "desirable_weight": weight, "undesirable_weight": weight}
    good, bad = (at(baseline + offset, label, (baseline,), **options).loss.item() for label in (True, False))
    assert 0 < good < weight
    assert good == pytest.approx(at(baseline - offset, False, (baseline,), **options).loss.item())
    assert good + bad == pytest.approx(weight)


@settings(max_examples=15)
@given(st.floats(-20, 20), st.floats(0.01, 5))
def test_kto_falls_with_desirable_completions_and_rises_with_undesirable_ones(log_ratio: float, step: float) -> None:
    assert at(log_ratio + step, True).loss.item() < at(log_ratio, True).loss.item()
    assert at(log_ratio + step, False).loss.item() > at(log_ratio, False).loss.item()
