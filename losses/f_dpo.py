"""DPO under other divergences than the reverse KL. P pairs."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.ops import logistic_loss, ratio_of, reward_metrics
from losses.registry import register
from losses.types import LossOutput

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]


@register("f_dpo")
def f_dpo_loss(
    policy_chosen_logps: Tensor,  # [P]
    policy_rejected_logps: Tensor,  # [P]
    reference_chosen_logps: Tensor,  # [P]
    reference_rejected_logps: Tensor,  # [P]
    *,
    beta: float = 0.1,
    divergence: Divergence = "forward_kl",
    alpha: float = 0.5,
) -> LossOutput:
    """L = -log sigma(beta*(f'(pi/ref(y_w)) - f'(pi/ref(y_l)))).

    Wang et al. 2023, eq. 13 [wang2023fdpo]: the policy is held to the reference by the divergence whose generator is f.
    Exponents of log-ratios are cut at 20 and the gradient is zero beyond.

    Args:
        beta: strength against the reference; raising it keeps the policy nearer to it.
        divergence: "reverse_kl" is DPO; "forward_kl": a chosen completion earns at most 1, so its margin saturates; "js":
            it earns at most log 2; "alpha" lies between reverse (alpha to 1) and forward KL (alpha 0).
        alpha: of the alpha divergence; unused by the others. The paper's alpha is 1 minus this one, which is TRL's.

    Raises:
        ValueError: an unknown divergence.
    """
    chosen_rewards = beta * f_derivative(policy_chosen_logps - reference_chosen_logps, divergence, alpha)
    rejected_rewards = beta * f_derivative(policy_rejected_logps - reference_rejected_logps, divergence, alpha)
    loss = logistic_loss(chosen_rewards - rejected_rewards, owner="f_dpo_loss")
    return LossOutput(loss, torch.ones_like(loss), reward_metrics(chosen_rewards, rejected_rewards))


def f_derivative(log_ratio: Tensor, divergence: Divergence, alpha: float) -> Tensor:
    """f'(exp(log_ratio)) of any shape, shifted so that it is 0 at log_ratio = 0: only differences matter.

    Raises:
        ValueError: an unknown divergence.
    """
    if divergence == "reverse_kl" or (divergence == "alpha" and alpha == 1):
        return log_ratio
    if divergence == "forward_kl":
        return 1 - ratio_of(-log_ratio)
    if divergence == "js":
        return math.log(2) + F.logsigmoid(log_ratio)
    if divergence == "alpha":
        return (ratio_of((alpha - 1) * log_ratio) - 1) / (alpha - 1)
    raise ValueError(f"f_dpo_loss: unknown divergence {divergence!r}; expected one of {', '.join(get_args(Divergence))}.")
