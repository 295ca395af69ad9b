"""What happens in a round: sample, label, learn, measure; each step leaves a file and is skipped where the file is."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from prefopt.algorithms import Setting
from prefopt.errors import ConfigError
from prefopt.iterate.folder import round_name, write_json
from prefopt.iterate.labels import LabelBook, agreement, check_label_model, label_by_reward
from prefopt.iterate.options import SAMPLES, LoopOptions, draw_seed
from prefopt.iterate.rows import Labelled, labelled_rows, make_pairs, write_data
from prefopt.iterate.samples import FILE as SAMPLES_FILE
from prefopt.iterate.samples import Origin, Row, choose_prompts, draw_rows, policy_hash, read_rows, write_rows
from prefopt.iterate.update import Learner, prune
from prefopt.iterate.votes import PAGE_FILE, VOTES_FILE, import_votes, votes_on_left, write_page
from prefopt.options import Options, RewardOptions
from prefopt.rewards import Scorer
from prefopt.rewards.build import TRUE
from prefopt.rewards.functions import is_function
from prefopt.runlog import counter
from prefopt.tasks import Task, Training, build_task, prepare_process
from prefopt.trainer import FitResult

START_FILE, ROUND_FILE = "start.json", "round.json"
# Rows that a model scores at once.
_MODEL_BATCH = 64


@dataclass(frozen=True)
class Outcome:
    """Where a loop stands.

    Args:
        start: metrics before the first round.
        rounds: what round.json holds, of every finished round.
        page: what people have to vote on before it can go on; None when all rounds are finished.
    """

    start: Mapping[str, Any]
    rounds: Sequence[Mapping[str, Any]]
    page: Path | None = None


class Rounds:
    """The rounds of one loop in its folder; arguments as those of `iterate`."""

    def __init__(
        self, setting: Setting, options: Options, loop: LoopOptions, output: Path, seed: int, cache: Path, console: Console
    ) -> None:
        self._setting, self._options, self._loop, self._output = setting, options, loop, output
        self._seed, self._cache, self._console = seed, cache, console

    def run(self, votes: Path | None) -> Outcome:
        """All rounds, or those until people have to vote."""
        done: list[dict[str, Any]] = []
        for number in range(1, self._loop.rounds + 1):
            folder = self._folder(number)
            if (folder / ROUND_FILE).exists():
                done.append(_read(folder / ROUND_FILE))
                continue
            if not self._ready(number, folder, votes):
                return Outcome(self._start, done, folder / PAGE_FILE)
            done.append(self._finish(number, folder))
            votes = None  # they were this round's
        if votes is not None:
            raise ConfigError(f"--votes {votes}: all {len(done)} rounds are finished, and none waits for votes.")
        return Outcome(self._start, done)

    def _folder(self, number: int) -> Path:
        return self._output / round_name(number)

    @cached_property
    def _task(self) -> Task:
        prepare_process(self._options, 1)
        return build_task(self._options, self._cache, self._console)

    @cached_property
    def _training(self) -> Training:
        return self._task.training(self._seed)

    @cached_property
    def _learner(self) -> Learner:
        """At the end of the last finished round."""
        learner = Learner(self._task, self._setting, self._options, self._loop, self._seed, self._cache, self._console)
        finished = [n for n in range(1, self._loop.rounds + 1) if (self._folder(n) / ROUND_FILE).exists()]
        if finished:
            learner.load(self._folder(finished[-1]))
        return learner

    @property
    def _start(self) -> dict[str, Any]:
        """The metrics before the first round; measured before anything was trained."""
        path = self._output / START_FILE
        if not path.exists():
            primary = next(metric for metric in self._task.metrics if metric.primary)
            facts = {"key": primary.key, "label": primary.label, "format": primary.format}
            measured = _plain(self._learner.measure())
            write_json(path, {"policy": policy_hash(self._learner.policy), "primary": facts, "metrics": measured})
        return _read(path)

    @cached_property
    def _labeller(self) -> tuple[Scorer, str]:
        reward = self._task.scorer(self._seed)
        return reward.scorer, reward.name

    @cached_property
    def _true_scorer(self) -> Scorer | None:
        """The task's own reward; text has none."""
        if self._options.data.task == "text":
            return None
        if self._options.reward.reward == TRUE:
            return self._task.scorer(self._seed).scorer
        options = replace(self._options, reward=RewardOptions(reward=TRUE))
        return build_task(options, self._cache, self._console).scorer(self._seed).scorer

    def _origin(self, number: int) -> Origin:
        learner, loop = self._learner, self._loop
        seed = draw_seed(self._seed, SAMPLES, number)
        return Origin(policy_hash(learner.policy), loop.temperature, loop.top_p, self._task.max_new_tokens, seed)

    def _sampled(self, number: int, folder: Path) -> list[Row]:
        origin = self._origin(number)
        if (folder / SAMPLES_FILE).exists():
            return read_rows(folder, origin)
        prompts = choose_prompts(self._training, self._loop.round_prompts, number, self._seed)
        rows = draw_rows(
            self._learner.policy, prompts, self._training.texts, origin, samples=self._loop.samples_per_prompt,
            eos_ids=self._task.eos_ids, name=folder.name, on_progress=counter(self._console, f"round {number}: sampling"),
        )  # fmt: skip
        write_rows(folder, rows, origin)
        return rows

    def _ready(self, number: int, folder: Path, votes: Path | None) -> bool:
        """True when the round's rows are labelled; False when people have to vote first."""
        assert self._start  # before the first update
        rows = self._sampled(number, folder)
        book = LabelBook(folder, rows)
        if self._loop.labeller == "reward":
            if book.missing:
                scorer, _ = self._labeller
                batch = self._loop.label_batch or (1 if is_function(self._options.reward.reward) else _MODEL_BATCH)
                data = self._options.data
                model = check_label_model(data.labels, data.label_temperature, self._loop.samples_per_prompt)
                label_by_reward(book, scorer, model, batch=batch, seed=self._seed, number=number, console=self._console)
            return True
        return self._voted(number, folder, rows, book, votes)

    def _voted(self, number: int, folder: Path, rows: Sequence[Row], book: LabelBook, votes: Path | None) -> bool:
        for path in (votes, folder / VOTES_FILE):
            if path is not None and (path == votes or path.exists()):
                self._say(f"round {number}: {import_votes(path, book, rows)} new votes from {path}")
        missing = len(book.missing)
        if not missing or (self._loop.accept_missing and book.labels):
            return True
        page = write_page(folder, rows, self._seed, number)
        cast = f"{len(book.labels)} of {len(rows)} rows are voted on; {missing} are missing. " if book.labels else ""
        self._say(
            f"round {number}: {cast}Open {page} in a browser, vote, and save the votes. Then: the same command with --resume "
            f"--votes FILE (or with the file as {folder / VOTES_FILE}); --accept-missing does without rows that have no vote."
        )
        return False

    def _history(self, before: int) -> Labelled:
        """The labelled rows of all rounds before this one."""
        history: list[Any] = []
        for number in range(1, before):
            rows = read_rows(self._folder(number))
            history += labelled_rows(rows, LabelBook(self._folder(number), rows).labels)
        return history

    def _finish(self, number: int, folder: Path) -> dict[str, Any]:
        """Learns from the round's labels and measures what came of it."""
        began = time.perf_counter()
        rows = read_rows(folder)
        labels = LabelBook(folder, rows).labels
        fresh, history = labelled_rows(rows, labels), self._history(number)
        write_data(folder, fresh)
        learner, pairs = self._learner, make_pairs(fresh)
        learner.begin_round()
        metrics = {"labels/agree_before": learner.agreement(pairs, history)}
        facts: dict[str, Any] = {"round": number, **self._provenance(number)}
        if self._setting.algorithm.on_policy:
            reward = learner.learn_reward([*history, *fresh])
            facts["reward_model"] = {key: value for key, value in reward.stages["reward model"].facts.items() if key != "right"}
        result = learner.train(number, folder, [*history, *fresh] if self._loop.keep_rows else fresh, self._training)
        metrics |= {
            "labels/agree_after": learner.agreement(pairs, history),
            **self._label_metrics(rows, labels),
            **learner.measure(),
        }
        if self._setting.algorithm.on_policy:
            metrics["proxy"] = _last(result, "score")
        learner.save(folder)
        facts |= {
            "policy_after": policy_hash(learner.policy),
            "counts": {
                "prompts": self._loop.round_prompts, "rows": len(rows), "labels": len(labels),
                "ties": sum(label.tie for label in labels.values()), "unlabelled": len(rows) - len(labels),
                "labels_so_far": len(history) + len(fresh), "updates": result.steps, "trained_tokens": result.tokens,
            },
            "metrics": _plain(metrics),
            "time/seconds": time.perf_counter() - began,
        }  # fmt: skip
        prune(folder, keep=1)
        write_json(folder / ROUND_FILE, facts)
        if number > 1:
            prune(self._folder(number - 1), keep=0)  # its policy stays; nothing starts from its optimizer any more
        return facts

    def _provenance(self, number: int) -> dict[str, Any]:
        options, people = self._options, self._loop.labeller == "people"
        return {
            "start": self._learner.start.weights,
            "sampling": {**asdict(self._origin(number)), "samples_per_prompt": self._loop.samples_per_prompt},
            "labeller": {"name": "people"}
            if people
            else {"name": self._labeller[1], "labels": options.data.labels, "temperature": options.data.label_temperature},
            "update": {
                "algorithm": self._setting.algorithm.name,
                "hyper": dict(self._setting.hyper),
                "reference": self._loop.reference,
            },
            "seed": self._seed,
        }

    def _label_metrics(self, rows: Sequence[Row], labels: Mapping[str, Any]) -> dict[str, float]:
        """What is known of the labels without what was learned from them."""
        import torch

        found = {"labels/left": votes_on_left([*labels.values()])} if self._loop.labeller == "people" else {}
        scores = [label.scores for label in labels.values() if label.scores is not None]
        if scores:
            found["samples/score"] = float(torch.tensor(scores).mean())
        if self._true_scorer is not None:
            texts = [(row.prompt, text) for row in rows for text in row.completions]
            true = self._true_scorer([prompt for prompt, _ in texts], [text for _, text in texts]).view(len(rows), -1)
            found |= {"samples/true": float(true.mean()), "labels/agree_true": agreement(rows, labels, true)}
        return found

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)


def _plain(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """For JSON, which has no NaN."""
    return {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}


def _last(result: FitResult, key: str) -> float:
    return next((float(line[key]) for line in reversed(result.lines) if key in line), math.nan)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
