"""PPO's clipped surrogate on preference pairs, without sampling and without a value head. P pairs, T tokens."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from losses._surrogate import LengthNorm, clipped_tokens, normalise, token_log_ratio
from losses.ops import masked_sum, reward_metrics
from losses.registry import register
from losses.types import LossOutput


@register("ppo_offline")
def ppo_offline_loss(
    policy_chosen_token_logps: Tensor,  # [P, T]
    policy_rejected_token_logps: Tensor,  # [P, T]
    reference_chosen_token_logps: Tensor,  # [P, T]
    reference_rejected_token_logps: Tensor,  # [P, T]
    chosen_mask: Tensor,  # [P, T]
    rejected_mask: Tensor,  # [P, T]
    chosen_scores: Tensor | None = None,  # [P]
    rejected_scores: Tensor | None = None,  # [P]
    max_completion_length: Tensor | None = None,  # []
    *,
    advantage: Literal["label", "score"] = "label",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    length_norm: LengthNorm = "seq_mean",
) -> LossOutput:
    """L_t = max(-A rho_t, -A clip(rho_t)) on fixed completions, rho_t = pi(y_t) / ref(y_t), A = +1 chosen, -1 rejected.

    Schulman et al. 2017, eq. 7 [schulman2017ppo], with the reference as the old policy, as the offline PPO of HALOs
    (Ethayarajh et al. 2024 [ethayarajh2024kto]). The data were not sampled from the reference in general, so rho is not an
    importance weight: the clip is a trust region around the reference, and a chosen token's log-ratio stops being pushed
    at log(1 + clip_high), a rejected one's at log(1 - clip_low). The first step's gradient is that of A-weighted maximum
    likelihood. It is zero where log rho > 20.

    The default length_norm is "seq_mean": both sides of a pair then weigh the same, so the two advantages cancel whatever
    the lengths; "token" would push down on balance where rejected completions are longer.

    Differences from HALOs: no value head, no KL term in the loss, clips of 0.2 instead of 0.5.

    Args:
        advantage: "label": +1 and -1; "score": the pair-centred scores, (s_w - s_l)/2 and its negative.
        clip_low: how far below 1 the ratio of a token with negative advantage is still pushed.
        clip_high: how far above 1 the ratio of a token with positive advantage is still pushed.
        dual_clip: for A < 0 the loss is at most -dual_clip*A.
        length_norm: as in `ppo_policy`, over the 2P completions.

    Raises:
        ValueError: "score" without scores, an option out of range, or "constant" without `max_completion_length`.
    """
    if advantage == "label":
        chosen_advantage = torch.ones_like(policy_chosen_token_logps[:, 0])
    elif advantage == "score":
        if chosen_scores is None or rejected_scores is None:
            raise ValueError("ppo_offline_loss: advantage='score' needs chosen_scores and rejected_scores; or use 'label'.")
        chosen_advantage = (chosen_scores - rejected_scores) / 2
    else:
        raise ValueError(f"ppo_offline_loss: unknown advantage {advantage!r}; expected 'label' or 'score'.")
    token_logps = torch.cat([policy_chosen_token_logps, policy_rejected_token_logps])
    old_token_logps = torch.cat([reference_chosen_token_logps, reference_rejected_token_logps])
    mask = torch.cat([chosen_mask, rejected_mask])
    log_ratio = token_log_ratio(token_logps, old_token_logps, mask)
    token_loss, metrics = clipped_tokens(
        log_ratio,
        torch.cat([chosen_advantage, -chosen_advantage])[:, None].expand_as(token_logps),
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        owner="ppo_offline_loss",
    )
    metrics |= reward_metrics(*masked_sum(log_ratio, mask, dim=-1).chunk(2))
    return normalise(
        token_loss, mask, length_norm, metrics, max_completion_length=max_completion_length, owner="ppo_offline_loss"
    )
