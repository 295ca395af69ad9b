"""One cell of a comparison: one setting on one seed, trained and measured. `prefopt train` runs exactly this."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from prefopt.algorithms import Setting
from prefopt.errors import ConfigError
from prefopt.machine import peak_memory_mb
from prefopt.models.causal_lm import CausalLMPolicy, FrozenReference
from prefopt.models.hydra import build_roles
from prefopt.models.lora import LoRA
from prefopt.models.packed import PackedPolicy, Reference, head_names
from prefopt.options import Options
from prefopt.parallel.strategy import Strategy
from prefopt.reference import ReferenceCache
from prefopt.report.health import WATCHED
from prefopt.report.schema import Cell, CellTiming, Ledger, PairRow, PromptRow
from prefopt.rewards import RewardModelScorer
from prefopt.rewards.build import Reward
from prefopt.rewards.layout import save_reward_model
from prefopt.rollouts import OnlineStream, RolloutStream, Workshop, online, rollouts
from prefopt.runlog import counter
from prefopt.stages import trained_reward_model
from prefopt.streams import Budget, OfflineStream
from prefopt.tasks import Task, Training
from prefopt.trainer import FitResult, fit

# What the report's learning curves show of the training log.
_CURVE = ("step", "loss", "grad_norm", "rewards/margins", "rewards/accuracies", *(watched.key for watched in WATCHED))


@dataclass(frozen=True)
class CellResult:
    """A finished cell and its policy. `reward_model` is that policy as a scorer, where the loss trained a reward head alone."""

    cell: Cell
    timing: CellTiming
    rows: tuple[PromptRow, ...]
    pairs: tuple[PairRow, ...]
    policy: PackedPolicy
    reward_model: RewardModelScorer | None = None

    def save(self, folder: Path) -> None:
        """Writes the policy as what it is; a causal LM that became a reward model as one that `--reward` reads."""
        if self.reward_model is None:
            self.policy.save(folder)
        else:
            save_reward_model(self.reward_model, folder)


def run_cell(
    task: Task,
    setting: Setting,
    options: Options,
    seed: int,
    *,
    label: str,
    cache: Path,
    folder: Path | None = None,
    resume: bool = False,
    console: Console | None = None,
    strategy: Strategy | None = None,
) -> CellResult:
    """Trains one setting on one seed and measures it at checkpoints and at the end.

    Args:
        task: rows, start, reward and metrics.
        setting: algorithm with its hyper-parameters.
        options: budget, optimizer, evaluation.
        seed: of order, adapter and rollouts.
        label: names the cell in the report.
        cache: of reference log-probs and shared stages.
        folder: for metrics.jsonl and checkpoints.
        resume: go on from the newest checkpoint.
        console: for progress.
        strategy: the processes that it is spread over, each of which calls this; one by default.
    """
    begin = time.perf_counter()
    seeds = options.seeding
    torch.manual_seed(seeds.of("adapter", seed))
    training = task.training(seeds.of("data", seed))
    policy, reference = build_policies(task, setting, options, seed)
    strategy = strategy or Strategy()
    strategy.agree({"weights": reference.weights}, "the model that the run starts from")
    known = ReferenceCache(
        reference, cache / "reference", micro_batch_tokens=options.budget.micro_batch_tokens,
        on_progress=counter(console, "reference log-probs"),
    )  # fmt: skip
    stream, reward = build_stream(
        task, setting, training, policy, reference, known, options.budget, seeds.of("order", seed),
        reward_seed=seeds.of("reward", seed), strategy=strategy,
    )  # fmt: skip
    evaluate = partial(task.evaluate, policy, reference, known, setting.loss, seed)
    total = stream.total_steps
    checkpoints = sorted(
        {round(total * (i + 1) / options.evaluation.checkpoints) for i in range(options.evaluation.checkpoints - 1)}
        - {0, total}
    )
    result = fit(
        policy, setting.loss, stream, options.optimization, logging=options.logging, recovery=options.recovery,
        folder=folder, resume=resume, evaluate=lambda: evaluate().metrics, evaluate_at=checkpoints, strategy=strategy,
        console=console,
        title=f"{label} seed {seed}",
    )  # fmt: skip
    policy.train(False)
    measured = evaluate()
    final = dict(measured.metrics)
    cell = Cell(
        setting.algorithm.name, label, seed, "ok", None, final, _path(result, final), _curve(result),
        _ledger(stream, training, options.budget, result, known, reward),
    )  # fmt: skip
    timing = CellTiming(
        label, seed, time.perf_counter() - begin, result.seconds / max(1, result.steps),
        result.tokens / result.seconds if result.seconds else 0.0,
        peak_memory_mb(),
    )  # fmt: skip
    rows = tuple(replace(row, label=label, seed=seed) for row in measured.rows)
    pairs = tuple(replace(row, label=label, seed=seed) for row in measured.pairs)
    trained = trained_reward_model(
        policy, setting.algorithm.loss, training.examples, max_length=options.data.max_length,
        max_completion_length=task.max_new_tokens, micro_batch_tokens=options.budget.micro_batch_tokens,
    )  # fmt: skip
    return CellResult(cell, timing, rows, pairs, policy, trained)


def build_policies(task: Task, setting: Setting, options: Options, seed: int) -> tuple[PackedPolicy, Reference]:
    """A policy that starts at the task's shared start, with the heads that the loss calls for, and its reference."""
    heads = head_names(setting.loss.needs)
    if (own := task.own_policies(heads, seed)) is not None:
        return own
    model, tokenizer = task.start()
    lora = LoRA(r=options.model.lora, alpha=2 * options.model.lora) if options.model.lora else None
    return build_roles(
        options.model.hydra, model, tokenizer, lora=lora, heads=heads,
        reward_head=task.hydra_base.reward_head if task.hydra_base is not None else None,
        checkpointing=options.model.activation_checkpointing,
    )  # fmt: skip


def build_stream(
    task: Task,
    setting: Setting,
    training: Training,
    policy: PackedPolicy,
    reference: Reference,
    known: ReferenceCache,
    budget: Budget,
    seed: int,
    reward: Reward | None = None,
    *,
    reward_seed: int | None = None,
    strategy: Strategy | None = None,
) -> tuple[OfflineStream | RolloutStream | OnlineStream, Reward | None]:
    """The stream that the algorithm derives, and the reward that on-policy algorithms maximise: the task's if none is given."""
    budget = replace(budget, seed=seed)
    if not setting.algorithm.on_policy:
        cache = known if setting.needs_reference else None
        return OfflineStream(
            training.examples, kind=setting.algorithm.stream, budget=budget, needs=setting.loss.needs, reference=cache,
            dtype=policy.dtype, strategy=strategy,
        ), None  # fmt: skip
    speaker, frozen = language_models(policy, reference, f"{setting.algorithm.name} trains on")
    if reward is None:
        base = task.hydra_base
        reward = task.scorer(seed if reward_seed is None else reward_seed) if base is None else base.reward(speaker)
    advantage = setting.algorithm.loss.advantage
    workshop = Workshop(
        speaker, frozen, reward.scorer, training.examples, training.texts, budget, task.eos_ids, task.max_new_tokens,
        setting.loss.needs, partial(advantage, **setting.advantage_options) if advantage is not None else None, policy.dtype,
        strategy or Strategy(),
    )  # fmt: skip
    if setting.algorithm.online:
        return online(workshop, setting.algorithm.stream, **setting.stream_options), reward
    return rollouts(workshop, **setting.stream_options), reward


def language_models(policy: PackedPolicy, reference: Reference, who: str) -> tuple[CausalLMPolicy, FrozenReference]:
    """Policy and reference as what can be sampled from.

    Raises:
        ConfigError: they are no language models.
    """
    if isinstance(policy, CausalLMPolicy) and isinstance(reference, FrozenReference):
        return policy, reference
    raise ConfigError(
        f"{who} fresh completions of a language model; this data's policies learn offline: take dpo, ipo, cpl, …."
    )


def _path(result: FitResult, final: Mapping[str, float]) -> tuple[Mapping[str, float], ...]:
    lines = [line for line in result.lines if any(key.startswith("eval/") for key in line)]
    path = [{key.removeprefix("eval/"): float(value) for key, value in line.items()} for line in lines]
    return (*path, {"step": float(result.steps), **final})


def _curve(result: FitResult) -> tuple[Mapping[str, float], ...]:
    return tuple({key: float(line[key]) for key in _CURVE if key in line} for line in result.lines if "loss" in line)


def _ledger(
    stream: OfflineStream | RolloutStream | OnlineStream,
    training: Training,
    budget: Budget,
    result: FitResult,
    known: ReferenceCache,
    reward: Reward | None,
) -> Ledger:
    """Counts of what the cell consumed. The labels of an on-policy cell are those that its reward learned from."""
    rows = len(training.examples)
    rolled = None if isinstance(stream, OfflineStream) else stream.collector
    seen = rolled.sampled if rolled is not None else result.steps * budget.batch_size
    return Ledger(
        labels=reward.labels if reward is not None else min(rows, seen),
        unique_prompts=len({example.prompt_ids for example in training.examples}) if seen >= rows else seen,
        epochs=seen / rows,
        trained_tokens=result.tokens,
        reference_tokens=known.asked_tokens + (rolled.reference_tokens if rolled is not None else 0),
        generated_tokens=rolled.generated_tokens if rolled is not None else 0,
        reward_model_tokens=reward.tokens if reward is not None else 0,
    )
