"""The tables of benchmarks.control: success by task, what can be told apart, and what training cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from rich.console import Console

from benchmarks.control_cells import PIQL, Run
from prefopt.report.grid import Column, Entry, Grid, to_rich
from prefopt.report.statistics import Comparison, corrected, mean_interval, paired

Row = dict[str, Any]

# Compared by tests: the three of the paper's claim; the rest of the table is exploratory.
TESTED = ("cpl", "sft", PIQL)
SPARSE_CPL, DENSE_CPL = "cpl", "cpl dense"


def success_table(runs: Sequence[Run], window: int) -> list[Row]:
    """Success by algorithm and task: mean and half-width of the t interval over seeds, best window and end; then over tasks."""
    tasks = list(dict.fromkeys(run.task for run in runs))
    rows = []
    for algorithm in dict.fromkeys(run.algorithm for run in runs):
        own = [run for run in runs if run.algorithm == algorithm]
        row: Row = {"algorithm": algorithm}
        for task in tasks:
            mine = [run for run in own if run.task == task]
            row[task] = _pair([run.best_window(window) for run in mine])
            row[f"{task}, end"] = _pair([run.successes[-1] for run in mine])
        by_seed = [[run.best_window(window) for run in own if run.seed == seed] for seed in sorted({run.seed for run in own})]
        row["all tasks"] = _pair([sum(values) / len(values) for values in by_seed])
        rows.append(row)
    return rows


def comparison_table(runs: Sequence[Run], window: int) -> list[Row]:
    """Paired t tests of best windows over seeds, task by task, and over seeds x tasks; Holm over all of them together."""
    tasks = list(dict.fromkeys(run.task for run in runs))
    made: list[tuple[str, Comparison]] = []
    for left, right in [*combinations(TESTED, 2), (DENSE_CPL, SPARSE_CPL)]:
        for where in (*tasks, "all tasks"):
            differences = _differences(runs, left, right, window, None if where == "all tasks" else where)
            made.append((where, paired(left, right, differences)))
    tests = corrected([comparison for _, comparison in made])
    return [{"task": where, **_words(test)} for (where, _), test in zip(made, tests, strict=True)]


def dense_sentence(runs: Sequence[Run], window: int) -> str:
    """The effect of more comparisons of the same segments, in words."""
    interval = mean_interval(_differences(runs, DENSE_CPL, SPARSE_CPL, window, None))
    if interval.half_width is None:
        return f"More comparisons of the same segments: {interval.mean:+.1%} success; too few seeds for an interval."
    low, high = interval.mean - interval.half_width, interval.mean + interval.half_width
    verdict = "help" if low > 0 else "hurt" if high < 0 else "make no difference that can be told"
    return f"More comparisons of the same segments {verdict}: {interval.mean:+.1%} success, from {low:+.1%} to {high:+.1%}."


def cost_table(runs: Sequence[Run]) -> list[Row]:
    """Seconds of training, milliseconds an update, trained parameters, each over CPL's; means over tasks and seeds."""
    rows, base = [], _cost([run for run in runs if run.algorithm == SPARSE_CPL])
    for algorithm in dict.fromkeys(run.algorithm for run in runs):
        seconds, milliseconds, parameters = _cost([run for run in runs if run.algorithm == algorithm])
        rows.append(
            {
                "algorithm": algorithm, "seconds": seconds, "ms an update": milliseconds, "parameters": parameters,
                "seconds over cpl": seconds / base[0], "parameters over cpl": parameters / base[2],
            }
        )  # fmt: skip
    return rows


def show(found: Mapping[str, Sequence[Row]], sentence: str, window: int, episodes: int, console: Console) -> None:
    """Prints the tables, and what their numbers are."""
    success = found["success"]
    tasks = [name for name in success[0] if name not in ("algorithm",) and not name.endswith(", end")]
    columns = ["algorithm", *tasks, *(name for name in success[0] if name.endswith(", end"))]
    _print(
        "Success rates",
        columns,
        [[row["algorithm"], *(_percent(row[name]) for name in columns[1:])] for row in success],
        console,
    )
    console.print(
        f"Means with 95% t intervals over seeds. A task's column is the best mean of {window} neighbouring evaluations of "
        f"{episodes} episodes, as in the paper, which flatters all alike; 'end' is the last evaluation. "
        f"{PIQL} learns from every step of its episodes, the others from those of their pairs.",
        highlight=False,
    )
    tests = found["tests"]
    _print("Paired t tests", list(tests[0]), [[_cell(value) for value in row.values()] for row in tests], console)
    console.print(sentence, highlight=False)
    cost = found["cost"]
    _print("What training cost", list(cost[0]), [[_cell(value) for value in row.values()] for row in cost], console)


def _print(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    heads = tuple(Column(name, "left" if index == 0 else "right") for index, name in enumerate(columns))
    console.print(to_rich(Grid(title, heads, tuple(tuple(Entry(cell) for cell in row) for row in rows))))


def _differences(runs: Sequence[Run], left: str, right: str, window: int, task: str | None) -> list[float]:
    """Best window of left minus that of right, one for each task and seed that both have."""
    values = {(run.algorithm, run.task, run.seed): run.best_window(window) for run in runs}
    blocks = dict.fromkeys((run.task, run.seed) for run in runs if task in (None, run.task))
    return [
        values[left, *block] - values[right, *block] for block in blocks if {(left, *block), (right, *block)} <= values.keys()
    ]


def _words(test: Comparison) -> Row:
    """A test as a row, with its verdict."""
    told = test.p_holm is not None and test.p_holm < 0.05
    if told:
        verdict = f"{test.left if test.difference > 0 else test.right} is better"
    else:
        verdict = "cannot be told apart" + (f": {test.missing}" if test.missing else "")
    return {
        "difference": f"{test.left} - {test.right}", "mean": _percent([test.difference, test.half_width]), "n": test.n,
        "p (Holm)": "n/a" if test.p_holm is None else f"{test.p_holm:.3f}",
        "detectable": "n/a" if test.detectable is None else f"{test.detectable:.0%}", "verdict": verdict,
    }  # fmt: skip


def _cost(runs: Sequence[Run]) -> tuple[float, float, float]:
    seconds = sum(run.seconds for run in runs) / len(runs)
    return seconds, 1000 * seconds / runs[0].updates[-1], float(runs[0].parameters)


def _pair(values: Sequence[float]) -> list[float | None]:
    interval = mean_interval(values)
    return [interval.mean, interval.half_width]


def _percent(pair: Sequence[float | None]) -> str:
    mean, half = pair
    return f"{mean:.0%}" if half is None else f"{mean:.0%} ± {half:.0%}"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return str(value)
