"""The mutation check of the loss mathematics: would the loss tests notice a small slip anywhere in losses/?

    python -m benchmarks.mutants                      200 mutants drawn with seed 0 from all that the operators make
    python -m benchmarks.mutants --files 'dpo.py'     those of some files only
    python -m benchmarks.mutants --all                every mutant

The sample is uniform over all mutants of all files (losses/__init__.py, which finds modules, excepted). A mutant is killed if
one of the tests in tests/losses (all but slow ones) fails on it, or hangs; it survives only if all of them pass. The check
passes if killed / sampled is at least 95%, every survivor is argued to be equivalent in benchmarks/mutants.yaml, and nothing
that was argued to be equivalent is killed; else the exit status is 1.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import random
import signal
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.measuring import Table, print_machine, write_json
from benchmarks.mutant_sources import Mutant, generate
from benchmarks.mutant_trials import EVERYTHING, Outcome, Stage, Task, near_tests, run_tasks, snapshot
from benchmarks.mutation_operators import OPERATORS
from prefopt.machine import standard_console

REQUIRED = 0.95
EQUIVALENTS = Path(__file__).with_name("mutants.yaml")
# A shared machine may be slow for a while; an endless loop never ends.
_SLACK, _LEAST_LIMIT, _BASELINE_LIMIT = 10, 60.0, 3600.0

Key = tuple[str, str, str, str, str]
_FIELDS = ("file", "function", "operator", "original", "mutated")


@dataclass(frozen=True)
class Result:
    """A mutant, what the tests made of it, and the argument that it is equivalent, if there is one."""

    mutant: Mutant
    outcome: Outcome
    reason: str | None

    @property
    def killed(self) -> bool:
        return self.outcome.end != "survived"


def key_of(mutant: Mutant) -> Key:
    """What identifies a mutant however its line moves."""
    return mutant.file, mutant.function, mutant.operator, mutant.original, mutant.mutated


def read_equivalents(path: Path) -> dict[Key, str]:
    """The reasons of argued equivalents.

    Raises:
        ValueError: an entry without one of the fields, with an empty or unknown one, or twice.
    """
    reasons: dict[Key, str] = {}
    for entry in yaml.safe_load(path.read_text()) or []:
        if set(entry) != {*_FIELDS, "reason"} or not all(isinstance(value, str) and value for value in entry.values()):
            raise ValueError(f"{path}: expected the texts {', '.join(_FIELDS)} and reason, got {entry}.")
        file, function, operator, original, mutated = (" ".join(entry[name].split()) for name in _FIELDS)
        key = file, function, operator, original, mutated
        if key in reasons:
            raise ValueError(f"{path}: {file}, {function}: {mutated!r} is listed twice; remove one.")
        reasons[key] = entry["reason"].strip()
    return reasons


def all_mutants(root: Path, pattern: str = "*") -> list[Mutant]:
    """Every mutant of the files in `root`/losses whose name or path matches, by file and place."""
    mutants: list[Mutant] = []
    for path in sorted((root / "losses").glob("*.py")):
        name = path.relative_to(root).as_posix()
        if path.name != "__init__.py" and any(fnmatch.fnmatch(text, pattern) for text in (path.name, name)):
            mutants += generate(name, path.read_text())
    return mutants


def sample(mutants: Sequence[Mutant], count: int, seed: int) -> list[Mutant]:
    """`count` of them (all, if there are no more), uniformly, in their order."""
    chosen = random.Random(seed).sample(range(len(mutants)), min(count, len(mutants)))
    return [mutants[index] for index in sorted(chosen)]


class Bench:
    """Runs tests on copies of one snapshot.

    Args:
        base: the snapshot.
        scratch: a folder for copies.
        jobs: processes at a time.
        console: for progress and survivors as they appear.
    """

    def __init__(self, base: Path, scratch: Path, jobs: int, console: Console) -> None:
        self.base, self.scratch, self.jobs, self.console = base, scratch, jobs, console
        self.stages: dict[tuple[str, ...], Stage] = {}

    def baseline(self, files: Iterable[str]) -> None:
        """Passes the unchanged copy through every run that mutants of these files will go through, and times the runs.

        Raises:
            SystemExit: one of them fails.
        """
        runs = dict.fromkeys([EVERYTHING, *(near for file in sorted(set(files)) if (near := near_tests(file, self.base)))])
        everything, *rest = (Task((Stage(arguments, _BASELINE_LIMIT),)) for arguments in runs)
        for tasks in ([everything], rest):
            for index, outcome in self._run(tasks, "unchanged copy"):
                arguments = tasks[index].stages[0].arguments
                if outcome.end != "survived":
                    raise SystemExit(
                        f"error: on the unchanged losses, pytest {' '.join(arguments)} {outcome.end}: {outcome.by}"
                    )
                self.stages[arguments] = Stage(arguments, max(_LEAST_LIMIT, _SLACK * outcome.seconds))
                for module in outcome.modules:
                    _preload(module)

    def run(self, mutants: Sequence[Mutant], reasons: Mapping[Key, str]) -> list[Result]:
        """The results in the order of the mutants; `baseline` has to have passed for their files."""
        tasks = []
        for mutant in mutants:
            runs = [near_tests(mutant.file, self.base), EVERYTHING]
            tasks.append(Task(tuple(self.stages[arguments] for arguments in runs if arguments), mutant.file, mutant.source))
        results: dict[int, Result] = {}
        for index, outcome in self._run(tasks, "mutants"):
            result = results[index] = Result(mutants[index], outcome, reasons.get(key_of(mutants[index])))
            if not result.killed:
                self.console.print(escape(describe(result)), highlight=False, soft_wrap=True)
        return [results[index] for index in range(len(tasks))]

    def _run(self, tasks: Sequence[Task], what: str) -> Iterable[tuple[int, Outcome]]:
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        # Without a thread that redraws: children are forked from this process.
        with Progress(TextColumn(what), *columns, console=self.console, auto_refresh=False) as progress:
            bar = progress.add_task(what, total=len(tasks))
            progress.refresh()
            for index, outcome in run_tasks(tasks, self.base, self.scratch, self.jobs):
                progress.advance(bar)
                progress.refresh()
                yield index, outcome


def _preload(module: str) -> None:
    """Imports what trials would import each for itself; what cannot be imported alone stays theirs."""
    try:
        import_module(module)
    except Exception:
        return


def describe(result: Result) -> str:
    """A survivor: where, the change, and why it is no slip."""
    mutant = result.mutant
    where = f"{mutant.file}:{mutant.line} {mutant.function}, {mutant.operator}"
    return (
        f"{where}\n  - {mutant.original}\n  + {mutant.mutated}\n  {f'argued: {result.reason}' if result.reason else 'UNARGUED'}"
    )


def counts(title: str, column: str, generated: Mapping[str, int], results: Mapping[str, Sequence[Result]]) -> Table:
    """One row a group, and the sum."""
    table = Table(title, forms={"kill_rate": ".1%"})
    rows: dict[str, tuple[int, Sequence[Result]]] = {name: (count, results[name]) for name, count in generated.items()}
    rows["all"] = sum(generated.values()), [result for group in results.values() for result in group]
    for name, (count, group) in rows.items():
        killed = sum(result.killed for result in group)
        table.add(
            **{column: name},
            generated=count,
            sampled=len(group),
            killed=killed,
            by_hanging=sum(result.outcome.end == "hung" for result in group),
            survived=len(group) - killed,
            argued=sum(not result.killed and result.reason is not None for result in group),
            kill_rate=killed / len(group) if group else None,
        )
    return table


def tables_of(mutants: Sequence[Mutant], results: Sequence[Result]) -> list[Table]:
    """Counts by operator and by file."""
    tables = []
    for title, column, groups in (
        ("By operator", "operator", list(OPERATORS)),
        ("By file", "file", list(dict.fromkeys(mutant.file for mutant in mutants))),
    ):
        generated = {group: sum(getattr(mutant, column) == group for mutant in mutants) for group in groups}
        found = {group: [result for result in results if getattr(result.mutant, column) == group] for group in groups}
        tables.append(counts(title, column, generated, found))
    return tables


def verdict(results: Sequence[Result]) -> tuple[bool, str]:
    """Whether the check passes, and the line that says so."""
    killed = sum(result.killed for result in results)
    unargued = sum(not result.killed and result.reason is None for result in results)
    refuted = sum(result.killed and result.reason is not None for result in results)
    passed = killed >= REQUIRED * len(results) and not unargued and not refuted
    rate = f"kill rate {killed}/{len(results)} = {killed / len(results):.1%} (required {REQUIRED:.0%})"
    return passed, f"{'passed' if passed else 'FAILED'}: {rate}; survivors unargued: {unargued}; arguments refuted: {refuted}"


def check(arguments: argparse.Namespace, console: Console) -> int:
    """Generates, samples, runs and reports; the exit status."""
    reasons = read_equivalents(arguments.equivalents)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        base = snapshot(arguments.root, Path(folder) / "base")
        mutants = all_mutants(base, arguments.files)
        if not mutants:
            raise SystemExit(f"error: no file of losses/ matches {arguments.files!r}, or none has anything to mutate.")
        chosen = mutants if arguments.all else sample(mutants, arguments.samples, arguments.seed)
        console.print(f"{len(chosen)} of {len(mutants)} mutants, seed {arguments.seed}", highlight=False)
        bench = Bench(base, Path(folder) / "trials", arguments.jobs, console)
        bench.baseline(mutant.file for mutant in chosen)
        results = bench.run(chosen, reasons)
    tables = tables_of(mutants, results)
    for table in tables:
        table.print()
    for result in results:
        if result.killed and result.reason is not None:
            console.print(escape(f"REFUTED by {result.outcome.by}: {describe(result)}"), highlight=False, soft_wrap=True)
    passed, line = verdict(results)
    seconds = sum(result.outcome.seconds for result in results)
    console.print(f"{seconds / len(results):.1f} s a mutant, {arguments.jobs} at a time", highlight=False)
    console.print(line, highlight=False, soft_wrap=True)
    rows = [_as_dict(result) for result in results]
    write_json(arguments.json, "mutants", tables, settings=vars(arguments), passed=passed, mutants=rows)
    return 0 if passed else 1


def _as_dict(result: Result) -> dict[str, Any]:
    mutant, outcome = asdict(result.mutant), asdict(result.outcome)
    del mutant["source"], outcome["modules"]
    return {**mutant, **outcome, "reason": result.reason}


def main(tokens: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200, help="mutants to run")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--files", default="*", metavar="GLOB", help="names of files in losses/")
    parser.add_argument("--all", action="store_true", help="run every mutant")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutants at a time")
    parser.add_argument(
        "--root", type=Path, default=Path(__file__).parent.parent, help="folder that holds losses/ and tests/losses"
    )
    parser.add_argument("--equivalents", type=Path, default=EQUIVALENTS, help="the argued equivalents")
    parser.add_argument("--json", type=Path, help="write tables, settings and every mutant's end to this file")
    arguments = parser.parse_args(tokens)
    if min(arguments.samples, arguments.jobs) < 1:
        parser.error("--samples and --jobs must be positive.")
    torch.set_num_threads(1)
    # As an exception, so that trials end with this process.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    print_machine()
    return check(arguments, standard_console())


if __name__ == "__main__":
    sys.exit(main())
