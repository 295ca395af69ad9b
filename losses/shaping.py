"""From a completion's score to a reward for each of its tokens: KL penalty, credit, and the controller of the penalty's price.

Shapes: N sequences, T tokens. Nothing here carries gradient: rewards are data for the advantage functions.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from losses.ops import kl_k1, kl_k2, kl_k3, masked_sum

KLEstimator = Literal["k1", "k2", "k3"]
_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}

MAX_KL_ERROR = 0.2
"""One adaptation sees a relative error of the KL of at most this much (Ziegler et al. 2019, section 2.2)."""


@torch.no_grad()
def token_kls(
    logps: Tensor,  # [N, T]
    reference_logps: Tensor,  # [N, T]
    mask: Tensor,  # [N, T]
    *,
    kl_estimator: KLEstimator = "k1",
) -> Tensor:
    """Estimates of KL(policy || reference) from each drawn token [N, T], 0 where the mask is 0.

    Schulman 2020 [schulman2020kl]. In a reward only k1's sum over a completion has the KL's gradient: maximising
    r - kl_coef*k1 maximises E[r] - kl_coef KL. k2 and k3 are other penalties, with less noise.

    Args:
        kl_estimator: "k1", "k2" or "k3"; see `losses.ops`.

    Raises:
        ValueError: an unknown estimator.
    """
    if kl_estimator not in _ESTIMATORS:
        raise ValueError(f"token_kls: unknown kl_estimator {kl_estimator!r}; expected {', '.join(get_args(KLEstimator))}.")
    found = _ESTIMATORS[kl_estimator](logps, reference_logps)
    return torch.where(mask.bool(), found, torch.zeros_like(found))


@torch.no_grad()
def redistribute(
    scores: Tensor,  # [N]
    weights: Tensor | None,  # [N, T]
    mask: Tensor,  # [N, T]
    *,
    credit_beta: float = 1.0,
) -> Tensor:
    """r_t = credit_beta * alpha_t * score + 1[t is the last token] * (1 - credit_beta) * score [N, T], alpha = weights / sum.

    Attention-based credit, Chan et al. 2024, eq. 5 [chan2024abc]: alpha is the reward model's attention. A completion's
    rewards sum to its score for every `credit_beta`, so undiscounted objectives keep their optimum.

    Args:
        scores: of completions.
        weights: not negative, of any scale; None puts the whole score on the last token. A completion without any weight
            has it there too.
        mask: 1 on the completion's tokens; weights outside do not matter.
        credit_beta: share of the score that is spread.

    Raises:
        ValueError: `credit_beta` outside [0, 1], or a negative weight.
    """
    if not 0 <= credit_beta <= 1:
        raise ValueError(f"redistribute: credit_beta is {credit_beta}, expected a share in [0, 1].")
    last = _last_token(mask, scores.dtype)
    if weights is None:
        return scores[:, None] * last
    kept = torch.where(mask.bool(), weights.to(scores.dtype), torch.zeros_like(mask, dtype=scores.dtype))
    if (kept < 0).any():
        raise ValueError(f"redistribute: the smallest weight is {float(kept.min()):.3g}, expected none below 0.")
    total = kept.sum(-1, keepdim=True)
    shares = torch.where(total > 0, kept / torch.where(total > 0, total, 1), last)
    return scores[:, None] * (credit_beta * shares + (1 - credit_beta) * last)


@torch.no_grad()
def token_rewards(
    scores: Tensor,  # [N]
    old_token_logps: Tensor,  # [N, T]
    reference_token_logps: Tensor,  # [N, T]
    mask: Tensor,  # [N, T]
    *,
    kl_coef: float = 0.05,
    kl_estimator: KLEstimator = "k1",
    weights: Tensor | None = None,  # [N, T]
    credit_beta: float = 1.0,
) -> Tensor:
    """r_t = -kl_coef*kl_t + the token's part of the score [N, T], 0 where the mask is 0.

    Ziegler et al. 2019, eq. 2 [ziegler2019finetuning]; Ouyang et al. 2022, eq. 2 [ouyang2022instructgpt]. The score stands at
    the last token, EOS where there is one, or is spread by `redistribute`.

    Args:
        kl_coef: price of one nat.
        kl_estimator: as in `token_kls`.
        weights, credit_beta: as in `redistribute`.
    """
    kls = token_kls(old_token_logps, reference_token_logps, mask, kl_estimator=kl_estimator)
    return redistribute(scores, weights, mask, credit_beta=credit_beta) - kl_coef * kls


def adapted_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: float, samples: int) -> float:
    """kl_coef * (1 + clip(kl/target - 1, -0.2, 0.2) * samples/horizon): the adaptive controller.

    Ziegler et al. 2019, section 2.2 [ziegler2019finetuning].

    Args:
        kl_coef: at present.
        kl: mean KL of the last completions, nats.
        target: the KL that is wanted, nats.
        horizon: completions over which the price may change by a fifth.
        samples: completions that `kl` was measured on.

    Raises:
        ValueError: `target` or `horizon` is not positive.
    """
    if target <= 0 or horizon <= 0:
        raise ValueError(f"adapted_kl_coef: target and horizon must be positive, got {target} and {horizon}.")
    error = min(max(kl / target - 1, -MAX_KL_ERROR), MAX_KL_ERROR)
    return kl_coef * max(1 + error * samples / horizon, 0.0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the unmasked tokens, a scalar: 1 is a perfect value head, 0 one that says
    nothing, below 0 one that misleads. 0 where the returns do not vary."""

    def variance(x: Tensor) -> Tensor:
        count = mask.sum().clamp(min=1)
        return masked_sum((x - masked_sum(x, mask) / count).square(), mask) / count

    spread = variance(returns)
    return torch.where(spread > 0, 1 - variance(returns - values) / spread.clamp(min=1e-30), torch.zeros_like(spread))


def _last_token(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """1 on each sequence's last unmasked token [N, T]."""
    position = torch.arange(1, mask.shape[-1] + 1, device=mask.device) * mask.bool()
    return ((position == position.amax(-1, keepdim=True)) & mask.bool()).to(dtype)
