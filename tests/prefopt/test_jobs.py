"""Cells as jobs: shards and processes that share a folder, damaged results, kills; results are those of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from prefopt.cli import main
from prefopt.compare import compare, list_jobs
from prefopt.errors import ConfigError, OutputError
from prefopt.jobs import CELL_FILE, MANIFEST_FILE
from prefopt.matching import equal_updates
from prefopt.study import Study, study_of

OPTIONS: dict[str, Any] = {
    "data": ["control:gridworld"], "segment_length": 4, "pairs": 60, "batch_size": 20, "epochs": 1, "learning_rate": 0.03,
    "checkpoints": 1, "eval_pairs": 40,
}  # fmt: skip


def gridworld(*algorithms: Any, **changes: Any) -> Study:
    return study_of({"algorithms": algorithms or ("cpl", "dpo"), "seeds": 2, **OPTIONS, **changes})


def run(study: Study, output: Path, cache: Path, **how: Any) -> None:
    compare(study, output, cache=cache, workers=0, **how)


def text(folder: Path) -> str:
    return (folder / "results.json").read_text()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def serial(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "serial"
    run(gridworld(), folder, cache)
    return folder


def test_shards_write_the_results_of_a_serial_run(serial: Path, cache: Path, tmp_path: Path) -> None:
    """The first shard leaves no results, the last one writes them, and they are those of a run in one piece."""
    folder = tmp_path / "study"
    run(gridworld(), folder, cache, shard=(2, 3))
    assert not (folder / "results.json").exists()
    assert len(list(folder.glob(f"cells/*/{CELL_FILE}"))) == 1
    run(gridworld(), folder, cache, shard=(1, 3))
    assert not (folder / "results.json").exists()
    run(gridworld(), folder, cache, shard=(3, 3))
    assert text(folder) == text(serial)
    for wrong in ((0, 2), (3, 2)):
        with pytest.raises(ConfigError, match="expected i/n"):
            run(gridworld(), folder, cache, shard=wrong)


@pytest.mark.fault(15)
def test_a_cell_belongs_to_who_holds_its_lock_and_is_taken_over_when_it_lets_go(
    serial: Path, cache: Path, tmp_path: Path
) -> None:
    """Another process holds one cell: the rest is run, then waited; when the lock is free without a result, it is run too."""
    folder = tmp_path / "study"
    held = list_jobs(gridworld(), folder, cache)[1]
    lock = FileLock(held.folder / ".lock")
    held.folder.mkdir(parents=True)
    lock.acquire()
    # study.json is there, as where two processes started together
    worker = threading.Thread(target=run, args=(gridworld(), folder, cache), daemon=True)
    (folder / "study.json").write_text((serial / "study.json").read_text())
    worker.start()
    deadline = time.monotonic() + 60
    while len(list(folder.glob(f"cells/*/{CELL_FILE}"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    assert worker.is_alive()
    assert not held.done
    lock.release()
    worker.join(60)
    assert held.done
    assert text(folder) == text(serial)


@pytest.mark.fault(6)
def test_a_damaged_cell_is_run_again(serial: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "study"
    run(gridworld(), folder, cache)
    job = list_jobs(gridworld(), folder, cache)[0]
    file = job.folder / CELL_FILE
    manifest = json.loads((job.folder / MANIFEST_FILE).read_text())
    assert {CELL_FILE, "config.json", "environment.json", "metrics.jsonl"} <= manifest.keys()
    file.write_text(file.read_text().replace("0.", "1.", 1))
    assert job.damaged
    assert not job.done
    run(gridworld(), folder, cache)
    assert job.done
    assert text(folder) == text(serial)


def test_a_cell_can_be_run_again_alone(serial: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`prefopt rerun`: equal in every number from the cell's own config; a changed stored number is found."""
    monkeypatch.setenv("PREFOPT_CACHE", str(cache))
    cell = list_jobs(gridworld(), serial, cache)[2].folder
    assert main(["rerun", str(cell), "--output-dir", str(tmp_path / "again")]) == 0
    assert main(["rerun", str(cell), "--output-dir", str(tmp_path / "again")]) == 2
    copy = tmp_path / "copy" / "cells" / cell.name
    copy.mkdir(parents=True)
    for name in ("config.json", "environment.json", CELL_FILE):
        (copy / name).write_text((cell / name).read_text())
    stored = json.loads((copy / CELL_FILE).read_text())
    stored["final"]["kl"] += 1e-9
    (copy / CELL_FILE).write_text(json.dumps(stored))
    assert main(["rerun", str(copy)]) == 1
    assert (tmp_path / "copy-rerun" / "cells" / cell.name / CELL_FILE).exists()
    assert main(["rerun", str(tmp_path)]) == 2


@pytest.mark.slow
def test_a_tuned_study_reports_its_trials(cache: Path, tmp_path: Path) -> None:
    """Trials are cells elsewhere; their choice is in the results; the same study goes on without training anything again."""
    study = gridworld({"dpo": {"beta": [0.1, 1.0]}}, "cpl", trials=2, seeds=1)
    results = compare(study, tmp_path / "study", cache=cache, workers=0)
    assert [record.group for record in results.tuning] == ["dpo", "cpl"]
    assert all(len(record.trials) == 2 for record in results.tuning)
    assert [setting.label for setting in results.settings] == ["dpo beta=0.1", "dpo beta=1.0", "cpl"]
    assert [setting.family for setting in results.settings] == ["dpo", "dpo", "cpl"]
    assert all(setting.tuned for setting in results.settings)
    assert len(list((tmp_path / "study" / "tuning" / "cells").iterdir())) == 4
    before = text(tmp_path / "study")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").glob(f"**/{CELL_FILE}")}
    compare(study, tmp_path / "study", cache=cache, workers=0)
    assert text(tmp_path / "study") == before
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_one_algorithm_under_two_names_is_equal_bit_for_bit(cache: Path, tmp_path: Path) -> None:
    results = compare(gridworld("dpo", {"dpo": {"as": "twin"}}), tmp_path / "study", cache=cache, workers=0)
    for one, other in zip(results.cells_of("dpo"), results.cells_of("twin"), strict=True):
        assert (one.final, one.path, one.curve) == (other.final, other.path, other.curve)


def command(folder: Path, *more: str) -> list[str]:
    """A comparison of two algorithms on three seeds, as a user starts it."""
    flags = [
        word
        for name, value in OPTIONS.items()
        for word in (f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value]))
    ]
    asked = ["compare", "cpl", "dpo", "--seeds", "3", "--workers", "0", *more]
    return [sys.executable, "-m", "prefopt", *asked, *flags, "--output-dir", str(folder)]


def surroundings(folder: Path) -> dict[str, str]:
    return {
        "PREFOPT_CACHE": str(folder / "cache"), "PATH": "", "OMP_NUM_THREADS": "1", "HOME": str(folder),
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
    }  # fmt: skip


def results_of(folder: Path) -> dict[str, Any]:
    """Without the command, which names the folder."""
    found = json.loads((folder / "results.json").read_text())
    assert str(folder) in found.pop("command")
    return dict(found)


@pytest.mark.slow
def test_two_shards_of_which_one_is_killed_write_the_serial_results(tmp_path: Path) -> None:
    """kill -9 in the middle of a cell: the other shard ends without it, and the same command goes on."""
    environment = surroundings(tmp_path)
    subprocess.run(command(tmp_path / "whole"), env=environment, check=True, capture_output=True)
    folder = tmp_path / "shards"
    first, second = (command(folder, "--shard", f"{number}/2") for number in (1, 2))
    with subprocess.Popen(first, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as killed:
        deadline = time.monotonic() + 300
        while not list(folder.glob("cells/*/config.json")):
            assert killed.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        killed.kill()
    assert killed.returncode == -9
    unfinished = [cell for cell in folder.glob("cells/*") if not (cell / CELL_FILE).exists()]
    assert unfinished, "it was killed too late"
    ended = subprocess.run(second, env=environment, check=True, capture_output=True, text=True)
    assert "of the others are not" in ended.stdout
    assert not (folder / "results.json").exists()
    subprocess.run(first, env=environment, check=True, capture_output=True)
    assert results_of(folder) == results_of(tmp_path / "whole")


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    """kill -9 at random moments of tuning, cells and report: the folder always goes on, and ends with equal results."""
    environment = surroundings(tmp_path)
    begin = time.monotonic()
    subprocess.run(command(tmp_path / "whole", "--trials", "2"), env=environment, check=True, capture_output=True)
    whole = time.monotonic() - begin
    expected = results_of(tmp_path / "whole")
    draw, killed, finished = random.Random(0), 0, 0
    while killed < 20:
        folder = tmp_path / f"killed-{finished}"
        fresh, begin = not folder.exists(), time.monotonic()
        process = subprocess.Popen(
            command(folder, "--trials", "2"), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            assert process.wait(draw.uniform(0.2, 0.8) * whole) == 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed += 1
        else:
            assert results_of(folder) == expected
            finished += 1
            assert finished < 40, "nothing is killed any more"
            if fresh:  # the first run filled the cache, and a machine beside other work is now slow, now fast
                whole = time.monotonic() - begin
    subprocess.run(command(folder, "--trials", "2"), env=environment, check=True, capture_output=True)
    assert results_of(folder) == expected


def test_equal_updates_follow_from_costs() -> None:
    costs = {
        "dpo": {"tokens": 100.0, "seconds": 1.0}, "ppo": {"tokens": 400.0, "seconds": 0.5},
        "big": {"tokens": 1e9, "seconds": 9.0},
    }  # fmt: skip
    assert equal_updates(costs, "dpo", 40, "tokens") == {"dpo": 40, "ppo": 10, "big": 1}
    assert equal_updates(costs, "dpo", 40, "seconds") == {"dpo": 40, "ppo": 80, "big": 4}
    with pytest.raises(ConfigError, match="free was measured to cost nothing"):
        equal_updates({**costs, "free": {"tokens": 0.0, "seconds": 1.0}}, "dpo", 40, "tokens")


def test_a_study_that_matches_tokens_gives_every_setting_its_updates(cache: Path, tmp_path: Path) -> None:
    """SFT of the chosen alone trains on half the tokens of a pair, so it gets twice the updates. All is measured once."""
    study = gridworld("dpo", "sft", match="tokens", seeds=1, max_steps=2)
    results = compare(study, tmp_path / "study", cache=cache, workers=0)
    steps = {cell.label: cell.path[-1]["step"] for cell in results.cells}
    assert steps == {"dpo": 2.0, "sft": 4.0}
    assert any("Matched: tokens, to those of dpo's run" in note for note in results.notes)
    stored = (tmp_path / "study" / "match.json").read_text()
    assert compare(study, tmp_path / "study", cache=cache, workers=0).cells == results.cells
    assert (tmp_path / "study" / "match.json").read_text() == stored
    with pytest.raises(OutputError, match="match"):
        compare(gridworld("dpo", "sft", seeds=1, max_steps=2), tmp_path / "study", cache=cache, workers=0)


def test_what_does_not_vary_is_shared_by_all_seeds(cache: Path, tmp_path: Path) -> None:
    """The pairs alone, the order alone; and both together are the default's numbers where nothing else is drawn."""
    whole = compare(gridworld("dpo"), tmp_path / "whole", cache=cache, workers=0)
    for vary in (["data"], ["order"]):
        part = compare(gridworld("dpo", vary=vary), tmp_path / vary[0], cache=cache, workers=0)
        assert part.cells[0].final == whole.cells[0].final  # seed 0 is seed 0
        assert part.cells[1].final not in (part.cells[0].final, whole.cells[1].final)
    adapter = compare(gridworld("dpo", vary=["adapter"]), tmp_path / "adapter", cache=cache, workers=0)
    assert adapter.cells[1].curve == adapter.cells[0].curve  # a table has no drawn weights
    with pytest.raises(ConfigError, match="vary"):
        gridworld("dpo", vary=[])
