"""The fault scoreboard: thirty things that go wrong, and whether users get what they should. A table row by row.

    python -m benchmarks.faults                  all rows; minutes
    python -m benchmarks.faults --rows 5 6       some of them
    python -m benchmarks.faults --json FILE --markdown docs/faults.md

The rows are benchmarks/faults.yaml. A row is shown by the tests that are marked with its number (`@pytest.mark.fault(5)`), slow
ones included: handled if all of them pass, partly if some do or the row itself says what is missing, else not. A test that is
skipped, as for want of a browser, counts for neither. The exit status is 1 unless every row that was asked for is handled.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefopt.machine import standard_console

ROOT = Path(__file__).resolve().parent.parent
ROWS = Path(__file__).with_name("faults.yaml")
State = Literal["handled", "partly", "not"]
_COLOURS: Mapping[State, str] = {"handled": "green", "partly": "yellow", "not": "red"}


@dataclass(frozen=True)
class Row:
    """A fault, and what users get.

    Args:
        number: in the scoreboard.
        title: what goes wrong.
        users: what they get then.
        partly: why a row whose tests pass is not all there.
        gpus: what of it several GPUs would have to show.
    """

    number: int
    title: str
    users: str
    partly: str = ""
    gpus: str = ""


@dataclass(frozen=True)
class Judged:
    """A row with the outcomes of its tests, by test."""

    row: Row
    outcomes: Mapping[str, str]

    @property
    def state(self) -> State:
        passed, failed = self._count("passed"), self._count("failed")
        if not passed:
            return "not"
        return "partly" if failed or self.row.partly else "handled"

    @property
    def summary(self) -> str:
        """What its tests were, and what else there is to say."""
        skipped, failed = self._count("skipped"), [test for test, outcome in self.outcomes.items() if outcome == "failed"]
        parts = [f"{self._count('passed')} of {len(self.outcomes) - skipped} tests pass"]
        parts += [f"{skipped} skipped"] if skipped else []
        parts += [f"failed: {', '.join(failed)}"] if failed else []
        return "; ".join(parts + [note.removesuffix(".") for note in (self.row.partly, self.row.gpus) if note])

    def _count(self, outcome: str) -> int:
        return sum(found == outcome for found in self.outcomes.values())


def read_rows(path: Path = ROWS) -> list[Row]:
    """The rows of the scoreboard, by number."""
    return [Row(**entry) for entry in yaml.safe_load(path.read_text(encoding="utf-8"))]


def judge(rows: Sequence[Row], outcomes: Sequence[Mapping[str, Any]]) -> list[Judged]:
    """Each row with its tests.

    Args:
        outcomes: `test`, `rows` and `outcome` of every test that ran.

    Raises:
        ValueError: a test shows a row that does not exist.
    """
    known = {row.number for row in rows}
    for found in outcomes:
        if unknown := {*found["rows"]} - known:
            raise ValueError(f"{found['test']} is marked with rows that faults.yaml does not have: {sorted(unknown)}.")
    return [Judged(row, {found["test"]: found["outcome"] for found in outcomes if row.number in found["rows"]}) for row in rows]


def run_tests(numbers: Sequence[int], workers: int) -> list[dict[str, Any]]:
    """The outcomes of the tests that are marked with one of the rows; all of them where none is named.

    Raises:
        RuntimeError: pytest could not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outcomes.json"
        command = [sys.executable, "-m", "pytest", "-p", "benchmarks.fault_plugin", "--fault-outcomes", str(path), "-q"]
        command += ["--fault-rows", ",".join(map(str, numbers)), "-m", "fault and not gpu"]
        command += ["-n", str(workers), "--dist", "loadgroup"] if workers > 1 else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment)
        if not path.exists() or done.returncode not in (0, 1, 5):  # passed, some failed, none found
            raise RuntimeError(f"pytest ended with status {done.returncode}: {' '.join(command)}")
        outcomes: list[dict[str, Any]] = json.loads(path.read_text())
        return outcomes


def print_table(judged: Sequence[Judged], console: Console) -> None:
    """A line a row."""
    table = Table(title="faults and bad inputs", title_justify="left")
    for name in ("#", "what goes wrong", "users get", "", "shown by"):
        table.add_column(name, justify="right" if name == "#" else "left")
    for one in judged:
        table.add_row(
            str(one.row.number), one.row.title, one.row.users, Text(one.state, style=_COLOURS[one.state]), one.summary
        )
    console.print(table)
    console.print(_handled(judged), highlight=False)


def _handled(judged: Sequence[Judged]) -> str:
    return f"{sum(one.state == 'handled' for one in judged)} of {len(judged)} handled."


def markdown(judged: Sequence[Judged]) -> str:
    """The table as a page."""
    lines = [
        "# Faults and bad inputs",
        "",
        "What goes wrong, what users get then, and the tests that show it: `make faults` runs them and writes this page "
        "(`python -m benchmarks.faults --markdown docs/faults.md`).",
        "",
        f"Of {date.today().isoformat()}: {_handled(judged)}",
        "",
        "| # | what goes wrong | users get | | shown by |",
        "|---:|---|---|---|---|",
    ]
    for one in judged:
        files = sorted({test.partition("::")[0] for test in one.outcomes})
        names = ", ".join(f"[{Path(file).name}](../{file})" for file in files)
        cells = (one.row.title, one.row.users, one.state, f"{one.summary}. {names}".removesuffix(" "))
        lines.append(f"| {one.row.number} | " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the scoreboard; 1 unless every row is handled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[], help="some rows instead of all")
    parser.add_argument("--workers", type=int, default=1, help="processes that run the tests")
    parser.add_argument("--json", type=Path, help="where the table goes as JSON")
    parser.add_argument("--markdown", type=Path, help="where the table goes as a page; all rows")
    asked = parser.parse_args(argv)
    rows = read_rows()
    if unknown := {*asked.rows} - {row.number for row in rows}:
        parser.error(f"there is no row {', '.join(map(str, sorted(unknown)))}; rows are 1 to {len(rows)}")
    if asked.markdown and asked.rows:
        parser.error("--markdown writes all rows; leave --rows out")
    outcomes = run_tests(asked.rows, asked.workers)
    judged = judge([row for row in rows if not asked.rows or row.number in asked.rows], _within(outcomes, asked.rows))
    print_table(judged, standard_console())
    if asked.json:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        table = [{**asdict(one.row), "state": one.state, "tests": dict(one.outcomes)} for one in judged]
        asked.json.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if asked.markdown:
        asked.markdown.write_text(markdown(judged), encoding="utf-8")
    return int(any(one.state != "handled" for one in judged))


def _within(outcomes: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> list[dict[str, Any]]:
    """The outcomes without rows that were not asked for, which other tests show too."""
    return [{**found, "rows": [row for row in found["rows"] if not numbers or row in numbers]} for found in outcomes]


if __name__ == "__main__":
    sys.exit(main())
