"""Maths that several losses share: masked reductions, label expectations, KL estimators, whitening, reward metrics.

Shapes: P pairs, N sequences, T tokens; `...` is any shape. Masks are 1 (or True) on what counts.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from losses.types import Metric

MAX_LOG_RATIO = 20.0
"""Largest exponent of a probability ratio: exp(20) = 4.9e8. Beyond it the ratio is constant and its gradient zero."""


MIN_NEGATIVE = 1e-6
"""How near to 0 a log-prob may come before log(1 - exp(.)) is cut off."""


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of `values` [...] where `mask` [...] is set, over `dim` or over everything.

    What stands outside the mask does not matter, not even NaN, and receives no gradient.
    """
    kept = torch.where(mask.bool(), values, torch.zeros_like(values))
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `values` [...] where `mask` [...] is set, over `dim` or over everything; 0 where the mask is empty."""
    count = mask.to(values.dtype).sum() if dim is None else mask.to(values.dtype).sum(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def per_token(logps: Tensor, lengths: Tensor) -> Tensor:
    """Mean log-prob of a token [...] from sums and lengths of that shape; 0 where a completion is empty."""
    return logps / lengths.clamp(min=1)


def step_index(mask: Tensor) -> Tensor:
    """0, 1, 2, ... [..., T] int64 over the unmasked steps of each row; masked ones hold some number that is not negative."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) [...] for x <= 0, exact to the last digits on both sides (Maechler 2012 [maechler2012log1mexp]).

    x is cut at -1e-6, a probability of 0.999999: value constant and gradient zero above it, where log 0 is near.
    """
    x = x.clamp(max=-MIN_NEGATIVE)
    near = x > -math.log(2)
    # The branch not taken still sends its gradient, times 0: near 0 exp(x) rounds to 1 in bf16, and log1p(-1) has none.
    from_log1p = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, torch.log(-torch.expm1(x)), from_log1p)


def ratio_of(log_ratio: Tensor) -> Tensor:
    """exp(log_ratio) [...], constant (gradient zero) where log_ratio exceeds `MAX_LOG_RATIO`."""
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def kl_k1(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """log pi - log ref [...], on samples from pi (Schulman 2020 [schulman2020kl]).

    As a value: unbiased for KL(pi || ref); may be negative.
    As a loss term on-policy: its gradient has expectation zero, so it does nothing. Use it inside the reward instead.
    """
    return logps - reference_logps


def kl_k2(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """(log pi - log ref)^2 / 2 [...], on samples from pi (Schulman 2020 [schulman2020kl]).

    As a value: biased for KL(pi || ref) (right to second order), never negative, low variance.
    As a loss term on-policy: its gradient is unbiased for that of KL(pi || ref), the one that RLHF wants.
    """
    return (logps - reference_logps).square() / 2


def kl_k3(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """exp(r) - 1 - r with r = log ref - log pi [...], on samples from pi (Schulman 2020 [schulman2020kl]).

    As a value: unbiased for KL(pi || ref), never negative.
    As a loss term on-policy: its gradient is unbiased for that of KL(ref || pi), the forward KL, not of KL(pi || ref).
    r is cut at `MAX_LOG_RATIO`: value constant and gradient zero where ref is more than exp(20) times as likely.
    """
    # Cutting only the exponent would leave the gradient of -r, which points the wrong way.
    log_ratio = (reference_logps - logps).clamp(max=MAX_LOG_RATIO)
    return torch.expm1(log_ratio) - log_ratio


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True, bessel: bool = False, epsilon: float = 1e-8) -> Tensor:
    """(values - mean) / sqrt(variance + epsilon) [...] over the masked positions; 0 elsewhere.

    Args:
        values: [...], any shape.
        mask: the same shape; padding takes no part in mean and variance.
        shift_mean: True moves the mean to 0; False keeps it where it was and only scales.
        bessel: divide the variance by n - 1 instead of n.
        epsilon: added to the variance, so that equal values become 0.

    Raises:
        ValueError: `bessel` with fewer than two values.
    """
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean).square(), mask)
    if bessel:
        count = int(mask.sum())
        if count < 2:
            raise ValueError(f"whiten: bessel=True needs at least 2 unmasked values, got {count}; use bessel=False.")
        variance = variance * (count / (count - 1))
    whitened = (values - mean) * torch.rsqrt(variance + epsilon)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask.bool(), whitened, torch.zeros_like(whitened))


def expected_over_labels(loss: Tensor, swapped_loss: Tensor, soft_labels: Tensor | None) -> Tensor:
    """p * loss + (1 - p) * swapped_loss [P], p the probability that chosen is preferred; `loss` itself without labels.

    It is the expectation of the loss when the label is drawn with probability p, so labels sampled afresh each epoch and
    soft labels have one gradient in expectation, and label smoothing e is the constant soft label 1 - e.
    """
    if soft_labels is None:
        return loss
    return soft_labels * loss + (1 - soft_labels) * swapped_loss


def logistic_loss(margin: Tensor, soft_labels: Tensor | None = None, *, label_smoothing: float = 0.0, owner: str) -> Tensor:
    """-p log sigma(margin) - (1 - p) log sigma(-margin) [P], p the soft label, 1 without one.

    Label smoothing e is the constant soft label 1 - e; both together flip the drawn label with probability e, that is
    p(1 - e) + (1 - p)e.

    Raises:
        ValueError: `label_smoothing` outside [0, 0.5).
    """
    check_smoothing(label_smoothing, owner)
    if label_smoothing > 0:
        labels = torch.ones_like(margin) if soft_labels is None else soft_labels
        soft_labels = labels * (1 - label_smoothing) + (1 - labels) * label_smoothing
    return expected_over_labels(-F.logsigmoid(margin), -F.logsigmoid(-margin), soft_labels)


def check_smoothing(label_smoothing: float, owner: str, *, positive: bool = False) -> None:
    """Raises ValueError when `label_smoothing` is no share of flipped labels in [0, 0.5), or (0, 0.5) with `positive`."""
    if not 0 <= label_smoothing < 0.5 or (positive and label_smoothing == 0):
        span = "(0, 0.5)" if positive else "[0, 0.5)"
        raise ValueError(f"{owner}: label_smoothing is {label_smoothing}, expected a share of flipped labels in {span}.")


def reward_metrics(chosen_rewards: Tensor, rejected_rewards: Tensor) -> dict[str, Metric]:
    """The four metrics by their usual names from rewards [P], detached; a tie counts as half right."""
    chosen, rejected = chosen_rewards.detach(), rejected_rewards.detach()
    weight = torch.ones_like(chosen)
    accuracies = (chosen > rejected).to(chosen.dtype) + (chosen == rejected).to(chosen.dtype) / 2
    return {
        "rewards/chosen": (chosen, weight),
        "rewards/rejected": (rejected, weight),
        "rewards/margins": (chosen - rejected, weight),
        "rewards/accuracies": (accuracies, weight),
    }


def unpaired_reward_metrics(rewards: Tensor, desirable: Tensor) -> dict[str, Metric]:
    """Mean rewards [N] of desirable and of undesirable completions under their usual names, detached."""
    rewards, good = rewards.detach(), desirable.to(rewards.dtype)
    return {"rewards/chosen": (rewards, good), "rewards/rejected": (rewards, 1 - good)}
