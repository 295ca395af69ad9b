"""PPO's clipped surrogate: closed forms on every branch, REINFORCE at ratio 1, length normalisations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from losses import LossOutput, Max, get, ppo_policy_loss
from losses.advantages import discounted_returns
from losses.ops import MAX_LOG_RATIO

LENGTH_NORMS = ("token", "seq_mean", "seq_sum", "constant")


def one(ratio: float, advantage: float, **options: float) -> tuple[float, float]:
    """Loss and gradient with respect to the log-prob of one token."""
    logps = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    loss = ppo_policy_loss(logps, zero, zero + advantage, zero + 1, **options).mean()
    loss.backward()
    assert logps.grad is not None
    return loss.item(), logps.grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.1, 2.0, -2.2, -2.2),  # inside the clip: -A rho, and d rho / d log pi = rho
        (1.5, 2.0, -2.4, 0.0),  # a good action, likely enough: -A (1 + 0.2), no gradient
        (0.5, 2.0, -1.0, -1.0),  # a good action that became rare: pushed on
        (0.5, -2.0, 1.6, 0.0),  # a bad action, rare enough: -A (1 - 0.2), no gradient
        (1.5, -2.0, 3.0, 3.0),  # a bad action that became likely: pushed down with its ratio
    ],
)
def test_ppo_policy_closed_forms(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    assert one(ratio, advantage) == pytest.approx((loss, gradient))


def test_ppo_policy_clips_low_and_high_apart() -> None:
    assert one(1.5, 1.0, clip_high=0.28)[0] == pytest.approx(-1.28)
    assert one(0.5, -1.0, clip_low=0.3)[0] == pytest.approx(0.7)
    assert one(1.5, 1.0, clip_low=0.5)[0] == pytest.approx(-1.2)


def test_ppo_policy_dual_clip_bounds_bad_actions_only() -> None:
    """A = -2: the loss is 2 min(rho, 3), without gradient beyond; A = 2 is as before."""
    assert one(5.0, -2.0, dual_clip=3.0) == pytest.approx((6.0, 0.0))
    assert one(2.0, -2.0, dual_clip=3.0) == pytest.approx((4.0, 4.0))
    assert one(5.0, 2.0, dual_clip=3.0) == pytest.approx(one(5.0, 2.0))


def test_ppo_policy_gradient_is_zero_beyond_the_largest_exponent() -> None:
    beyond, below = math.exp(MAX_LOG_RATIO + 1), math.exp(MAX_LOG_RATIO - 1)
    assert one(beyond, -1.0) == pytest.approx((math.exp(MAX_LOG_RATIO), 0.0))
    assert one(below, -1.0) == pytest.approx((below, below))


@pytest.fixture
def rollout() -> dict[str, Tensor]:
    """Four completions of up to five tokens, near their sampling policy."""
    mask = (torch.arange(5) < torch.tensor([[5], [2], [3], [1]])).double()
    old = -2 * torch.rand(4, 5, dtype=torch.float64) * mask
    return {
        "policy_token_logps": (old + 0.4 * torch.randn(4, 5, dtype=torch.float64)) * mask,
        "old_token_logps": old,
        "advantages": torch.randn(4, 5, dtype=torch.float64),
        "mask": mask,
        "max_completion_length": torch.tensor(8.0, dtype=torch.float64),
    }


def reduced(out: LossOutput, key: str) -> float:
    metric = out.metrics[key]
    assert not isinstance(metric, Max)
    return float((metric[0] * metric[1]).sum() / metric[1].sum())


@pytest.mark.parametrize("length_norm", LENGTH_NORMS)
def test_ppo_policy_at_ratio_1_has_the_gradient_of_reinforce(rollout: dict[str, Tensor], length_norm: str) -> None:
    """d/d theta of -A rho at rho = 1 is that of -A log pi, under every normalisation."""
    logps = rollout["old_token_logps"].clone().requires_grad_()
    ppo_policy_loss(**{**rollout, "policy_token_logps": logps}, length_norm=length_norm).mean().backward()
    mask = rollout["mask"]
    share = {
        "token": mask / mask.sum(),
        "seq_mean": mask / mask.sum(-1, keepdim=True) / 4,
        "seq_sum": mask / 4,
        "constant": mask / (4 * 8),
    }[length_norm]
    torch.testing.assert_close(logps.grad, -rollout["advantages"] * share)


@pytest.mark.parametrize("length_norm", LENGTH_NORMS)
def test_ppo_policy_gradcheck(rollout: dict[str, Tensor], length_norm: str) -> None:
    logps = rollout.pop("policy_token_logps").requires_grad_()
    assert gradcheck(lambda x: ppo_policy_loss(x, **rollout, dual_clip=1.5, length_norm=length_norm).mean(), logps)


def test_ppo_policy_length_norms_agree_where_lengths_do(rollout: dict[str, Tensor]) -> None:
    rollout["mask"] = torch.ones_like(rollout["mask"])
    token, seq_mean, seq_sum, constant = (ppo_policy_loss(**rollout, length_norm=norm).mean() for norm in LENGTH_NORMS)
    torch.testing.assert_close(token, seq_mean)
    torch.testing.assert_close(seq_sum, 5 * token)
    torch.testing.assert_close(constant, 5 / 8 * token)


@pytest.mark.parametrize("length_norm", LENGTH_NORMS)
def test_ppo_policy_rows_without_tokens_do_not_count(rollout: dict[str, Tensor], length_norm: str) -> None:
    more = {name: torch.cat([t, torch.zeros(2, 5).double()]) if t.ndim else t for name, t in rollout.items()}
    here, there = (ppo_policy_loss(**tensors, length_norm=length_norm).mean() for tensors in (rollout, more))
    torch.testing.assert_close(here, there)


@given(st.integers(0, 2**31), st.floats(-3, 3))
def test_ppo_policy_bounds_the_unclipped_surrogate_and_ignores_a_shift(seed: int, shift: float) -> None:
    old, noise, advantages = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mask = torch.ones(2, 6)
    loss = ppo_policy_loss(old + noise, old, advantages, mask).loss
    assert (loss >= -advantages * noise.exp() - 1e-12).all()
    torch.testing.assert_close(ppo_policy_loss(old + noise + shift, old + shift, advantages, mask).loss, loss)
    unclipped = ppo_policy_loss(old + noise, old, advantages, mask, clip_low=1e9, clip_high=1e9).loss
    torch.testing.assert_close(unclipped, -advantages * noise.exp())


def test_ppo_policy_metrics() -> None:
    """Ratios 0.9 and 0.5 (clipped: A < 0) count, the masked 9 does not; k3 of old against policy is r - 1 - log r."""
    logps = torch.tensor([[0.9, 0.5, 9.0]], dtype=torch.float64).log()
    mask = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
    out = ppo_policy_loss(logps, torch.zeros_like(logps), -torch.ones_like(logps), mask)
    ratio_max = out.metrics["ratio/max"]
    assert isinstance(ratio_max, Max)
    assert ratio_max.values.max().item() == pytest.approx(0.9)  # not the 1 of a masked ratio
    assert reduced(out, "clip_frac") == 0.5
    assert reduced(out, "approx_kl") == pytest.approx((0.9 + 0.5 - 2 - math.log(0.9 * 0.5)) / 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dual_clip": 1.0}, "dual_clip must exceed 1, got 1.0"),
        ({"clip_low": -0.1}, "must be at least 0, got -0.1 and 0.2"),
        ({"length_norm": "constant"}, "max_completion_length, which was not given"),
        ({"length_norm": "mean"}, "unknown length_norm 'mean'; expected one of token, seq_mean, seq_sum, constant"),
    ],
)
def test_ppo_policy_options_out_of_range_are_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ppo_policy_loss(*torch.zeros(4, 1, 1), **options)


def test_ppo_policy_declaration() -> None:
    """By itself it trains on rewards to go; no dual clip and token means unless asked for."""
    assert get("ppo_policy").bind().hyper == {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "length_norm": "token"}
    assert get("ppo_policy").advantage is discounted_returns
    assert get("ppo_policy").defaults == {}


def test_ppo_policy_sends_no_gradient_to_the_sampling_policy_and_advantages(rollout: dict[str, Tensor]) -> None:
    leaves = [rollout[name].clone().requires_grad_() for name in ("policy_token_logps", "old_token_logps", "advantages")]
    out = ppo_policy_loss(*leaves, rollout["mask"])
    gradient, *unused = torch.autograd.grad(out.mean(), leaves, allow_unused=True)
    assert not gradient[~rollout["mask"].bool()].any()
    assert unused == [None, None]
    for metric in out.metrics.values():
        assert not any(part.requires_grad for part in ([metric.values] if isinstance(metric, Max) else metric))


@pytest.mark.parametrize("length_norm", LENGTH_NORMS)
def test_ppo_policy_padding_may_hold_anything(rollout: dict[str, Tensor], length_norm: str) -> None:
    """Not even NaN of either policy at masked positions reaches objective or gradient."""
    mask = rollout["mask"].bool()
    objectives, gradients = [], []
    for padding in (0.0, math.nan):
        dirty = {name: torch.where(mask, rollout[name], padding) for name in ("policy_token_logps", "old_token_logps")}
        policy = dirty["policy_token_logps"].requires_grad_()
        objectives.append(ppo_policy_loss(**{**rollout, **dirty}, length_norm=length_norm).mean())
        gradients.append(torch.autograd.grad(objectives[-1], policy)[0])
    torch.testing.assert_close(*objectives)
    torch.testing.assert_close(*gradients)
