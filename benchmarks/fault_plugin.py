"""A pytest plugin that runs the tests of some rows of the fault scoreboard and writes down how each ended.

python -m pytest -p benchmarks.fault_plugin --fault-outcomes FILE [--fault-rows 5,6]
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

_ROWS = "fault rows"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-outcomes", type=Path, help="where the outcomes go, as JSON")
    parser.addoption("--fault-rows", default="", help="rows of the scoreboard, with commas; all by default")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the tests that show one of the rows."""
    wanted = {int(number) for number in config.getoption("--fault-rows").split(",") if number}
    kept, left = [], []
    for item in items:
        rows = sorted({row for marker in item.iter_markers("fault") for row in marker.args})
        item.user_properties.append((_ROWS, rows))
        (kept if rows and (not wanted or wanted & {*rows}) else left).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left)


class _Outcomes:
    """How every test ended, however many processes ran them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, dict[str, object]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test passes when its body does and nothing around it fails; it is skipped wherever it says so.
        if report.when == "call" or report.outcome != "passed":
            rows = dict(report.user_properties).get(_ROWS, [])
            self._found[report.nodeid] = {"test": report.nodeid, "rows": rows, "outcome": report.outcome}

    def pytest_sessionfinish(self) -> None:
        self._path.write_text(json.dumps([self._found[test] for test in sorted(self._found)]))


def pytest_configure(config: pytest.Config) -> None:
    if (path := config.getoption("--fault-outcomes")) is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Outcomes(path))
