"""GAE and returns: closed forms, limits, padding, whitening."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from losses.advantages import discounted_returns, gae
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
