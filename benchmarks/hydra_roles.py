"""What bench-hydra measures in processes of their own: PPO with its four roles on as few models as a setting asks for."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from benchmarks.measuring import Spread
from benchmarks.workloads import MeasuredStream
from prefopt import algorithms
from prefopt.cell import run_cell
from prefopt.data.records import Example
from prefopt.models.causal_lm import CausalLMPolicy
from prefopt.models.hydra import BASED, Hydra, build_roles
from prefopt.models.loading import load_model
from prefopt.models.lora import LoRA
from prefopt.models.packed import head_names
from prefopt.optimization import Optimization
from prefopt.options import DataOptions, EvaluationOptions, ModelOptions, Options, SupervisedOptions, default_cache
from prefopt.rewards import RewardModelScorer
from prefopt.rollouts import Workshop, rollouts
from prefopt.streams import Budget
from prefopt.tasks import build_task, prepare_process
from prefopt.trainer import fit


@dataclass(frozen=True)
class Roles:
    """A row of the table: which roles share weights, and whether adapters or all weights are trained."""

    hydra: Hydra
    lora: bool

    @property
    def name(self) -> str:
        return f"{self.hydra}, {'LoRA' if self.lora else 'all weights'}"


FOUR_MODELS, FOUR_COPIES = Roles("off", False), Roles("off", True)
"""Full fine-tuning of actor and critic beside two frozen models; LoRA on four copies, which is what Hydra improves on."""
SETTINGS = (FOUR_MODELS, FOUR_COPIES, Roles("trunk", False), Roles("trunk", True), Roles("split", True), Roles("joined", True))


@dataclass(frozen=True)
class Workload:
    """What every setting trains on.

    Args:
        model: for `load_model`, in float32.
        prompts: token ids, equally many each.
        new_tokens: of every completion: nothing ends one earlier, so that all settings do the same work.
        lora: rank of adapters.
        device: "cpu" or "cuda".
        checkpointing: keep the inputs of layers only for backward.
    """

    model: str
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int
    lora: int
    device: str
    checkpointing: bool = False

    @property
    def sample_tokens(self) -> int:
        """Tokens of a prompt with its completion."""
        return len(self.prompts[0]) + self.new_tokens


@dataclass(frozen=True)
class Trained:
    """PPO steps of one setting.

    Args:
        seconds_per_sample: sampling, scoring and training, over the updates behind the first.
        others: largest share of the machine that other processes used meanwhile; None where the system does not tell.
        held_mb: weights of all roles, gradients and AdamW's two numbers a trained weight.
    """

    seconds_per_sample: Spread
    others: float | None
    held_mb: float


def idle() -> None:
    """The runtime's baseline: what every setting imports, and no model."""
    import peft  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401


def train(roles: Roles, work: Workload, *, micro_batch_tokens: int, samples: int, updates: int) -> Trained:
    """PPO as a cell runs it: sample, score, train on packed micro-batches; the first update is a warm-up on top of `updates`.

    Heads are random: what they say costs as much as what trained ones say.
    """
    loaded = load_model(work.model, cache=default_cache(), device=work.device)
    model, tokenizer = loaded.model, loaded.tokenizer
    setting = algorithms.get("ppo").setting(rollout_size=samples, ppo_epochs=1, max_new_tokens=work.new_tokens)
    lora = LoRA(r=work.lora, alpha=2 * work.lora) if roles.lora else None
    torch.manual_seed(0)
    head = {"weight": torch.randn(1, model.config.hidden_size) / model.config.hidden_size**0.5}
    limits = {
        "max_length": work.sample_tokens,
        "max_completion_length": work.new_tokens,
        "micro_batch_tokens": micro_batch_tokens,
    }
    judge = None
    if roles.hydra not in BASED:
        judge = CausalLMPolicy(copy.deepcopy(model), tokenizer, lora=lora, heads=("reward",))
        judge.heads["reward"].load_state_dict(head)
        judge.requires_grad_(False)
    policy, reference = build_roles(
        roles.hydra, model, tokenizer, lora=lora, heads=head_names(setting.loss.needs), reward_head=head,
        checkpointing=work.checkpointing,
    )  # fmt: skip
    scorer = RewardModelScorer(judge, **limits) if judge else RewardModelScorer(policy, adapter=None, **limits)
    examples = [Example(f"prompt:{i}", ids, ()) for i, ids in enumerate(work.prompts)]
    workshop = Workshop(
        policy=policy, reference=reference, scorer=scorer, examples=examples,
        texts={example.id: tokenizer.decode(example.prompt_ids) for example in examples},
        budget=Budget(samples, 0, micro_batch_tokens, epochs=1e6, max_steps=1 + updates), eos_ids=(),
        max_new_tokens=work.new_tokens, needs=setting.loss.needs,
        advantage=partial(cast(Any, setting.algorithm.loss.advantage), **setting.advantage_options), dtype=policy.dtype,
    )  # fmt: skip
    stream = MeasuredStream(cast(Any, rollouts(workshop, **setting.stream_options)), policy)
    # Hardly a step: the table compares costs, and no setting may wander off into longer or shorter work.
    fit(policy, setting.loss, stream, Optimization(learning_rate=1e-6, schedule="constant", warmup=0.0))
    steps = stream.steps[1:]
    shares = [step.busy.share for step in steps if step.busy.share is not None]
    models = [policy, reference._policy, *([judge] if judge else [])]
    return Trained(Spread.of([step.seconds / samples for step in steps]), max(shares, default=None), held_mb(models))


def held_mb(models: Iterable[nn.Module]) -> float:
    """MB of weights (each storage once), and three times those that are trained again: gradient and AdamW's moments."""
    weights = {parameter.data_ptr(): parameter for model in models for parameter in model.parameters()}
    sizes = [(4 if p.requires_grad else 1) * p.numel() * p.element_size() for p in weights.values()]
    return sum(sizes) / 2**20


@dataclass(frozen=True)
class Reached:
    """PPO in the exact world.

    Args:
        proxy: mean score of the last fifth of the updates' samples by the setting's own reward model.
        gain: hidden reward over that of the setting's own reference.
        kl: to that reference, nats.
    """

    proxy: float
    gain: float
    kl: float


def exact_options(roles: Roles, updates: int, pairs: int = 8192) -> Options:
    """The exact world as `make bench-exact` sets it; adapters step three times as far, and learn as much of rank 16 of 64."""
    return Options(
        data=DataOptions(pairs=pairs),
        model=ModelOptions(hydra=roles.hydra, lora=16 if roles.lora else 0),
        supervised=SupervisedOptions(reward_epochs=2, reward_learning_rate=1e-3, reward_batch_size=64),
        budget=Budget(batch_size=64, epochs=1e4, max_steps=updates, micro_batch_tokens=1 << 20),
        optimization=Optimization(learning_rate=1e-3 if roles.lora else 3e-4),
        evaluation=EvaluationOptions(checkpoints=1),
    )


def reach(options: Options, seed: int) -> Reached:
    """PPO with a reward model in the exact world, measured by enumeration."""
    prepare_process(options, 1)
    cache = default_cache()
    task = build_task(options, cache)
    setting = algorithms.get("ppo").setting(rollout_size=256, kl_coef=0.1)
    options = replace(options, logging=replace(options.logging, log_every=1))
    cell = run_cell(task, setting, options, seed, label="ppo", cache=cache).cell
    start = task.shared(on_policy=False).reference
    final = cell.final
    scores = [line["score"] for line in cell.curve if "score" in line]
    return Reached(_late_mean(scores), final["reward"] - start["reward"], final["kl"])


def _late_mean(values: Sequence[float]) -> float:
    return statistics.fmean(values[-max(1, len(values) // 5) :])
