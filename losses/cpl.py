"""Contrastive preference learning, alone and with behaviour cloning. P pairs of segments, T tokens (or MDP steps)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import losses.sft  # noqa: F401  registers the behaviour-cloning term
from losses.ops import expected_over_labels, masked_sum, reward_metrics, step_index
from losses.registry import Coefficient, compose, register
from losses.types import LossOutput


@register("cpl")
def cpl_loss(
    policy_chosen_token_logps: Tensor,  # [P, T]
    policy_rejected_token_logps: Tensor,  # [P, T]
    chosen_mask: Tensor,  # [P, T]
    rejected_mask: Tensor,  # [P, T]
    soft_labels: Tensor | None = None,  # [P]
    *,
    alpha: float = 0.1,
    bias: float = 0.5,
    gamma: float = 1.0,
) -> LossOutput:
    """L = -log sigma(S_w - bias*S_l), S = sum_t gamma^t alpha log pi(a_t | s_t).

    Hejna et al. 2023, eq. 5 with the bias of section 3.2 [hejna2023cpl]: preferences by regret, where alpha log pi is the
    optimal advantage, so no reference is needed. t counts the unmasked steps of the segment from 0. With bias 1 and gamma 1
    this is DPO with a reference that is constant over completions, and with log-ratios in place of log-probs it is DPO.
    With soft labels p the loss is p L + (1-p) L with the segments swapped, as the authors' code treats ties (p = 1/2).

    Args:
        alpha: temperature of the regret model; raising it saturates pairs at smaller differences of log-probs.
        bias: in (0, 1]; below 1 the loss falls when both segments become likelier, which keeps the policy on the data.
        gamma: discount of the regret model over steps.

    Differences from the authors' code: defaults are those of their experiments (alpha 0.1, bias 0.5), not of their class
    (1, 1); the discount of the paper, which their code leaves out, is an option.
    """
    chosen_score = alpha * _discounted_sum(policy_chosen_token_logps, chosen_mask, gamma)
    rejected_score = alpha * _discounted_sum(policy_rejected_token_logps, rejected_mask, gamma)
    loss = expected_over_labels(
        -F.logsigmoid(chosen_score - bias * rejected_score),
        -F.logsigmoid(rejected_score - bias * chosen_score),
        soft_labels,
    )
    return LossOutput(loss, torch.ones_like(loss), reward_metrics(chosen_score, rejected_score))


def _discounted_sum(token_logps: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """sum_t gamma^t logp_t [P] over the unmasked steps of [P, T]."""
    if gamma == 1:
        return masked_sum(token_logps, mask, dim=-1)
    return masked_sum(gamma ** step_index(mask).to(token_logps.dtype) * token_logps, mask, dim=-1)


compose(
    "cpl_bc",
    cpl=1.0,
    sft=Coefficient("bc_coef", 1.5),
    doc="""CPL plus bc_coef times the negative log-likelihood of the chosen segments.

    Hejna et al. 2023, appendix [hejna2023cpl]; bc_coef 1.5 is the authors' setting. Differences: (1) they pair it with
    bias 1.0, while the option keeps CPL's default here; (2) their default clones both segments, this one the chosen
    only (their `bc_data: pos`).
    """,
)
