"""Offline PPO-clip: closed form, first step, saturation, scores, and its relation to ppo_policy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from losses import get, ppo_offline_loss, ppo_policy_loss


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


def test_ppo_offline_declaration_and_a_limit_of_lengths(pairs: dict[str, Tensor]) -> None:
    """Both sides weigh the same by default; "constant" divides by the limit, over the 2P completions."""
    assert get("ppo_offline").bind().hyper == {
        "advantage": "label", "clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "length_norm": "seq_mean",
    }  # fmt: skip
    constant = ppo_offline_loss(**pairs, max_completion_length=torch.tensor(8.0), length_norm="constant")
    torch.testing.assert_close(constant.loss, ppo_offline_loss(**pairs, length_norm="seq_sum").loss / 8)


def test_ppo_offline_clips_low_and_high_apart() -> None:
    """Ratios 1.5 and 0.5 with clips [0.7, 1.1]: -1.1 and 0.7; a rejected ratio of 3 counts at most a dual clip of 2."""
    chosen, rejected = torch.tensor([[1.5], [1.0]]).double().log(), torch.tensor([[0.5], [3.0]]).double().log()
    zero, ones = torch.zeros(2, 1), torch.ones(2, 1)
    out = ppo_offline_loss(chosen, rejected, zero, zero, ones, ones, clip_low=0.3, clip_high=0.1, dual_clip=2.0)
    assert out.loss.tolist() == pytest.approx([-1.1, -1.0, 0.7, 2.0])


def test_ppo_offline_rewards_are_sums_of_log_ratios_and_the_reference_receives_no_gradient(pairs: dict[str, Tensor]) -> None:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in pairs.items() if name.startswith("reference")}
    out = ppo_offline_loss(
        **{**pairs, **leaves, "policy_chosen_token_logps": pairs["policy_chosen_token_logps"].requires_grad_()}
    )
    assert torch.autograd.grad(out.mean(), list(leaves.values()), allow_unused=True) == (None, None)
    for side in ("chosen", "rejected"):
        ratio = (pairs[f"policy_{side}_token_logps"] - pairs[f"reference_{side}_token_logps"]) * pairs[f"{side}_mask"]
        torch.testing.assert_close(out.metrics[f"rewards/{side}"][0], ratio.sum(-1).detach())  # type: ignore[index]


def test_ppo_offline_padding_may_hold_anything(pairs: dict[str, Tensor]) -> None:
    """Not even NaN of the reference there reaches the objective or its metrics, which are means over unmasked tokens."""
    dirty = dict(pairs)
    for side in ("chosen", "rejected"):
        name = f"reference_{side}_token_logps"
        dirty[name] = torch.where(pairs[f"{side}_mask"].bool(), pairs[name], math.nan)
    out, clean = ppo_offline_loss(**dirty), ppo_offline_loss(**pairs)
    torch.testing.assert_close(out.mean(), clean.mean())
    log_ratio = both(pairs, "policy_{}_token_logps") - both(pairs, "reference_{}_token_logps")
    k3 = (log_ratio.exp() - 1 - log_ratio)[both(pairs, "{}_mask").bool()]
    for values, weight in (out.metrics["approx_kl"], clean.metrics["approx_kl"]):  # type: ignore[misc]
        assert ((values * weight).sum() / weight.sum()).item() == pytest.approx(k3.mean().item())


@pytest.mark.parametrize("given", ["chosen_scores", "rejected_scores"])
def test_ppo_offline_needs_the_scores_of_both_sides(pairs: dict[str, Tensor], given: str) -> None:
    with pytest.raises(ValueError, match="advantage='score' needs chosen_scores and rejected_scores; or use 'label'"):
        ppo_offline_loss(**pairs, **{given: torch.ones(3)}, advantage="score")


def test_ppo_offline_errors_of_the_clip_name_it(pairs: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"^ppo_offline_loss: clip_low and clip_high must be at least 0, got -1.0 and 0.2"):
        ppo_offline_loss(**pairs, clip_low=-1.0)
