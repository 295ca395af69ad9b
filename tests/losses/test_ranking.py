"""What losses on ranked lists share: the Plackett-Luce likelihood, pairs of a list, their means and metrics."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from losses._ranking import list_metrics, mean_over_pairs, pair_differences, plackett_luce_nll


def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_plackett_luce_nll_closed_form() -> None:
    """Weights exp(s) = 3, 2, 1; the second is best, then the first: P = 2/6 * 3/4 * 1/1 = 1/4."""
    scores, ranks = tensor([3.0, 2.0, 1.0]).log(), torch.tensor([[1, 0, 2]])
    nll, weight = plackett_luce_nll(scores, ranks, torch.ones(1, 3))
    assert nll.item() == pytest.approx(math.log(4), abs=1e-12)
    assert weight.tolist() == [1.0]
    spread, _ = plackett_luce_nll(scores, 5 * ranks + 2, torch.ones(1, 3))
    torch.testing.assert_close(spread, nll)


@settings(max_examples=15)
@given(st.lists(st.floats(-20, 20), min_size=4, max_size=4), st.floats(-100, 100))
def test_plackett_luce_nll_is_a_distribution_over_rankings_and_ignores_a_shift(scores: list[float], shift: float) -> None:
    """The probabilities of all 24 rankings of four items add up to 1."""
    ranks = torch.tensor(list(permutations(range(4))))
    every = tensor(scores).expand(24, 4)
    nll, _ = plackett_luce_nll(every, ranks, torch.ones(24, 4))
    assert (-nll).exp().sum().item() == pytest.approx(1, abs=1e-9)
    torch.testing.assert_close(plackett_luce_nll(every + shift, ranks, torch.ones(24, 4))[0], nll, rtol=1e-9, atol=1e-9)


def test_plackett_luce_nll_leaves_invalid_items_out() -> None:
    """Whatever they hold, and though they claim the best and a middle rank; nor do they receive gradient."""
    scores = tensor([math.nan, 0.7, -0.4, 9.0, 1.1]).requires_grad_()
    nll, weight = plackett_luce_nll(scores, torch.tensor([[0, 1, 3, 2, 4]]), tensor([0.0, 1.0, 1.0, 0.0, 1.0]))
    expected, _ = plackett_luce_nll(tensor([0.7, -0.4, 1.1]), torch.tensor([[0, 1, 2]]), torch.ones(1, 3))
    torch.testing.assert_close(nll, expected)
    assert weight.tolist() == [1.0]
    (gradient,) = torch.autograd.grad(nll.sum(), scores)
    assert (gradient != 0).tolist() == [[False, True, True, False, True]]
    assert gradient.sum().abs() < 1e-12, "a shift changes nothing"


def test_plackett_luce_nll_ties_are_in_each_others_sum() -> None:
    """Two best items of weights 3 and 2 before one of 1: -log(3/6) - log(2/6) - log(1/1) = log 6."""
    nll, _ = plackett_luce_nll(tensor([3.0, 2.0, 1.0]).log(), torch.tensor([[0, 0, 1]]), torch.ones(1, 3))
    assert nll.item() == pytest.approx(math.log(6), abs=1e-12)


def test_plackett_luce_nll_counts_lists_of_two_items_or_more() -> None:
    scores = torch.randn(4, 3, dtype=torch.float64)
    mask = tensor([1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0])
    nll, weight = plackett_luce_nll(scores, torch.arange(3).expand(4, 3), mask)
    assert weight.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert (nll[:2] > 0).all()
    assert nll[2:].tolist() == [0.0, 0.0]


def test_plackett_luce_nll_gradcheck() -> None:
    ranks = torch.tensor([[2, 0, 1, 3], [0, 1, 1, 2]])
    mask = tensor([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0])
    scores = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda s: plackett_luce_nll(s, ranks, mask)[0], scores)


def test_pair_differences_closed_form() -> None:
    """Scores 3, 1, 4, ranks 1, 0, 2, bias 1/2: entry (i, j) is s_i - s_j/2; the second beats both, the first the third."""
    scores, ranks = tensor([3.0, 1.0, 4.0]), torch.tensor([[1, 0, 2]])
    difference, better = pair_differences(scores, ranks, torch.ones(1, 3), 0.5)
    assert difference.tolist() == [[[1.5, 2.5, 1.0], [-0.5, 0.5, -1.0], [2.5, 3.5, 2.0]]]
    assert better.tolist() == [[[False, False, True], [True, False, True], [False, False, False]]]
    unbiased, _ = pair_differences(scores, ranks, torch.ones(1, 3))
    assert unbiased[0, 1].tolist() == [-2.0, 0.0, -3.0]


def test_pair_differences_leave_out_ties_and_invalid_items() -> None:
    """Ranks 0, 0, 1 and an invalid one at 0 and at 2: the tied two each beat the third, nothing else."""
    scores = tensor([1.0, 2.0, 3.0, math.nan, math.inf]).requires_grad_()
    difference, better = pair_differences(scores, torch.tensor([[0, 0, 1, 0, 2]]), tensor([1.0, 1.0, 1.0, 0.0, 0.0]))
    assert better[0].nonzero().tolist() == [[0, 2], [1, 2]]
    assert difference.isfinite().all(), "a loss of all pairs may be weighed by `better`"
    (gradient,) = torch.autograd.grad(torch.where(better, difference, 0.0).sum(), scores)
    assert gradient.tolist() == [[1.0, 1.0, -2.0, 0.0, 0.0]]


def test_mean_over_pairs_divides_by_the_pairs_of_a_list() -> None:
    """Three pairs of 1, 2, 6, one of 5, none: means 3, 5, 0 and weights 1, 1, 0; NaN outside the pairs does not matter."""
    better = torch.zeros(3, 3, 3, dtype=torch.bool)
    values = torch.full((3, 3, 3), math.nan, dtype=torch.float64)
    for group, row, column, value in ((0, 0, 1, 1.0), (0, 0, 2, 2.0), (0, 1, 2, 6.0), (1, 2, 0, 5.0)):
        better[group, row, column] = True
        values[group, row, column] = value
    mean, weight = mean_over_pairs(values, better)
    assert mean.tolist() == [3.0, 5.0, 0.0]
    assert weight.tolist() == [1.0, 1.0, 0.0]
    assert weight.dtype == values.dtype


def test_list_metrics_are_shares_and_means_over_ordered_pairs() -> None:
    """Scores 2, 2, 2.5, ranks 0, 1, 2: a tie (half right) and two pairs in the wrong order by 0.5."""
    scores = tensor([2.0, 2.0, 2.5, 99.0]).requires_grad_()
    metrics = list_metrics(scores, torch.tensor([[0, 1, 2, 3]]), tensor([1.0, 1.0, 1.0, 0.0]))
    reduced = {key: ((values * weight).sum() / weight.sum()).item() for key, (values, weight) in metrics.items()}
    assert reduced == pytest.approx({"rewards/accuracies": 1 / 6, "rewards/margins": -1 / 3})
    assert not any(part.requires_grad for metric in metrics.values() for part in metric)
    right = list_metrics(scores, torch.tensor([[2, 1, 0, 3]]), tensor([1.0, 0.0, 1.0, 0.0]))["rewards/accuracies"]
    assert ((right[0] * right[1]).sum() / right[1].sum()).item() == 1.0
