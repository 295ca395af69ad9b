"""The tools of the benchmarks: other processes' share, peak memory of a process of its own, tables and their JSON."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.measuring import Busy, Spread, Table, describe_machine, matmul_rate, peak_memory_of, write_json
from prefopt.machine import peak_memory_mb

needs_proc = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="reads /proc")


def test_matmul_rate_is_that_of_a_product_timed_by_hand() -> None:
    """A rate in the wrong unit would be off by a factor of 1000."""
    rate = matmul_rate(0.05, size=256)
    assert 0.05 < rate < 1e6


@needs_proc
def test_busy_counts_what_others_do_and_not_what_this_process_does() -> None:
    spin = "import time; end = time.time() + 30\nwhile time.time() < end: pass"
    other = subprocess.Popen([sys.executable, "-c", spin])
    try:
        with Busy() as busy:
            while busy_cpu(other.pid) < 0.3:
                sum(range(10_000))
    finally:
        other.kill()
        other.wait()
    assert busy.share is not None
    assert busy.share >= 0.25 / (busy.seconds * (os.cpu_count() or 1)) * 0.5
    assert busy.share <= 1.0


def busy_cpu(pid: int) -> float:
    """Processor seconds of another process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_peak_memory_is_that_of_the_function_alone() -> None:
    """Three float32 matrices of 2048 x 2048 are 48 MiB; what this process holds does not count."""
    ballast = torch.ones(128, 2**20)
    small, large = (peak_memory_of(matmul_rate, 0.0, size=size) for size in (64, 2048))
    assert small.error == large.error == ""
    assert 40 < large.mb - small.mb < 200
    assert large.mb < peak_memory_mb()
    assert small.value > 0
    assert ballast[0, 0] == 1


def test_what_goes_wrong_in_the_other_process_is_told() -> None:
    raised = peak_memory_of(int, "x")
    assert raised.error.startswith("ValueError: invalid literal")
    assert math.isnan(raised.mb)


@needs_proc
def test_a_killed_process_is_told() -> None:
    assert "killed, most likely for memory" in peak_memory_of(signal.raise_signal, signal.SIGKILL).error


def test_a_process_is_ended_before_it_takes_the_last_memory() -> None:
    """Here all memory has to stay free, so the first look ends it."""
    assert "does not fit" in peak_memory_of(time.sleep, 30, keep_free_mb=math.inf).error


def test_spread_of_nothing_and_of_one() -> None:
    assert Spread.of([]).text() == "-"
    assert Spread.of([2.0]).text(".1f") == "2.0"
    assert Spread.of([3.0, 1.0, 2.5]).text(".1f") == "2.5 (1.0 to 3.0)"


def test_json_holds_the_rows_and_no_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("Steps", forms={"seconds": ".1f"}, note="turn by turn")
    table.add(who="a", seconds=Spread.of([1.0, 2.0]))
    table.add(who="b", seconds=math.nan, why="did not fit")
    table.print()
    printed = capsys.readouterr().out
    assert "1.5 (1.0 to 2.0)" in printed
    assert "did not fit" in printed
    write_json(tmp_path / "folder" / "x.json", "steps", [table], settings={"steps": 2})
    read = json.loads((tmp_path / "folder" / "x.json").read_text())
    rows = read["tables"][0]["rows"]
    assert rows[0]["seconds"] == {"median": 1.5, "low": 1.0, "high": 2.0, "count": 2}
    assert rows[1]["seconds"] is None
    assert read["settings"] == {"steps": 2}
    assert read["machine"]["versions"]["torch"] == torch.__version__


def test_the_machine_is_described_without_its_name() -> None:
    assert os.uname().nodename not in json.dumps(describe_machine())
