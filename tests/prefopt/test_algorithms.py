"""What follows from a loss's signature: its stream, its family, its flags and their defaults, and what cannot be trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import losses
from losses.advantages import gae
from losses.declaration import RegistrationError
from losses.types import LossOutput
from prefopt import algorithms
from prefopt.errors import ConfigError


def _loss(first: Tensor) -> LossOutput:
    return LossOutput(first, torch.ones_like(first))


def dpo_like(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, reference_chosen_logps: Tensor) -> LossOutput:
    return _loss(policy_chosen_logps)


def kl_like(policy_rejected_logps: Tensor, rejected_token_kls: Tensor) -> LossOutput:
    return _loss(policy_rejected_logps)


def simpo_like(policy_rejected_logps: Tensor, rejected_lengths: Tensor) -> LossOutput:
    return _loss(policy_rejected_logps)


def sft_like(policy_chosen_token_logps: Tensor, chosen_mask: Tensor) -> LossOutput:
    return _loss(policy_chosen_token_logps)


def kto_like(policy_logps: Tensor, policy_mismatched_logps: Tensor, desirable: Tensor) -> LossOutput:
    return _loss(policy_logps)


def shifted_like(policy_logps: Tensor, desirable: Tensor, reward_shift: Tensor) -> LossOutput:
    return _loss(policy_logps)


def list_like(policy_group_logps: Tensor, ranks: Tensor, group_mask: Tensor) -> LossOutput:
    return _loss(policy_group_logps)


def head_like(group_rewards: Tensor, ranks: Tensor) -> LossOutput:
    return _loss(group_rewards)


def pair_head_like(chosen_rewards: Tensor, rejected_rewards: Tensor) -> LossOutput:
    return _loss(chosen_rewards)


def gradient_like(policy_token_logps: Tensor, old_token_logps: Tensor, mask: Tensor) -> LossOutput:
    return _loss(policy_token_logps)


def entropy_like(entropies: Tensor, mask: Tensor) -> LossOutput:
    return _loss(entropies)


@pytest.mark.usefixtures("new_losses")
@pytest.mark.parametrize(
    ("function", "stream", "family"),
    [
        (dpo_like, "pairs", "pairs with a reference"),
        (kl_like, "pairs", "pairs with a reference"),
        (simpo_like, "pairs", "pairs without a reference"),
        (sft_like, "completions", "completions"),
        (kto_like, "labelled", "unpaired"),
        (shifted_like, "labelled", "unpaired"),
        (list_like, "groups", "lists"),
        (head_like, "groups", "rewards"),
        (pair_head_like, "pairs", "rewards"),
        (gradient_like, "rollouts", "policy gradient"),
        (entropy_like, "rollouts", "policy gradient"),
    ],
)
def test_stream_and_family_follow_from_the_tensors(function: Any, stream: str, family: str) -> None:
    losses.register("algorithms_test")(function)
    loss = losses.get("algorithms_test")
    assert (algorithms.stream_of(loss), algorithms.family(loss)) == (stream, family)
    assert algorithms.get("algorithms_test").on_policy == (stream == "rollouts")
    assert "algorithms_test" in algorithms.trainable_names()


def pairs_and_labels(policy_chosen_logps: Tensor, policy_logps: Tensor, desirable: Tensor) -> LossOutput:
    return _loss(policy_chosen_logps)


def rollouts_and_labels(policy_token_logps: Tensor, old_token_logps: Tensor, desirable: Tensor) -> LossOutput:
    return _loss(policy_token_logps)


def lists_and_pairs(policy_group_logps: Tensor, policy_chosen_logps: Tensor) -> LossOutput:
    return _loss(policy_group_logps)


def advantage_like(policy_token_logps: Tensor, advantages: Tensor, mask: Tensor) -> LossOutput:
    return _loss(policy_token_logps)


@pytest.mark.usefixtures("new_losses")
@pytest.mark.parametrize(
    ("function", "advantage", "message"),
    [
        (pairs_and_labels, None, "no stream provides desirable, .* together; its labelled have no policy_chosen_logps"),
        (rollouts_and_labels, None, ".* its rollouts have no desirable"),
        (lists_and_pairs, None, ".* its groups have no policy_chosen_logps"),
        (advantage_like, None, "it needs advantages, but names no advantage function"),
        (advantage_like, gae, "gae needs old_values, but no term of the loss trains a value head"),
    ],
)
def test_what_no_stream_provides_cannot_be_trained_alone(function: Any, advantage: Any, message: str) -> None:
    losses.register("algorithms_test", advantage=advantage)(function)
    assert "algorithms_test" not in algorithms.trainable_names()
    with pytest.raises(ConfigError, match=f"'algorithms_test' cannot be trained alone: {message}"):
        algorithms.get("algorithms_test")


def test_every_registered_loss_can_be_trained() -> None:
    """Each has a stream that holds its tensors, and an advantage function that the stream can feed."""
    for name in losses.names():
        if not name.startswith("trainer_test"):
            assert algorithms.get(name).stream, name


def plain_advantage(rewards: Tensor, mask: Tensor, *, slope: float = 1.0) -> dict[str, Tensor]:
    return {"advantages": slope * rewards}


@pytest.mark.usefixtures("new_losses")
def test_a_loss_changes_defaults_of_its_stream_and_its_advantage_function() -> None:
    """In flags, in a setting, and in what stream and advantage function are called with; users' values win."""
    register = losses.register(
        "algorithms_test", advantage=plain_advantage, defaults={"slope": 3.0, "kl_coef": 0.0, "rollout_size": 16}
    )
    register(advantage_like)
    algorithm = algorithms.get("algorithms_test")
    assert (algorithm.flags["slope"].default, algorithm.flags["kl_coef"].default) == (3.0, 0.0)
    setting = algorithm.setting(rollout_size=8)
    assert setting.advantage_options == {"slope": 3.0}
    assert (setting.stream_options["kl_coef"], setting.stream_options["rollout_size"]) == (0.0, 8)
    assert setting.hyper["slope"] == 3.0
    assert algorithms.get("ppo").flags["kl_coef"].default != 0.0


@pytest.mark.usefixtures("new_losses")
@pytest.mark.parametrize("function", [advantage_like, sft_like])
def test_a_default_of_no_option_is_an_error(function: Any) -> None:
    losses.register("algorithms_test", advantage=plain_advantage, defaults={"slopes": 3.0})(function)
    with pytest.raises(RegistrationError, match="algorithms_test: defaults name 'slopes', but"):
        algorithms.get("algorithms_test")
