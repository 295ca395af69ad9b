"""The shared maths."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from losses.ops import (
    MIN_NEGATIVE,
    check_smoothing,
    expected_over_labels,
    log1mexp,
    logistic_loss,
    masked_mean,
    masked_sum,
    per_token,
    ratio_of,
    reward_metrics,
    step_index,
    unpaired_reward_metrics,
    whiten,
)


def test_masked_reductions_ignore_what_is_masked_even_nan() -> None:
    values = torch.tensor([[1.0, 4.0, float("nan")], [7.0, float("inf"), 6.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert masked_sum(values, mask).item() == 12.0
    assert masked_sum(values, mask, dim=-1).tolist() == [5.0, 7.0]
    assert masked_mean(values, mask).item() == 4.0
    assert masked_mean(values, mask.bool(), dim=-1).tolist() == [2.5, 7.0]
    masked_sum(values, mask).backward()
    assert values.grad is not None
    assert values.grad.tolist() == mask.tolist()


def test_masked_mean_of_nothing_is_0() -> None:
    assert masked_mean(torch.tensor([5.0]), torch.tensor([0.0])).item() == 0.0


def test_per_token_divides_by_lengths_and_is_0_for_nothing() -> None:
    logps = torch.tensor([-6.0, -5.0, 0.0], requires_grad=True)
    means = per_token(logps, torch.tensor([4, 1, 0]))
    means.sum().backward()
    assert means.tolist() == [-1.5, -5.0, 0.0]
    assert logps.grad is not None
    assert logps.grad.tolist() == [0.25, 1.0, 1.0]


def test_step_index_counts_unmasked_steps_of_each_row() -> None:
    """Holes and padding on either side shift nothing; where the mask is 0 some index stands that can be gathered."""
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 0, 1, 0]])
    for form in (mask, mask.bool(), mask.double()):
        index = step_index(form)
        assert index.dtype == torch.int64
        assert [row[kept].tolist() for row, kept in zip(index, mask.bool(), strict=True)] == [[0, 1, 2, 3], [0, 1], [0, 1]]
        assert index.min() == 0


def test_log1mexp_values() -> None:
    """log(1 - p) for p = 1/4, 1/2 (where the branches meet) and 9/10."""
    p = torch.tensor([1 / 4, 1 / 2, 9 / 10], dtype=torch.float64)
    assert log1mexp(p.log()).tolist() == pytest.approx([math.log(3 / 4), math.log(1 / 2), math.log(1 / 10)], abs=1e-15)


@settings(max_examples=20)
@given(st.floats(1e-6, 16))
def test_log1mexp_is_exact_in_single_precision_on_both_sides(negative: float) -> None:
    """Against double precision; one form alone loses all digits of the other's side."""
    x = torch.tensor([-negative], dtype=torch.float32)
    exact = math.log(-math.expm1(x.item())) if x.item() > -0.1 else math.log1p(-math.exp(x.item()))
    assert log1mexp(x).item() == pytest.approx(exact, rel=1e-6)


def test_log1mexp_gradient() -> None:
    """-p/(1 - p), whichever form is taken."""
    x = torch.tensor([-20.0, -3.0, -0.7, -0.68, -0.1], dtype=torch.float64, requires_grad=True)
    assert gradcheck(log1mexp, x)
    log1mexp(x).sum().backward()
    p = x.detach().exp()
    torch.testing.assert_close(x.grad, -p / (1 - p))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_log1mexp_is_cut_near_probability_1(dtype: torch.dtype) -> None:
    """Value constant and gradient zero above -1e-6, all of it finite, also where the other form would be log 0."""
    x = torch.tensor([-1e4, -2 * MIN_NEGATIVE, -MIN_NEGATIVE / 2, 0.0], dtype=dtype, requires_grad=True)
    value = log1mexp(x)
    value.sum().backward()
    assert x.grad is not None
    assert value.isfinite().all()
    assert value[2:].tolist() == pytest.approx([math.log(MIN_NEGATIVE)] * 2, rel=1e-2)
    assert x.grad[1] < -1e5
    assert x.grad[2:].tolist() == [0.0, 0.0]
    assert x.grad[0] == 0


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
    three = torch.tensor([1.0, 3.0, 8.0], dtype=torch.float64)  # mean 4, squares 9 + 1 + 16 = 26
    assert whiten(three, torch.ones(3), bessel=True).tolist() == pytest.approx([x / 13**0.5 for x in (-3, -1, 4)])
    assert whiten(values, mask, shift_mean=False).tolist() == pytest.approx([1, 3, 0])
    assert whiten(values, torch.tensor([1, 0, 0])).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="at least 2 unmasked values, got 1"):
        whiten(values, torch.tensor([1, 0, 0]), bessel=True)


@settings(max_examples=15)
@given(st.floats(0, 1))
def test_expected_over_labels(label: float) -> None:
    loss, swapped = torch.tensor([2.0, 5.0]), torch.tensor([3.0, -7.0])
    assert expected_over_labels(loss, swapped, None) is loss
    expected = label * loss + (1 - label) * swapped
    torch.testing.assert_close(expected_over_labels(loss, swapped, torch.full((2,), label)), expected)


def test_logistic_loss_labels_and_smoothing() -> None:
    """Margin 1.5: -log sigma is 0.2014, the flipped one 1.5 more. A label p weighs the flipped one by 1 - p, smoothing e by
    p e + (1 - p)(1 - e)."""
    margin = torch.tensor([1.5], dtype=torch.float64)
    right = math.log(1 + math.exp(-1.5))

    def flipped(share: float) -> object:
        return pytest.approx(right + 1.5 * share, abs=1e-12)

    labels = torch.tensor([0.7], dtype=torch.float64)
    assert logistic_loss(margin, owner="me").item() == flipped(0.0)
    assert logistic_loss(margin, label_smoothing=0.1, owner="me").item() == flipped(0.1)
    assert logistic_loss(margin, labels, owner="me").item() == flipped(0.3)
    assert logistic_loss(margin, labels, label_smoothing=0.1, owner="me").item() == flipped(0.7 * 0.1 + 0.3 * 0.9)


def test_logistic_loss_without_labels_does_not_see_the_flipped_pair() -> None:
    """Infinitely far apart, which the flipped pair would make 0*inf."""
    assert logistic_loss(torch.tensor([math.inf]), owner="me").item() == 0


def test_logistic_loss_refuses_smoothing_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"^me: label_smoothing is -0.1, expected a share of flipped labels in \[0, 0.5\)"):
        logistic_loss(torch.zeros(1), label_smoothing=-0.1, owner="me")


@pytest.mark.parametrize("share", [-0.01, 0.5, 0.75])
def test_check_smoothing_out_of_range(share: float) -> None:
    with pytest.raises(ValueError, match=rf"^me: label_smoothing is {share}, expected .* in \[0, 0.5\)"):
        check_smoothing(share, "me")


def test_check_smoothing_of_0_is_a_question_of_the_loss() -> None:
    check_smoothing(0.0, "me")
    check_smoothing(0.01, "me", positive=True)
    with pytest.raises(ValueError, match=r"^me: label_smoothing is 0.0, expected .* in \(0, 0.5\)"):
        check_smoothing(0.0, "me", positive=True)


def test_reward_metrics_are_detached_and_count_ties_half() -> None:
    chosen, rejected = (torch.tensor(rewards, requires_grad=True) for rewards in ([1.0, 2.0, 3.0], [4.0, 2.0, -2.0]))
    metrics = reward_metrics(chosen, rejected)
    assert {key: values.tolist() for key, (values, _) in metrics.items()} == {
        "rewards/chosen": [1.0, 2.0, 3.0], "rewards/rejected": [4.0, 2.0, -2.0],
        "rewards/margins": [-3.0, 0.0, 5.0], "rewards/accuracies": [0.0, 0.5, 1.0],
    }  # fmt: skip
    assert all(weight.tolist() == [1.0, 1.0, 1.0] for _, weight in metrics.values())
    assert not any(tensor.requires_grad for metric in metrics.values() for tensor in metric)


def test_unpaired_reward_metrics_are_detached_and_split_by_label() -> None:
    rewards = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    metrics = unpaired_reward_metrics(rewards, torch.tensor([True, False, False]))
    assert {key: [tensor.tolist() for tensor in metric] for key, metric in metrics.items()} == {
        "rewards/chosen": [[1.0, 2.0, 3.0], [1.0, 0.0, 0.0]], "rewards/rejected": [[1.0, 2.0, 3.0], [0.0, 1.0, 1.0]],
    }  # fmt: skip
    assert not any(tensor.requires_grad for metric in metrics.values() for tensor in metric)
