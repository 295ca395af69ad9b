"""Offline PPO-clip: closed form, first step, saturation, scores, and its relation to ppo_policy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from losses import ppo_offline_loss, ppo_policy_loss


@pytest.fixture
def pairs() -> dict[str, Tensor]:
    """Three pairs of up to four tokens near the reference."""
    chosen_mask = (torch.arange(4) < torch.tensor([[4], [1], [2]])).double()
    made = {"chosen_mask": chosen_mask, "rejected_mask": chosen_mask.roll(1, 0)}
    for side in ("chosen", "rejected"):
        reference = -2 * torch.rand(3, 4, dtype=torch.float64) * made[f"{side}_mask"]
        made[f"reference_{side}_token_logps"] = reference
        noise = 0.4 * torch.randn(3, 4, dtype=torch.float64)
        made[f"policy_{side}_token_logps"] = (reference + noise) * made[f"{side}_mask"]
    return made


def both(pairs: dict[str, Tensor], name: str) -> Tensor:
    return torch.cat([pairs[name.format("chosen")], pairs[name.format("rejected")]])


def test_ppo_offline_closed_form() -> None:
    """One token a side. Chosen ratio 1.1: -1.1. Rejected ratio 0.5, below the clip: +0.8. Mean -0.15."""
    chosen, rejected = torch.tensor([[math.log(1.1)]]), torch.tensor([[math.log(0.5)]])
    zero, ones = torch.zeros(1, 1), torch.ones(1, 1)
    out = ppo_offline_loss(chosen, rejected, zero, zero, ones, ones)
    assert out.mean().item() == pytest.approx(-0.15)
    assert out.metrics["clip_frac"][0].tolist() == [[0.0], [1.0]]
    assert out.metrics["rewards/margins"][0].item() == pytest.approx(math.log(1.1 / 0.5))


@pytest.mark.parametrize("length_norm", ["token", "seq_mean", "seq_sum"])
def test_ppo_offline_is_ppo_policy_on_both_sides(pairs: dict[str, Tensor], length_norm: str) -> None:
    mask = both(pairs, "{}_mask")
    advantages = torch.cat([torch.ones(3, 4), -torch.ones(3, 4)]).double()
    policy, reference = both(pairs, "policy_{}_token_logps"), both(pairs, "reference_{}_token_logps")
    on_policy = ppo_policy_loss(policy, reference, advantages, mask, dual_clip=3.0, length_norm=length_norm)
    offline = ppo_offline_loss(**pairs, dual_clip=3.0, length_norm=length_norm)
    torch.testing.assert_close(offline.loss, on_policy.loss)
    torch.testing.assert_close(offline.weight, on_policy.weight)


def test_ppo_offline_starts_as_weighted_likelihood_and_balanced(pairs: dict[str, Tensor]) -> None:
    """At the reference the gradient is that of A-weighted log-likelihood: chosen up, rejected down, in equal shares.

    With seq_mean the shares of the two sides cancel whatever the lengths.
    """
    leaves = {name: pairs[f"reference_{name}_token_logps"].clone().requires_grad_() for name in ("chosen", "rejected")}
    start = {**pairs, **{f"policy_{name}_token_logps": leaf for name, leaf in leaves.items()}}
    ppo_offline_loss(**start).mean().backward()
    for name, sign in (("chosen", -1), ("rejected", 1)):
        mask = pairs[f"{name}_mask"]
        torch.testing.assert_close(leaves[name].grad, sign * mask / mask.sum(-1, keepdim=True) / 6)
    assert leaves["chosen"].grad is not None
    assert leaves["rejected"].grad is not None
    assert (leaves["chosen"].grad.sum(-1) + leaves["rejected"].grad.sum(-1)).abs().max() < 1e-15


def test_ppo_offline_stops_at_the_clip() -> None:
    """A chosen token is pushed until log(1 + clip_high), a rejected one until log(1 - clip_low)."""
    chosen = torch.tensor([[math.log(1.2) - 1e-6, math.log(1.2) + 1e-6]], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([[math.log(0.8) + 1e-6, math.log(0.8) - 1e-6]], dtype=torch.float64, requires_grad=True)
    zero, ones = torch.zeros(1, 2).double(), torch.ones(1, 2).double()
    ppo_offline_loss(chosen, rejected, zero, zero, ones, ones).mean().backward()
    for leaf in (chosen, rejected):
        assert leaf.grad is not None
        assert leaf.grad[0, 0] != 0
        assert leaf.grad[0, 1] == 0


def test_ppo_offline_scores_are_centred_on_the_pair(pairs: dict[str, Tensor]) -> None:
    """Scores 5 and 3 are the advantages +1 and -1 of the labels; equal scores give no loss."""
    five, three = torch.full((3,), 5.0).double(), torch.full((3,), 3.0).double()
    scored = ppo_offline_loss(**pairs, chosen_scores=five, rejected_scores=three, advantage="score")
    torch.testing.assert_close(scored.loss, ppo_offline_loss(**pairs).loss)
    equal = ppo_offline_loss(**pairs, chosen_scores=five, rejected_scores=five, advantage="score")
    assert not equal.loss.any()


def test_ppo_offline_gradcheck(pairs: dict[str, Tensor]) -> None:
    names = ("policy_chosen_token_logps", "policy_rejected_token_logps")
    leaves = [pairs.pop(name).requires_grad_() for name in names]
    assert gradcheck(lambda c, r: ppo_offline_loss(c, r, **pairs).mean(), leaves)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"advantage": "score"}, "needs chosen_scores and rejected_scores"),
        ({"advantage": "gae"}, "unknown advantage 'gae'; expected 'label' or 'score'"),
        ({"length_norm": "constant"}, "ppo_offline_loss: length_norm='constant' divides by max_completion_length"),
    ],
)
def test_ppo_offline_errors(pairs: dict[str, Tensor], options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ppo_offline_loss(**pairs, **options)
