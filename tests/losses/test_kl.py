"""The KL estimators against exact sums over a 4-way categorical: what each estimates, and what its gradient does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from losses.ops import MAX_LOG_RATIO, kl_k1, kl_k2, kl_k3

Estimator = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture
def logits() -> Tensor:
    return torch.tensor([0.3, -1.1, 0.8, 0.1], dtype=torch.float64, requires_grad=True)


REFERENCE = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()


def expectation(estimator: Estimator, logits: Tensor) -> Tensor:
    """E over samples from the policy, exactly; the sampling probabilities carry no gradient, as with real samples."""
    logps = logits.log_softmax(-1)
    return (logps.exp().detach() * estimator(logps, REFERENCE)).sum()


def reverse_kl(logits: Tensor) -> Tensor:
    logps = logits.log_softmax(-1)
    return (logps.exp() * (logps - REFERENCE)).sum()


def forward_kl(logits: Tensor) -> Tensor:
    return (REFERENCE.exp() * (REFERENCE - logits.log_softmax(-1))).sum()


def test_kl_values(logits: Tensor) -> None:
    exact = reverse_kl(logits).item()
    assert expectation(kl_k1, logits).item() == pytest.approx(exact, abs=1e-14)
    assert expectation(kl_k3, logits).item() == pytest.approx(exact, abs=1e-14)
    assert abs(expectation(kl_k2, logits).item() - exact) > 0.01, "k2 is biased"


def test_kl_k2_is_right_to_second_order() -> None:
    """Its bias vanishes faster than the KL as the policies approach."""
    direction = torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=torch.float64)
    errors = []
    for step in (1e-1, 1e-2):
        logits = REFERENCE + step * direction
        errors.append(abs(expectation(kl_k2, logits).item() / reverse_kl(logits).item() - 1))
    assert errors[1] < errors[0] / 5


@pytest.mark.parametrize(
    ("estimator", "target"),
    [(kl_k1, lambda logits: 0 * logits.sum()), (kl_k2, reverse_kl), (kl_k3, forward_kl)],
    ids=["k1-nothing", "k2-reverse", "k3-forward"],
)
def test_kl_gradients_as_loss_terms(logits: Tensor, estimator: Estimator, target: Callable[[Tensor], Tensor]) -> None:
    (got,) = torch.autograd.grad(expectation(estimator, logits), logits)
    (expected,) = torch.autograd.grad(target(logits), logits)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_kl_forward_and_reverse_gradients_differ(logits: Tensor) -> None:
    """Else the test above could not tell k2 from k3."""
    (reverse,) = torch.autograd.grad(reverse_kl(logits), logits)
    (forward,) = torch.autograd.grad(forward_kl(logits), logits)
    assert (reverse - forward).abs().max() > 0.01


def test_kl_signs_and_argument_order() -> None:
    policy, reference = torch.tensor([-1.0]), torch.tensor([-3.0])
    assert kl_k1(policy, reference).item() == 2.0
    difference = torch.linspace(-30, 30, 61, dtype=torch.float64)
    assert (kl_k2(difference, torch.zeros_like(difference)) >= 0).all()
    assert (kl_k3(difference, torch.zeros_like(difference)) >= 0).all()


def test_kl_k3_is_finite_and_flat_beyond_its_largest_exponent() -> None:
    logps = torch.tensor([-1e4, -MAX_LOG_RATIO - 1, -MAX_LOG_RATIO + 1, 1e4], requires_grad=True)
    value = kl_k3(logps, torch.zeros(4))
    value.sum().backward()
    assert value.isfinite().all()
    assert logps.grad is not None
    assert logps.grad[:2].tolist() == [0.0, 0.0]
    assert logps.grad[2] < 0 < logps.grad[3]
