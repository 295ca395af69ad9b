"""The shared maths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from losses.ops import masked_mean, masked_sum, ratio_of, reward_metrics, whiten


def test_masked_reductions_ignore_what_is_masked_even_nan() -> None:
    values = torch.tensor([[1.0, 2.0, float("nan")], [3.0, float("inf"), 7.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert masked_sum(values, mask).item() == 6.0
    assert masked_sum(values, mask, dim=-1).tolist() == [3.0, 3.0]
    assert masked_mean(values, mask).item() == 2.0
    assert masked_mean(values, mask.bool(), dim=-1).tolist() == [1.5, 3.0]
    masked_sum(values, mask).backward()
    assert values.grad is not None
    assert values.grad.tolist() == mask.tolist()


def test_masked_mean_of_nothing_is_0() -> None:
    assert masked_mean(torch.tensor([5.0]), torch.tensor([0.0])).item() == 0.0


def test_ratio_is_constant_beyond_exp_20() -> None:
    log_ratio = torch.tensor([-1e4, 0.0, 19.0, 21.0, 1e4], dtype=torch.float64, requires_grad=True)
    ratio = ratio_of(log_ratio)
    ratio.sum().backward()
    expected = torch.tensor([0.0, 1.0, 19.0, 20.0, 20.0], dtype=torch.float64).exp()
    expected[:2] = torch.tensor([0.0, 1.0])
    torch.testing.assert_close(ratio.detach(), expected)
    torch.testing.assert_close(log_ratio.grad, torch.where(log_ratio.detach() > 20, 0.0, expected))


@given(st.integers(0, 10_000), st.floats(0.1, 10), st.floats(-100, 100))
def test_whiten_undoes_affine_maps(seed: int, scale: float, shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    mask = (torch.arange(5) < torch.randint(2, 6, (4, 1), generator=generator)).double()
    options = {"epsilon": 0.0}
    torch.testing.assert_close(
        whiten(scale * values + shift, mask, **options), whiten(values, mask, **options), rtol=1e-6, atol=1e-6
    )


def test_whiten_options() -> None:
    """Values 1 and 3: mean 2, variance 1 (2 with Bessel's correction)."""
    values, mask = torch.tensor([1.0, 3.0, 50.0], dtype=torch.float64), torch.tensor([1, 1, 0])
    root = 2**-0.5
    assert whiten(values, mask).tolist() == pytest.approx([-1, 1, 0])
    assert whiten(values, mask, bessel=True).tolist() == pytest.approx([-root, root, 0])
    assert whiten(values, mask, shift_mean=False).tolist() == pytest.approx([1, 3, 0])
    assert whiten(values, torch.tensor([1, 0, 0])).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="at least 2 unmasked values, got 1"):
        whiten(values, torch.tensor([1, 0, 0]), bessel=True)


def test_reward_metrics_are_detached_and_count_ties_half() -> None:
    chosen = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    metrics = reward_metrics(chosen, torch.tensor([2.0, 2.0, 2.0]))
    accuracies = metrics["rewards/accuracies"]
    assert isinstance(accuracies, tuple)
    assert accuracies[0].tolist() == [0.0, 0.5, 1.0]
    assert not any(values.requires_grad for metric in metrics.values() if isinstance(metric, tuple) for values in metric)
