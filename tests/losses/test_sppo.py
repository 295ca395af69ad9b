"""SPPO on four numbers, its two targets, and how it stands to IPO."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from losses import get, ipo_loss, sppo_loss

LOG_RATIO = st.floats(-20, 20)
BETA = st.floats(0.01, 5)


def at(chosen: Tensor | float, rejected: Tensor | float, beta: float) -> Tensor:
    """SPPO's loss at two log-ratios. [P]"""
    ratios = [torch.as_tensor(ratio, dtype=torch.float64).reshape(-1) for ratio in (chosen, rejected)]
    return sppo_loss(*ratios, *map(torch.zeros_like, ratios), beta=beta).loss


def test_sppo_closed_form() -> None:
    """beta 0.25, targets +2 and -2; log-ratios 1.5 and -0.5: (1.5 - 2)^2 + (-0.5 + 2)^2 = 2.5."""
    tensors = [torch.tensor([x], dtype=torch.float64) for x in (-1.0, -4.0, -2.5, -3.5)]
    out = sppo_loss(*tensors, beta=0.25)
    assert (out.loss.tolist(), out.weight.tolist()) == ([2.5], [1.0])
    rewards = {key: values.item() for key, (values, _) in out.metrics.items()}
    assert rewards == {"rewards/chosen": 0.375, "rewards/rejected": -0.125, "rewards/margins": 0.5, "rewards/accuracies": 1.0}


def test_sppo_defaults() -> None:
    """The paper's eta of 1000: targets of 500 nats."""
    assert {flag: hyper.default for flag, hyper in get("sppo").hyper.items()} == {"beta": 1e-3}


def test_sppo_gradient_pulls_each_log_ratio_to_its_own_target() -> None:
    """dL/dC = 2 (C - 1/(2 beta)), dL/dR = 2 (R + 1/(2 beta)); a chosen completion beyond its target falls."""
    tensors = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert gradcheck(lambda *t: sppo_loss(*t, beta=0.7).loss, tensors)
    sppo_loss(*tensors, beta=0.7).loss.sum().backward()
    chosen, rejected, reference_chosen, reference_rejected = (tensor.detach() for tensor in tensors)
    torch.testing.assert_close(tensors[0].grad, 2 * (chosen - reference_chosen - 1 / 1.4))
    torch.testing.assert_close(tensors[1].grad, 2 * (rejected - reference_rejected + 1 / 1.4))


@given(BETA)
def test_sppo_limits(beta: float) -> None:
    """1/(2 beta^2) when the policy is the reference; 0 at the targets."""
    assert at(0.0, 0.0, beta).item() == pytest.approx(1 / (2 * beta**2))
    assert at(1 / (2 * beta), -1 / (2 * beta), beta).item() == 0


@given(LOG_RATIO, LOG_RATIO, BETA)
def test_sppo_swapped_completions_with_negated_log_ratios_are_the_same(chosen: float, rejected: float, beta: float) -> None:
    assert at(-rejected, -chosen, beta).item() == pytest.approx(at(chosen, rejected, beta).item())


@given(LOG_RATIO, LOG_RATIO, BETA)
def test_sppo_is_half_of_ipo_and_half_of_the_squared_sum(chosen: float, rejected: float, beta: float) -> None:
    """a^2 + b^2 = (a - b)^2/2 + (a + b)^2/2 with a = C - t, b = R + t: IPO of tau = beta/2, and what holds C + R at 0."""
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1)
    ipo = ipo_loss(zero + chosen, zero + rejected, zero, zero, one, one, tau=beta / 2, average_log_prob=False).loss.item()
    assert at(chosen, rejected, beta).item() == pytest.approx((ipo + (chosen + rejected) ** 2) / 2)
