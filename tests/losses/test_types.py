"""The vocabulary, its shapes, and what a loss returns."""

from __future__ import annotations

import pytest
import torch

from losses import LossOutput
from losses.types import VOCABULARY, TensorSpec, check_shapes


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        (
            "policy_chosen_logps",
            TensorSpec(("P",), "policy", "logps", "log-prob of the chosen completion, policy, summed over tokens"),
        ),
        (
            "old_group_logps",
            TensorSpec(("G", "K"), "old", "logps", "log-prob of each of K completions, sampling policy, summed over tokens"),
        ),
        (
            "reference_token_logps",
            TensorSpec(
                ("N", "T"),
                "reference",
                "token_logps",
                "per-token log-prob of a completion under the reference, 0 where the mask is 0",
            ),
        ),
        (
            "reference_mismatched_logps",
            TensorSpec(("M",), "reference", "logps", "log-prob of another prompt's completion, reference"),
        ),
        ("rejected_mask", TensorSpec(("P", "T"), "batch", "mask", "1 on scored tokens, EOS included, rejected")),
        ("rejected_lengths", TensorSpec(("P",), "batch", "lengths", "rejected_mask.sum(-1)")),
        ("chosen_token_kls", TensorSpec(("P", "T"), "policy", "nonnegative", "KL(reference || policy) per chosen token")),
        (
            "chosen_token_log_sum_sq",
            TensorSpec(("P", "T"), "policy", "token_logps", "log of sum of squared probs, chosen"),
        ),
        ("rejected_rewards", TensorSpec(("P",), "policy", "real", "trained reward head on the rejected completion")),
        ("rejected_scores", TensorSpec(("P",), "batch", "real", "a frozen scorer's value of the rejected completion")),
        ("ranks", TensorSpec(("G", "K"), "batch", "index", "rank of each completion, 0 = best")),
        ("reward_shift", TensorSpec((), "state", "real", "running mean of implicit rewards")),
    ],
)
def test_a_name_means_one_thing(name: str, spec: TensorSpec) -> None:
    assert VOCABULARY[name] == spec


def test_every_model_has_every_layout_but_mismatched_completions_are_not_sampled() -> None:
    for model in ("policy", "reference", "old"):
        layouts = {name.removeprefix(f"{model}_") for name in VOCABULARY if name.startswith(model) and name.endswith("logps")}
        sides = ("chosen_", "rejected_", "", "group_")
        assert layouts == {
            *(f"{side}{form}" for side in sides for form in ("logps", "token_logps")),
            *(["mismatched_logps"] if model != "old" else []),
        }


def test_log_probs_follow_the_mask_of_their_side() -> None:
    """Sums have the rows of their tokens, and both those of the mask."""
    for side, mask in (
        ("chosen_", "chosen_mask"),
        ("rejected_", "rejected_mask"),
        ("", "mask"),
        ("group_", "group_token_mask"),
    ):
        for model in ("policy", "reference", "old"):
            assert VOCABULARY[f"{model}_{side}token_logps"].shape == VOCABULARY[mask].shape
            assert VOCABULARY[f"{model}_{side}logps"].shape == VOCABULARY[mask].shape[:-1]
            assert VOCABULARY[f"{model}_{side}logps"].source == model


def test_shapes_that_agree_pass() -> None:
    check_shapes("mine", {})
    check_shapes("mine", {"policy_logps": torch.zeros(3), "mask": torch.zeros(3, 2), "reward_shift": torch.zeros(())})


def test_a_wrong_number_of_dimensions_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^mine: mask is \[3\]; it must be \[N, T\]\.$"):
        check_shapes("mine", {"mask": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"^mine: reward_shift is \[1\]; it must be \[\]\.$"):
        check_shapes("mine", {"reward_shift": torch.zeros(1)})


def test_two_sizes_of_one_letter_are_an_error() -> None:
    message = r"^mine: mask is \[3, 2\], values is \[3, 5\]; T of \[N, T\] must be the same in both\.$"
    with pytest.raises(ValueError, match=message):
        check_shapes("mine", {"mask": torch.zeros(3, 2), "values": torch.zeros(3, 5)})


def test_the_mean_is_weighted() -> None:
    """(2*1 + 3*4 + 5*0)/(1 + 4 + 0) = 14/5."""
    out = LossOutput(torch.tensor([2.0, 3.0, 5.0]), torch.tensor([1.0, 4.0, 0.0]))
    torch.testing.assert_close(out.mean(), torch.tensor(2.8))
    assert out.metrics == {}
    assert out.updates == {}


def test_loss_and_weight_must_have_one_shape() -> None:
    message = r"^LossOutput: loss is \[2\], weight is \[2, 1\]; both must have one shape\.$"
    with pytest.raises(ValueError, match=message):
        LossOutput(torch.zeros(2), torch.zeros(2, 1))
