"""The Hydra base (Santacroce 2023): one model that speaks (LM head) and judges (reward head), the shared start of a run.

`--hydra joined` and `split` train adapters over it; with adapters off it is their reference and their reward model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

import losses
from losses.registry import BoundLoss
from prefopt.data.records import Example
from prefopt.errors import ConfigError
from prefopt.models.causal_lm import CausalLMPolicy
from prefopt.models.hydra import BASED
from prefopt.optimization import Optimization
from prefopt.options import Options, RewardOptions
from prefopt.rewards import RewardModelScorer
from prefopt.rewards.build import Reward
from prefopt.stages import Stage, reward_model
from prefopt.streams import Budget

HYDRA_BASE = "Hydra base"
"""What a report calls it."""


@dataclass(frozen=True)
class HydraBase:
    """What joint SFT left behind besides the model's weights.

    Args:
        reward_head: its state.
        stage: its cost and its record on held-out rows.
        limits: of scoring: `max_length`, `max_completion_length` and `micro_batch_tokens`.
    """

    reward_head: Mapping[str, Tensor]
    stage: Stage
    limits: Mapping[str, Any]

    def reward(self, policy: CausalLMPolicy) -> Reward:
        """The base of a policy of `build_roles` as the reward: adapters off, read by the frozen reward head."""
        scorer = RewardModelScorer(policy, offset=self.stage.facts["offset"], adapter=None, **self.limits)
        return Reward(scorer, "the reward head of the Hydra base", {HYDRA_BASE: self.stage})


def hydra_loss(options: Options) -> BoundLoss:
    """The joint loss of the base."""
    coefficients = {"reward_coef": options.supervised.hydra_reward_coef, "center_coef": options.reward.reward_center_coef}
    return losses.get("hydra_sft").bind(**coefficients)


def hydra_base(
    model: Any,
    tokenizer: Any,
    train: Sequence[Example],
    held_out: Sequence[Example],
    *,
    options: Options,
    micro_batch_tokens: int,
    max_length: int,
    max_completion_length: int | None,
    cache: Path,
    console: Console | None = None,
) -> HydraBase:
    """Trains all weights of `model` in place, or loads those of an earlier equal run: `stages.reward_model` with a loss that
    teaches the LM head as well.

    Args:
        train: pairs, chosen first.
        held_out: as there.
        options: the reward flags set batch, epochs and learning rate.
        micro_batch_tokens: packed tokens of a forward pass, in training and in scoring.
        max_length, max_completion_length: of scored completions.
    """
    supervised = options.supervised
    limits: dict[str, Any] = {"max_length": max_length, "max_completion_length": max_completion_length}
    scorer, stage = reward_model(
        model, tokenizer, train, held_out, loss=hydra_loss(options), lora=None,
        budget=Budget(supervised.reward_batch_size, 0, micro_batch_tokens, supervised.reward_epochs),
        optimization=Optimization(learning_rate=supervised.reward_learning_rate), cache=cache, console=console,
        title=HYDRA_BASE, **limits,
    )  # fmt: skip
    head = {name: value.detach().clone() for name, value in scorer.policy.heads["reward"].state_dict().items()}
    return HydraBase(head, stage, {**limits, "micro_batch_tokens": micro_batch_tokens})


def check_hydra(options: Options) -> None:
    """Raises ConfigError where `--hydra` does not go with the other options."""
    asked, reward = options.model, options.reward
    if asked.hydra not in BASED:
        if options.supervised.hydra_reward_coef != 1.0:
            raise ConfigError(
                "--hydra-reward-coef is of the base of --hydra joined and split; leave it out, or add one of them."
            )
        return
    name = f"--hydra {asked.hydra}"
    if not asked.lora:
        raise ConfigError(
            f"{name} trains adapters over a frozen base: add --lora 16 (their rank), or use --hydra off or trunk."
        )
    if find_spec("peft") is None:
        raise ConfigError(f"{name} needs the 'peft' extra: pip install -e '.[peft]'; or use --hydra off or trunk.")
    if asked.init != "as-is":
        raise ConfigError(f"{name} makes its own start, SFT and reward head in one: leave --init {asked.init} out.")
    # Centring is a part of the joint loss.
    changed = [key for key, value in vars(reward).items() if value != getattr(RewardOptions(), key) and "center" not in key]
    if changed:
        raise ConfigError(
            f"{name}: the reward is the base's own reward head, trained by bradley_terry beside SFT, but {changed[0]} is "
            f"{getattr(reward, changed[0])!r}. Leave it out, or use --hydra off or trunk."
        )
