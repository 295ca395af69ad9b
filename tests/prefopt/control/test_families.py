"""Distributions over actions against torch's own, and against sums over what they draw."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, Normal, kl_divergence

from prefopt.control.families import FAMILIES, LOG_STD_RANGE

CONTINUOUS = [name for name, family in FAMILIES.items() if not family.discrete]


def draw(name: str, seed: int, actions: int = 3, steps: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, FAMILIES[name].outputs(actions), generator=generator, dtype=torch.float64)


def same(name: str, output: Tensor) -> Independent | Categorical:
    """The distribution as torch has it."""
    if name == "categorical":
        return Categorical(logits=output)
    if name == "gaussian":
        mean, raw = output.chunk(2, dim=-1)
        low, high = LOG_STD_RANGE
        return Independent(Normal(mean.tanh(), (low + (high - low) * raw.sigmoid()).exp()), 1)
    return Independent(Normal(output.tanh(), 1.0 if name == "unit_gaussian" else math.sqrt(0.5)), 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probs_entropies_and_kls_are_torchs(name: str) -> None:
    family, output, other = FAMILIES[name], draw(name, 0), draw(name, 1)
    actions = family.sample(output, torch.Generator().manual_seed(2))
    expected = same(name, output).log_prob(actions)
    constant = 1.5 * math.log(math.pi) if name == "mean_squared" else 0.0  # three numbers of variance 1/2
    torch.testing.assert_close(family.logps(output, actions), expected + constant)
    torch.testing.assert_close(family.entropies(output), same(name, output).entropy())
    torch.testing.assert_close(family.kls(output, other), kl_divergence(same(name, output), same(name, other)))
    assert float(family.kls(output, output).abs().max()) < 1e-12


@pytest.mark.parametrize("name", FAMILIES)
def test_samples_have_the_frequencies_of_the_log_probs(name: str) -> None:
    """E[log p] over samples is minus the entropy (of mean_squared up to its constant), within 5 standard errors."""
    family, output = FAMILIES[name], draw(name, 3, steps=1).expand(40_000, -1)
    logps = family.logps(output, family.sample(output, torch.Generator().manual_seed(4)))
    constant = 1.5 * math.log(math.pi) if name == "mean_squared" else 0.0
    error = float((logps - constant + family.entropies(output)).mean())
    assert abs(error) < 5 * float(logps.std()) / math.sqrt(len(logps))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_best_action_is_the_likeliest(name: str) -> None:
    family, output = FAMILIES[name], draw(name, 5)
    best = family.logps(output, family.best(output))
    for seed in range(20):
        assert (family.logps(output, family.sample(output, torch.Generator().manual_seed(seed))) <= best + 1e-12).all()


@pytest.mark.parametrize("name", CONTINUOUS)
def test_means_stay_within_the_box_of_actions(name: str) -> None:
    family = FAMILIES[name]
    assert family.best(100 * draw(name, 6)).abs().max() <= 1


def test_mean_squared_is_the_negative_squared_distance() -> None:
    mean = torch.tensor([[0.5, -0.25]], dtype=torch.float64)
    actions = torch.tensor([[0.0, 0.75]], dtype=torch.float64)
    assert float(FAMILIES["mean_squared"].logps(mean.atanh(), actions)) == pytest.approx(-(0.5**2 + 1.0**2))


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients(name: str) -> None:
    family, output, other = FAMILIES[name], draw(name, 7).requires_grad_(), draw(name, 8)
    actions = family.sample(output.detach(), torch.Generator().manual_seed(9))
    for function in (lambda o: family.logps(o, actions), family.entropies, lambda o: family.kls(o, other)):
        assert torch.autograd.gradcheck(function, (output,))
