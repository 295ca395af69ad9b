"""Length and preference apart: the length-controlled win rate and the subset of equal lengths. N pairs.

Policies learn to say more, and judges to like it: a raw win rate mixes the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.errors import ConfigError
from prefopt.judges.winrate import WinRate, clusters, hard, win_rate
from prefopt.rewards.quality import MATCHED

_STEPS, _TOLERANCE, _Z = 100, 1e-10, 1.959963984540054
# An eigenvalue below this share of the largest is none: all lengths then have one ratio.
_SINGULAR = 1e-12
# A step on the scale of log-odds: Newton's own may leap from a flat part of the likelihood.
_LARGEST_STEP = 2.0

Length = Callable[[str], int]
LENGTHS: dict[str, Length] = {"words": lambda text: len(text.split()), "characters": len}
"""How long a text is, by the name of the unit."""


def length_in(unit: str) -> Length:
    """The measure of a unit.

    Raises:
        ConfigError: no such unit.
    """
    if unit not in LENGTHS:
        raise ConfigError(f"length {unit!r}: expected one of {', '.join(LENGTHS)}.")
    return LENGTHS[unit]


def token_length(tokenizer: Any) -> Length:
    """Tokens without special ones."""
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def measure(length: Length, first: Sequence[str], second: Sequence[str]) -> Tensor:
    """[N, 2] lengths."""
    return torch.tensor([[length(one), length(other)] for one, other in zip(first, second, strict=True)]).view(-1, 2)


@dataclass(frozen=True)
class LengthControlled:
    """The win rate at equal lengths.

    Args:
        rate: sigma(intercept).
        low, high: 95% interval.
        effect: log-odds that one standard deviation of the log length ratio adds: the length preference of the judge on these
            pairs. 0 where all lengths are equal.
        extrapolated: ours is longer in all pairs, or shorter in all: nothing was seen on both sides of equal lengths.
    """

    rate: float
    low: float
    high: float
    effect: float
    extrapolated: bool


def length_controlled(shares: Tensor, lengths: Tensor, prompts: Sequence[str] | None = None) -> LengthControlled | None:
    """logit P(ours is preferred) = a + b x, x = log(our length / their length) / s; the rate is sigma(a).

    After AlpacaEval's length-controlled win rate (Dubois et al. 2024 [dubois2024length]). Each pair stands for its two orders,
    (y, x) and (1 - y, -x) with a's sign turned: over both, x has mean 0 and s, the root of its mean square, is its standard
    deviation; so x is scaled and never centred, and a is a preference and no effect of the average length. Both orders have
    one likelihood, so one is fitted. The fit maximises the likelihood times Jeffreys' prior (Firth 1993 [firth1993bias]), which
    keeps estimates finite where length separates wins from losses. The interval is sigma(a +- 1.96 s_a); the variance is
    robust to several pairs of a prompt, and for wins and losses at least the model's own.

    Differences to AlpacaEval: (1) a log ratio for the tanh of the difference; (2) no term for the difficulty of a prompt.

    Args:
        shares: [N] that ours is preferred; NaN is no verdict.
        lengths: [N, 2] of ours and theirs; an empty completion counts as one.
        prompts: [N] which prompt a pair belongs to.

    Returns:
        None without a verdict.
    """
    read = ~shares.isnan()
    if not read.any():
        return None
    kept, groups = shares[read].double(), clusters(prompts, read)
    logs = lengths[read].double().clamp(min=1).log()
    ratios = logs[:, 0] - logs[:, 1]
    scale = float(ratios.square().mean().sqrt())
    columns = [torch.ones_like(ratios)] + ([ratios / scale] if scale > 0 else [])
    design = torch.stack(columns, dim=1)  # [N, 1 or 2]
    found = fit_logistic(design, kept)
    deviation = math.sqrt(float(_covariance(design, kept, found, groups)[0, 0]))
    middle = float(found[0])
    rate, low, high = torch.sigmoid(
        torch.tensor([middle, middle - _Z * deviation, middle + _Z * deviation], dtype=torch.float64)
    ).tolist()
    one_sided = bool((ratios > 0).all() or (ratios < 0).all())
    return LengthControlled(rate, low, high, float(found[1]) if scale > 0 else 0.0, one_sided)


def fit_logistic(design: Tensor, shares: Tensor) -> Tensor:
    """Coefficients [k] of a logistic regression of shares [N] in [0, 1] on design [N, k] under Jeffreys' prior.

    Fisher scoring on the modified score, sum_i (y_i - p_i + h_i (1/2 - p_i)) x_i, h the leverages (Firth 1993
    [firth1993bias]). A step is halved until the penalised likelihood does not fall: whole ones may go back and forth forever.
    """
    beta = torch.zeros(design.shape[1], dtype=torch.float64)
    reached = _penalised(design, shares, beta)
    for _ in range(_STEPS):
        p = torch.sigmoid(design @ beta)
        inverse = torch.linalg.pinv(_information(design, p))
        leverage = p * (1 - p) * ((design @ inverse) * design).sum(-1)
        step = inverse @ (design.T @ (shares - p + leverage * (0.5 - p)))
        step = step * (_LARGEST_STEP / step.abs().max()).clamp(max=1)
        while (value := _penalised(design, shares, beta + step)) < reached and step.abs().max() >= _TOLERANCE:
            step = step / 2
        if step.abs().max() < _TOLERANCE:
            break
        beta, reached = beta + step, value
    return beta


def _penalised(design: Tensor, shares: Tensor, beta: Tensor) -> float:
    """Log-likelihood plus half the log-determinant of the information, over the directions that the design has."""
    scores = design @ beta
    likelihood = (shares * F.logsigmoid(scores) + (1 - shares) * F.logsigmoid(-scores)).sum()
    values = torch.linalg.eigvalsh(_information(design, torch.sigmoid(scores)))
    return float(likelihood + 0.5 * values[values > _SINGULAR * values.max()].log().sum())


def _information(design: Tensor, p: Tensor) -> Tensor:
    return design.T @ ((p * (1 - p))[:, None] * design)


def _covariance(design: Tensor, shares: Tensor, beta: Tensor, groups: Tensor) -> Tensor:
    """[k, k], robust to dependence within groups (prompts); of wins and losses the larger of that and the model's."""
    p = torch.sigmoid(design @ beta)
    model = torch.linalg.pinv(_information(design, p))
    count = int(groups.max()) + 1
    scores = torch.zeros(count, design.shape[1], dtype=torch.float64).index_add(0, groups, (shares - p)[:, None] * design)
    robust = model @ (scores.T @ scores) @ model * (count / max(count - 1, 1))
    return model if hard(shares) and model[0, 0] >= robust[0, 0] else robust


def matched(lengths: Tensor, tolerance: float = MATCHED) -> Tensor:
    """[N] bool: lengths [N, 2] differ by at most `tolerance` of the longer one."""
    lengths = lengths.double()
    return (lengths[:, 0] - lengths[:, 1]).abs() <= tolerance * lengths.amax(1)


def matched_win_rate(
    shares: Tensor, lengths: Tensor, prompts: Sequence[str] | None = None, tolerance: float = MATCHED
) -> WinRate:
    """The win rate over the pairs of nearly equal lengths."""
    kept = matched(lengths, tolerance)
    names = None if prompts is None else [prompt for prompt, keep in zip(prompts, kept.tolist(), strict=True) if keep]
    return win_rate(shares[kept], names)
