"""Length-normalised DPO. P pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from losses.ops import logistic_loss, per_token, reward_metrics
from losses.registry import register
from losses.types import LossOutput


@register("dpo_norm")
def dpo_norm_loss(
    policy_chosen_logps: Tensor,  # [P]
    policy_rejected_logps: Tensor,  # [P]
    reference_chosen_logps: Tensor,  # [P]
    reference_rejected_logps: Tensor,  # [P]
    chosen_lengths: Tensor,  # [P]
    rejected_lengths: Tensor,  # [P]
    *,
    beta: float = 5.0,
) -> LossOutput:
    """L = -log sigma(beta*(log pi/ref(y_w) / |y_w| - log pi/ref(y_l) / |y_l|)).

    Lambert et al. 2024, section 5.1 [lambert2024tulu3]: DPO on log-ratios averaged over tokens, so that long completions get no
    larger margins. With completions of one length n it is DPO with beta/n. The default is Tulu 3's beta; TRL's `sigmoid_norm`
    takes the 0.1 of DPO, which is about fifty times weaker than it looks.

    Args:
        beta: strength against the reference, per token; raising it keeps the policy nearer to it.
    """
    chosen_rewards = beta * per_token(policy_chosen_logps - reference_chosen_logps, chosen_lengths)
    rejected_rewards = beta * per_token(policy_rejected_logps - reference_rejected_logps, rejected_lengths)
    loss = logistic_loss(chosen_rewards - rejected_rewards, owner="dpo_norm_loss")
    return LossOutput(loss, torch.ones_like(loss), reward_metrics(chosen_rewards, rejected_rewards))
