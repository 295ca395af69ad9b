"""GSPO-token: GSPO's value and gradient with one advantage a sequence, token gradients with more."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from losses import get, gspo_loss, gspo_token_loss
from losses.advantages import group_baseline
from losses.sampling import sample_tensors

OLD = torch.tensor([[-1.0, -1.0], [-2.0, 0.0]], dtype=torch.float64)
# Log-ratios 0.3 and -0.1 (mean 0.1), and 0.2 on one token.
POLICY = OLD + torch.tensor([[0.3, -0.1], [0.2, 0.0]], dtype=torch.float64)
MASK = torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
ADVANTAGES = torch.tensor([[2.0, -3.0], [0.5, 7.0]], dtype=torch.float64)
WIDE = {"clip_low": 0.5, "clip_high": 0.5}


def test_value_and_gradient_without_clipping() -> None:
    """rho is exp(0.1) on both tokens of the first sequence: ((-2 + 3) e^0.1 / 2 - 0.5 e^0.2) / 2.

    d/d logp_t = -A_t rho / |y| / 2: its own token's advantage, the sequence's ratio.
    """
    policy = POLICY.clone().requires_grad_()
    loss = gspo_token_loss(policy, OLD, ADVANTAGES, MASK, **WIDE).mean()
    assert loss.item() == pytest.approx((math.exp(0.1) / 2 - 0.5 * math.exp(0.2)) / 2, rel=1e-12)
    loss.backward()
    expected = torch.tensor(
        [[-2 * math.exp(0.1) / 4, 3 * math.exp(0.1) / 4], [-0.5 * math.exp(0.2) / 2, 0.0]], dtype=torch.float64
    )
    torch.testing.assert_close(policy.grad, expected)


def test_the_sequence_decides_the_clip() -> None:
    """exp(0.1) is above 1 + 0.05: good tokens of the first sequence stop, its bad one goes on, whatever their own ratios."""
    policy = POLICY.clone().requires_grad_()
    out = gspo_token_loss(policy, OLD, ADVANTAGES, MASK, clip_low=0.5, clip_high=0.05)
    out.mean().backward()
    assert policy.grad is not None
    assert (policy.grad == 0).tolist() == [[True, False], [True, True]]
    assert out.mean().item() == pytest.approx(((-2 * 1.05 + 3 * math.exp(0.1)) / 2 - 0.5 * 1.05) / 2, rel=1e-12)
    low = (2 * OLD - POLICY).requires_grad_()  # exp(-0.1) is below 1 - 0.05: now the bad token stops
    gspo_token_loss(low, OLD, ADVANTAGES, MASK, clip_low=0.05, clip_high=0.5).mean().backward()
    assert low.grad is not None
    assert (low.grad == 0).tolist() == [[False, True], [False, True]]


@settings(max_examples=10)
@given(seed=st.integers(0, 2**31))
def test_one_advantage_a_sequence_gives_gspo(seed: int) -> None:
    tensors = sample_tensors(get("gspo").bind(), torch.Generator().manual_seed(seed))
    tensors["advantages"] = tensors["advantages"][:, :1].expand_as(tensors["mask"])

    def run(loss: object, clip: float) -> tuple[Tensor, Tensor]:
        policy = tensors["policy_token_logps"].clone().requires_grad_()
        value = loss(**{**tensors, "policy_token_logps": policy}, clip_low=clip, clip_high=clip).mean()  # type: ignore[operator]
        return value.detach(), torch.autograd.grad(value, policy)[0]

    for clip in (0.02, 0.5):
        torch.testing.assert_close(run(gspo_token_loss, clip), run(gspo_loss, clip))


def test_no_gradient_to_advantages_or_old_log_probs() -> None:
    tensors = [tensor.clone().requires_grad_() for tensor in (POLICY, OLD, ADVANTAGES)]
    gspo_token_loss(*tensors, MASK, **WIDE).mean().backward()
    assert tensors[1].grad is None
    assert tensors[2].grad is None


def test_defaults_advantage_and_metrics() -> None:
    loss = get("gspo_token")
    assert dict(loss.bind().hyper) == {"clip_low": 3e-4, "clip_high": 4e-4}
    assert loss.advantage is group_baseline
    metrics = gspo_token_loss(POLICY, OLD, ADVANTAGES, MASK, clip_low=0.5, clip_high=0.05).metrics
    values, weight = metrics["clip_frac"]  # type: ignore[misc]
    assert ((values * weight).sum() / weight.sum()).item() == pytest.approx(2 / 3)
    assert metrics["ratio/max"].values.max().item() == pytest.approx(math.exp(0.2))  # type: ignore[union-attr]


def test_options_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"gspo_token_loss: clip_low and clip_high must be at least 0, got -0\.1 and 0\.5"):
        gspo_token_loss(POLICY, OLD, ADVANTAGES, MASK, clip_low=-0.1, clip_high=0.5)
