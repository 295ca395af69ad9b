"""Binary classifier optimization, on pairs and on labelled completions. P pairs, N sequences."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.ops import reward_metrics, unpaired_reward_metrics
from losses.registry import register
from losses.types import LossOutput


@register("bco_pair")
def bco_pair_loss(
    policy_chosen_logps: Tensor,  # [P]
    policy_rejected_logps: Tensor,  # [P]
    reference_chosen_logps: Tensor,  # [P]
    reference_rejected_logps: Tensor,  # [P]
    *,
    beta: float = 0.1,
) -> LossOutput:
    """L = -log sigma(r_w) - log sigma(-r_l), r = beta log pi/ref(y).

    Jung et al. 2024, eq. 8 [jung2024bco], without the reward shift, as TRL's `bco_pair`. It is never below DPO's loss on the
    same pair, of which it is the upper bound that needs no pairing.

    Args:
        beta: strength against the reference; raising it keeps the policy nearer to it.
    """
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    loss = -F.logsigmoid(chosen_rewards) - F.logsigmoid(-rejected_rewards)
    return LossOutput(loss, torch.ones_like(loss), reward_metrics(chosen_rewards, rejected_rewards))


@register("bco")
def bco_loss(
    policy_logps: Tensor,  # [N]
    reference_logps: Tensor,  # [N]
    desirable: Tensor,  # [N]
    reward_shift: Tensor,  # []
    *,
    beta: float = 0.1,
) -> LossOutput:
    """L = -log sigma(r - shift) if desirable, else -log sigma(-(r - shift)), r = beta log pi/ref(y).

    Jung et al. 2024, eq. 12 [jung2024bco]. The shift is the running mean of all rewards before this step and carries no
    gradient; it tightens the bound on DPO's loss.

    Args:
        beta: strength against the reference; raising it keeps the policy nearer to it.

    Differences: (1) the mean does not contain the step's own rewards, so it is the same for every micro-batch; TRL's does;
    (2) it weighs desirable and undesirable rewards by their number, as TRL; the paper averages the two means; (3) no
    density-ratio weights for prompts of another distribution.
    """
    rewards = beta * (policy_logps - reference_logps)
    sign = 2 * desirable.to(rewards.dtype) - 1
    loss = -F.logsigmoid(sign * (rewards - reward_shift.detach()))
    count = torch.ones_like(rewards).sum()
    updates = {"reward_shift": (rewards.detach().sum(), count)}
    return LossOutput(loss, torch.ones_like(loss), unpaired_reward_metrics(rewards, desirable), updates)
