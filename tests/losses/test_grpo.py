"""GRPO and the variants by length normalisation: closed forms, gradients at ratio 1, the KL term, defaults."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from losses import LossOutput, Max, bnpo_loss, dapo_loss, dr_grpo_loss, get, grpo_loss
from losses.advantages import group_baseline
from losses.ops import MAX_LOG_RATIO

LIMIT = torch.tensor(8.0, dtype=torch.float64)
VARIANTS: dict[str, tuple[Callable[..., LossOutput], tuple[Tensor, ...]]] = {
    "grpo": (grpo_loss, (torch.zeros(2, 3, dtype=torch.float64),)),
    "bnpo": (bnpo_loss, ()),
    "dr_grpo": (dr_grpo_loss, (LIMIT,)),
    "dapo": (dapo_loss, ()),
}
"""Each with its last tensors; the reference of GRPO is replaced where it matters."""
MASK = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
OLD = torch.tensor([[-1.0, -2.0, 0.0], [-0.5, 0.0, 0.0]], dtype=torch.float64)
ADVANTAGES = torch.tensor([[2.0, 2.0, 9.0], [-1.0, 9.0, 9.0]], dtype=torch.float64)


def at(name: str, ratios: Tensor, **options: float) -> LossOutput:
    function, more = VARIANTS[name]
    return function(OLD + ratios.log(), OLD, ADVANTAGES, MASK, *more, **options)


def reduced(out: LossOutput, key: str) -> float:
    metric = out.metrics[key]
    assert not isinstance(metric, Max)
    return float((metric[0] * metric[1]).sum() / metric[1].sum())


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("grpo", {"beta": 0.0}, ((-2.2 - 2.4) / 2 + 0.8) / 2),
        ("grpo", {"beta": 0.0, "clip_high": 0.4, "clip_low": 0.3}, ((-2.2 - 2.8) / 2 + 0.7) / 2),
        ("bnpo", {}, (-2.2 - 2.4 + 0.8) / 3),
        ("bnpo", {"clip_high": 0.4, "clip_low": 0.3}, (-2.2 - 2.8 + 0.7) / 3),
        ("dr_grpo", {}, (-2.2 - 2.4 + 0.8) / 8 / 2),
        ("dr_grpo", {"clip_high": 0.4, "clip_low": 0.3}, (-2.2 - 2.8 + 0.7) / 8 / 2),
        ("dapo", {}, (-2.2 - 2.56 + 0.8) / 3),
        ("dapo", {"clip_high": 0.4, "clip_low": 0.3}, (-2.2 - 2.8 + 0.7) / 3),
    ],
)
def test_grpo_closed_forms(name: str, options: dict[str, float], expected: float) -> None:
    """A = 2 with ratios 1.1 and 1.5 (clipped at 1 + clip_high), A = -1 with ratio 0.5 (clipped at 1 - clip_low)."""
    out = at(name, torch.tensor([[1.1, 1.5, 7.0], [0.5, 7.0, 7.0]], dtype=torch.float64), **options)
    assert out.mean().item() == pytest.approx(expected)
    assert reduced(out, "clip_frac") == pytest.approx(2 / 3)
    assert reduced(out, "approx_kl") == pytest.approx((1.1 + 1.5 + 0.5 - 3 - math.log(1.1 * 1.5 * 0.5)) / 3)
    largest = out.metrics["ratio/max"]
    assert isinstance(largest, Max)
    assert largest.values.max().item() == pytest.approx(1.5)


def test_grpo_adds_the_kl_of_each_token() -> None:
    """rho 1, A 0, so L = beta*k3: log 2 - 1/2 where ref is half as likely, 1 - log 2 where it is twice, 0 where equal.

    Its gradient beta*(1 - ref/pi) pulls to the reference; both are means over a sequence's tokens, then over sequences.
    """
    policy = OLD.clone().requires_grad_()
    reference = (OLD + torch.tensor([[0.5, 2.0, 1.0], [1.0, 1.0, 1.0]]).log()).requires_grad_()
    old, advantages = OLD.clone().requires_grad_(), torch.zeros_like(OLD).requires_grad_()
    out = grpo_loss(policy, old, advantages, MASK, reference, beta=0.4)
    first, second = math.log(2) - 0.5, 1 - math.log(2)
    assert out.mean().item() == pytest.approx(0.4 * (first + second) / 2 / 2)
    assert reduced(out, "kl/ref") == pytest.approx((first + second) / 3)
    assert not out.metrics["kl/ref"][0].requires_grad  # type: ignore[index]
    out.mean().backward()
    torch.testing.assert_close(policy.grad, 0.4 * torch.tensor([[0.125, -0.25, 0.0], [0.0, 0.0, 0.0]]).double())
    assert [tensor.grad for tensor in (reference, old, advantages)] == [None] * 3


def test_grpo_kl_is_flat_beyond_its_largest_exponent() -> None:
    policy = OLD.clone().requires_grad_()
    reference = OLD + (MAX_LOG_RATIO + 1)
    out = grpo_loss(policy, OLD, torch.zeros_like(OLD), MASK, reference)
    assert out.mean().item() == pytest.approx(0.04 * (math.exp(MAX_LOG_RATIO) - 1 - MAX_LOG_RATIO))
    assert not torch.autograd.grad(out.mean(), policy)[0].any()


@pytest.mark.parametrize("name", VARIANTS)
def test_grpo_gradient_at_ratio_1_is_the_advantage_by_its_normalisation(name: str) -> None:
    function, more = VARIANTS[name]
    policy, old, advantages = (tensor.clone().requires_grad_() for tensor in (OLD, OLD, ADVANTAGES))
    out = function(policy, old, advantages, MASK, *more, **({"beta": 0.0} if name == "grpo" else {}))
    gradient, *unused = torch.autograd.grad(out.mean(), (policy, old, advantages), allow_unused=True)
    share = {"grpo": MASK / MASK.sum(-1, keepdim=True) / 2, "dr_grpo": MASK / 8 / 2}.get(name, MASK / MASK.sum())
    torch.testing.assert_close(gradient, -ADVANTAGES * share)
    assert unused == [None, None]


@pytest.mark.parametrize("name", VARIANTS)
def test_grpo_padding_of_the_sampling_policy_may_hold_anything(name: str) -> None:
    """Not even NaN there reaches objective, gradient or metrics."""
    function, more = VARIANTS[name]
    objectives, gradients, kls = [], [], []
    for padding in (0.0, math.nan):
        policy = (OLD - 0.1).requires_grad_()
        out = function(policy, torch.where(MASK.bool(), OLD, padding), ADVANTAGES, MASK, *more)
        objectives.append(out.mean())
        gradients.append(torch.autograd.grad(out.mean(), policy)[0])
        kls.append(reduced(out, "approx_kl"))
    torch.testing.assert_close(*objectives)
    torch.testing.assert_close(*gradients)
    assert kls[0] == kls[1]


@pytest.mark.parametrize("name", VARIANTS)
def test_grpo_gradcheck(name: str) -> None:
    function, more = VARIANTS[name]
    policy = (OLD + 0.4 * torch.randn(2, 3, dtype=torch.float64)).requires_grad_()
    assert gradcheck(lambda x: function(x, OLD, ADVANTAGES, MASK, *more).mean(), policy)


def test_grpo_with_centred_advantages_starts_at_0() -> None:
    """At rho 1 the value of GRPO is minus the mean advantage, which is 0; its gradient is not."""
    policy = OLD.clone().requires_grad_()
    advantages = torch.tensor([[1.5], [-1.5]], dtype=torch.float64).expand(2, 3)
    loss = grpo_loss(policy, OLD, advantages, MASK, OLD).mean()
    loss.backward()
    assert abs(loss.item()) < 1e-15
    assert policy.grad is not None
    assert policy.grad.abs().sum() > 1


@pytest.mark.parametrize(
    ("name", "hyper", "defaults"),
    [
        ("grpo", {"clip_low": 0.2, "clip_high": 0.2, "beta": 0.04}, {"kl_coef": 0.0}),
        ("bnpo", {"clip_low": 0.2, "clip_high": 0.2}, {}),
        ("dr_grpo", {"clip_low": 0.2, "clip_high": 0.2}, {"scale": "none"}),
        ("dapo", {"clip_low": 0.2, "clip_high": 0.28}, {}),
    ],
)
def test_grpo_declarations(name: str, hyper: dict[str, float], defaults: dict[str, object]) -> None:
    loss = get(name)
    assert loss.bind().hyper == hyper
    assert loss.defaults == defaults
    assert loss.advantage is group_baseline


@pytest.mark.parametrize("name", VARIANTS)
def test_grpo_errors_name_the_variant(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}_loss: clip_low and clip_high must be at least 0, got -0.1 and 0.3"):
        at(name, torch.ones(2, 3, dtype=torch.float64), clip_low=-0.1, clip_high=0.3)


def test_grpo_survives_what_stands_in_padding() -> None:
    """NaN under the mask reaches neither value nor gradient, the KL term included."""
    logps = torch.tensor([[-1.0, math.nan]], requires_grad=True)
    others = torch.tensor([[-1.5, math.nan]])
    mask = torch.tensor([[1.0, 0.0]])
    loss = grpo_loss(logps, others, torch.ones(1, 2), mask, others, beta=0.5).mean()
    loss.backward()
    assert loss.isfinite()
    assert logps.grad is not None
    assert logps.grad[0, 1] == 0
    assert logps.grad[0, 0].isfinite()
