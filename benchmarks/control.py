"""CPL where it was born: preference algorithms, cloning and P-IQL on simulated manipulation (Hejna et al. 2023 [hejna2023cpl]).

    python -m benchmarks.control                       three Meta-World tasks, 3 seeds: within an hour on 2 cores
    python -m benchmarks.control --tasks bin-picking   other tasks; --labels return: another labeller
    --quick                                            one task, one seed, a few updates: a test that it runs
    --figures FOLDER                                   control.png (learning curves), control_strips.png (episodes)

Every algorithm of a task and seed learns from the same labelled pairs and starts at the same cloned policy; all policies are
measured on the same episodes. Data, cells and policies are kept in --output-dir, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console

from benchmarks.control_cells import PIQL, Run, run_piql, run_study
from benchmarks.control_figures import draw_curves, draw_strips
from benchmarks.control_report import comparison_table, cost_table, dense_sentence, show, success_table
from benchmarks.measuring import without_nan
from benchmarks.piql import PiqlOptions
from prefopt.control.generate import Recipe, generate
from prefopt.control.simulate import TASKS
from prefopt.errors import PrefoptError
from prefopt.files import write_json
from prefopt.machine import standard_console
from prefopt.optimization import Optimization
from prefopt.options import (
    ControlOptions,
    DataOptions,
    EvaluationOptions,
    ModelOptions,
    Options,
    SupervisedOptions,
    default_cache,
)
from prefopt.streams import Budget
from prefopt.study import Entry, Study

SPARSE, BEST, DENSE = "sparse", "best", "dense"
BEST_BC, DENSE_CPL = "%bc", "cpl dense"


@dataclass(frozen=True)
class Plan:
    """One size of the benchmark.

    Args:
        tasks: of Meta-World.
        seeds: of pairs, networks and order.
        episodes: of offline data a task.
        pairs: sparse comparisons, of two segments of their own each.
        dense: how often as many comparisons the same segments have in the dense study.
        updates: of every preference algorithm.
        cloning: passes of behaviour cloning over all segments before.
        checkpoints: evaluations along a run.
        eval_episodes: of each.
        window: neighbouring evaluations that the success rates of the table average over.
        piql: of the baseline.
    """

    tasks: tuple[str, ...] = ("drawer-open", "button-press", "plate-slide")
    seeds: tuple[int, ...] = (0, 1, 2)
    episodes: int = 400
    pairs: int = 1000
    dense: int = 16
    updates: int = 1500
    cloning: float = 8.0
    checkpoints: int = 6
    eval_episodes: int = 25
    window: int = 3
    piql: PiqlOptions = PiqlOptions()  # noqa: RUF009  frozen

    def quick(self) -> Plan:
        """What runs, not what comes out."""
        piql = replace(self.piql, updates=20, reward_updates=10)
        return replace(
            self, tasks=self.tasks[:1], seeds=(0,), episodes=20, pairs=40, dense=2, updates=10, cloning=0.5, checkpoints=2,
            eval_episodes=2, piql=piql,
        )  # fmt: skip


def studies(plan: Plan, data: Path, labels: str) -> dict[str, Study]:
    """A task's studies: one for each kind of comparisons that its algorithms learn from."""
    options = Options(
        data=DataOptions((f"control:{data}",), pairs=plan.pairs, labels="deterministic"),
        model=ModelOptions(init="sft-both"),
        supervised=SupervisedOptions(sft_epochs=plan.cloning, sft_learning_rate=1e-3),
        budget=Budget(batch_size=16, epochs=1e6, max_steps=plan.updates, micro_batch_tokens=1 << 14),
        optimization=Optimization(learning_rate=1e-3),
        evaluation=EvaluationOptions(checkpoints=plan.checkpoints, eval_pairs=100, eval_prompts=plan.eval_episodes),
        control=ControlOptions(preferences=labels, dropout=0.25),  # type: ignore[arg-type]
    )
    dense = replace(options.data, pairs=plan.dense * plan.pairs)
    entries = [Entry("sft"), Entry("cpl"), Entry("cpl_kl"), Entry("dpo"), Entry("ipo")]
    return {
        SPARSE: Study(entries, plan.seeds, options),
        # Behaviour cloning of the best segments alone, from a fresh network: the first stage would have seen all.
        BEST: Study(
            [Entry("sft", name=BEST_BC)], plan.seeds,
            replace(options, model=ModelOptions(), control=replace(options.control, keep_best=0.1)),
        ),
        # The very segments of the sparse study, and as many updates of cloning.
        DENSE: Study(
            [Entry("cpl", name=DENSE_CPL)], plan.seeds,
            replace(
                options, data=dense, control=replace(options.control, segments=2 * plan.pairs),
                supervised=replace(options.supervised, sft_epochs=plan.cloning / plan.dense),
            ),
        ),
    }  # fmt: skip


def run_task(task: str, plan: Plan, labels: str, output: Path, workers: int, console: Console) -> list[Run]:
    """Data, studies and P-IQL of one task."""
    cache, folder = default_cache(), output / task
    generate(Recipe(task, episodes=plan.episodes), folder / "data", workers=workers, console=console)
    runs: list[Run] = []
    made = studies(plan, folder / "data", labels)
    for kind, study in made.items():
        runs += run_study(task, study, folder / f"{kind}-{labels}", cache, workers, console)
    options = made[SPARSE].options
    console.print(f"{task}: {PIQL}", highlight=False)
    return runs + run_piql(task, options, plan.piql, plan.seeds, folder / f"piql-{labels}", cache, workers)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the tasks, prints the tables; writes figures and JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="(drawer-open, button-press, plate-slide)")
    parser.add_argument(
        "--labels", choices=("regret", "return"), default="regret", help="what the labeller compares (%(default)s)"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output-dir", type=Path)
    parser.add_argument("--figures", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread each (%(default)s)")
    asked = parser.parse_args(arguments)
    plan = Plan(tasks=tuple(asked.tasks)) if asked.tasks else Plan()
    plan = plan.quick() if asked.quick else plan
    output = asked.output_dir or Path("runs/control" + ("-quick" if asked.quick else ""))
    console = standard_console()
    try:
        runs = [run for task in plan.tasks for run in run_task(task, plan, asked.labels, output, asked.workers, console)]
    except PrefoptError as error:
        raise SystemExit(f"error: {error}") from error
    found = {
        "success": success_table(runs, plan.window), "tests": comparison_table(runs, plan.window), "cost": cost_table(runs),
    }  # fmt: skip
    show(found, dense_sentence(runs, plan.window), plan.window, plan.eval_episodes, console)
    if asked.figures:
        asked.figures.mkdir(parents=True, exist_ok=True)
        (asked.figures / "control.png").write_bytes(draw_curves(runs))
        draw_strips(plan, asked.labels, output, asked.figures / "control_strips.png", console)
    if asked.json:
        write_json(asked.json, without_nan({**found, "runs": [asdict(run) for run in runs]}))


if __name__ == "__main__":
    main()
