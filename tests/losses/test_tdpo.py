"""TDPO on numbers in both versions, which KL carries gradient, and when it is DPO."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from losses import LossOutput, dpo_loss, get, tdpo_loss


def one_pair(**options: float) -> LossOutput:
    """Log-ratios 2 and -0.5; KLs 0.1 + 0.3 = 0.4 and 0.5 + 0.7 + 0.2 = 1.4, 9 where masked."""
    logps = [torch.tensor([x], dtype=torch.float64) for x in (-1.0, -4.0, -3.0, -3.5)]
    kls = [torch.tensor([x], dtype=torch.float64) for x in ([0.1, 0.3, 9.0], [0.5, 0.7, 0.2])]
    return tdpo_loss(*logps, *kls, torch.tensor([[1, 1, 0]]), torch.tensor([[1, 1, 1]]), **options)


@pytest.fixture
def pairs() -> list[Tensor]:
    """Four pairs: sums of log-probs, KLs of up to three tokens (numbers also where masked), masks."""
    logps = list(-3 * torch.rand(4, 4, dtype=torch.float64))
    kls = list(torch.rand(2, 4, 3, dtype=torch.float64))
    mask = (torch.arange(3) < torch.tensor([[3], [1], [2], [2]])).double()
    return [*logps, *kls, mask, mask.flip(0)]


@pytest.mark.parametrize(
    ("options", "margin"),
    [
        ({"version": 2, "alpha": 0.25}, 1.125),  # 0.5*(2.5 - 0.25*(1.4 - 0.4))
        ({"version": 1, "alpha": 0.25}, 0.75),  # 0.5*(2.5 - (1.4 - 0.4)): version 1 has no alpha
        ({}, 1.0),  # the defaults but beta: 0.5*(2.5 - 0.5*(1.4 - 0.4))
    ],
)
def test_tdpo_closed_form(options: dict[str, float], margin: float) -> None:
    out = one_pair(beta=0.5, **options)
    assert out.loss.item() == pytest.approx(math.log(1 + math.exp(-margin)), abs=1e-12)
    assert {key: values.item() for key, (values, _) in out.metrics.items()} == pytest.approx({
        "rewards/chosen": 1.0, "rewards/rejected": -0.25, "rewards/margins": 1.25, "rewards/accuracies": 1.0,
        "kl/chosen": 0.4, "kl/rejected": 1.4,
    })  # fmt: skip


def test_tdpo_defaults() -> None:
    assert get("tdpo").bind().hyper == {"beta": 0.1, "alpha": 0.5, "version": 2}


@pytest.mark.parametrize("version", [1, 2])
def test_tdpo_gradient(pairs: list[Tensor], version: int) -> None:
    """With s = beta sigma(-margin): -s and +s on the log-probs; on the KLs alpha s for rejected tokens, and for chosen ones
    -s in version 1 (where alpha is 1) and nothing at all in version 2."""
    leaves = [tensor.requires_grad_(index in (0, 1, 4, 5)) for index, tensor in enumerate(pairs)]
    loss = tdpo_loss(*leaves, beta=0.6, alpha=0.3, version=version).loss
    loss.sum().backward()
    push = 0.6 * -torch.expm1(-loss.detach())  # sigma(-m) = 1 - exp(-L)
    torch.testing.assert_close(leaves[0].grad, -push)
    torch.testing.assert_close(leaves[1].grad, push)
    weight = 1.0 if version == 1 else 0.3
    torch.testing.assert_close(leaves[5].grad, weight * push[:, None] * pairs[7])
    if version == 1:
        torch.testing.assert_close(leaves[4].grad, -push[:, None] * pairs[6])
    else:
        assert leaves[4].grad is None


@pytest.mark.parametrize(("version", "free"), [(1, (0, 1, 4, 5)), (2, (0, 1, 5))])
def test_tdpo_gradcheck(pairs: list[Tensor], version: int, free: tuple[int, ...]) -> None:
    """By everything that carries gradient."""

    def loss(*moved: Tensor) -> Tensor:
        tensors = list(pairs)
        for index, tensor in zip(free, moved, strict=True):
            tensors[index] = tensor
        return tdpo_loss(*tensors, beta=0.6, alpha=0.3, version=version).loss

    assert gradcheck(loss, [pairs[index].clone().requires_grad_() for index in free])


def test_tdpo_versions_agree_in_value_at_alpha_1(pairs: list[Tensor]) -> None:
    first, second = (tdpo_loss(*pairs, alpha=1.0, version=version).loss for version in (1, 2))
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("version", [1, 2])
def test_tdpo_without_kls_is_dpo(pairs: list[Tensor], version: int) -> None:
    dpo = dpo_loss(*pairs[:4], beta=0.4).loss
    blank = [*pairs[:4], torch.zeros(4, 3), torch.zeros(4, 3), *pairs[6:]]
    torch.testing.assert_close(tdpo_loss(*blank, beta=0.4, version=version).loss, dpo)
    torch.testing.assert_close(tdpo_loss(*pairs, beta=0.4, alpha=0.0).loss, dpo, msg="nor does alpha 0 see them")


@pytest.mark.parametrize("version", [1, 2])
def test_tdpo_is_log_2_when_the_policy_is_the_reference(pairs: list[Tensor], version: int) -> None:
    chosen, rejected, *_ = pairs
    zeros = torch.zeros(2, 4, 3, dtype=torch.float64)
    loss = tdpo_loss(chosen, rejected, chosen, rejected, *zeros, *pairs[6:], version=version).loss
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)), rtol=0, atol=1e-15)


@settings(max_examples=15)
@given(st.floats(0.01, 5), st.floats(0.05, 2), st.sampled_from([1, 2]))
def test_tdpo_rises_with_the_rejected_kl_and_falls_with_the_chosen_one(step: float, alpha: float, version: int) -> None:
    pair = [torch.tensor([x], dtype=torch.float64) for x in (-1.0, -4.0, -3.0, -3.5)]
    one = torch.ones(1, 1, dtype=torch.float64)

    def loss(chosen_kl: float, rejected_kl: float) -> float:
        return tdpo_loss(*pair, one * chosen_kl, one * rejected_kl, one, one, alpha=alpha, version=version).loss.item()

    assert loss(1.0 + step, 1.0) < loss(1.0, 1.0) < loss(1.0, 1.0 + step)
    assert loss(1.0 + step, 1.0 + step) == pytest.approx(loss(1.0, 1.0)), "only their difference counts"


def test_tdpo_with_sides_swapped_differs_by_the_margin(pairs: list[Tensor]) -> None:
    """log sigma(x) - log sigma(-x) = x."""
    order = [1, 0, 3, 2, 5, 4, 7, 6]
    here, there = (tdpo_loss(*tensors, beta=0.6, alpha=0.3) for tensors in (pairs, [pairs[index] for index in order]))
    kl_margin = (pairs[5] * pairs[7]).sum(-1) - (pairs[4] * pairs[6]).sum(-1)
    torch.testing.assert_close(there.loss - here.loss, here.metrics["rewards/margins"][0] - 0.6 * 0.3 * kl_margin)


def test_tdpo_unknown_version_is_an_error() -> None:
    with pytest.raises(ValueError, match="tdpo_loss: version is 3, expected 1 or 2"):
        one_pair(version=3)
