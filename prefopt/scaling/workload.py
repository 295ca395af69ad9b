"""What an algorithm asks of a run: which models it holds, and what it does with a row."""

from __future__ import annotations

from dataclasses import dataclass

from losses.types import VOCABULARY
from prefopt import algorithms
from prefopt.errors import ConfigError
from prefopt.models.packed import head_names

# A pair as a plan takes it: a prompt of half the longest length, and two completions of the other half.
_PROMPT_SHARE = 0.5
# Completions that are drawn of a prompt where a plan does not say.
_SAMPLES = 4


@dataclass(frozen=True)
class Workload:
    """A run's rows and models.

    Args:
        algorithm: its name.
        rows: pairs, lists or prompts that are trained on, passes counted.
        batch: rows of one update, on all GPUs together.
        length: longest prompt with one completion, in tokens; all rows are taken as that long.
        completions: of a row: 2 of a pair; the samples of a prompt.
        reference: log-probs of the reference are made, for the loss or for the price of KL.
        sampled: completions are drawn from the policy and scored by a reward model of its shape.
        heads: scalar heads on the policy.
    """

    algorithm: str
    rows: int = 10_000
    batch: int = 64
    length: int = 1024
    completions: int = 2
    reference: bool = True
    sampled: bool = False
    heads: int = 0

    def __post_init__(self) -> None:
        if min(self.rows, self.batch, self.completions) < 1 or self.length < 2:
            raise ConfigError(f"rows, batch and completions must be at least 1 and length at least 2; got {self}.")

    @property
    def scored(self) -> int:
        """Completion tokens of a row, each of which asks the LM head once."""
        return self.completions * (self.length - self.prompt)

    @property
    def prompt(self) -> int:
        """Prompt tokens of a row, encoded once for all its completions."""
        return int(self.length * _PROMPT_SHARE)

    @property
    def tokens(self) -> int:
        """Packed tokens of a row: no padding."""
        return self.prompt + self.scored

    def largest_batch(self, gpus: int) -> int:
        """Rows of one update on the GPU that has most."""
        return -(-self.batch // gpus)

    def updates(self) -> int:
        """Of the whole run."""
        return -(-self.rows // self.batch)


def workload_of(algorithm: str, *, rows: int, batch: int, length: int, completions: int = 0) -> Workload:
    """What a registered algorithm asks for, from its tensors.

    Args:
        algorithm: a loss or a sum of losses; `online_` before it for fresh samples.
        rows, batch, length: see `Workload`.
        completions: of a row; 0 takes a pair's two, or four samples of a prompt.

    Raises:
        ConfigError: an unknown algorithm, or sizes below 1.
    """
    found = algorithms.get(algorithm)
    needs = found.setting().loss.needs
    return Workload(
        algorithm, rows, batch, length, completions or (_SAMPLES if found.on_policy else 2),
        reference=found.on_policy or any(VOCABULARY[name].source == "reference" for name in needs), sampled=found.on_policy,
        heads=len(head_names(needs)),
    )  # fmt: skip
