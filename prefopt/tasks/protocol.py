"""The protocol between a comparison and what it runs on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from losses.registry import BoundLoss
from prefopt.data.records import Example, Text
from prefopt.data.report import DataReport
from prefopt.hydra import HydraBase
from prefopt.models.packed import PackedPolicy, Reference
from prefopt.reference import ReferenceCache
from prefopt.report.schema import Baseline, FrontierPoint, Judge, Metric, PairRow, PromptRow
from prefopt.rewards.build import Reward
from prefopt.stages import Stage


@dataclass(frozen=True)
class Training:
    """The rows that every algorithm of a seed trains on.

    Args:
        examples: in the data set's order.
        texts: prompts as text by example id, for scorers.
        report: what was read, split and cut.
    """

    examples: Sequence[Example]
    texts: Mapping[str, Text]
    report: DataReport


@dataclass(frozen=True)
class Measured:
    """One evaluation: numbers by metric key, and a row for each sampled prompt and each held-out pair, where there are any."""

    metrics: Mapping[str, float]
    rows: Sequence[PromptRow] = ()
    pairs: Sequence[PairRow] = ()
    generated_tokens: int = 0


@dataclass(frozen=True)
class Shared:
    """What all cells share and the report states once."""

    reference: Mapping[str, float]
    baselines: Sequence[Baseline] = ()
    judges: Sequence[Judge] = ()
    frontier: Sequence[FrontierPoint] | None = None
    stages: Mapping[str, Stage] = field(default_factory=dict)
    notes: Sequence[str] = ()


class Task(Protocol):
    """Rows, start, reward and metrics."""

    @property
    def metrics(self) -> Sequence[Metric]:
        """The columns of the report."""

    @property
    def eos_ids(self) -> Sequence[int]:
        """Tokens that end a completion."""

    @property
    def max_new_tokens(self) -> int:
        """The limit on a rollout's length, where its flag does not say another."""

    def training(self, seed: int) -> Training:
        """The policy rows of a seed."""

    def start(self) -> tuple[Any, Any]:
        """A fresh copy of the shared start, with its tokenizer: the caller trains it in place."""

    @property
    def hydra_base(self) -> HydraBase | None:
        """With `--hydra joined` or `split`: the reward head of the shared start, which then is a Hydra base."""

    def own_policies(self, heads: Collection[str], seed: int) -> tuple[PackedPolicy, Reference] | None:
        """A fresh policy with these heads and its reference, where they are no transformer; None: they are built at `start`."""

    def scorer(self, seed: int) -> Reward:
        """The reward of on-policy algorithms, as the options name it; by default a model trained on the same policy rows."""

    def held_out(self) -> Sequence[Example]:
        """Tokenised pairs that nothing is trained on, for what is said of a reward model."""

    def evaluate(self, policy: Any, reference: Any, cache: ReferenceCache, loss: BoundLoss | None, seed: int) -> Measured:
        """Every metric of a policy, which with its reference is of the kind that this task's cells train."""

    def shared(self, *, on_policy: bool) -> Shared:
        """Facts about the reference, judges and baselines; trains what cells will load from the cache."""
