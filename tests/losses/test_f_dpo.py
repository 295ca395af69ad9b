"""f-DPO: every divergence on numbers and against its generator, its bounds, where exponents are cut, and when it is DPO."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from losses import dpo_loss, f_dpo_loss, get
from losses.f_dpo import Divergence, f_derivative

DIVERGENCES = get_args(Divergence)
every = pytest.mark.parametrize("divergence", DIVERGENCES)


def pair(divergence: str, **options: float) -> list[float]:
    """Rewards and loss at probability ratios 4 and 1/9, beta 0.5."""
    policy = [torch.tensor([x + math.log(ratio)], dtype=torch.float64) for x, ratio in ((-2.5, 4), (-3.5, 1 / 9))]
    reference = [torch.tensor([x], dtype=torch.float64) for x in (-2.5, -3.5)]
    out = f_dpo_loss(*policy, *reference, beta=0.5, divergence=divergence, **options)  # type: ignore[arg-type]
    assert out.weight.tolist() == [1.0]
    return [out.metrics["rewards/chosen"][0].item(), out.metrics["rewards/rejected"][0].item(), out.loss.item()]


@pytest.mark.parametrize(
    ("divergence", "alpha", "chosen", "rejected"),
    [
        ("reverse_kl", 0.5, math.log(4), -math.log(9)),
        ("forward_kl", 0.5, 1 - 1 / 4, 1 - 9),
        ("js", 0.5, math.log(8 / 5), math.log(2 / 10)),
        ("alpha", 0.5, (1 / 2 - 1) / -0.5, (3 - 1) / -0.5),
        ("alpha", 2.0, 4 - 1, 1 / 9 - 1),
        ("alpha", 0.0, 1 - 1 / 4, 1 - 9),
        ("alpha", 1.0, math.log(4), -math.log(9)),
    ],
)
def test_f_dpo_closed_form(divergence: str, alpha: float, chosen: float, rejected: float) -> None:
    """f'(t) at t = 4 and 1/9: log t; 1 - 1/t; log(2t/(1+t)); (t^(a-1) - 1)/(a-1), which is 1 - 1/t at a = 0 and log t at 1."""
    expected = [chosen / 2, rejected / 2, math.log(1 + math.exp(-(chosen - rejected) / 2))]
    assert pair(divergence, alpha=alpha) == pytest.approx(expected, abs=1e-12)


def test_f_dpo_defaults() -> None:
    defaults = {flag: hyper.default for flag, hyper in get("f_dpo").hyper.items()}
    assert defaults == {"beta": 0.1, "divergence": "forward_kl", "alpha": 0.5}


GENERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": lambda t: t * t.log(),
    "forward_kl": lambda t: -t.log(),
    "js": lambda t: t * t.log() - (t + 1) * ((t + 1) / 2).log(),
    # The paper's alpha is 1 - 0.3.
    "alpha": lambda t: (t.pow(0.3) - 0.3 * t - 0.7) / (0.7 * (0.7 - 1)),
}


@every
def test_f_dpo_rewards_are_the_derivative_of_the_generator(divergence: Divergence) -> None:
    """f of Wang et al. 2023, table 1, differentiated by autograd at t; constants cancel, so it is taken from that at t = 1."""
    ratio = torch.tensor([1.0, 0.05, 0.5, 2.0, 30.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(GENERATORS[divergence](ratio).sum(), ratio)
    torch.testing.assert_close(f_derivative(ratio.log().detach(), divergence, alpha=0.3), slope - slope[0])


@every
def test_f_dpo_gradcheck_and_signs(divergence: Divergence) -> None:
    """Chosen rises and rejected falls, whatever the divergence: f is convex."""
    tensors = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert gradcheck(lambda *t: f_dpo_loss(*t, beta=0.7, divergence=divergence, alpha=0.3).loss, tensors)
    chosen, rejected = torch.autograd.grad(f_dpo_loss(*tensors, divergence=divergence, alpha=0.3).loss.sum(), tensors[:2])
    assert (chosen < 0).all()
    assert (rejected > 0).all()


@every
def test_f_dpo_is_log_2_when_the_policy_is_the_reference(divergence: Divergence) -> None:
    """There all rewards are 0, and their slope in the log-ratio is f''(1): 1, for JS 1/2."""
    log_ratio = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    reward = f_derivative(log_ratio, divergence, alpha=0.3)
    assert reward.item() == pytest.approx(0, abs=1e-15)
    (slope,) = torch.autograd.grad(reward.sum(), log_ratio)
    assert slope.item() == pytest.approx(0.5 if divergence == "js" else 1.0)
    logps = torch.tensor([-3.0, -7.0], dtype=torch.float64)
    loss = f_dpo_loss(logps, logps - 1, logps, logps - 1, divergence=divergence).loss
    torch.testing.assert_close(loss, torch.full_like(logps, math.log(2)))


@settings(max_examples=10)
@given(st.floats(0.05, 2))
def test_f_dpo_under_reverse_kl_is_dpo_and_alpha_tends_to_it(beta: float) -> None:
    tensors = [torch.randn(5, dtype=torch.float64) for _ in range(4)]
    dpo = dpo_loss(*tensors, beta=beta)
    torch.testing.assert_close(f_dpo_loss(*tensors, beta=beta, divergence="reverse_kl").loss, dpo.loss)
    near = f_dpo_loss(*tensors, beta=beta, divergence="alpha", alpha=1 - 1e-7).loss
    torch.testing.assert_close(near, dpo.loss, rtol=0, atol=1e-5)


@given(st.floats(-15, 15), st.floats(0.001, 5))
def test_f_dpo_rewards_rise_up_to_their_bounds(log_ratio: float, step: float) -> None:
    """Forward KL below 1, JS below log 2, alpha between reverse and forward KL."""
    here, further = torch.tensor([log_ratio, log_ratio + step], dtype=torch.float64).unbind()
    for divergence in DIVERGENCES:
        assert f_derivative(further, divergence, 0.3) >= f_derivative(here, divergence, 0.3)
    assert f_derivative(here, "forward_kl", 0.3) < 1
    assert f_derivative(here, "js", 0.3) < math.log(2)
    forward, between, reverse = (f_derivative(here, name, 0.3) for name in ("forward_kl", "alpha", "reverse_kl"))
    assert forward - 1e-12 <= between <= reverse + 1e-12


@pytest.mark.parametrize(
    ("divergence", "alpha", "log_ratio", "expected"),
    [
        ("forward_kl", 0.5, -21.0, 1 - math.exp(20)),
        ("alpha", 0.5, -41.0, (math.exp(20) - 1) / -0.5),
        ("alpha", 3.0, 11.0, (math.exp(20) - 1) / 2),
    ],
)
def test_f_dpo_exponents_are_cut_at_20(divergence: Divergence, alpha: float, log_ratio: float, expected: float) -> None:
    """Beyond exp(20) the reward stands still and has no gradient."""
    far = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)
    reward = f_derivative(far, divergence, alpha)
    assert reward.item() == pytest.approx(expected, rel=1e-12)
    (slope,) = torch.autograd.grad(reward.sum(), far)
    assert slope.item() == 0


def test_f_dpo_unknown_divergence_is_an_error() -> None:
    with pytest.raises(
        ValueError, match="f_dpo_loss: unknown divergence 'kl'; expected one of reverse_kl, forward_kl, js, alpha"
    ):
        pair("kl")
