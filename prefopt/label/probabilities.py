"""From what a labeller says of two orders to one label: pure functions on probabilities.

N pairs, R rationales, S scores. A pair is shown twice: A first, then B first. `orders` [N, 2] holds the probability that the
labeller gives to the first place in each of the two; NaN where its reply could not be read.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Average = Literal["probabilities", "logits"]

# A labeller that is sure (or speaks in words) has no finite logit; 1e-6 is 13.8 nats, more than any real reply says.
_LEAST = 1e-6


def average_orders(orders: Tensor, by: Average = "probabilities") -> Tensor:
    """[N] probability that A is better, from both orders [N, 2] (Lee et al. 2023 [lee2023rlaif], section 2.1.1).

    probabilities: p(A) = (p_1(A, B) + p_2(B, A)) / 2 = 1/2 + (p_1(A, B) - p_1(B, A)) / 2
    logits:        logit p(A) = (logit p_1(A, B) - logit p_1(B, A)) / 2

    The first removes a preference for a place that adds to probabilities, the second one that adds to logits, exactly; both are
    antisymmetric and give a labeller that looks at the place alone 1/2.
    """
    if by == "probabilities":
        return 0.5 + (orders[:, 0] - orders[:, 1]) / 2
    logits = orders.clamp(_LEAST, 1 - _LEAST).logit()
    return torch.sigmoid((logits[:, 0] - logits[:, 1]) / 2)


def average_rationales(orders: Tensor) -> Tensor:
    """[N, 2] mean of the distributions that R sampled rationales [R, N, 2] lead to (self-consistency: Wang et al. 2022
    [wang2022selfconsistency]); replies that could not be read are left out, and NaN remains where none could."""
    return orders.nanmean(0)


def expected_score(probabilities: Tensor) -> Tensor:
    """[N] score in [-1, 1] from probabilities [N, S] of the scores 1 to S: direct RLAIF (Lee et al. 2023 [lee2023rlaif]).

    s = sum_i i P(i) / sum_i P(i), rescaled: with S = 10, (s - 5.5) / 4.5.
    """
    count = probabilities.shape[-1]
    scores = torch.arange(1, count + 1, dtype=probabilities.dtype)
    expected = (probabilities * scores).sum(-1) / probabilities.sum(-1)
    return (expected - (count + 1) / 2) / ((count - 1) / 2)


def same_place_wins(orders: Tensor) -> Tensor:
    """[N] 1 where the first place wins both orders, -1 where the second does, 0 where the same completion wins both."""
    wins = (orders - 0.5).sign()
    return torch.where(wins[:, 0] == wins[:, 1], wins[:, 0], 0.0)


def is_right(probabilities: Tensor, a_is_better: Tensor) -> Tensor:
    """[N] 1 where the label names the better completion, 0 where it does not, 1/2 for a tie.

    Args:
        probabilities: [N] that A is better.
        a_is_better: [N] bool.
    """
    wins = (probabilities - 0.5).sign()
    return 0.5 + 0.5 * torch.where(a_is_better, wins, -wins)
