"""Controlled sentiment as a task: a language model under a known reward (Rafailov et al. 2023 [rafailov2023dpo], section 6.1).

Every seed draws pairs of samples from the shared start, labelled by the gold reward: algorithms are measured by the reward that
their labels came from, and by a lexicon that shares nothing with it.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from losses.registry import BoundLoss
from prefopt.data.exact_world.labels import LabelModel, parse_labels
from prefopt.data.records import Example, Record, Text
from prefopt.data.report import DataReport
from prefopt.data.sentiment import FOLDS, Opening, Review, openings, read_reviews, source_name, split_folds
from prefopt.errors import ConfigError
from prefopt.evaluate import correlation, measure_pairs, perplexity, sample_and_measure, wilson_interval
from prefopt.generate import Decoding
from prefopt.hydra import HYDRA_BASE, HydraBase, hydra_base
from prefopt.models.causal_lm import CausalLMPolicy, FrozenReference, build_policy
from prefopt.models.fingerprint import fingerprint
from prefopt.models.hydra import BASED, HydraPolicy
from prefopt.models.lora import LoRA
from prefopt.models.small import small_llama, train_tokenizer
from prefopt.optimization import Optimization
from prefopt.options import Options
from prefopt.reference import ReferenceCache
from prefopt.report.schema import Judge, Metric
from prefopt.rewards import RewardModelScorer, Scorer
from prefopt.rewards.build import REWARD_MODEL, Reward, build_reward, member_seed
from prefopt.rewards.gold import GoldReward, LexiconJudge
from prefopt.runlog import counter
from prefopt.sampled_pairs import Prompt, label_pairs, sampled_pairs
from prefopt.stages import Stage, reward_loss, reward_model, supervised_start
from prefopt.streams import Budget
from prefopt.tasks.language import (
    PAIR_METRICS,
    SAMPLE_METRICS,
    SAMPLING_SEED,
    end_ids,
    length_baselines,
    load_named,
    place,
    reward_model_record,
    shared_start,
)
from prefopt.tasks.protocol import Measured, Shared, Training
from prefopt.tokenize import tokenize

GOLD, LEXICON, PROXY = "gold", "lexicon", "proxy"
# Tokens of a completion where --max-completion-length names none: most sentences end within them.
MAX_NEW_TOKENS = 32
# The small language model: as large as a few minutes on two cores allow.
VOCABULARY = 4096
LANGUAGE_BUDGET = Budget(batch_size=16, max_steps=1200, micro_batch_tokens=8192)
LANGUAGE_OPTIMIZATION = Optimization(learning_rate=3e-3, schedule="cosine", warmup=0.05, weight_decay=0.1)
_POLICY_PROMPTS, _NEUTRAL_SENTENCES = 4096, 256
# Seeds that no study uses: held-out pairs, and pairs for a Hydra base.
_HELD_OUT, _HYDRA_PAIRS = 1_000_000, 1_000_001


class SentimentTask:
    """See `Task`. Reviews are split into folds once; every seed draws its own pairs and labels."""

    metrics = (
        Metric(f"score/{GOLD}", "gold reward", "up", "+.3f", primary=True, note="log-odds of positive, the labels' own source"),
        Metric(f"score/{LEXICON}", "lexicon", "up", "+.3f", note="VADER's compound score, -1 to 1: an independent witness"),
        Metric(f"score/{PROXY}", "proxy reward", "up", "+.3f", note="the learned reward that on-policy algorithms maximise"),
        *SAMPLE_METRICS,
        Metric("perplexity", "perplexity", "down", ".1f", diagnostic=True, note="of neutral held-out reviews: retention"),
        *PAIR_METRICS,
    )

    def __init__(self, options: Options, cache: Path, console: Console | None = None) -> None:
        self._options, self._cache, self._console = options, cache, console
        if options.model.init != "as-is" and not options.model.model:
            raise ConfigError(
                f"--init {options.model.init} is of a model that --model names; without one, the small model is always trained "
                "on reviews."
            )
        self._labels = parse_labels(options.data.labels, options.data.label_temperature)
        read = read_reviews(options.data.source, on_bad_row=options.data.on_bad_row)
        self._read = read.report
        self.folds = split_folds(read.reviews)
        self.gold = GoldReward(*_texts_and_labels(self.folds["gold"]))
        self.lexicon = LexiconJudge()
        self._loaded = self._load()
        self.eos_ids = end_ids(self._loaded[1], self._loaded[0])
        self.max_new_tokens = options.data.max_completion_length or MAX_NEW_TOKENS
        self._lora = LoRA(r=options.model.lora, alpha=2 * options.model.lora) if options.model.lora else None
        self._training: dict[int, Training] = {}
        self._rewards: dict[int, Reward] = {}

    def _load(self) -> tuple[Any, Any]:
        """The model that is asked for with its tokenizer, or the small one, untrained."""
        asked = self._options.model
        if asked.model:
            found = load_named(asked, self._cache)
            return found.model, found.tokenizer
        tokenizer = train_tokenizer((o.prompt + o.rest for o in openings(self.folds["language"])), VOCABULARY)
        return small_llama(tokenizer, self._options.data.max_length).to(place(asked.device)), tokenizer

    @cached_property
    def _start(self) -> tuple[Any, Stage | None]:
        """The model after what it learned from the language fold."""
        model, tokenizer = self._loaded
        texts = self.tokenize(openings(self.folds["language"]))
        if self._options.model.model:
            return model, shared_start(self._options, model, tokenizer, texts, self._cache, self._console)
        return model, supervised_start(
            CausalLMPolicy(model, tokenizer), fingerprint(model), texts, both=False,
            budget=replace(LANGUAGE_BUDGET, epochs=self._options.supervised.language_epochs),
            optimization=LANGUAGE_OPTIMIZATION, cache=self._cache, console=self._console,
        )  # fmt: skip

    @cached_property
    def _shared(self) -> tuple[Any, HydraBase | None]:
        """What every cell starts from: the start, or the Hydra base made of it with pairs of its own samples."""
        options, model = self._options, self._start[0]
        if options.model.hydra not in BASED:
            return model, None
        train, _ = self._pairs(model, "policy", options.data.pairs, self._labels, _HYDRA_PAIRS)
        held_out = self._test_pairs(model)
        model = copy.deepcopy(model)
        base = hydra_base(
            model, self._loaded[1], train, held_out, options=options, micro_batch_tokens=options.budget.micro_batch_tokens,
            max_length=options.data.max_length, max_completion_length=self.max_new_tokens, cache=self._cache,
            console=self._console,
        )  # fmt: skip
        return model, base

    @property
    def hydra_base(self) -> HydraBase | None:
        """See `Task.hydra_base`."""
        return self._shared[1]

    def start(self) -> tuple[Any, Any]:
        return copy.deepcopy(self._shared[0]), self._loaded[1]

    def own_policies(self, heads: Collection[str], seed: int) -> None:
        return None

    def training(self, seed: int) -> Training:
        if seed not in self._training:
            examples, texts = self._pairs(self._shared[0], "policy", self._options.data.pairs, self._labels, seed)
            self._training[seed] = Training(examples, texts, DataReport(self._read))
        return self._training[seed]

    def scorer(self, seed: int) -> Reward:
        if seed not in self._rewards:
            train = partial(self._reward_model, seed)
            self._rewards[seed] = build_reward(self._options, self._cache, train=train, true=self.gold)
        return self._rewards[seed]

    def _reward_model(self, seed: int, member: int) -> tuple[RewardModelScorer, Stage]:
        options, supervised = self._options, self._options.supervised
        budget = Budget(
            supervised.reward_batch_size, 0, options.budget.micro_batch_tokens, supervised.reward_epochs,
            seed=member_seed(seed, member),
        )  # fmt: skip
        model, tokenizer = self.start()
        return reward_model(
            model, tokenizer, self.training(seed).examples, self.held_out(),
            loss=reward_loss(options.reward.reward_loss, center_coef=options.reward.reward_center_coef), lora=self._lora,
            budget=budget, optimization=Optimization(learning_rate=supervised.reward_learning_rate),
            max_length=options.data.max_length, max_completion_length=self.max_new_tokens, cache=self._cache,
            console=self._console, title=REWARD_MODEL,
        )  # fmt: skip

    def held_out(self) -> Sequence[Example]:
        return self._held_out

    @cached_property
    def _held_out(self) -> list[Example]:
        return self._test_pairs(self._shared[0])

    def _test_pairs(self, model: Any) -> list[Example]:
        """Pairs on test prompts in the gold reward's order, without label noise."""
        count = self._options.evaluation.eval_pairs or len(self.prompts(self._options.evaluation.eval_rows))
        return self._pairs(model, self._options.evaluation.eval_rows, count, parse_labels("deterministic"), _HELD_OUT)[0]

    def evaluate(
        self, policy: CausalLMPolicy, reference: FrozenReference, cache: ReferenceCache, loss: BoundLoss | None, seed: int
    ) -> Measured:
        budget, asked = self._options.budget.micro_batch_tokens, self._options.evaluation
        prompts = self.prompts(asked.eval_rows)[: asked.eval_prompts]
        samples = sample_and_measure(
            policy, reference, [Example(p.id, p.ids, ()) for p in prompts], {p.id: p.text for p in prompts},
            max_new_tokens=min(asked.eval_tokens, self.max_new_tokens), eos_ids=self.eos_ids, seed=SAMPLING_SEED + seed,
            judges=self._judges(policy, seed), micro_batch_tokens=budget,
            on_progress=counter(self._console, "sampling for evaluation"),
        )  # fmt: skip
        pairs = measure_pairs(policy, cache, self.held_out(), loss, budget)
        found = {
            **pairs.metrics,
            **samples.metrics(),
            "perplexity": perplexity(policy, self._neutral, budget),
        }
        return Measured(found, samples.rows(seed), pairs.rows, int(samples.lengths.sum()))

    def _judges(self, policy: CausalLMPolicy, seed: int) -> dict[str, Scorer]:
        """The learned reward is among them where this process has it, or where it is asked for."""
        base, judges = self.hydra_base, dict[str, Scorer]({GOLD: self.gold, LEXICON: self.lexicon})
        if base is not None:
            reward = base.reward(policy) if isinstance(policy, HydraPolicy) else None
        else:
            reward = self.scorer(seed) if self._options.evaluation.proxy else self._rewards.get(seed)
        if reward is not None and reward.scorer is not self.gold:
            judges[PROXY] = reward.scorer
        return judges

    def shared(self, *, on_policy: bool) -> Shared:
        policy, reference = build_policy(*self.start())
        cache = ReferenceCache(
            reference, self._cache / "reference", micro_batch_tokens=self._options.budget.micro_batch_tokens,
            on_progress=counter(self._console, "reference log-probs"),
        )  # fmt: skip
        base, stages = self.hydra_base, {}
        if self._start[1] is not None:
            stages["SFT of the shared start"] = self._start[1]
        if base is not None:
            stages[HYDRA_BASE] = base.stage
        reward = self.scorer(0) if on_policy and base is None else None
        notes = [self._fold_note(), self._prompt_note()]
        if reward is not None:
            stages |= reward.stages
            notes.append(f"On-policy algorithms maximise {reward.name}.")
        measured = self.evaluate(policy, reference, cache, None, 0)
        return Shared(
            reference={**measured.metrics, "own_accuracy": float("nan")},
            baselines=length_baselines(self.held_out()),
            judges=self._judge_records(reward),
            stages=stages,
            notes=notes,
        )

    def _judge_records(self, reward: Reward | None) -> tuple[Judge, ...]:
        """Accuracy on labelled reviews of a fold of their own (0 counts half); then that of learned rewards, on pairs."""
        texts, positive = _texts_and_labels(self.folds["gold_test"])
        found = {GOLD: self.gold.scores(texts), LEXICON: self.lexicon.scores(texts)}
        right = {name: _right(scores, positive) for name, scores in found.items()}
        shared = correlation((1 - right[GOLD]).tolist(), (1 - right[LEXICON]).tolist())
        notes = {
            GOLD: f"logistic regression on {len(self.folds['gold'])} labelled reviews",
            LEXICON: "VADER, not fitted" + (f"; its errors correlate {shared:+.2f} with gold's" if shared is not None else ""),
        }
        lengths = [float(len(text.split())) for text in texts]
        known = tuple(
            Judge(
                name, float(right[name].mean()), *wilson_interval(float(right[name].sum()), len(texts)), len(texts),
                length_bias=correlation(found[name].tolist(), lengths), note=notes[name],
            )
            for name in found
        )  # fmt: skip
        learned = {} if reward is None else reward.stages
        return *known, *(reward_model_record(name, stage, "pairs of seed 0") for name, stage in learned.items())

    def _fold_note(self) -> str:
        sizes = ", ".join(f"{len(self.folds[fold]):,} {fold}" for fold in FOLDS)
        return (
            f"Reviews of {source_name(self._options.data.source)} by fold: {sizes}. The fold is a hash of a text's letters "
            "and digits, so no text is in two folds, and none that differs in case, punctuation or spacing only."
        )

    def _prompt_note(self) -> str:
        data, wanted = self._options.data, self._options.evaluation
        asked = min(wanted.eval_prompts, len(self.prompts(wanted.eval_rows)))
        return (
            f"Prompts are the first words of sentences: {len(self.prompts('policy')):,} to train on, {asked:,} to evaluate "
            f"on. Completions have at most {self.max_new_tokens} tokens. Every seed draws {data.pairs:,} pairs of samples from "
            f"the shared start, labelled by the gold reward ({data.labels}). Accuracy is that on {len(self.held_out()):,} "
            "held-out pairs in the gold reward's order."
        )

    @cached_property
    def _neutral(self) -> Sequence[Example]:
        return self.tokenize(openings(self.folds["neutral"])[:_NEUTRAL_SENTENCES])

    @cached_property
    def _prompts_by_role(self) -> dict[str, list[Prompt]]:
        held_out = openings(self.folds["test"])
        found = {
            "policy": openings(self.folds["policy"], every_length=True)[:_POLICY_PROMPTS],
            "test": held_out[: len(held_out) // 2],
            "tuning": held_out[len(held_out) // 2 :],
        }
        return {
            role: [Prompt(o.id, o.prompt, e.prompt_ids) for o, e in zip(members, self.tokenize(members), strict=True)]
            for role, members in found.items()
        }

    def prompts(self, role: str) -> list[Prompt]:
        """Openings to be continued: "policy" to train on, "test" to evaluate on, "tuning" while numbers are chosen."""
        return self._prompts_by_role[role]

    def _pairs(self, model: Any, role: str, count: int, labels: LabelModel, seed: int) -> tuple[list[Example], dict[str, Text]]:
        """Samples of a model on a role's prompts, labelled by the gold reward, and the prompts' texts by example id."""
        prompts = self.prompts(role)
        policy = CausalLMPolicy(copy.deepcopy(model), self._loaded[1])
        policy.train(False)
        # Of each token here: a whole completion's distribution cannot be flattened by sampling.
        temperature = labels.parameter if labels.name == "shifted" else 1.0
        pairs = sampled_pairs(
            policy, prompts, count, Decoding(self.max_new_tokens, temperature), eos_ids=self.eos_ids, seed=seed,
            cache=self._cache, console=self._console, on_progress=counter(self._console, "sampling pairs"),
        )  # fmt: skip
        asked = [prompts[pair.prompt].text for pair in pairs for _ in pair.texts]
        rewards = self.gold(asked, [text for pair in pairs for text in pair.texts]).view(-1, 2)
        examples = label_pairs(pairs, prompts, rewards, labels, seed=seed, name=f"sentiment:{role}:{seed}")
        return examples, {example.id: prompts[pair.prompt].text for example, pair in zip(examples, pairs, strict=True)}

    def tokenize(self, found: Sequence[Opening]) -> Sequence[Example]:
        """Openings with what followed them as examples of one completion."""
        records = [Record(opening.id, opening.prompt, (opening.rest,)) for opening in found]
        limit = self._options.data.max_length
        return tokenize(records, self._loaded[1], max_length=limit, max_completion_length=limit // 2).examples


def _texts_and_labels(reviews: Sequence[Review]) -> tuple[list[str], list[bool]]:
    return [review.text for review in reviews], [review.positive for review in reviews]


def _right(scores: Tensor, positive: Sequence[bool]) -> Tensor:
    """[N] 1 where the sign of a score is that of the label, 0.5 where the score is 0."""
    signs = torch.tensor(positive).float() * 2 - 1
    return 0.5 + 0.5 * signs * scores.sign()
