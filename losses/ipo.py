"""Identity preference optimization. P pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from losses.ops import expected_over_labels, per_token, reward_metrics
from losses.registry import register
from losses.types import LossOutput


@register("ipo")
def ipo_loss(
    policy_chosen_logps: Tensor,  # [P]
    policy_rejected_logps: Tensor,  # [P]
    reference_chosen_logps: Tensor,  # [P]
    reference_rejected_logps: Tensor,  # [P]
    chosen_lengths: Tensor,  # [P]
    rejected_lengths: Tensor,  # [P]
    soft_labels: Tensor | None = None,  # [P]
    *,
    tau: float = 0.1,
    average_log_prob: bool = True,
) -> LossOutput:
    """L = (h - 1/(2 tau))^2, h = log pi/ref(y_w) - log pi/ref(y_l).

    Azar et al. 2023, eq. 17 [azar2023ipo]. The paper's h has log-probs of whole completions; its authors later asked
    implementers to average over tokens, since otherwise tau means something else at each length. The average is the default
    here; `average_log_prob=False` is the paper's text. With completions of one length n they differ by the scale of h:
    averaging with tau is 1/n^2 times summing with tau/n.

    With soft labels p the loss is p (h - 1/(2 tau))^2 + (1-p) (-h - 1/(2 tau))^2: what labels drawn with probability p give
    in expectation. Its minimum is h = (p - 1/2)/tau, that of the paper's population loss.

    Args:
        tau: strength against the reference; raising it moves the target 1/(2 tau) nearer to the reference.
        average_log_prob: divide each log-ratio by its completion's length.
    """
    chosen_log_ratio = policy_chosen_logps - reference_chosen_logps
    rejected_log_ratio = policy_rejected_logps - reference_rejected_logps
    if average_log_prob:
        chosen_log_ratio = per_token(chosen_log_ratio, chosen_lengths)
        rejected_log_ratio = per_token(rejected_log_ratio, rejected_lengths)
    margin = chosen_log_ratio - rejected_log_ratio
    target = 1 / (2 * tau)
    loss = expected_over_labels((margin - target).square(), (margin + target).square(), soft_labels)
    return LossOutput(loss, torch.ones_like(loss), reward_metrics(tau * chosen_log_ratio, tau * rejected_log_ratio))
