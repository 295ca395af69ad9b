"""`prefopt control` and what `prefopt doctor` says of the simulator."""

from __future__ import annotations

import shlex
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from prefopt.control.folder import shard_path

TINY = ("--episodes", 2, "--length", 4, "--shard-episodes", 1, "--workers", 0, "--levels", 0.5, 0)


@pytest.fixture
def folder(cli: Any, tmp_path: Path) -> Path:
    done = cli("control", "generate", "drawer-open", "--output-dir", tmp_path / "data", *TINY)
    assert done.code == 0, done.err
    assert "drawer-open: shards: 2/2" in done.out
    assert "8 steps in" in done.out
    assert done.last == str(tmp_path / "data")
    return tmp_path / "data"


def test_show_tells_how_the_data_was_made_and_what_it_came_to(cli: Any, folder: Path) -> None:
    done = cli("control", "show", folder)
    assert done.code == 0, done.err
    assert "drawer-open: 2 episodes of 4 steps, seed 0; observations of 39 numbers, actions of 4." in done.out
    assert f"mujoco {metadata.version('mujoco')}" in done.out
    assert "bias 0.3" in done.out
    assert " all 2 0 (0%) " in done.flat


def test_the_command_that_an_error_names_mends_the_folder(cli: Any, folder: Path) -> None:
    shard_path(folder, 1).unlink()
    refused = cli("control", "show", folder)
    assert refused.code == 2
    command = shlex.split(refused.err.partition("makes it anew: ")[2])
    assert command[0] == "prefopt"
    mended = cli(*command[1:], "--workers", 0)
    assert mended.code == 0, mended.err
    assert "1 of 2 shards were made before and are kept." in mended.out
    assert cli("control", "show", folder).code == 0


def test_other_options_and_missing_words_are_refused(cli: Any, folder: Path) -> None:
    other = cli("control", "generate", "drawer-open", "--output-dir", folder, *TINY, "--seed", 5)
    assert (other.code, "other options (seed)" in other.err) == (2, True)
    nowhere = cli("control", "generate", "drawer-open", *TINY)
    assert (nowhere.code, "--output-dir FOLDER" in nowhere.err) == (2, True)
    unknown = cli("control", "generate", "open-drawer", "--output-dir", folder / "other", *TINY)
    assert (unknown.code, "unknown control task 'open-drawer'" in unknown.err) == (2, True)
    assert not (folder / "other").exists()


def test_doctor_tells_a_mujoco_that_metaworld_does_not_run_on(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "needs mujoco" not in cli("doctor").out
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "3.9.1" if name == "mujoco" else version(name))
    assert "needs mujoco==3.3.0, got 3.9.1: pip install 'mujoco==3.3.0'" in cli("doctor").flat
