"""What learns in a loop: the policy, and for on-policy algorithms the reward model that they maximise."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import losses
from prefopt import checkpoint
from prefopt.algorithms import Setting, stream_of
from prefopt.cell import build_policies, build_stream, language_models
from prefopt.data.records import Example
from prefopt.errors import DataError, OutputError
from prefopt.evaluate import measure_pairs
from prefopt.files import staged_folder
from prefopt.iterate.labels import Label
from prefopt.iterate.options import TRAINING, LoopOptions, draw_seed
from prefopt.iterate.rows import Labelled, make_examples
from prefopt.iterate.samples import Row, policy_hash
from prefopt.models.causal_lm import CausalLMPolicy, FrozenReference
from prefopt.models.lora import LoRA
from prefopt.optimization import Optimization
from prefopt.options import Options
from prefopt.reference import ReferenceCache
from prefopt.rewards import RewardModelScorer
from prefopt.rewards.build import Reward
from prefopt.runlog import counter
from prefopt.stages import content_key, reward_loss, reward_model
from prefopt.streams import Budget
from prefopt.tasks import Task, Training
from prefopt.trainer import FitResult, fit

TRAINING_FOLDER, POLICY_FOLDER = "training", "policy"


class Learner:
    """The policy through the rounds.

    Args:
        task: start, rows and metrics.
        setting: the update's algorithm with its hyper-parameters.
        options: of every training; the budget is a round's.
        loop: which reference.
        seed: of the loop.
        cache: of reference log-probs and reward models.
        console: for progress.

    Attributes:
        policy: as it is now.
        start: the reference that the loop began with.
    """

    def __init__(
        self, task: Task, setting: Setting, options: Options, loop: LoopOptions, seed: int, cache: Path, console: Console
    ) -> None:
        self._task, self._setting, self._options, self._loop = task, setting, options, loop
        self._seed, self._cache, self._console = seed, cache, console
        torch.manual_seed(seed)
        self.policy, self.start = language_models(*build_policies(task, setting, options, seed), "iterate needs")
        self._evaluated = self._log_probs(self.start, cache / "reference")
        self._known = self._log_probs(self.start)
        self._reward: Reward | None = None

    def load(self, folder: Path) -> None:
        """The policy as the round in `folder` left it.

        Raises:
            OutputError: its checkpoint is missing or damaged.
        """
        found = checkpoint.load_latest(folder / TRAINING_FOLDER, lambda text: self._console.print(text, highlight=False))
        if found is None:
            raise OutputError(
                f"{folder / TRAINING_FOLDER} has no checkpoint, so the next round cannot start from it. Restore it."
            )
        self.policy.load_trainable_state(found[1]["policy"])

    def measure(self) -> dict[str, float]:
        """The task's metrics; its KL is to the start of the loop."""
        self.policy.train(False)
        return dict(self._task.evaluate(self.policy, self.start, self._evaluated, self._setting.loss, self._seed).metrics)

    def begin_round(self) -> None:
        """Forgets the reference log-probs of the rounds before. Those of a round are in memory and computed in one order: what
        earlier rounds or other runs have left in a cache was packed otherwise, and differs in the last digit."""
        self._known = self._log_probs(self.start)

    def agreement(self, pairs: Sequence[Example], history: Labelled) -> float:
        """The share of pairs that what was learned so far orders as their labels do, ties count half: the policy's log-ratio to
        the start, or the reward model of on-policy algorithms. NaN where there is no model yet, or no pair.

        Args:
            history: the labels that the reward model was trained on.
        """
        if not pairs:
            return float("nan")
        if not self._setting.algorithm.on_policy:
            budget = self._options.budget.micro_batch_tokens
            return measure_pairs(self.policy, self._known, pairs, None, budget).metrics["accuracy"]
        if self._reward is None and history:
            self.learn_reward(history)
        if self._reward is None:
            return float("nan")
        assert isinstance(self._reward.scorer, RewardModelScorer)
        scores = self._reward.scorer.score(pairs)
        return float((0.5 + 0.5 * (scores[:, 0] - scores[:, 1]).sign()).mean())

    def learn_reward(self, labelled: Labelled) -> Reward:
        """A reward model trained anew on these labels, from the task's start; or that of an earlier equal training."""
        options, supervised = self._options, self._options.supervised
        loss = reward_loss(options.reward.reward_loss, center_coef=options.reward.reward_center_coef)
        examples = make_examples(labelled, stream_of(losses.get(loss.name)), loss)
        if not examples:
            raise DataError(f"all {len(labelled)} labels are ties, which {loss.name} learns nothing from: sample more prompts.")
        model, tokenizer = self._task.start()
        scorer, stage = reward_model(
            model, tokenizer, examples, self._task.held_out(), loss=loss,
            lora=LoRA(r=options.model.lora, alpha=2 * options.model.lora) if options.model.lora else None,
            budget=Budget(
                supervised.reward_batch_size, 0, options.budget.micro_batch_tokens, supervised.reward_epochs, seed=self._seed
            ),
            optimization=Optimization(learning_rate=supervised.reward_learning_rate), max_length=options.data.max_length,
            max_completion_length=self._task.max_new_tokens, cache=self._cache, console=self._console,
            title=f"reward model on {len(examples)} labels",
        )  # fmt: skip
        self._reward = Reward(scorer, f"a {loss.name} model on the loop's labels", {"reward model": stage})
        return self._reward

    def train(self, number: int, folder: Path, labelled: Sequence[tuple[Row, Label]], training: Training) -> FitResult:
        """The update of round `number`: from its start, or from its newest checkpoint.

        Args:
            labelled: what offline losses train on.
            training: the task's rows, whose prompts on-policy algorithms sample from.
        """
        setting, seed = self._setting, draw_seed(self._seed, TRAINING, number)
        reference, known = self.start, self._known
        if self._loop.reference == "round" and number > 1:
            reference = frozen_copy(self.policy, self.start)
            known = self._log_probs(reference)
        self.policy.reference = reference
        if not setting.algorithm.on_policy:
            examples = make_examples(labelled, setting.algorithm.stream, setting.loss)
            if not examples:
                raise DataError(
                    f"round {number}: all {len(labelled)} labels are ties, which {setting.algorithm.name} learns nothing "
                    "from: sample more prompts, or use a loss with soft labels (dpo, ipo, cpl)."
                )
            training = replace(training, examples=examples)
        torch.manual_seed(seed)
        stream, _ = build_stream(
            self._task, setting, training, self.policy, reference, known, self._options.budget, seed, reward=self._reward
        )  # fmt: skip
        place = folder / TRAINING_FOLDER
        return fit(
            self.policy, setting.loss, stream, self._options.optimization, logging=self._options.logging,
            recovery=self._options.recovery, folder=place, resume=bool(checkpoint.list_checkpoints(place)),
            console=self._console, title=f"round {number}", starts_at_reference=number == 1 or self._loop.reference == "round",
        )  # fmt: skip

    def save(self, folder: Path) -> None:
        """The policy in the Hugging Face layout in folder/policy, whole or not at all."""
        with staged_folder(folder / POLICY_FOLDER) as staged:
            self.policy.save(staged)

    def _log_probs(self, reference: FrozenReference, folder: Path | None = None) -> ReferenceCache:
        return ReferenceCache(
            reference, folder, micro_batch_tokens=self._options.budget.micro_batch_tokens,
            on_progress=counter(self._console, "reference log-probs"),
        )  # fmt: skip


def frozen_copy(policy: CausalLMPolicy, start: FrozenReference) -> FrozenReference:
    """The policy as it is now as a reference, a model of its own: adapters are merged into the copy's weights."""
    weights = content_key(start.weights, policy_hash(policy))
    shared: dict[int, Any] = {id(policy.tokenizer): policy.tokenizer, id(policy.reference): None}
    twin = copy.deepcopy(policy, shared)
    if policy.lora is not None:
        twin = CausalLMPolicy(twin.model.merge_and_unload(), policy.tokenizer)
    twin.requires_grad_(False)
    return FrozenReference(twin, weights)


def prune(folder: Path, *, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints of the round in `folder`."""
    found = checkpoint.list_checkpoints(folder / TRAINING_FOLDER)
    for path in found[: len(found) - keep]:
        shutil.rmtree(path)
