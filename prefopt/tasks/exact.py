"""The exactly solvable world as a task: every metric is an expectation over all completions."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from losses.registry import BoundLoss
from prefopt.data.exact_world import ExactWorld, WorldConfig, beta_at_kl, expected, frontier, optimal_logps, regret
from prefopt.data.records import Record
from prefopt.data.report import DataReport
from prefopt.errors import ConfigError
from prefopt.models.causal_lm import CausalLMPolicy, FrozenReference
from prefopt.optimization import Optimization
from prefopt.options import Options
from prefopt.reference import ReferenceCache
from prefopt.report.schema import FrontierPoint, Metric
from prefopt.rewards import Scorer
from prefopt.stages import Stage, reward_model, supervised_start
from prefopt.streams import Budget
from prefopt.tasks.protocol import Measured, Shared, Training
from prefopt.tokenize import Tokenized, tokenize

# The reference: SFT of the small LM on samples of the world's random source. Enough that lengths and EOS are learned.
START_SAMPLES = 16384
START_BUDGET = Budget(batch_size=256, epochs=4.0, micro_batch_tokens=1 << 20)
START_OPTIMIZATION = Optimization(learning_rate=3e-3, schedule="cosine", warmup=0.05)
# One fixed price of KL for the regret column, since each loss's own strength means something else.
REGRET_BETA = 0.5
# Two digits, so that a figure can name them.
FRONTIER_BETAS = tuple(float(f"{b:.2g}") for b in torch.logspace(-1.7, 1.7, 60, base=10.0).tolist())


class ExactTask:
    """See `Task`. The cells of a seed see pairs drawn with that seed, so intervals over seeds include label noise."""

    metrics = (
        Metric("reward", "hidden reward", "up", primary=True, note="exact expectation over all completions"),
        Metric("kl", "KL to reference", None, note="exact, nats per completion"),
        Metric(
            "gap", "gap at equal KL", "down", note="reward of the optimal policy with the same KL, minus the reward reached"
        ),
        Metric(
            "regret", f"regret (beta {REGRET_BETA})", "down", note="E[r] - beta KL of the optimum, minus that of the policy"
        ),
        Metric(
            "pair_accuracy",
            "pair accuracy",
            "up",
            ".1%",
            diagnostic=True,
            note="log-ratio sum against the hidden reward, exact",
        ),
        Metric("entropy", "entropy", None, note="nats per completion"),
        Metric("length", "length", None, ".2f", note="expected tokens, EOS included"),
        Metric("eos_share", "ends by EOS", None, ".1%"),
    )

    def __init__(self, options: Options, cache: Path, console: Console | None = None) -> None:
        self._options, self._cache, self._console = options, cache, console
        self.world = ExactWorld(WorldConfig(seed=options.data.world))
        self.max_new_tokens = self.world.config.max_completion_length
        self.eos_ids = (self.world.layout.eos,)
        self._pairs: dict[int, tuple[list[Record], Tokenized]] = {}

    @cached_property
    def _start(self) -> tuple[Any, Stage]:
        torch.manual_seed(self.world.config.seed)
        model = AutoModelForCausalLM.from_config(self.world.model_config())
        samples = self._tokenize(self.world.source_records(START_SAMPLES, seed=0)).examples
        stage = supervised_start(
            model, self.world.tokenizer, samples, both=False, budget=START_BUDGET, optimization=START_OPTIMIZATION,
            cache=self._cache, console=self._console,
        )  # fmt: skip
        return model, stage

    @cached_property
    def reference_logps(self) -> torch.Tensor:
        """[G, C] float64, by enumeration with transformers' own attention."""
        with CausalLMPolicy(copy.deepcopy(self._start[0]), self.world.tokenizer).plain_attention() as model:
            return self.world.sequence_logps(self.world.next_logps(model))

    def start(self) -> tuple[Any, Any]:
        return copy.deepcopy(self._start[0]), self.world.tokenizer

    def training(self, seed: int) -> Training:
        records, tokenized = self._labelled(seed)
        return Training(tokenized.examples, {r.id: r.prompt for r in records}, DataReport(tokens=tokenized.report))

    def scorer(self, seed: int) -> tuple[Scorer, Stage]:
        supervised = self._options.supervised
        budget = Budget(
            batch_size=supervised.reward_batch_size, epochs=supervised.reward_epochs, micro_batch_tokens=1 << 20, seed=seed
        )
        held_out = self._tokenize(self._draw(512, _HELD_OUT)).examples
        model, tokenizer = self.start()
        return reward_model(
            model, tokenizer, self._labelled(seed)[1].examples, held_out, lora=None, budget=budget,
            optimization=Optimization(learning_rate=supervised.reward_learning_rate), max_length=self._max_length,
            max_completion_length=self.max_new_tokens, cache=self._cache, console=self._console, title="PPO's reward model",
        )  # fmt: skip

    def evaluate(
        self, policy: CausalLMPolicy, reference: FrozenReference, cache: ReferenceCache, loss: BoundLoss | None, seed: int
    ) -> Measured:
        with policy.plain_attention() as model:
            logps = self.world.sequence_logps(self.world.next_logps(model))
        return Measured(self._measure(logps))

    def shared(self, *, on_policy: bool) -> Shared:
        line = frontier(self.reference_logps, self.world.rewards, FRONTIER_BETAS)
        points = [FrontierPoint(float(k), float(r), float(b)) for b, k, r in zip(line.betas, line.kl, line.reward, strict=True)]
        return Shared(
            reference=self._measure(self.reference_logps),
            frontier=sorted(points, key=lambda point: point.kl),
            stages={"SFT of the reference": self._start[1]},
            notes=(
                f"Exact world {self.world.config.seed}: {len(self.world.prompts)} prompts, "
                f"{self.world.layout.completions:,} completions each, all enumerated. "
                "Every seed draws its own pairs and labels.",
            ),
        )

    def _measure(self, logps: torch.Tensor) -> dict[str, float]:
        found = self.world.evaluate(logps, self.reference_logps).means()
        found["regret"] = float(regret(logps, self.reference_logps, self.world.rewards, REGRET_BETA).mean())
        found["gap"] = self._best_reward(found["kl"]) - found["reward"]
        return found

    def _best_reward(self, kl: float) -> float:
        """The reward of the optimal policy whose mean KL is `kl`: the reference at 0, the best completion past the last."""
        if kl < 1e-6:  # below it the search for a beta has no digits left
            return float(expected(self.world.rewards, self.reference_logps).mean())
        try:
            beta = beta_at_kl(self.reference_logps, self.world.rewards, kl)
        except ConfigError:
            return float(self.world.rewards.amax(-1).mean())
        return float(expected(self.world.rewards, optimal_logps(self.reference_logps, self.world.rewards, beta)).mean())

    @property
    def _max_length(self) -> int:
        return max(self.world.config.prompt_lengths) + self.max_new_tokens

    def _labelled(self, seed: int) -> tuple[list[Record], Tokenized]:
        if seed not in self._pairs:
            records = self._draw(self._options.data.pairs, seed)
            self._pairs[seed] = records, self._tokenize(records)
        return self._pairs[seed]

    def _draw(self, count: int, seed: int) -> list[Record]:
        data = self._options.data
        return self.world.pairs(self.reference_logps, count, labels=data.labels, temperature=data.label_temperature, seed=seed)

    def _tokenize(self, records: Sequence[Record]) -> Tokenized:
        return tokenize(records, self.world.tokenizer, max_length=self._max_length, max_completion_length=self.max_new_tokens)


# Pairs for the reward model's reported accuracy: a seed that no study uses.
_HELD_OUT = 1_000_000
