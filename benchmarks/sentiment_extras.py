"""What benchmarks.sentiment measures besides the comparison: the reference's samples, best of n, and demonstrations."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from prefopt import algorithms
from prefopt.best_of_n import best_of_n, kl_bound
from prefopt.cell import run_cell
from prefopt.data.report import DataReport
from prefopt.data.sentiment import openings
from prefopt.engines import build_engine
from prefopt.files import write_json
from prefopt.generate import Decoding
from prefopt.models.causal_lm import build_policy
from prefopt.options import Options
from prefopt.reference import ReferenceCache
from prefopt.report.schema import PromptRow
from prefopt.study import Study
from prefopt.tasks import prepare_process
from prefopt.tasks.protocol import Training
from prefopt.tasks.sentiment import GOLD, PROXY, SentimentTask

_BEST_OF_SEED = 31_337


def reference_rows(study: Study, output: Path, cache: Path, console: Console) -> list[PromptRow]:
    """The shared start measured as a policy is, with the draws of each seed: one row for every judge and prompt."""

    def measure() -> list[dict[str, Any]]:
        task = SentimentTask(study.options, cache, console)
        policy, reference = build_policy(*task.start())
        known = ReferenceCache(reference, cache / "reference", micro_batch_tokens=study.options.budget.micro_batch_tokens)
        return [asdict(row) for seed in study.seeds for row in task.evaluate(policy, reference, known, None, seed).rows]

    return [PromptRow(**row) for row in _kept(output / "reference.json", measure)]


def best_of_n_curve(study: Study, largest: int, output: Path, cache: Path, console: Console) -> list[dict[str, float]]:
    """Best of n = 1, 2, 4, ... samples of the shared start by each seed's proxy: proxy and gold reward on test prompts.

    One set of draws serves every n. The KL is its upper bound, log n - (n-1)/n.
    """

    def measure() -> list[dict[str, float]]:
        task = SentimentTask(study.options, cache, console)
        policy, _ = build_policy(*task.start())
        decoding = Decoding(task.max_new_tokens)
        engine = build_engine("own", task.eos_ids, decoding)
        engine.sync(policy)
        prompts = task.prompts("test")[: study.options.evaluation.eval_prompts]
        asked = [prompt.text for prompt in prompts]
        found = []
        for seed in study.seeds:
            drawn = best_of_n(
                engine, task.scorer(seed).scorer, policy.tokenizer, [p.ids for p in prompts], asked, largest,
                decoding=decoding, seed=_BEST_OF_SEED + seed,
            )  # fmt: skip
            for n in (2**power for power in range(largest.bit_length())):
                kept = drawn.first(n)
                gold = task.gold(asked, kept.chosen_texts)
                scores = {PROXY: float(kept.chosen_scores.mean()), GOLD: float(gold.mean())}
                found.append({"seed": seed, "n": n, "kl": kl_bound(n), **scores})
        return found

    return _kept(output / "best_of_n.json", measure)


class Demonstrations(SentimentTask):
    """The same task with people's positive sentences to imitate in place of labelled samples.

    Args:
        count: demonstrations.
    """

    count = 0

    def training(self, seed: int) -> Training:
        """The first `count` positive sentences of the policy fold: one prompt each, continued as its author did."""
        positive = [review for review in self.folds["policy"] if review.positive]
        found = openings(positive)[: self.count]
        return Training(self.tokenize(found), {opening.id: opening.prompt for opening in found}, DataReport())


def demonstrations(study: Study, labels: int, output: Path, cache: Path, console: Console) -> list[dict[str, Any]]:
    """Comparisons against demonstrations at an equal number of labels: the generator-discriminator gap.

    A demonstration is a person's positive sentence, imitated by SFT; a comparison is one label on two samples, for DPO, and for
    PPO through a reward model. All make the same number of updates on batches of the same size.
    """
    # Demonstrations have no pairs to train a proxy on.
    evaluation = replace(study.options.evaluation, proxy=False)
    options = replace(study.options, data=replace(study.options.data, pairs=labels), evaluation=evaluation)
    settings: list[tuple[str, type[SentimentTask], str, dict[str, Any]]] = [
        (f"sft, {labels} demonstrations", Demonstrations, "sft", {}),
        (f"dpo, {labels} comparisons", SentimentTask, "dpo", {"beta": 0.1}),
        (f"ppo, {labels} comparisons", SentimentTask, "ppo", {"kl_coef": 0.05, "rollout_size": 128}),
    ]

    def measure() -> list[dict[str, Any]]:
        prepare_process(options, 1)
        return [
            _one(options, kind, name, hyper, label, seed, labels, cache, console)
            for label, kind, name, hyper in settings
            for seed in study.seeds
        ]

    return _kept(output / "labels.json", measure)


def _one(
    options: Options, kind: type[SentimentTask], name: str, hyper: dict[str, Any], label: str, seed: int, labels: int,
    cache: Path, console: Console,
) -> dict[str, Any]:  # fmt: skip
    task = kind(options, cache, console)
    if isinstance(task, Demonstrations):
        task.count = labels
    setting = algorithms.get(name).setting(**hyper)
    result = run_cell(task, setting, options, seed, label=label, cache=cache, console=console)
    return {"label": label, "seed": seed, **{key: float(value) for key, value in result.cell.final.items()}}


def _kept(path: Path, measure: Callable[[], Sequence[Any]]) -> list[Any]:
    """What was measured before, or now."""
    if not path.exists():
        write_json(path, list(measure()))
    return json.loads(path.read_text(encoding="utf-8"))
