"""A step measured over the parts of a batch, as the laws compare it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from losses import LossOutput, Max
from losses.laws import LawViolation, Measured, measure
from losses.registry import BoundLoss, BoundTerm
from losses.types import Metric


def test_a_loss_that_is_cut_from_the_policy_cannot_be_measured() -> None:
    def cut(policy_logps: Tensor) -> LossOutput:
        return LossOutput(policy_logps.detach(), torch.ones_like(policy_logps))

    leaves = {"policy_logps": torch.zeros(2, requires_grad=True)}
    term = BoundTerm("cut", 1.0, False, frozenset(leaves), frozenset(), cut, {})
    with pytest.raises(LawViolation, match="mine is not connected to any policy tensor; is something detached"):
        measure(BoundLoss("mine", (term,), {}), [leaves], leaves)


def measured_by_hand() -> Measured:
    """Two parts of 1 and 2 rows, two terms with weights 1 and 0.5.

    Term a: loss 3x with weight 2, so over x = 1, 2, 4: 2*(3 + 6 + 12)/(2 + 2 + 2) = 7.
    Term b: loss x*x with weight margin = 1, 0, 3: (1 + 48)/4 = 12.25, halved 6.125.
    """

    def a(policy_chosen_logps: Tensor) -> LossOutput:
        x = policy_chosen_logps.detach()
        metrics: dict[str, Metric] = {"mean": (x, x + 1), "max": Max(-x), "empty": (x, 0 * x)}
        return LossOutput(3 * policy_chosen_logps, torch.full_like(x, 2), metrics)

    def b(policy_chosen_logps: Tensor, margins: Tensor) -> LossOutput:
        updates = {"shift": (margins.sum(), torch.tensor(10.0 * len(margins)))}
        return LossOutput(policy_chosen_logps.square(), margins, updates=updates)

    terms = (
        BoundTerm("a", 1.0, False, frozenset({"policy_chosen_logps"}), frozenset(), a, {}),
        BoundTerm("b", 0.5, False, frozenset({"policy_chosen_logps", "margins"}), frozenset(), b, {}),
    )
    leaves = {
        "policy_chosen_logps": torch.tensor([1.0, 2.0, 4.0], requires_grad=True),
        "policy_rejected_logps": torch.zeros(3, requires_grad=True),
        "margins": torch.tensor([1.0, 0.0, 3.0]),
    }
    parts = [{name: tensor[rows] for name, tensor in leaves.items()} for rows in (slice(0, 1), slice(1, 3))]
    return measure(BoundLoss("by_hand", terms, {}), parts, leaves)


def test_a_step_is_measured_over_all_parts() -> None:
    """One denominator a term and a metric; gradients of a: 3*2/6 = 1, of b: 0.5*2x*margin/4 = 0.25, 0, 3."""
    found = measured_by_hand()
    assert found.objective.item() == 13.125
    assert not found.objective.requires_grad
    assert {name: gradient.tolist() for name, gradient in found.gradients.items()} == {
        "policy_chosen_logps": [1.25, 1.0, 4.0],
        "policy_rejected_logps": [0.0, 0.0, 0.0],
    }
    assert {name: value.item() for name, value in found.metrics.items()} == {
        "a: mean": pytest.approx((1 * 2 + 2 * 3 + 4 * 5) / 10),
        "a: max": -1.0,
        "a: empty": 0.0,
    }
    assert {name: value.item() for name, value in found.updates.items()} == {"b: sum of shift": 4.0, "b: count of shift": 30.0}
