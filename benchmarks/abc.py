"""Dense reward for free: does spreading the score by attention make PPO learn faster? (Chan et al. 2024 [chan2024abc])

    python -m benchmarks.abc --sentiment PATH     controlled sentiment with the small language model, 5 seeds
    --quick                                       one seed, a few updates: a test that it runs
    --figures FOLDER                              abc.png
    --json FILE                                   the table, levels, steps and curves

PPO with one reward model a seed and five ways to spend its score: at the last token (sparse), over all tokens alike (uniform),
where the reward model attends (attention, all of the score and the paper's 0.8 of it), and where the policy attended
(generator). Nothing else differs: seed, prompts, reward model, price of KL, learning rate. Reviews: a folder or file with text
and label. Finished cells are kept in --output-dir.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.abc_curves import DEFINITION, compare_with, read_curves
from benchmarks.abc_figure import draw_credit
from benchmarks.sentiment import small_plan
from benchmarks.sentiment_report import show
from prefopt.compare import compare
from prefopt.errors import PrefoptError
from prefopt.files import write_json
from prefopt.machine import end_with_parent, standard_console
from prefopt.optimization import Logging
from prefopt.options import default_cache
from prefopt.study import Entry, Study
from prefopt.tasks import build_task, prepare_process
from prefopt.tasks.sentiment import GOLD

SPARSE = "sparse"
CREDITS: dict[str, dict[str, Any]] = {
    SPARSE: {"credit": "sparse"},
    "uniform": {"credit": "uniform"},
    "attention 0.8": {"credit": "attention", "credit_beta": 0.8},
    "attention 1": {"credit": "attention"},
    "generator 0.8": {"credit": "generator", "credit_beta": 0.8},
}
"""By label, what is set of `rollouts`."""
SEEDS = (0, 1, 2, 3, 4)
# 64 rollouts a collection, in two minibatches, twice.
ROLLOUTS, MINIBATCH, EPOCHS, COLLECTIONS = 64, 32, 2, 48


def study(data: str) -> Study:
    """The full study. Start, pairs and reward models are those of benchmarks.sentiment, so a cache serves both."""
    shared = small_plan(data).study.options
    options = replace(
        shared,
        budget=replace(shared.budget, batch_size=MINIBATCH, epochs=1e6, max_steps=COLLECTIONS * EPOCHS * ROLLOUTS // MINIBATCH),
        logging=Logging(log_every=1),
        evaluation=replace(shared.evaluation, checkpoints=1),
    )
    common = {"rollout_size": ROLLOUTS, "ppo_epochs": EPOCHS}
    entries = [Entry("ppo", {**common, **credit}, label) for label, credit in CREDITS.items()]
    return Study(
        entries, SEEDS, options, title="Credit for tokens: PPO on controlled sentiment", preset="abc", notes=(DEFINITION,)
    )


def quick(full: Study) -> Study:
    """One seed and 12 collections of a start that has learned little: what runs, not what comes out."""
    options = full.options
    return replace(
        full,
        seeds=full.seeds[:1],
        options=replace(
            options,
            data=replace(options.data, pairs=128),
            budget=replace(options.budget, max_steps=12 * EPOCHS * ROLLOUTS // MINIBATCH),
            supervised=replace(options.supervised, language_epochs=0.2),
            evaluation=replace(options.evaluation, eval_pairs=16, eval_prompts=32),
        ),
    )


def prepare(planned: Study, cache: Path, workers: int) -> None:
    """The shared start and every seed's reward model in the cache, so that no two cells train the same one side by side."""
    prepare_process(planned.options, 1)
    build_task(planned.options, cache, standard_console()).start()
    if workers:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
            list(pool.map(_train_reward, *zip(*((planned, cache, seed) for seed in planned.seeds), strict=True)))


def _train_reward(planned: Study, cache: Path, seed: int) -> None:
    prepare_process(planned.options, 2)
    build_task(planned.options, cache).scorer(seed)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the study and prints its table; writes figure and JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentiment", required=True, help="reviews: a folder, a file, or a hub id with text and label")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1,
        help="cells side by side, each on a thread; 0 runs them in this process (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--output-dir", type=Path)
    parser.add_argument("--figures", type=Path)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args(arguments)
    planned = study(f"sentiment:{asked.sentiment}")
    planned = quick(planned) if asked.quick else planned
    output = asked.output_dir or Path("runs") / ("abc-quick" if asked.quick else "abc")
    console = standard_console()
    try:
        prepare(planned, default_cache(), asked.workers)
        results = compare(planned, output, cache=default_cache(), workers=asked.workers, console=console)
    except PrefoptError as error:
        raise SystemExit(f"error: {error}") from error
    failed = [cell for cell in results.cells if cell.status != "ok"]
    if failed:
        raise SystemExit(
            f"error: {len(failed)} cells failed, first {failed[0].label} seed {failed[0].seed}: {failed[0].error_line}"
        )
    curves = read_curves(results)
    final = {label: {key: results.values(label, key) for key in (f"score/{GOLD}", "kl")} for label in curves}
    rows = compare_with(curves, SPARSE, final)
    show({"credit for tokens": [row.shown() for row in rows]}, console)
    console.print(DEFINITION, highlight=False)
    if asked.figures:
        asked.figures.mkdir(parents=True, exist_ok=True)
        (asked.figures / "abc.png").write_bytes(draw_credit(results, curves, SPARSE))
    if asked.json:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(asked.json, {"definition": DEFINITION, "rows": [asdict(row) for row in rows], "curves": curves})


if __name__ == "__main__":
    main()
