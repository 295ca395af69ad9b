"""CPL on ranked lists: closed form, one mean over all pairs, what the bias does, ties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from losses import LossOutput, Max, cpl_rank_loss, get

RANKS = torch.tensor([[1, 0, 2], [2, 1, 0]])


def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def over_pairs(out: LossOutput, key: str) -> list[float]:
    """The sum of a metric over each prompt's ordered pairs."""
    metric = out.metrics[key]
    assert not isinstance(metric, Max)
    return (metric[0] * metric[1]).sum((1, 2)).tolist()


def logistic(difference: float) -> float:
    return math.log1p(math.exp(-difference))


def test_cpl_rank_closed_form() -> None:
    """alpha 0.5, bias 0.25. Scores -1, -2.5, -3 ranked second, first, third; -2 and -4 the valid ones of the second list.

    Arguments -2.5 + 1/4, -2.5 + 3/4, -1 + 3/4; and -4 + 2/4. One mean over the four pairs, not over prompts.
    """
    logps, mask = tensor([-2.0, -5.0, -6.0], [-4.0, 30.0, -8.0]), tensor([1.0, 1.0, 1.0], [1.0, 0.0, 1.0])
    out = cpl_rank_loss(logps, RANKS, mask, alpha=0.5, bias=0.25)
    expected = (logistic(-2.25) + logistic(-1.75) + logistic(-0.25) + logistic(-3.5)) / 4
    assert out.mean().item() == pytest.approx(expected)
    assert over_pairs(out, "rewards/margins") == [-1.5 + 0.5 + 2, -2], "without the bias"
    assert over_pairs(out, "rewards/accuracies") == [2.0, 0.0]


def test_cpl_rank_defaults() -> None:
    """alpha 0.1, bias 0.5: log-probs 20 and 10 give 2 - 0.5*1."""
    assert get("cpl_rank").bind().hyper == {"alpha": 0.1, "bias": 0.5}
    out = cpl_rank_loss(tensor([20.0, 10.0]), torch.tensor([[0, 1]]), torch.ones(1, 2))
    assert out.mean().item() == pytest.approx(logistic(1.5))


def test_cpl_rank_gradient_is_that_of_its_pair() -> None:
    """dL/dlogp = -alpha sigma(-x) for the better one and bias alpha sigma(-x) for the worse one, x = S_i - bias S_j."""
    logps = tensor([-3.0, -1.0]).requires_grad_()
    cpl_rank_loss(logps, torch.tensor([[1, 0]]), torch.ones(1, 2), alpha=0.4, bias=0.6).mean().backward()
    share = torch.sigmoid(torch.tensor(0.4 * (1 - 0.6 * 3), dtype=torch.float64)).item()
    torch.testing.assert_close(logps.grad, tensor([0.24 * share, -0.4 * share]))


def test_cpl_rank_gradcheck() -> None:
    mask = tensor([1.0, 1.0, 1.0], [1.0, 0.0, 1.0])
    logps = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda p: cpl_rank_loss(p, RANKS, mask, alpha=0.7, bias=0.4).mean(), logps)


@settings(max_examples=15)
@given(st.integers(0, 2**31), st.floats(0.01, 20))
def test_cpl_rank_bias_breaks_the_shift(seed: int, shift: float) -> None:
    """Likelier segments leave the loss at bias 1 and lower it below; at log-probs of 0 it is log 2 for every bias."""
    logps = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ones = torch.ones(2, 3)

    def at(logps: Tensor, bias: float) -> float:
        return cpl_rank_loss(logps, RANKS, ones, bias=bias).mean().item()

    assert at(logps + shift, 1.0) == pytest.approx(at(logps, 1.0), abs=1e-12)
    assert at(logps + shift, 0.5) < at(logps, 0.5)
    assert at(torch.zeros(2, 3), 0.3) == pytest.approx(math.log(2))


def test_cpl_rank_ties_are_in_no_pair() -> None:
    logps = torch.randn(2, 3, dtype=torch.float64)
    out = cpl_rank_loss(logps, torch.tensor([[0, 1, 1], [4, 4, 4]]), torch.ones(2, 3))
    assert out.weight.nonzero().tolist() == [[0, 0, 1], [0, 0, 2]]
    a, b, c = (0.1 * logps[0]).tolist()
    assert out.mean().item() == pytest.approx((logistic(a - 0.5 * b) + logistic(a - 0.5 * c)) / 2)
