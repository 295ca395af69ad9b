"""The mathematics of labels: what averaging takes away, exactly, and what it leaves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from prefopt.label.probabilities import (
    Average,
    average_orders,
    average_rationales,
    expected_score,
    is_right,
    same_place_wins,
)

BOTH = pytest.mark.parametrize("by", ["probabilities", "logits"])
probability = st.floats(0.001, 0.999)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@BOTH
@given(ab=probability, ba=probability)
def test_antisymmetry(by: Average, ab: float, ba: float) -> None:
    """p(A, B) + p(B, A) = 1."""
    both = average_orders(torch.stack([double(ab, ba), double(ba, ab)]), by)
    assert float(both.sum()) == pytest.approx(1, abs=1e-15)


@BOTH
@given(first=st.floats(0, 1))
def test_a_labeller_that_looks_at_the_place_alone_gives_exactly_one_half(by: Average, first: float) -> None:
    assert float(average_orders(double(first, first).view(1, 2), by)) == 0.5


@given(truth=st.floats(0.3, 0.7), bias=st.floats(-0.3, 0.3))
def test_averaging_probabilities_removes_an_additive_bias(truth: float, bias: float) -> None:
    orders = double(truth + bias, (1 - truth) + bias).view(1, 2)
    assert float(average_orders(orders)) == pytest.approx(truth, abs=1e-15)


@given(truth=st.floats(-4, 4), bias=st.floats(-4, 4))
def test_averaging_logits_removes_a_logit_bias(truth: float, bias: float) -> None:
    orders = torch.sigmoid(double(truth + bias, -truth + bias)).view(1, 2)
    found = average_orders(orders, "logits").logit()
    assert float(found) == pytest.approx(truth, abs=1e-11)


def test_neither_average_removes_the_bias_of_the_other() -> None:
    """Truth 0.6. A bias of 0.3 in probabilities: 0.9, 0.7; of 2 in logits: 0.917, 0.831."""
    additive, of_logits = double(0.9, 0.7).view(1, 2), torch.sigmoid(double(0.6, 0.4).logit() + 2).view(1, 2)
    assert float(average_orders(additive, "logits")) == pytest.approx(0.6626, abs=1e-4)
    assert float(average_orders(of_logits, "probabilities")) == pytest.approx(0.5430, abs=1e-4)


@BOTH
def test_words_without_probabilities_can_be_averaged(by: Average) -> None:
    found = average_orders(double(1, 0, 0, 1, 1, 1).view(3, 2), by)
    assert torch.allclose(found, double(1, 0, 0.5), atol=1e-5)


@BOTH
def test_an_order_that_could_not_be_read_leaves_no_label(by: Average) -> None:
    assert bool(average_orders(double(0.3, torch.nan).view(1, 2), by).isnan())


@given(ab=probability, ba=probability, count=st.integers(1, 8))
def test_equal_rationales_are_one(ab: float, ba: float, count: int) -> None:
    orders = double(ab, ba).view(1, 2)
    assert torch.allclose(average_rationales(orders.expand(count, 1, 2)), orders, rtol=0, atol=1e-15)


def test_rationales_that_could_not_be_read_are_left_out() -> None:
    found = average_rationales(double(0.2, torch.nan, 0.6, torch.nan).view(2, 1, 2))
    assert torch.allclose(found, double(0.4, torch.nan).view(1, 2), equal_nan=True)


def test_scores_by_hand() -> None:
    """All on 1, all on 10, half and half; P(5) = 0.2, P(6) = 0.6 of 0.8 that is left: 5.75, so 0.25 / 4.5."""
    probabilities = torch.zeros(4, 10, dtype=torch.float64)
    probabilities[0, 0] = probabilities[1, 9] = 1
    probabilities[2, [0, 9]] = 0.5
    probabilities[3, 4], probabilities[3, 5] = 0.2, 0.6
    assert torch.allclose(expected_score(probabilities), double(-1, 1, 0, 0.25 / 4.5))


@given(weights=st.lists(st.floats(0.01, 1), min_size=10, max_size=10), share=st.floats(0, 1), place=st.integers(0, 8))
def test_a_score_rises_under_first_order_stochastic_dominance(weights: list[float], share: float, place: int) -> None:
    """Mass that moves up by one raises the score by (mass / total) / 4.5."""
    before = double(*weights)
    after = before.clone()
    moved = share * float(before[place])
    after[place] -= moved
    after[place + 1] += moved
    one, other = expected_score(torch.stack([before, after])).tolist()
    assert -1 <= one <= other + 1e-12 <= 1 + 2e-12
    assert other - one == pytest.approx(moved / sum(weights) / 4.5, abs=1e-12)


def test_which_place_wins_and_who_is_right() -> None:
    orders = double(0.9, 0.8, 0.1, 0.3, 0.9, 0.2, 0.5, 0.5).view(4, 2)
    assert same_place_wins(orders).tolist() == [1, -1, 0, 0]
    better = torch.tensor([True, False, True, False])
    assert is_right(double(0.7, 0.7, 0.5, 0.2), better).tolist() == [1, 0, 0.5, 1]
