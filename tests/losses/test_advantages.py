"""Advantage functions: closed forms, limits, padding, whitening, and what a shift of a prompt's rewards does."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from losses.advantages import discounted_returns, gae, group_baseline, leave_one_out
from losses.declaration import read_signature


def rollout(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and a mask of three completions of up to six tokens."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 7, (3, 1), generator=generator)
    return rewards, values, (torch.arange(6) < lengths).double()


def test_gae_closed_form() -> None:
    """discount 0.5, lambda 0.5; r = (1, 2), V = (4, 6), then the end.

    delta_1 = 2 - 6 = -4; delta_0 = 1 + 0.5*6 - 4 = 0; A_1 = -4, A_0 = 0 + 0.25*(-4) = -1; returns (3, 2).
    """
    out = gae(
        torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 6.0]]), torch.ones(1, 2),
        discount=0.5, gae_lambda=0.5, whiten_advantages=False,
    )  # fmt: skip
    assert out["advantages"].tolist() == [[-1.0, -4.0]]
    assert out["returns"].tolist() == [[3.0, 2.0]]


@given(st.integers(0, 10_000), st.floats(0, 1))
def test_gae_limits(seed: int, discount: float) -> None:
    """lambda 1: reward to go minus value; lambda 0: the one-step error."""
    rewards, values, mask = rollout(seed)
    to_go = discounted_returns(rewards, mask, discount=discount)["returns"]
    full = gae(rewards, values, mask, discount=discount, gae_lambda=1.0, whiten_advantages=False)
    torch.testing.assert_close(full["advantages"], (to_go - values) * mask)
    torch.testing.assert_close(full["returns"], to_go)
    next_values = torch.cat([(values * mask)[:, 1:], torch.zeros(3, 1)], dim=1)
    one_step = gae(rewards, values, mask, discount=discount, gae_lambda=0.0, whiten_advantages=False)
    torch.testing.assert_close(one_step["advantages"], (rewards + discount * next_values - values) * mask)


def test_returns_without_discount_are_the_reward_to_go() -> None:
    out = discounted_returns(torch.tensor([[1.0, 2.0, 4.0, 99.0]]), torch.tensor([[1, 1, 1, 0]]))
    assert out["returns"].tolist() == [[7.0, 6.0, 4.0, 0.0]]
    assert out["advantages"].tolist() == out["returns"].tolist()


@given(st.integers(0, 10_000), st.booleans())
def test_gae_padding_does_not_leak(seed: int, left: bool) -> None:
    """Garbage in more padding, on either side, changes nothing, whitening included."""
    rewards, values, mask = rollout(seed)
    expected = gae(rewards, values, mask, discount=0.9)
    junk, none = torch.full((3, 2), 1e3, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)

    def pad(tensor: Tensor, fill: Tensor) -> Tensor:
        return torch.cat([fill, tensor] if left else [tensor, fill], dim=1)

    dirty = torch.where(mask.bool(), rewards, junk[:, :1])
    got = gae(pad(dirty, junk), pad(values, -junk), pad(mask, none), discount=0.9)
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], pad(tensor, none))


@pytest.mark.parametrize("function", [gae, discounted_returns])
def test_whitened_advantages_have_mean_0_and_variance_1_and_returns_stay(function: object) -> None:
    rewards, values, mask = rollout(0)
    given_tensors = (rewards, values, mask) if function is gae else (rewards, mask)
    assert callable(function)
    plain, white = (function(*given_tensors, whiten_advantages=choice) for choice in (False, True))
    torch.testing.assert_close(plain["returns"], white["returns"])
    kept = white["advantages"][mask.bool()]
    assert kept.mean().abs() < 1e-12
    assert kept.var(unbiased=False).item() == pytest.approx(1, abs=1e-6)
    assert not white["advantages"][~mask.bool()].any()


def test_gae_of_a_single_step_and_of_a_masked_one_between() -> None:
    """r - V for one step. A step in the middle that is masked is stepped over and holds 0: 2 - 6 and 1 + 6 - 4 - 0.5*4."""
    one = gae(torch.tensor([[3.0]]), torch.tensor([[1.0]]), torch.ones(1, 1), whiten_advantages=False)
    assert (one["advantages"].item(), one["returns"].item()) == (2.0, 3.0)
    out = gae(
        torch.tensor([[1.0, 9.0, 2.0]]), torch.tensor([[4.0, 9.0, 6.0]]), torch.tensor([[1, 0, 1]]),
        gae_lambda=0.5, whiten_advantages=False,
    )  # fmt: skip
    assert out["advantages"].tolist() == [[1.0, 0.0, -4.0]]
    assert out["returns"].tolist() == [[5.0, 0.0, 2.0]]


def test_advantages_carry_no_gradient() -> None:
    rewards, values, mask = rollout(0)
    assert not any(tensor.requires_grad for tensor in gae(rewards, values.requires_grad_(), mask).values())


def test_advantage_functions_declare_themselves() -> None:
    signature = read_signature(gae, "gae")
    assert signature.required == ("rewards", "old_values", "mask")
    assert {name: parameter.default for name, parameter in signature.hyper.items()} == {
        "discount": 1.0, "gae_lambda": 0.95, "whiten_advantages": True,
    }  # fmt: skip
    assert all(parameter.help for parameter in signature.hyper.values())


def test_advantage_functions_without_values_declare_themselves() -> None:
    """Returns are neither discounted nor whitened; the baselines need the prompts, and scale by the group or not at all."""
    functions: dict[Callable[..., object], tuple[tuple[str, ...], dict[str, object]]] = {
        discounted_returns: (("rewards", "mask"), {"discount": 1.0, "whiten_advantages": False}),
        group_baseline: (("rewards", "mask", "group_ids"), {"scale": "group"}),
        leave_one_out: (("rewards", "mask", "group_ids"), {"normalise": False}),
    }
    for function, (required, defaults) in functions.items():
        signature = read_signature(function, function.__name__)
        assert signature.required == required
        assert {name: parameter.default for name, parameter in signature.hyper.items()} == defaults
        assert all(parameter.help for parameter in signature.hyper.values())


REWARDS = torch.tensor(
    [[1.0, 0.0, 2.0], [0.0, 5.0, 99.0], [4.0, -99.0, 99.0], [1.0, 1.0, 1.0], [-1.0, 0.0, 99.0]], dtype=torch.float64
)  # fmt: skip
MASK = torch.tensor([[1.0, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]], dtype=torch.float64)
PROMPTS = torch.tensor([7, 2, 7, 2, 7])
"""Totals 3, 4, -1 of one prompt and 5, 3 of another, their rows mixed."""


def of_sequences(advantages: Tensor) -> list[float]:
    """The advantage of each sequence, which all its tokens have and no masked position."""
    torch.testing.assert_close(advantages, advantages[:, :1] * MASK)
    return advantages[:, 0].tolist()


def test_group_baseline_closed_form() -> None:
    """Means 2 and 4: centred 1, 2, -3 and 1, -1. Unbiased variances 14/2 = 7 and 2/1 = 2."""
    seven, two = math.sqrt(7) + 1e-4, math.sqrt(2) + 1e-4
    expected = [1 / seven, 1 / two, 2 / seven, -1 / two, -3 / seven]
    assert of_sequences(group_baseline(REWARDS, MASK, PROMPTS)["advantages"]) == pytest.approx(expected, abs=1e-12)
    plain = group_baseline(REWARDS, MASK, PROMPTS, scale="none")["advantages"]
    assert of_sequences(plain) == pytest.approx([1, 1, 2, -1, -3], abs=1e-12)


def test_group_baseline_scaled_by_the_batch_closed_form() -> None:
    """Of all totals 3, 5, 4, 3, -1 (mean 2.8) the unbiased variance is (0.04 + 4.84 + 1.44 + 0.04 + 14.44)/4 = 5.2."""
    std = math.sqrt(5.2) + 1e-4
    batch = group_baseline(REWARDS, MASK, PROMPTS, scale="batch")["advantages"]
    assert of_sequences(batch) == pytest.approx([1 / std, 1 / std, 2 / std, -1 / std, -3 / std], abs=1e-12)
    two = group_baseline(torch.tensor([[1.0], [3.0]]).double(), torch.ones(2, 1), torch.zeros(2), scale="batch")["advantages"]
    assert two[:, 0].tolist() == pytest.approx([-1 / (math.sqrt(2) + 1e-4), 1 / (math.sqrt(2) + 1e-4)], abs=1e-12)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_baseline_of_equal_rewards_and_of_single_samples_is_0(scale: Literal["group", "batch", "none"]) -> None:
    """A prompt with one sample has nothing to compare with; one that earns the same in all, nothing to learn."""
    rewards = torch.tensor([[3.0], [3.0], [3.0], [8.0]], dtype=torch.float64)
    ones, prompts = torch.ones(4, 1), torch.tensor([0, 0, 0, 1])
    assert group_baseline(rewards, ones, prompts, scale=scale)["advantages"].tolist() == [[0.0]] * 4
    assert group_baseline(rewards[:1], ones[:1], prompts[:1], scale=scale)["advantages"].tolist() == [[0.0]]


def test_leave_one_out_closed_form() -> None:
    """Totals 3, 4, -1 against the mean of the other two: 3 - 1.5, 4 - 1, -1 - 3.5; 5 and 3 against each other."""
    plain = leave_one_out(REWARDS, MASK, PROMPTS)["advantages"]
    assert of_sequences(plain) == pytest.approx([1.5, 2, 3, -2, -4.5], abs=1e-12)
    normalised = leave_one_out(REWARDS, MASK, PROMPTS, normalise=True)["advantages"]
    std = math.sqrt((1.5**2 + 2**2 + 3**2 + 2**2 + 4.5**2) / 4) + 1e-4
    assert of_sequences(normalised) == pytest.approx([a / std for a in (1.5, 2, 3, -2, -4.5)], abs=1e-12)


def test_leave_one_out_normalised_keeps_mean_0_and_unit_deviation() -> None:
    """Over the sequences of all prompts, and nothing where all rewards are equal."""
    rewards = torch.randn(6, 1, dtype=torch.float64)
    prompts = torch.arange(6) // 3
    advantages = leave_one_out(rewards, torch.ones(6, 1), prompts, normalise=True)["advantages"]
    assert abs(advantages.mean().item()) < 1e-12
    assert advantages.std().item() == pytest.approx(1, abs=1e-3)
    assert not leave_one_out(torch.ones(6, 1), torch.ones(6, 1), prompts, normalise=True)["advantages"].any()


@settings(max_examples=15)
@given(st.integers(0, 2**31), st.floats(-50, 50), st.floats(0.5, 20))
def test_baselines_ignore_a_prompts_constant_and_sum_to_0(seed: int, shift: float, scale: float) -> None:
    """Rewards of one prompt moved together change nothing; GRPO's scale ignores their unit too, up to its offset."""
    rewards = torch.randn(5, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ones = torch.ones(5, 1)
    moved = rewards + torch.where(PROMPTS == 7, shift, 0.0)[:, None]
    for function in (group_baseline, partial(group_baseline, scale="none"), leave_one_out):
        here, there = (function(r, ones, PROMPTS)["advantages"] for r in (rewards, moved))
        torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-9)
        assert all(abs(here[prompt == PROMPTS].sum().item()) < 1e-9 for prompt in (2, 7))
    torch.testing.assert_close(
        group_baseline(scale * moved, ones, PROMPTS)["advantages"], group_baseline(rewards, ones, PROMPTS)["advantages"],
        rtol=1e-2, atol=1e-2,
    )  # fmt: skip
    linear = group_baseline(scale * rewards, ones, PROMPTS, scale="none")["advantages"]
    torch.testing.assert_close(linear, scale * group_baseline(rewards, ones, PROMPTS, scale="none")["advantages"])


def test_leave_one_out_is_the_centred_reward_by_k_over_k_minus_1() -> None:
    rewards, prompts = torch.randn(8, 1, dtype=torch.float64), torch.arange(8) % 2
    centred = group_baseline(rewards, torch.ones(8, 1), prompts, scale="none")["advantages"]
    torch.testing.assert_close(leave_one_out(rewards, torch.ones(8, 1), prompts)["advantages"], 4 / 3 * centred)


def test_baselines_raise_errors_and_carry_no_gradient() -> None:
    with pytest.raises(ValueError, match="group_baseline: unknown scale 'std'; expected 'group', 'batch' or 'none'"):
        group_baseline(REWARDS, MASK, PROMPTS, scale="std")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="leave_one_out: a prompt has 1 sample, expected 2 or more; raise samples_per_prompt"):
        leave_one_out(REWARDS[:3], MASK[:3], PROMPTS[:3])
    leaf = REWARDS.clone().requires_grad_()
    for function in (group_baseline, leave_one_out):
        assert not function(leaf, MASK, PROMPTS)["advantages"].requires_grad
    assert not discounted_returns(leaf, MASK)["advantages"].requires_grad
