"""What a loop can be told beyond what every training can be told, and the random numbers of its rounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from prefopt.errors import ConfigError

Labeller = Literal["reward", "people"]
ReferencePoint = Literal["start", "round"]

# One stream of random numbers per purpose and round: a round's draws depend on nothing that an interruption could change.
SAMPLES, LABELS, SIDES, TRAINING = range(4)


def draws(seed: int, purpose: int, *more: int) -> np.random.Generator:
    """A generator whose numbers depend on these numbers alone (a round's, and for labels and sides a row's too)."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose, *more)))


def draw_seed(seed: int, purpose: int, *more: int) -> int:
    """A seed for torch; small enough to be multiplied by what makes orders of epochs."""
    return int(draws(seed, purpose, *more).integers(2**31))


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """How rounds go.

    Args:
        rounds: How often: sample, label, update. A finished loop goes on with --resume and a larger number.
        round_prompts: Prompts sampled from in each round, in the data's order; the next round takes the next ones.
        samples_per_prompt: Completions of each prompt that are labelled together: a pair, or with more than 2 a ranking.
        temperature: Of sampling.
        top_p: Nucleus of sampling.
        labeller: reward labels by what --reward names, through the label model of --labels; people stops each round with a page
            for people to vote on.
        label_batch: Rows that the labeller sees at once, and that may have to be asked again after a crash; 0 takes 1 for a
            function of yours, whose answers may cost something, and 64 for models.
        accept_missing: Go on without the rows that the votes leave out.
        keep_rows: Train every round on the rows of all rounds so far; otherwise on its own.
        reference: What log-ratios and KL penalties are against: the start of the loop, or the start of the round. The KL of
            the table is always against the start of the loop.
    """

    rounds: int = 3
    round_prompts: int = 256
    samples_per_prompt: int = 2
    temperature: float = 1.0
    top_p: float = 1.0
    labeller: Labeller = "reward"
    label_batch: int = 0
    accept_missing: bool = False
    keep_rows: bool = False
    reference: ReferencePoint = "start"

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.round_prompts < 1 or self.label_batch < 0 or self.samples_per_prompt < 2:
            raise ConfigError(
                "rounds and round_prompts must be at least 1, samples_per_prompt at least 2 and label_batch not negative; got "
                f"{self.rounds}, {self.round_prompts}, {self.samples_per_prompt} and {self.label_batch}."
            )
        if not self.temperature > 0 or not 0 < self.top_p <= 1:
            raise ConfigError(f"temperature must be positive and top_p in (0, 1]; got {self.temperature} and {self.top_p}.")
        for name, choices in (("labeller", Labeller), ("reference", ReferencePoint)):
            if getattr(self, name) not in get_args(choices):
                raise ConfigError(f"{name} must be one of {', '.join(get_args(choices))}; got {getattr(self, name)!r}.")
        if self.labeller == "people" and self.samples_per_prompt != 2:
            raise ConfigError(f"people are asked about pairs: samples_per_prompt must be 2, got {self.samples_per_prompt}.")
