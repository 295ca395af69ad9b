"""Group-relative policy optimization and the variants that differ by how lengths are normalised. N sequences, T tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from losses._surrogate import clipped_tokens, normalise, token_log_ratio
from losses.advantages import group_baseline
from losses.ops import kl_k3
from losses.registry import register
from losses.types import LossOutput


@register("grpo", advantage=group_baseline, defaults={"kl_coef": 0.0})
def grpo_loss(
    policy_token_logps: Tensor,  # [N, T]
    old_token_logps: Tensor,  # [N, T]
    advantages: Tensor,  # [N, T]
    mask: Tensor,  # [N, T]
    reference_token_logps: Tensor,  # [N, T]
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.04,
) -> LossOutput:
    """L_t = clip(rho_t, A) + beta*k3(pi, ref), the mean of token means; A = (r - mean)/std in the prompt's group.

    Shao et al. 2024, eq. 3 [shao2024grpo]. The KL is a term of the loss, not of the reward; its gradient is that of the forward
    KL(ref || pi), see `ops.kl_k3`. Dividing by a completion's own length lets long bad completions off lightly, which
    `dr_grpo` and `dapo` mend. Exponents are cut at 20 and the gradient is zero beyond.

    Args:
        clip_low: how far the ratio of a bad token may fall below 1 and still be pushed.
        clip_high: how far the ratio of a good token may rise above 1 and still be pushed.
        beta: price of the KL; raising it keeps the policy nearer to the reference.

    Raises:
        ValueError: an option out of range.
    """
    log_ratio = token_log_ratio(policy_token_logps, old_token_logps, mask)
    token_loss, metrics = clipped_tokens(log_ratio, advantages, mask, clip_low=clip_low, clip_high=clip_high, owner="grpo_loss")
    reference_log_ratio = token_log_ratio(policy_token_logps, reference_token_logps, mask)
    kl = kl_k3(reference_log_ratio, torch.zeros_like(reference_log_ratio))
    metrics["kl/ref"] = (kl.detach(), mask.to(kl.dtype))
    return normalise(token_loss + beta * kl, mask, "seq_mean", metrics, owner="grpo_loss")


@register("bnpo", advantage=group_baseline)
def bnpo_loss(
    policy_token_logps: Tensor,  # [N, T]
    old_token_logps: Tensor,  # [N, T]
    advantages: Tensor,  # [N, T]
    mask: Tensor,  # [N, T]
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> LossOutput:
    """GRPO with one mean over all tokens: L_t = clip(rho_t, A), and no KL in the loss.

    The batch normalisation of TRL's `bnpo` (named after Xiao et al. 2025 [xiao2025bnpo], whose Beta normalisation of rewards it
    leaves out), on the core of Shao et al. 2024 [shao2024grpo]. TRL divides by the tokens of a micro-batch; here the count is
    that of the whole step, so this is `dapo` with a symmetric clip.

    Args:
        clip_low: how far the ratio of a bad token may fall below 1 and still be pushed.
        clip_high: how far the ratio of a good token may rise above 1 and still be pushed.

    Raises:
        ValueError: an option out of range.
    """
    log_ratio = token_log_ratio(policy_token_logps, old_token_logps, mask)
    token_loss, metrics = clipped_tokens(log_ratio, advantages, mask, clip_low=clip_low, clip_high=clip_high, owner="bnpo_loss")
    return normalise(token_loss, mask, "token", metrics, owner="bnpo_loss")


@register("dr_grpo", advantage=group_baseline, defaults={"scale": "none"})
def dr_grpo_loss(
    policy_token_logps: Tensor,  # [N, T]
    old_token_logps: Tensor,  # [N, T]
    advantages: Tensor,  # [N, T]
    mask: Tensor,  # [N, T]
    max_completion_length: Tensor,  # []
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> LossOutput:
    """GRPO with sums divided by one constant: L = sum_t clip(rho_t, A) / max_completion_length, and A = r - mean without a std.

    Liu et al. 2025, section 3.2 [liu2025drgrpo]: neither a completion's length nor the spread of its group's rewards changes
    its weight, so the gradient is linear in the rewards. No KL in the loss.

    Args:
        clip_low: how far the ratio of a bad token may fall below 1 and still be pushed.
        clip_high: how far the ratio of a good token may rise above 1 and still be pushed.

    Raises:
        ValueError: an option out of range.
    """
    log_ratio = token_log_ratio(policy_token_logps, old_token_logps, mask)
    token_loss, metrics = clipped_tokens(
        log_ratio, advantages, mask, clip_low=clip_low, clip_high=clip_high, owner="dr_grpo_loss"
    )
    return normalise(token_loss, mask, "constant", metrics, max_completion_length=max_completion_length, owner="dr_grpo_loss")


@register("dapo", advantage=group_baseline)
def dapo_loss(
    policy_token_logps: Tensor,  # [N, T]
    old_token_logps: Tensor,  # [N, T]
    advantages: Tensor,  # [N, T]
    mask: Tensor,  # [N, T]
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> LossOutput:
    """GRPO with one mean over all tokens and a higher upper clip: L_t = clip(rho_t, A), clip_high 0.28, and no KL in the loss.

    Yu et al. 2025, eq. 8 [yu2025dapo]. Long completions count by their tokens; unlikely good tokens have more room to rise,
    which keeps entropy up. With all lengths equal and equal clips it is GRPO without its KL.

    Args:
        clip_low: how far the ratio of a bad token may fall below 1 and still be pushed.
        clip_high: how far the ratio of a good token may rise above 1 and still be pushed.

    Raises:
        ValueError: an option out of range.

    Differences: neither dynamic sampling of prompts nor the overlong penalty; both belong to the rollouts.
    """
    log_ratio = token_log_ratio(policy_token_logps, old_token_logps, mask)
    token_loss, metrics = clipped_tokens(log_ratio, advantages, mask, clip_low=clip_low, clip_high=clip_high, owner="dapo_loss")
    return normalise(token_loss, mask, "token", metrics, owner="dapo_loss")
