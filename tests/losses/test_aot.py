"""AOT, paired and unpaired: the sort on numbers, its gradient, when it is DPO, and that no other coupling costs less."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from losses import LossOutput, aot_loss, aot_unpaired_loss, dpo_loss, get

both = pytest.mark.parametrize("loss", [aot_loss, aot_unpaired_loss])
Loss = Callable[..., LossOutput]

# Log-ratios C = (1, 3, -1) and R = (2, -1.5, 0.5); margins of the policy (-3, 6, -0.5), of the reference (-2, 1.5, 1).
PAIRS = [[-4.0, -1.0, -3.0], [-1.0, -7.0, -2.5], [-5.0, -4.0, -2.0], [-3.0, -5.5, -3.0]]


def pairs() -> list[Tensor]:
    return [torch.tensor(values, dtype=torch.float64, requires_grad=True) for values in PAIRS]


def drawn(seed: int, count: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [-10 * torch.rand(count, dtype=torch.float64, generator=generator) for _ in range(4)]


def softplus(*values: float) -> list[float]:
    return [math.log1p(math.exp(value)) for value in values]


def test_aot_closed_form() -> None:
    """Sorted policy margins (-3, -0.5, 6) less sorted reference margins (-2, 1, 1.5): (-1, -1.5, 4.5); beta 0.5."""
    out = aot_loss(*pairs(), beta=0.5)
    assert out.loss.tolist() == pytest.approx(softplus(0.5, 0.75, -2.25), abs=1e-12)
    smoothed = aot_loss(*pairs(), beta=0.5, label_smoothing=0.2).loss.tolist()
    linear = [0.2 * x for x in (-0.5, -0.75, 2.25)]
    assert smoothed == pytest.approx([a + b for a, b in zip(softplus(0.5, 0.75, -2.25), linear, strict=True)], abs=1e-12)


def test_aot_unpaired_closed_form() -> None:
    """Sorted C (-1, 1, 3) less sorted R (-1.5, 0.5, 2): (0.5, 0.5, 1); beta 0.5."""
    out = aot_unpaired_loss(*pairs(), beta=0.5)
    assert out.loss.tolist() == pytest.approx(softplus(-0.25, -0.25, -0.5), abs=1e-12)
    smoothed = aot_unpaired_loss(*pairs(), beta=0.5, label_smoothing=0.2).loss.tolist()
    linear = [0.2 * x for x in (0.25, 0.25, 0.5)]
    assert smoothed == pytest.approx([a + b for a, b in zip(softplus(-0.25, -0.25, -0.5), linear, strict=True)], abs=1e-12)


@both
def test_aot_metrics_are_those_of_the_pairs_as_they_came(loss: Loss) -> None:
    out = loss(*pairs(), beta=0.5)
    assert out.weight.tolist() == [1.0] * 3
    assert {key: values.tolist() for key, (values, _) in out.metrics.items()} == {
        "rewards/chosen": [0.5, 1.5, -0.5],
        "rewards/rejected": [1.0, -0.75, 0.25],
        "rewards/margins": [-0.5, 2.25, -0.75],
        "rewards/accuracies": [0.0, 1.0, 0.0],
    }


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_defaults(name: str) -> None:
    assert {flag: hyper.default for flag, hyper in get(name).hyper.items()} == {"beta": 0.1, "label_smoothing": 0.0}
    assert get(name).coupled, "rows interact through the sort"


@both
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_aot_gradcheck(loss: Loss, smoothing: float) -> None:
    assert gradcheck(lambda *t: loss(*t, beta=0.7, label_smoothing=smoothing).loss, pairs())


def test_aot_gradient_goes_to_the_pair_that_holds_the_rank() -> None:
    """The pairs hold ranks 0, 2, 1 among the policy's margins: deltas -1, 4.5, -1.5; -beta sigma(-beta delta) each."""
    tensors = pairs()
    aot_loss(*tensors, beta=0.5).loss.sum().backward()
    expected = -0.5 * torch.sigmoid(-0.5 * torch.tensor([-1.0, 4.5, -1.5], dtype=torch.float64))
    torch.testing.assert_close(tensors[0].grad, expected)
    torch.testing.assert_close(tensors[1].grad, -expected)


def test_aot_unpaired_gradient_goes_to_the_completions_that_hold_the_rank() -> None:
    """Differences (0.5, 0.5, 1) by rank; chosen completions hold ranks 1, 2, 0, rejected ones 2, 0, 1."""
    tensors = pairs()
    aot_unpaired_loss(*tensors, beta=0.5).loss.sum().backward()
    pull = 0.5 * torch.sigmoid(-0.5 * torch.tensor([0.5, 0.5, 1.0], dtype=torch.float64))
    torch.testing.assert_close(tensors[0].grad, -pull[[1, 2, 0]])
    torch.testing.assert_close(tensors[1].grad, pull[[2, 0, 1]])


@both
def test_aot_is_log_2_when_the_policy_is_the_reference(loss: Loss) -> None:
    chosen, rejected, _, _ = drawn(0)
    torch.testing.assert_close(
        loss(chosen, rejected, chosen, rejected).loss, torch.full((6,), math.log(2), dtype=torch.float64)
    )


@both
@given(st.integers(0, 2**31), st.floats(0, 0.4))
@settings(max_examples=10)
def test_aot_of_one_pair_is_dpo(loss: Loss, seed: int, smoothing: float) -> None:
    tensors = drawn(seed, 1)
    dpo = dpo_loss(*tensors, beta=0.3, label_smoothing=smoothing)
    torch.testing.assert_close(loss(*tensors, beta=0.3, label_smoothing=smoothing).loss, dpo.loss)


@both
@given(st.integers(0, 2**31))
def test_aot_never_costs_more_than_dpo(loss: Loss, seed: int) -> None:
    """-log sigma(x - y) is convex, so the transport that sorts both sides alike is the cheapest; DPO's is another."""
    tensors = drawn(seed)
    assert loss(*tensors, beta=0.7).mean() <= dpo_loss(*tensors, beta=0.7).mean() + 1e-12


@given(st.integers(0, 2**31))
@settings(max_examples=10)
def test_aot_compares_distributions(seed: int) -> None:
    """The paired form does not see which reference margin stood beside which policy margin, but it sees the pairs.

    The unpaired form does not see the pairs, but it sees which reference log-prob belongs to which policy log-prob.
    """
    chosen, rejected, reference_chosen, reference_rejected = drawn(seed)
    other = torch.tensor([2, 0, 1, 5, 3, 4])
    paired = aot_loss(chosen, rejected, reference_chosen, reference_rejected).mean()
    shuffled_references = (chosen, rejected, reference_chosen[other], reference_rejected[other])
    shuffled_pairs = (chosen, rejected[other], reference_chosen, reference_rejected[other])
    torch.testing.assert_close(aot_loss(*shuffled_references).mean(), paired)
    assert not torch.isclose(aot_loss(*shuffled_pairs).mean(), paired, rtol=1e-9)
    unpaired = aot_unpaired_loss(chosen, rejected, reference_chosen, reference_rejected).mean()
    torch.testing.assert_close(aot_unpaired_loss(*shuffled_pairs).mean(), unpaired)
    assert not torch.isclose(aot_unpaired_loss(*shuffled_references).mean(), unpaired, rtol=1e-9)


@both
@pytest.mark.parametrize("smoothing", [-0.1, 0.5])
def test_aot_label_smoothing_out_of_range_is_an_error(loss: Loss, smoothing: float) -> None:
    with pytest.raises(ValueError, match=rf"{loss.__name__}: label_smoothing is {smoothing}, expected .* in \[0, 0.5\)"):
        loss(*pairs(), label_smoothing=smoothing)
