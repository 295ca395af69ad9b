"""The fault scoreboard: its rows, what links tests to them, how a row is judged, and its page."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults import ROOT, Judged, Row, judge, main, markdown, read_rows

pytest_plugins = ("pytester",)


def marked() -> dict[int, set[str]]:
    """The tests that carry each row's mark, read off their files."""
    found: dict[int, set[str]] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            for mark in getattr(node, "decorator_list", ()):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault":
                    for number in mark.args:
                        found.setdefault(ast.literal_eval(number), set()).add(f"{path.name}::{node.name}")
    return found


def test_there_are_thirty_rows_and_each_says_what_users_get() -> None:
    rows = read_rows()
    assert [row.number for row in rows] == list(range(1, 31))
    assert all(row.title and row.users.endswith(".") for row in rows)


def test_every_row_has_tests_and_every_mark_a_row() -> None:
    """Rows of several processes may have theirs where several processes are to be had."""
    rows, found = read_rows(), marked()
    assert not {row.number for row in rows if not row.gpus} - found.keys()
    assert not found.keys() - {row.number for row in rows}
    assert len(found[6]) > 1


def test_the_committed_page_has_these_rows() -> None:
    page = (ROOT / "docs" / "faults.md").read_text()
    shown = re.findall(r"^\| (\d+) \| (.*?) \| (.*?) \| (handled|partly|not) \|", page, re.MULTILINE)
    assert [(int(number), title, users) for number, title, users, _ in shown] == [
        (row.number, row.title, row.users) for row in read_rows()
    ]


@pytest.mark.parametrize(
    ("outcomes", "partly", "state"),
    [
        (["passed", "passed"], "", "handled"),
        (["passed", "skipped"], "", "handled"),
        (["passed", "failed"], "", "partly"),
        (["passed"], "not on Windows", "partly"),
        (["failed", "failed"], "", "not"),
        (["skipped"], "", "not"),
        ([], "", "not"),
    ],
)
def test_how_a_row_is_judged(outcomes: list[str], partly: str, state: str) -> None:
    row = Row(3, "title", "users", partly)
    tests = [{"test": f"t::{i}", "rows": [3, 4], "outcome": outcome} for i, outcome in enumerate(outcomes)]
    [one, _] = judge([row, Row(4, "other", "users")], tests)
    assert one.state == state
    assert len(one.outcomes) == len(outcomes)
    assert ("failed: " in one.summary) == ("failed" in outcomes)


def test_a_mark_without_a_row_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"t::x is marked with rows that faults\.yaml does not have: \[31\]"):
        judge(read_rows(), [{"test": "t::x", "rows": [31], "outcome": "passed"}])


def test_the_page_links_files_and_keeps_its_columns() -> None:
    row = Judged(Row(1, "a | b", "c"), {"tests/x/test_a.py::test_b": "passed"})
    [line] = [line for line in markdown([row]).splitlines() if line.startswith("| 1")]
    assert line == r"| 1 | a \| b | c | handled | 1 of 1 tests pass. [test_a.py](../tests/x/test_a.py) |"


def test_rows_that_do_not_exist_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--rows", "31"])
    assert "there is no row 31" in capsys.readouterr().err


def test_the_plugin_runs_marked_tests_alone_and_writes_how_they_ended(pytester: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makeini("[pytest]\nmarkers =\n    fault: x\n")
    pytester.makepyfile("""
        import pytest
        @pytest.fixture
        def breaks():
            yield
            raise RuntimeError
        @pytest.mark.fault(1, 2)
        def test_good(): pass
        @pytest.mark.fault(1)
        def test_bad(): assert False
        @pytest.mark.fault(2)
        def test_skipped(): pytest.skip()
        @pytest.mark.fault(1)
        def test_breaks(breaks): pass
        @pytest.mark.fault(3)
        def test_of_another_row(): pass
        def test_of_none(): pass
    """)
    path = pytester.path / "outcomes.json"
    pytester.runpytest_subprocess("-p", "benchmarks.fault_plugin", "--fault-outcomes", path, "--fault-rows", "1,2")
    found = {entry["test"].partition("::")[2]: (entry["rows"], entry["outcome"]) for entry in json.loads(path.read_text())}
    assert found == {
        "test_good": ([1, 2], "passed"),
        "test_bad": ([1], "failed"),
        "test_skipped": ([2], "skipped"),
        "test_breaks": ([1], "failed"),
    }


def test_every_marked_test_file_is_found() -> None:
    files = {name.partition("::")[0] for names in marked().values() for name in names}
    assert {Path(name).name for name in files} >= {"test_checkpoint.py", "test_recovery.py", "test_hostile.py"}
