"""WPO on numbers, weights without gradient, both alignments, and when it is DPO."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from losses import dpo_loss, get, wpo_loss
from losses.ops import MAX_LOG_RATIO


@pytest.fixture
def pairs() -> dict[str, Tensor]:
    """Three pairs of completions of up to four tokens."""
    chosen_mask = (torch.arange(4) < torch.tensor([[4], [1], [3]])).double()
    rejected_mask = (torch.arange(4) < torch.tensor([[2], [4], [1]])).double()
    chosen, rejected, chosen_sq, rejected_sq = -2 * torch.rand(4, 3, 4, dtype=torch.float64)
    return {
        "policy_chosen_token_logps": chosen * chosen_mask,
        "policy_rejected_token_logps": rejected * rejected_mask,
        "reference_chosen_logps": -4 * torch.rand(3, dtype=torch.float64),
        "reference_rejected_logps": -4 * torch.rand(3, dtype=torch.float64),
        "chosen_token_log_sum_sq": chosen_sq * chosen_mask,
        "rejected_token_log_sum_sq": rejected_sq * rejected_mask,
        "chosen_mask": chosen_mask,
        "rejected_mask": rejected_mask,
    }


def one_pair() -> list[Tensor]:
    """Chosen tokens (-1, -2), rejected (-0.5, -1.5, -1); their sums of squares; 7 and 5 where masked.

    Sums -3 and -3, references -4 and -2.5: log-ratios 1 and -0.5. Means: -1.5 and -1; relative to the sums of squares
    (-0.6, -1.0), mean -0.8, and (0.1, -1.3, -0.9), mean -0.7.
    """
    tensors = [
        [[-1.0, -2.0, 7.0]], [[-0.5, -1.5, -1.0]], [-4.0], [-2.5],
        [[-0.4, -1.0, 5.0]], [[-0.6, -0.2, -0.1]], [[1, 1, 0]], [[1, 1, 1]],
    ]  # fmt: skip
    return [torch.tensor(tensor, dtype=torch.float64) for tensor in tensors]


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


def test_wpo_closed_form() -> None:
    """beta 0.3: margin 0.3*1.5 = 0.45, weight exp(-0.8 - 0.7), loss weight*log(1 + e^-0.45)."""
    out = wpo_loss(*one_pair(), beta=0.3)
    assert out.loss.item() == pytest.approx(math.exp(-1.5) * softplus(-0.45), abs=1e-12)
    assert {key: values.item() for key, (values, _) in out.metrics.items()} == pytest.approx({
        "rewards/chosen": 0.3, "rewards/rejected": -0.15, "rewards/margins": 0.45, "rewards/accuracies": 1.0,
        "wpo/weight": math.exp(-1.5),
    })  # fmt: skip


def test_wpo_not_aligned_weighs_by_the_log_probs_alone() -> None:
    """Weight exp(-1.5 - 1)."""
    assert wpo_loss(*one_pair(), beta=0.3, aligned=False).loss.item() == pytest.approx(math.exp(-2.5) * softplus(-0.45))


def test_wpo_smoothing_is_inside_of_the_weight() -> None:
    """(1 - e) log(1 + e^-m) + e log(1 + e^m), times the weight."""
    smoothed = wpo_loss(*one_pair(), beta=0.3, label_smoothing=0.2).loss.item()
    assert smoothed == pytest.approx(math.exp(-1.5) * (0.8 * softplus(-0.45) + 0.2 * softplus(0.45)))


def test_wpo_defaults() -> None:
    assert get("wpo").bind().hyper == {"beta": 0.1, "label_smoothing": 0.0, "aligned": True}


@pytest.mark.parametrize("aligned", [True, False])
def test_wpo_gradient_flows_through_the_pair_alone(pairs: dict[str, Tensor], aligned: bool) -> None:
    """-w beta sigma(-margin) on every chosen token, the opposite on every rejected one; none into the sums of squares."""
    policy = [name for name in pairs if name.endswith("token_logps") or name.endswith("log_sum_sq")]
    leaves = {name: tensor.requires_grad_(name in policy) for name, tensor in pairs.items()}
    out = wpo_loss(**leaves, beta=0.3, aligned=aligned)
    out.loss.sum().backward()
    push = (out.metrics["wpo/weight"][0] * 0.3 * torch.sigmoid(-out.metrics["rewards/margins"][0]))[:, None]
    torch.testing.assert_close(leaves["policy_chosen_token_logps"].grad, -push * pairs["chosen_mask"])
    torch.testing.assert_close(leaves["policy_rejected_token_logps"].grad, push * pairs["rejected_mask"])
    assert leaves["chosen_token_log_sum_sq"].grad is None
    assert leaves["rejected_token_log_sum_sq"].grad is None


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_wpo_gradcheck_at_fixed_weights(pairs: dict[str, Tensor], smoothing: float) -> None:
    """Sums of squares that follow the log-probs hold the weights still, which finite differences would move."""

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        pairs.update(policy_chosen_token_logps=chosen, policy_rejected_token_logps=rejected)
        pairs.update(chosen_token_log_sum_sq=chosen.detach() + 0.3, rejected_token_log_sum_sq=rejected.detach() - 0.5)
        return wpo_loss(**pairs, beta=0.7, label_smoothing=smoothing).loss

    chosen, rejected = pairs["policy_chosen_token_logps"], pairs["policy_rejected_token_logps"]
    assert gradcheck(loss, (chosen.requires_grad_(), rejected.requires_grad_()))


def test_wpo_weights_are_no_denominator(pairs: dict[str, Tensor]) -> None:
    out = wpo_loss(**pairs)
    assert out.weight.tolist() == [1.0, 1.0, 1.0]
    assert out.mean().item() == pytest.approx(out.loss.sum().item() / 3)


def test_wpo_with_weight_1_is_dpo(pairs: dict[str, Tensor]) -> None:
    """Tokens as likely as a token that the policy draws."""
    for side in ("chosen", "rejected"):
        pairs[f"{side}_token_log_sum_sq"] = pairs[f"policy_{side}_token_logps"]
    sums = [pairs[f"policy_{side}_token_logps"].sum(-1) for side in ("chosen", "rejected")]
    dpo = dpo_loss(*sums, pairs["reference_chosen_logps"], pairs["reference_rejected_logps"], beta=0.4, label_smoothing=0.1)
    torch.testing.assert_close(wpo_loss(**pairs, beta=0.4, label_smoothing=0.1).loss, dpo.loss)


def test_wpo_weight_of_a_uniform_policy(pairs: dict[str, Tensor]) -> None:
    """Every token has probability 1/V and so has the sum of squares: weight 1 aligned, V^-2 not, at any length; and log 2
    times the weight when the reference is uniform too."""
    for side in ("chosen", "rejected"):
        mask = pairs[f"{side}_mask"]
        pairs[f"policy_{side}_token_logps"] = pairs[f"{side}_token_log_sum_sq"] = -math.log(8) * mask
        pairs[f"reference_{side}_logps"] = -math.log(8) * mask.sum(-1)
    assert wpo_loss(**pairs).loss.tolist() == pytest.approx([math.log(2)] * 3)
    assert wpo_loss(**pairs, aligned=False).loss.tolist() == pytest.approx([math.log(2) / 64] * 3)


@settings(max_examples=15)
@given(st.floats(-3, 3), st.floats(-3, 3))
def test_wpo_is_exponential_in_the_sums_of_squares(chosen_shift: float, rejected_shift: float) -> None:
    """Lower sums of squares raise the weight, also above 1; both sides' weights multiply."""
    tensors = one_pair()
    before = wpo_loss(*tensors).loss
    tensors[4] = tensors[4] - chosen_shift
    tensors[5] = tensors[5] - rejected_shift
    torch.testing.assert_close(wpo_loss(*tensors).loss, math.exp(chosen_shift + rejected_shift) * before)


def test_wpo_weight_is_cut_at_its_largest_exponent() -> None:
    tensors = one_pair()
    tensors[4] = tensors[4] - 300.0
    assert wpo_loss(*tensors).metrics["wpo/weight"][0].item() == pytest.approx(math.exp(MAX_LOG_RATIO))


def test_wpo_label_smoothing_out_of_range_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"wpo_loss: label_smoothing is 0.5, expected .* in \[0, 0.5\)"):
        wpo_loss(*one_pair(), label_smoothing=0.5)
