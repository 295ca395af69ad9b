"""The exactly solvable world as a task: every metric is an expectation over all completions."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from losses.registry import BoundLoss
from prefopt.data.exact_world import ExactWorld, WorldConfig, beta_at_kl, expected, frontier, optimal_logps, regret
from prefopt.data.records import Example, Record, Text
from prefopt.data.report import DataReport
from prefopt.errors import ConfigError
from prefopt.hydra import HYDRA_BASE, HydraBase, hydra_base
from prefopt.models.causal_lm import CausalLMPolicy, FrozenReference
from prefopt.models.fingerprint import fingerprint
from prefopt.models.hydra import BASED
from prefopt.models.tabular import TabularPolicy, build_tabular
from prefopt.optimization import Optimization
from prefopt.options import ModelOptions, Options
from prefopt.reference import ReferenceCache
from prefopt.report.schema import FrontierPoint, Metric
from prefopt.rewards import RewardModelScorer
from prefopt.rewards.build import REWARD_MODEL, Reward, build_reward, member_seed
from prefopt.stages import Stage, reward_loss, reward_model, supervised_start
from prefopt.streams import Budget
from prefopt.tasks.protocol import Measured, Shared, Training
from prefopt.tokenize import Tokenized, tokenize

# The reference: SFT of the small LM on samples of the world's random source. Enough that lengths and EOS are learned.
START_SAMPLES = 16384
START_BUDGET = Budget(batch_size=256, epochs=4.0, micro_batch_tokens=1 << 20)
START_OPTIMIZATION = Optimization(learning_rate=3e-3, schedule="cosine", warmup=0.05)
# One fixed price of KL for the regret column, since each loss's own strength means something else.
REGRET_BETA = 0.5
# --model: free logits for every prompt and prefix instead of the small language model, started at the same log-probs.
TABULAR = "tabular"
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
        _check_model(options.model)
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
            CausalLMPolicy(model, self.world.tokenizer), fingerprint(model), samples, both=False, budget=START_BUDGET,
            optimization=START_OPTIMIZATION, cache=self._cache, console=self._console,
        )  # fmt: skip
        return model, stage

    @cached_property
    def _shared(self) -> tuple[Any, HydraBase | None]:
        """What every cell starts from: the SFT start, or the Hydra base made of it with pairs of its own samples."""
        options, model = self._options, self._start[0]
        if options.model.hydra not in BASED:
            return model, None
        logps = self.world.sequence_logps(self._next_logps(model))
        train, held_out = (
            self._tokenize(self._draw(count, seed, logps)).examples
            for count, seed in ((options.data.pairs, _HYDRA_PAIRS), (512, _HELD_OUT))
        )
        model = copy.deepcopy(model)
        base = hydra_base(
            model, self.world.tokenizer, train, held_out, options=options, micro_batch_tokens=1 << 20,
            max_length=self._max_length, max_completion_length=self.max_new_tokens, cache=self._cache, console=self._console,
        )  # fmt: skip
        return model, base

    @property
    def hydra_base(self) -> HydraBase | None:
        """See `Task.hydra_base`."""
        return self._shared[1]

    def _next_logps(self, model: Any) -> torch.Tensor:
        with CausalLMPolicy(copy.deepcopy(model), self.world.tokenizer).plain_attention() as plain:
            return self.world.next_logps(plain)

    @cached_property
    def reference_next_logps(self) -> torch.Tensor:
        """[G, N, V] float64, by enumeration with transformers' own attention."""
        return self._next_logps(self._shared[0])

    @cached_property
    def reference_logps(self) -> torch.Tensor:
        """[G, C] float64."""
        return self.world.sequence_logps(self.reference_next_logps)

    def start(self) -> tuple[Any, Any]:
        return copy.deepcopy(self._shared[0]), self.world.tokenizer

    def own_policies(self, heads: Collection[str], seed: int) -> tuple[CausalLMPolicy, FrozenReference] | None:
        tabular = self._options.model.model == TABULAR
        return build_tabular(self.world, self.reference_next_logps, heads=heads) if tabular else None

    def training(self, seed: int) -> Training:
        records, tokenized = self._labelled(seed)
        return Training(tokenized.examples, {r.id: r.prompt for r in records}, DataReport(tokens=tokenized.report))

    def scorer(self, seed: int) -> Reward:
        return build_reward(self._options, self._cache, train=partial(self._reward_model, seed), true=self._true_reward)

    def _true_reward(self, prompts: Sequence[Text], completions: Sequence[str]) -> torch.Tensor:
        """[N] hidden rewards."""
        texts = zip(map(str, prompts), completions, strict=True)
        return torch.tensor([self.world.reward_text(prompt, completion) for prompt, completion in texts])

    def _reward_model(self, seed: int, member: int) -> tuple[RewardModelScorer, Stage]:
        supervised, reward = self._options.supervised, self._options.reward
        budget = Budget(
            batch_size=supervised.reward_batch_size, epochs=supervised.reward_epochs, micro_batch_tokens=1 << 20,
            seed=member_seed(seed, member),
        )  # fmt: skip
        model, tokenizer = self.start()
        return reward_model(
            model, tokenizer, self._labelled(seed)[1].examples, self.held_out(),
            loss=reward_loss(reward.reward_loss, center_coef=reward.reward_center_coef), lora=None, budget=budget,
            optimization=Optimization(learning_rate=supervised.reward_learning_rate), max_length=self._max_length,
            max_completion_length=self.max_new_tokens, cache=self._cache, console=self._console, title=REWARD_MODEL,
        )  # fmt: skip

    def held_out(self) -> Sequence[Example]:
        return self._tokenize(self._draw(512, _HELD_OUT)).examples

    def evaluate(
        self, policy: CausalLMPolicy, reference: FrozenReference, cache: ReferenceCache, loss: BoundLoss | None, seed: int
    ) -> Measured:
        return Measured(self._measure(self.policy_logps(policy)))

    def policy_logps(self, policy: CausalLMPolicy) -> torch.Tensor:
        """[G, C] float64, by enumeration."""
        if isinstance(policy, TabularPolicy):
            return self.world.sequence_logps(policy.next_logps())
        with policy.plain_attention() as model:
            return self.world.sequence_logps(self.world.next_logps(model))

    def shared(self, *, on_policy: bool) -> Shared:
        base = self.hydra_base
        line = frontier(self.reference_logps, self.world.rewards, FRONTIER_BETAS)
        points = [FrontierPoint(float(k), float(r), float(b)) for b, k, r in zip(line.betas, line.kl, line.reward, strict=True)]
        return Shared(
            reference=self._measure(self.reference_logps),
            frontier=sorted(points, key=lambda point: point.kl),
            stages={"SFT of the reference": self._start[1]} | ({HYDRA_BASE: base.stage} if base is not None else {}),
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

    def _draw(self, count: int, seed: int, logps: torch.Tensor | None = None) -> list[Record]:
        data = self._options.data
        logps = self.reference_logps if logps is None else logps
        return self.world.pairs(logps, count, labels=data.labels, temperature=data.label_temperature, seed=seed)

    def _tokenize(self, records: Sequence[Record]) -> Tokenized:
        return tokenize(records, self.world.tokenizer, max_length=self._max_length, max_completion_length=self.max_new_tokens)


def _check_model(model: ModelOptions) -> None:
    if model.model not in ("", TABULAR):
        raise ConfigError(
            f"--model {model.model}: the exact world brings its own language model; leave --model out, or say {TABULAR!r} for "
            "a table of free logits."
        )
    if model.model == TABULAR and (model.lora or model.activation_checkpointing or model.hydra != "trunk"):
        raise ConfigError("a table has no layers: --lora, --hydra and --activation-checkpointing do nothing to it; drop them.")


# Seeds that no study uses: pairs for the reward model's reported accuracy, and those that a Hydra base is made of.
_HELD_OUT, _HYDRA_PAIRS = 1_000_000, 1_000_001
