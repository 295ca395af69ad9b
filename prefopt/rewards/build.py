"""The reward of on-policy algorithms, as the options name it: one builder for all tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prefopt.errors import ConfigError
from prefopt.options import Options
from prefopt.rewards.functions import FunctionScorer, import_function, is_function
from prefopt.rewards.layout import load_reward_model
from prefopt.rewards.scorers import EnsembleScorer, RewardModelScorer, Scorer
from prefopt.stages import Stage

MODEL, TRUE = "model", "true"
REWARD_MODEL = "PPO's reward model"
"""What a report calls a reward model trained for on-policy algorithms; members of an ensemble are numbered."""


# Far from the seeds of a study, so that a member is no other seed's first one.
_MEMBERS_APART = 1_000_003


def member_seed(seed: int, member: int) -> int:
    """The seed of an ensemble's member: of the order of its rows and of its adapters. The first has the study's own."""
    return seed + _MEMBERS_APART * member


@dataclass(frozen=True)
class Reward:
    """What on-policy algorithms maximise.

    Args:
        scorer: prompts and completions -> scores.
        name: for the report.
        stages: the training of the reward models by name; none for a reward that was there before.
    """

    scorer: Scorer
    name: str
    stages: Mapping[str, Stage] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Encoded with gradient in training the reward models."""
        return sum(stage.tokens for stage in self.stages.values())

    @property
    def labels(self) -> int:
        """Labelled rows that it learned from; the members of an ensemble learn from the same."""
        return max((stage.facts["train_rows"] for stage in self.stages.values()), default=0)


def build_reward(
    options: Options, cache: Path, *, train: Callable[[int], tuple[RewardModelScorer, Stage]], true: Scorer | None
) -> Reward:
    """The reward that `options.reward` names.

    Args:
        options: of the run.
        cache: of converted models.
        train: member's number, from 0 -> a reward model trained on the policy rows.
        true: the task's own reward; None when it has none.

    Raises:
        ConfigError: the task has no reward of its own, or there is no such model or function.
        HubError: the model is on a hub that cannot be reached.
    """
    asked = options.reward
    if asked.reward == MODEL:
        members = [train(number) for number in range(asked.reward_members)]
        names = [REWARD_MODEL + (f" {number + 1}" if len(members) > 1 else "") for number in range(len(members))]
        stages = {name: stage for name, (_, stage) in zip(names, members, strict=True)}
        if len(members) == 1:
            return Reward(members[0][0], f"a {asked.reward_loss} model trained on the policy rows", stages)
        scorer = EnsembleScorer([member for member, _ in members], asked.reward_aggregate)
        what = f"the {asked.reward_aggregate} of {len(members)} {asked.reward_loss} models trained on the policy rows"
        return Reward(scorer, what, stages)
    if asked.reward == TRUE:
        if true is None:
            raise ConfigError(
                "reward 'true': these rows have no reward of their own. Leave --reward out (a model trained on the rows), or "
                "name a reward model (a folder or hub id) or a function (module:function)."
            )
        return Reward(true, "the task's own reward")
    if is_function(asked.reward):
        own = FunctionScorer(import_function(asked.reward), asked.reward, timeout=options.recovery.reward_timeout)
        return Reward(own, f"the function {asked.reward}")
    model = load_reward_model(
        asked.reward, cache=cache, device=options.model.device, trust_remote_code=options.model.trust_remote_code,
        micro_batch_tokens=options.budget.micro_batch_tokens,
    )  # fmt: skip
    return Reward(model, f"the reward model {asked.reward}")
