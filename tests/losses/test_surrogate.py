"""The parts of the clipped surrogate: ratios of tokens and sequences, the clip, its metrics, and the normalisations by name."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from losses import Max
from losses._surrogate import clipped_tokens, normalise, ratio_metrics, sequence_log_ratio, token_log_ratio
from losses.ops import MAX_LOG_RATIO
from losses.types import Metric


def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def pair(metric: Metric) -> tuple[Tensor, Tensor]:
    assert not isinstance(metric, Max)
    return metric


MASK = tensor([1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0])


def test_token_log_ratio_is_0_without_gradient_where_masked_and_leaves_the_old_policy_alone() -> None:
    logps = tensor([-1.0, -2.0, math.nan]).requires_grad_()
    old = tensor([-4.0, -1.5, 7.0]).requires_grad_()
    log_ratio = token_log_ratio(logps, old, MASK[1:2])
    assert log_ratio.tolist() == [[3.0, -0.5, 0.0]]
    policy_gradient, old_gradient = torch.autograd.grad(log_ratio.sum(), (logps, old), allow_unused=True)
    assert policy_gradient.tolist() == [[1.0, 1.0, 0.0]]
    assert old_gradient is None


def test_sequence_log_ratio_spreads_the_mean_or_the_sum() -> None:
    """Log-ratios 1, 2, 6: mean 3, sum 9; of two tokens 4, -1: 1.5 and 3; an empty row is 0. Each token moves all of its row."""
    log_ratio = tensor([1.0, 2.0, 6.0], [4.0, -1.0, 99.0], [5.0, 5.0, 5.0]).requires_grad_()
    mean, total = (sequence_log_ratio(log_ratio, MASK, average=choice) for choice in (True, False))
    assert mean.tolist() == [[3.0] * 3, [1.5] * 3, [0.0] * 3]
    assert total.tolist() == [[9.0] * 3, [3.0] * 3, [0.0] * 3]
    torch.testing.assert_close(
        torch.autograd.grad(mean[:, 0].sum(), log_ratio)[0], MASK / tensor([3.0], [2.0], [1.0])
    )  # fmt: skip
    torch.testing.assert_close(torch.autograd.grad(total[:, 0].sum(), log_ratio)[0], MASK)


def test_clipped_tokens_closed_form() -> None:
    """Clip [0.9, 1.3], ratios 0.5, 1.2, 2: A = 0.5 gives -0.25, -0.6, -0.65 (clipped), A = -2 gives 1.8 (clipped), 2.4, 4.

    A dual clip of 1.5 leaves A > 0 and bounds the last at 3; the clip decides where the loss is not -A rho.
    """
    log_ratio = tensor([0.5, 1.2, 2.0], [0.5, 1.2, 2.0]).log()
    advantages = tensor([0.5], [-2.0]).expand(2, 3)
    clip = partial(clipped_tokens, clip_low=0.1, clip_high=0.3, owner="tested")
    loss, metrics = clip(log_ratio, advantages, torch.ones(2, 3))
    torch.testing.assert_close(loss, tensor([-0.25, -0.6, -0.65], [1.8, 2.4, 4.0]))
    assert torch.equal(pair(metrics["clip_frac"])[0], tensor([0.0, 0.0, 1.0], [1.0, 0.0, 0.0]))
    dual, metrics = clip(log_ratio, advantages, MASK[:2], dual_clip=1.5)
    torch.testing.assert_close(dual, tensor([-0.25, -0.6, -0.65], [1.8, 2.4, 3.0]))
    assert torch.equal(pair(metrics["clip_frac"])[0], tensor([0.0, 0.0, 1.0], [1.0, 0.0, 1.0]))
    assert torch.equal(pair(metrics["clip_frac"])[1], MASK[:2])


def test_clipped_tokens_boundaries_of_its_options() -> None:
    """A clip of 0 keeps ratio 1 alone; a dual clip just above 1 is allowed, 1 is not."""
    log_ratio, advantages, ones = tensor([0.5, 2.0]).log(), tensor([-1.0, 1.0]), torch.ones(1, 2)
    loss, _ = clipped_tokens(log_ratio, advantages, ones, clip_low=0.0, clip_high=0.0, dual_clip=1.01, owner="tested")
    torch.testing.assert_close(loss, tensor([1.0, -1.0]))
    wrong: tuple[tuple[dict[str, float], str], ...] = (
        ({"clip_low": -0.1, "clip_high": 0.2}, "tested: clip_low and clip_high must be at least 0, got -0.1 and 0.2"),
        ({"clip_low": 0.2, "clip_high": -0.1}, "tested: clip_low and clip_high must be at least 0, got 0.2 and -0.1"),
        ({"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 1.0}, "tested: dual_clip must exceed 1, got 1.0"),
    )
    for options, message in wrong:
        with pytest.raises(ValueError, match=message):
            clipped_tokens(log_ratio, advantages, ones, **options, owner="tested")


def test_clipped_tokens_send_no_gradient_to_advantages_nor_beyond_the_largest_exponent() -> None:
    log_ratio = tensor([MAX_LOG_RATIO + 1, MAX_LOG_RATIO - 1, 0.1]).requires_grad_()
    advantages = tensor([-1.0, -1.0, 1.0]).requires_grad_()
    loss, _ = clipped_tokens(log_ratio, advantages, torch.ones(1, 3), clip_low=0.2, clip_high=0.2, owner="tested")
    gradient, unused = torch.autograd.grad(loss.sum(), (log_ratio, advantages), allow_unused=True)
    assert unused is None
    torch.testing.assert_close(gradient, tensor([0.0, math.exp(MAX_LOG_RATIO - 1), -math.exp(0.1)]))


def test_ratio_metrics_read_unmasked_tokens_without_gradient() -> None:
    """Ratios 0.9 and 0.5 (a masked 9 aside): the larger is 0.9; k3 of KL(old || policy) is rho - 1 - log rho."""
    log_ratio = tensor([0.9, 0.5, 9.0]).log().requires_grad_()
    metrics = ratio_metrics(log_ratio, MASK[1:2])
    largest, kl = metrics["ratio/max"], pair(metrics["approx_kl"])
    assert isinstance(largest, Max)
    assert largest.values.max().item() == pytest.approx(0.9)
    torch.testing.assert_close(kl[0][0, :2], tensor([-0.1 - math.log(0.9), -0.5 - math.log(0.5)])[0])
    assert kl[1].tolist() == MASK[1:2].tolist()
    assert not any(values.requires_grad for values in (largest.values, kl[0]))


@pytest.mark.parametrize(
    ("length_norm", "loss", "weight", "mean"),
    [
        ("token", [[1.0, 2.0, 6.0], [4.0, -1.0, 50.0], [50.0] * 3], MASK.tolist(), 12 / 5),
        ("seq_mean", [3.0, 1.5, 0.0], [1.0, 1.0, 0.0], 2.25),
        ("seq_sum", [9.0, 3.0, 0.0], [1.0, 1.0, 0.0], 6.0),
        ("constant", [0.9, 0.3, 0.0], [1.0, 1.0, 0.0], 0.6),
    ],
)
def test_normalise_closed_forms(length_norm: str, loss: list[object], weight: list[object], mean: float) -> None:
    """Tokens 1, 2, 6 and 4, -1, an empty row, a limit of 10; sequences without tokens do not count."""
    token_loss = tensor([1.0, 2.0, 6.0], [4.0, -1.0, 50.0], [50.0, 50.0, 50.0])
    out = normalise(token_loss, MASK, length_norm, {}, max_completion_length=torch.tensor(10.0), owner="tested")  # type: ignore[arg-type]
    torch.testing.assert_close(out.loss, torch.tensor(loss, dtype=torch.float64))
    assert out.weight.tolist() == weight
    assert out.mean().item() == pytest.approx(mean)
    assert out.weight.dtype == token_loss.dtype


def test_normalise_hands_metrics_on_and_names_its_owner_in_errors() -> None:
    metrics = {"x": (torch.ones(1), torch.ones(1))}
    arguments = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    for length_norm in ("token", "seq_mean", "seq_sum", "constant"):
        out = normalise(*arguments, length_norm, metrics, max_completion_length=torch.tensor(2.0), owner="tested")  # type: ignore[arg-type]
        assert out.metrics is metrics
    with pytest.raises(ValueError, match=r"^tested: length_norm='constant' divides by max_completion_length"):
        normalise(*arguments, "constant", {}, owner="tested")
    with pytest.raises(ValueError, match=r"^tested: unknown .* 'mean'; expected one of token, seq_mean, seq_sum, constant"):
        normalise(*arguments, "mean", {}, owner="tested")  # type: ignore[arg-type]
