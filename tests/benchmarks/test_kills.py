"""A few kills of each kind; `make bench-kills` makes hundreds. In a process of its own: what forks should have no threads."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.kills import HEADLINE, PHASES, difference

ROOT = Path(__file__).resolve().parents[2]


def killed(tmp_path: Path, *arguments: object) -> list[dict[str, Any]]:
    """The rows of the benchmark's table."""
    path = tmp_path / "kills.json"
    command = [sys.executable, "-m", "benchmarks.kills", "--json", str(path), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows: list[dict[str, Any]] = json.loads(path.read_text())["tables"][0]["rows"]
    return rows


@pytest.mark.slow
@pytest.mark.fault(1)
def test_saves_survive_kills(tmp_path: Path) -> None:
    """Fifty times in the middle of a save or right after it: the newest checkpoint is whole and what was saved."""
    [row] = killed(tmp_path, "--kills", 0, "--saves", 50)
    assert (row["kills"], row["resumed"], row["differences"]) == (50, 50, 0)
    assert row["saving"] >= 10


@pytest.mark.slow
@pytest.mark.fault(2)
def test_runs_survive_kills(tmp_path: Path) -> None:
    rows = killed(tmp_path, "--kills", 16)
    assert [(row["what"], row["kills"], row["differences"]) for row in rows] == [(name, 4, 0) for name in HEADLINE]
    assert all(row["runs_compared"] >= 1 and sum(row[phase] for phase in PHASES) == 4 for row in rows)
    assert sum(row["resumed"] for row in rows) >= 4


def test_trees_are_compared_to_the_last_bit() -> None:
    tree = {"a": [torch.ones(2), 1, "x"], "b": {"c": 0.1, "d": math.nan}}
    assert difference(tree, {"a": [torch.ones(2), 1, "x"], "b": {"c": 0.1, "d": math.nan}}) is None
    for other, place in (
        ({**tree, "a": [torch.ones(2, dtype=torch.float64), 1, "x"]}, "/a/0"),
        ({**tree, "a": [torch.ones(2) + 1e-6, 1, "x"]}, "/a/0"),
        ({**tree, "a": [torch.ones(2), 1]}, "/a"),
        ({**tree, "a": [torch.ones(2), True, "x"]}, "/a/1"),
        ({**tree, "b": {"c": math.nextafter(0.1, 1), "d": math.nan}}, "/b/c"),
        ({"a": tree["a"]}, "/"),
    ):
        assert difference(tree, other) == place
