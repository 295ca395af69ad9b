"""Control as a task: rows are labelled pairs of segments, the policy is a small network on observations.

What is common to the gridworld and to simulated tasks; their own files add data and metrics.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import ClassVar

import torch
from rich.console import Console

from losses.registry import BoundLoss
from prefopt.control.policies import Actor, ControlPolicy, actor_fingerprint, build_control
from prefopt.control.segments import Comparisons, Labelling, compare_segments
from prefopt.control.steps import Steps, steps_key
from prefopt.data.exact_world.labels import parse_labels
from prefopt.data.records import Example
from prefopt.data.report import DataReport
from prefopt.errors import ConfigError
from prefopt.evaluate import measure_pairs
from prefopt.models.packed import Reference
from prefopt.optimization import Optimization
from prefopt.options import ModelOptions, Options
from prefopt.reference import ReferenceCache
from prefopt.report.schema import Metric
from prefopt.rewards.build import Reward
from prefopt.stages import Stage, supervised_start
from prefopt.streams import Budget
from prefopt.tasks.language import PAIR_METRICS
from prefopt.tasks.protocol import Measured, Shared, Training

# Added to a study's seed where test pairs are drawn: they meet other segments in another order than training pairs do.
_TEST_SEED = 1_000_000


@dataclass(frozen=True)
class Offline:
    """What a seed's cells learn from: one table of steps, of which some episodes are for testing alone."""

    steps: Steps
    train: Collection[int]
    test: Collection[int]

    @cached_property
    def key(self) -> str:
        """Content address of the steps."""
        return steps_key(self.steps)


class ControlTask(ABC):
    """See `Task`. Every seed draws its own pairs, starts from its own network, and has its own reference."""

    own_metrics: ClassVar[Sequence[Metric]]
    eos_ids: Sequence[int] = ()
    hydra_base = None

    def __init__(self, options: Options, cache: Path, console: Console | None = None) -> None:
        _check_model(options.model)
        self._options, self._cache, self._console = options, cache, console
        control = options.control
        if options.evaluation.eval_pairs < 1:
            raise ConfigError("control draws the pairs that it tests on: --eval-pairs must be at least 1.")
        model = parse_labels(options.data.labels, options.data.label_temperature)
        self.labelling = Labelling(control.preferences, model, control.label_discount or self.discount)
        self.max_new_tokens = control.segment_length

    @property
    @abstractmethod
    def discount(self) -> float:
        """Of the labeller, where its option does not say another."""

    @abstractmethod
    def offline(self, seed: int) -> Offline:
        """The steps of the pairs of a data seed; the same object when asked again."""

    @abstractmethod
    def actor(self) -> Actor:
        """A fresh network, drawn from the global generator."""

    @abstractmethod
    def measure(self, policy: ControlPolicy, reference: Reference, seed: int) -> Measured:
        """The metrics of `own_metrics`."""

    @property
    def metrics(self) -> Sequence[Metric]:
        return (*self.own_metrics, *PAIR_METRICS)

    @cache  # noqa: B019  a task lives as long as its process
    def pairs(self, seed: int) -> Comparisons:
        """The training pairs of a seed."""
        seed = self._data_seed(seed)
        offline = self.offline(seed)
        control = self._options.control
        return compare_segments(
            offline.steps, self.labelling, pairs=self._options.data.pairs, length=control.segment_length, seed=seed,
            segments=control.segments, keep_best=control.keep_best, episodes=offline.train,
        )  # fmt: skip

    @cache  # noqa: B019
    def test_pairs(self, seed: int) -> Comparisons:
        """Pairs of the test episodes."""
        seed = self._data_seed(seed)
        offline = self.offline(seed)
        return compare_segments(
            offline.steps, self.labelling, pairs=self._options.evaluation.eval_pairs,
            length=self._options.control.segment_length, seed=seed + _TEST_SEED, episodes=offline.test, name="test pair",
        )  # fmt: skip

    def training(self, seed: int) -> Training:
        return Training(self.pairs(seed), {}, DataReport())

    def held_out(self) -> Sequence[Example]:
        return self.test_pairs(0)

    @cache  # noqa: B019
    def started(self, seed: int) -> tuple[Actor, Stage | None]:
        """The network that a seed's cells start from: fresh, or after behaviour cloning (the first of the two stages)."""
        seeding = self._options.seeding
        torch.manual_seed(seeding.of("adapter", seed))
        asked, init = self._options.model.device, self._options.model.init
        # Networks this small are bound by launches: a GPU only where it is named.
        actor, offline = self.actor().to("cpu" if asked == "auto" else asked), self.offline(self._data_seed(seed))
        if init == "as-is":
            return actor, None
        supervised, budget = self._options.supervised, self._options.budget
        stage = supervised_start(
            ControlPolicy(actor, offline.steps), f"{actor_fingerprint(actor)}-{offline.key}", self.pairs(seed),
            both=init == "sft-both",
            budget=Budget(
                budget.batch_size, budget.micro_batch_size, budget.micro_batch_tokens, supervised.sft_epochs,
                seed=seeding.of("order", seed),
            ),
            optimization=Optimization(learning_rate=supervised.sft_learning_rate), cache=self._cache, console=self._console,
        )  # fmt: skip
        return actor, stage

    def _data_seed(self, seed: int) -> int:
        return self._options.seeding.of("data", seed)

    def own_policies(self, heads: Collection[str], seed: int) -> tuple[ControlPolicy, Reference]:
        offline = self.offline(self._data_seed(seed))
        return build_control(self.started(seed)[0], offline.steps, offline.key, heads=heads)

    def start(self) -> tuple[Actor, None]:
        raise ConfigError("control policies are no transformers: they are built by own_policies.")

    def scorer(self, seed: int) -> Reward:
        raise ConfigError("control has no scorer of completions: its policies learn from labelled segments.")

    def evaluate(
        self, policy: ControlPolicy, reference: Reference, cache: ReferenceCache, loss: BoundLoss | None, seed: int
    ) -> Measured:
        found = measure_pairs(policy, cache, self.test_pairs(seed), loss, self._options.budget.micro_batch_tokens)
        own = self.measure(policy, reference, seed)
        return Measured({**own.metrics, **found.metrics}, own.rows, found.rows, own.generated_tokens)

    def shared(self, *, on_policy: bool) -> Shared:
        policy, reference = self.own_policies((), 0)
        known = ReferenceCache(
            reference, self._cache / "reference", micro_batch_tokens=self._options.budget.micro_batch_tokens
        )  # fmt: skip
        measured = self.evaluate(policy, reference, known, None, 0).metrics
        stage, offline = self.started(0)[1], self.offline(0)
        control, pairs = self._options.control, len(self.pairs(0))
        drawn = f"{control.segments} segments (dense)" if control.segments else "two segments of their own each (sparse)"
        notes = (
            f"{len(offline.train)} episodes to learn from, {len(offline.test)} for test pairs; {pairs} pairs of {drawn}, "
            f"{control.segment_length} steps long, labelled by {self.labelling.preferences} ({self._options.data.labels}, "
            f"discount {self.labelling.discount:g}).",
            "Every seed draws its own pairs and starts from its own network; the reference's row is that of seed 0.",
        )
        return Shared(
            reference={**measured, "own_accuracy": float("nan")},
            stages={} if stage is None else {"behaviour cloning of the shared start": stage},
            notes=(*notes, *self.notes()),
        )

    def notes(self) -> Sequence[str]:
        """What else the report should say."""
        return ()


def kl_at_data(policy: ControlPolicy, reference: Reference, observations: torch.Tensor) -> float:
    """Mean KL(policy || reference) of the action over states, nats."""
    family = policy.actor.family
    with reference.frozen() as frozen, torch.no_grad():
        states = observations.to(policy.device, policy.dtype)
        return float(family.kls(policy.actor(states), frozen.actor(states)).mean())


def _check_model(model: ModelOptions) -> None:
    if model.lora or model.activation_checkpointing or model.hydra != "trunk":
        raise ConfigError("--lora, --hydra and --activation-checkpointing are for transformers, control has none; drop them.")
