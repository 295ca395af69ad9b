"""What benchmarks.rlhf runs: rlhf.yaml read, checked against the registry, and turned into cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from prefopt import algorithms
from prefopt.errors import ConfigError
from prefopt.optimization import Logging, Optimization
from prefopt.options import DataOptions, EvaluationOptions, ModelOptions, Options, RewardOptions, SupervisedOptions
from prefopt.stages import content_key
from prefopt.streams import Budget
from prefopt.tasks.exact import TABULAR

POINTS = ("optimum", "k3", "k3_group", "best_completion")


@dataclass(frozen=True)
class ModelBudget:
    """What a run with a model spends, and the share of the gap that it should close.

    Args:
        updates: collections of samples; a pass over each is an update.
        samples: completions of one collection.
        target: of those settings whose point of rest is the optimum.
    """

    updates: int
    samples: int
    target: float


@dataclass(frozen=True)
class RlhfSetting:
    """One line of the table; see rlhf.yaml.

    Args:
        algorithm: as `prefopt train` names it.
        point: where its expected gradient vanishes, one of `POINTS`.
        hyper: its options; the word "beta" stands for the study's, divided by `ranking_temperature` where there is one.
        learning_rate: by model; it runs with those that are named.
        reported: why the target is not asked of it.
        budget: by model, what it spends in place of the model's own `updates` and `samples`.
    """

    algorithm: str
    point: str
    hyper: Mapping[str, Any]
    learning_rate: Mapping[str, float]
    reported: str = ""
    budget: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class RlhfStudy:
    """rlhf.yaml. `small` runs in the world of 4 prompts with 40 completions: for tests."""

    world: int
    beta: float
    seeds: Sequence[int]
    pairs: int
    models: Mapping[str, ModelBudget]
    settings: Mapping[str, RlhfSetting]
    learned: Mapping[str, Any] = field(default_factory=dict)
    best_of_n: Mapping[str, Any] = field(default_factory=dict)
    small: bool = False

    def specs(self) -> list[RlhfSpec]:
        """Every cell, the longest first."""
        found = [
            self.spec(label, model, seed) for label in self.settings for model in self._models(label) for seed in self.seeds
        ]
        return sorted(found, key=lambda spec: -spec.budget.updates * spec.budget.samples)

    def learned_specs(self) -> list[RlhfSpec]:
        """The cells whose reward is a reward model."""
        if not self.learned:
            return []
        label, model = self.learned["setting"], self.learned["model"]
        return [replace(self.spec(label, model, seed), reward="model") for seed in self.seeds]

    def spec(self, label: str, model: str, seed: int) -> RlhfSpec:
        """One cell, with beta in its place."""
        setting = self.settings[label]
        # Labels from the reward divided by a temperature: DPO's optimum is r/temperature - beta KL, so its beta is larger.
        price = self.beta / setting.hyper.get("ranking_temperature", 1.0)
        hyper = {name: price if value == "beta" else value for name, value in setting.hyper.items()}
        setting = replace(setting, hyper=hyper)
        budget = replace(self.models[model], **setting.budget.get(model, {}))
        return RlhfSpec(label, setting, model, budget, self.world, self.beta, seed, self.pairs, self.small)

    def _models(self, label: str) -> list[str]:
        return [model for model in self.models if model in self.settings[label].learning_rate]


def load_study(path: Path) -> RlhfStudy:
    """rlhf.yaml, checked against the registry.

    Raises:
        ConfigError: an unknown point, model, algorithm or option.
    """
    raw = yaml.safe_load(path.read_text())
    models = {name: ModelBudget(**budget) for name, budget in raw.pop("models").items()}
    settings = {name: RlhfSetting(**setting) for name, setting in raw.pop("settings").items()}
    study = RlhfStudy(models=models, settings=settings, **raw)
    for label, setting in settings.items():
        if setting.point not in POINTS or not setting.learning_rate.keys() <= models.keys():
            raise ConfigError(
                f"{path}: {label}: point must be one of {', '.join(POINTS)} and learning_rate name models of "
                f"{', '.join(models)}; got {setting.point!r} and {', '.join(setting.learning_rate)}."
            )
    for spec in study.specs():
        algorithms.get(spec.setting.algorithm).setting(**spec.setting.hyper)
    return study


@dataclass(frozen=True)
class RlhfSpec:
    """Everything that a cell depends on besides the code."""

    label: str
    setting: RlhfSetting
    model: str
    budget: ModelBudget
    world: int
    beta: float
    seed: int
    pairs: int
    small: bool = False
    reward: str = "true"

    @property
    def file(self) -> str:
        """Its name in a folder of cells."""
        readable = "".join(letter if letter.isalnum() else "-" for letter in self.label).strip("-")
        return f"{readable}-{self.model}-{self.seed}-{content_key(asdict(self))}.json"

    @property
    def online(self) -> bool:
        return algorithms.get(self.setting.algorithm).online

    @property
    def hyper(self) -> dict[str, Any]:
        return {**self.setting.hyper, "rollout_size": self.budget.samples}

    @property
    def options(self) -> Options:
        passes = int(self.setting.hyper.get("ppo_epochs", 1))
        # A row of an online loss is a prompt with its two completions.
        rows = self.budget.samples // 2 if self.online else self.budget.samples
        return Options(
            data=DataOptions(world=self.world, pairs=self.pairs),
            model=ModelOptions(model=TABULAR if self.model == "tabular" else ""),
            reward=RewardOptions(reward=self.reward),
            supervised=SupervisedOptions(reward_epochs=2, reward_learning_rate=1e-3, reward_batch_size=64),
            budget=Budget(rows, epochs=1e6, max_steps=self.budget.updates * passes, micro_batch_tokens=1 << 20),
            optimization=Optimization(learning_rate=self.setting.learning_rate[self.model]),
            logging=Logging(log_every=max(1, self.budget.updates * passes // 20)),
            evaluation=EvaluationOptions(checkpoints=5),
        )
