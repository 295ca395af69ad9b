"""A policy of TRL's and one of ours end in one report, and say the same: rows, order, weights and loss were the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefopt.report import load_results

pytest.importorskip("trl", reason="the extra bench has it")


@pytest.mark.slow
def test_both_stand_in_one_report_and_agree(
    tmp_path: Path, tiny_model: Path, jsonl: Callable[..., Path], pairs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import outsiders

    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    outsiders.main(["--quick", "--hh", str(jsonl(pairs)), "--model", str(tiny_model), "--output-dir", str(tmp_path / "out")])
    results = load_results(tmp_path / "out" / "report")
    ours, theirs = (results.cells_of(name)[0].final for name in ("DPO, prefopt", "DPO, TRL"))
    assert ours["kl"] > 1e-4
    # One adapter is drawn by our seed and one by TRL's; with both at zero the first steps are alike, not equal.
    assert theirs["kl"] > 1e-4
    assert abs(ours["margin"] - theirs["margin"]) < 0.5 * max(abs(ours["margin"]), 0.1)
