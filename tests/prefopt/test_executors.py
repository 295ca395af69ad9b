"""Executors: a study on processes or on a Ray cluster is the serial one; a lost worker's cell runs again, and that is said."""

from __future__ import annotations

import io
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from prefopt.compare import compare
from prefopt.errors import ConfigError
from prefopt.executors import Placement, WorkerLost
from prefopt.executors.processes import Processes, ThisProcess
from prefopt.study import Study, study_of

try:
    import ray  # noqa: F401

    RAY = True
except ImportError:
    RAY = False

needs_ray = pytest.mark.skipif(not RAY, reason="ray is not installed (the extra `ray` has it)")

# A loss of a user, whose first cells end their process as `kill -9` would, in the middle of a step of training.
FRAGILE = """
import os
import signal
from pathlib import Path

import losses
from losses.dpo import dpo_loss
from losses.types import LossOutput

DRIVER, LIVES = {driver}, Path({folder!r})


@losses.register("fragile")
def fragile_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, *,
                 beta: float = 0.1) -> LossOutput:
    \"\"\"DPO that takes its worker down while files are left that say so.\"\"\"
    for life in sorted(LIVES.glob("life-*")) if os.getpid() != DRIVER and policy_chosen_logps.requires_grad else ():
        life.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return dpo_loss(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta=beta
    )
"""


@pytest.fixture
def fragile(tmp_path: Path, new_losses: None) -> Path:
    file = tmp_path / "fragile.py"
    file.write_text(FRAGILE.format(driver=os.getpid(), folder=str(tmp_path)))
    return file


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers import what this process imports."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))


def gridworld(*algorithms: Any, seeds: int = 2, **changes: Any) -> Study:
    return study_of(
        {
            "algorithms": algorithms, "seeds": seeds, "data": ["control:gridworld"], "segment_length": 4, "pairs": 60,
            "batch_size": 20, "epochs": 1, "learning_rate": 0.03, "checkpoints": 1, "eval_pairs": 40, **changes,
        }
    )  # fmt: skip


def run(study: Study, folder: Path, cache: Path, **how: Any) -> tuple[dict[str, Any], str]:
    """What it wrote, and what it said."""
    said = io.StringIO()
    compare(study, folder, cache=cache, console=Console(file=said, width=200), **how)
    return json.loads((folder / "results.json").read_text()), said.getvalue()


def test_jobs_answer_fail_and_are_lost_each_alone() -> None:
    """A process that dies takes no other job with it."""
    with Processes(2) as executor:
        lost, answered, failed = (
            executor.submit(os._exit, 9),
            executor.submit(math.factorial, 3),
            executor.submit(math.sqrt, -1),
        )
        assert answered.result() == 6
        assert isinstance(failed.exception(), ValueError)
        assert isinstance(lost.exception(), WorkerLost)
    with ThisProcess() as here:
        assert here.submit(math.factorial, 3).result() == 6
        assert isinstance(here.submit(math.sqrt, -1).exception(), ValueError)


def test_flags_that_contradict_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="expected processes or ray"):
        Placement("rays")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--ray-address auto is of --executor ray"):
        Placement(ray_address="auto")
    with pytest.raises(ConfigError, match="expected 0 or more"):
        Placement(workers=-1)
    with pytest.raises(ConfigError, match="drop one of them"):
        Placement("ray", workers=0)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"'ray' extra, here and on every worker: pip install -e '\.\[ray\]'"):
        Placement("ray")


def test_workers_share_the_cores_of_one_machine_only() -> None:
    assert Placement().side_by_side(tiny=False, cells=9) == 1
    assert Placement().side_by_side(tiny=True, cells=1) == 1
    assert Placement(workers=3).side_by_side(tiny=False, cells=9) == 3


@pytest.mark.slow
def test_a_cell_whose_process_is_killed_runs_again(fragile: Path, cache: Path, tmp_path: Path, paths: None) -> None:
    study = gridworld("fragile", seeds=1, imports=[str(fragile)])
    serial, _ = run(study, tmp_path / "serial", cache, workers=0)
    assert {cell["status"] for cell in serial["cells"]} == {"ok"}
    (tmp_path / "life-1").touch()
    killed, said = run(study, tmp_path / "killed", cache, workers=1)
    assert killed == serial
    assert not list(tmp_path.glob("life-*"))
    assert "fragile seed 0: its worker was lost" in said
    for number in range(9):
        (tmp_path / f"life-{number}").touch()
    hopeless, said = run(study, tmp_path / "hopeless", cache, workers=1)
    assert said.count("it runs again") == 2
    assert hopeless["cells"][0]["status"] == "failed"
    assert "its worker was lost 3 times" in hopeless["cells"][0]["error"]


@needs_ray
@pytest.mark.slow
def test_two_ray_workers_of_which_one_is_killed_write_the_serial_results(
    fragile: Path, cache: Path, tmp_path: Path, paths: None
) -> None:
    """A cell that fails is reported as it is elsewhere; a finished cell is not run again."""
    study = gridworld("fragile", "cpl", imports=[str(fragile)])
    serial, _ = run(study, tmp_path / "serial", cache, workers=0)
    assert {cell["status"] for cell in serial["cells"]} == {"ok"}
    (tmp_path / "life-1").touch()
    folder = tmp_path / "ray"
    clustered, said = run(study, folder, cache, executor="ray", workers=2)
    assert clustered == serial
    assert not list(tmp_path.glob("life-*"))
    assert said.count("its worker was lost") == 1
    stamps = {file: file.stat().st_mtime_ns for file in folder.glob("cells/*/cell.json")}
    assert len(stamps) == 4
    next(iter(stamps)).unlink()
    again, said = run(study, folder, cache, executor="ray", workers=2)
    assert again == serial
    assert "3 of 4 cells were finished before and are kept." in said
    kept = [file for file, stamp in stamps.items() if file.stat().st_mtime_ns == stamp]
    assert len(kept) == 3


@needs_ray
@pytest.mark.slow
def test_failures_come_back_from_ray_as_they_were(paths: None) -> None:
    with Placement("ray", workers=1).start(tiny=True, cells=1) as executor:
        answered, failed, lost = (
            executor.submit(math.factorial, 3),
            executor.submit(math.sqrt, -1),
            executor.submit(os._exit, 9),
        )
        assert answered.result(60) == 6
        assert type(failed.exception(60)) is ValueError
        assert isinstance(lost.exception(60), WorkerLost)
    with pytest.raises(ConfigError, match="Name HOST:PORT of a running cluster"):
        Placement("ray", ray_address="nowhere").start(tiny=True, cells=1)
