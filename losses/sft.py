"""Supervised fine-tuning: the negative log-likelihood of chosen completions. P pairs (or single completions), T tokens."""

from __future__ import annotations

from torch import Tensor

from losses.registry import register
from losses.types import LossOutput


@register("sft")
def sft_loss(
    policy_chosen_token_logps: Tensor,  # [P, T]
    chosen_mask: Tensor,  # [P, T]
) -> LossOutput:
    """L = -sum_t log pi(y_t | x, y_<t) / number of chosen tokens: cross-entropy, a mean over all tokens of the step.

    Ouyang et al. 2022, section 3.5 [ouyang2022instructgpt]. Long completions weigh more than in a mean of per-completion
    means, and micro-batches of different lengths give the gradient of the whole batch.
    """
    loss = -policy_chosen_token_logps
    weight = chosen_mask.to(loss.dtype)
    return LossOutput(loss, weight, {"nll": (loss.detach(), weight)})
