"""A folder of offline data: what is written is what is read, and nothing else is taken for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from prefopt.control.folder import (
    MANIFEST,
    LevelSummary,
    Rollouts,
    concatenated,
    finish_folder,
    load_folder,
    read_shard,
    shard_path,
    sound_shards,
    summarise,
    write_shard,
)
from prefopt.control.steps import Steps
from prefopt.errors import DataError
from prefopt.files import write_json

RECIPE = {
    "task": "drawer-open", "episodes": 3, "seed": 7, "length": 2, "shard_episodes": 2,
    "noise": {"levels": [0.25, 1.0], "bias": 0.5}, "versions": {"mujoco": "3.3.0"},
}  # fmt: skip


def rollouts(*levels: float, success: bool = True) -> Rollouts:
    """An episode of two steps for each level, with rewards 1 and 2 and advantages of minus the level."""
    count = 2 * len(levels)
    advantages = -torch.tensor(levels).repeat_interleave(2)
    steps = Steps(
        observations=torch.randn(count, 3), actions=torch.rand(count, 2), rewards=torch.tensor([1.0, 2.0]).repeat(len(levels)),
        advantages=advantages, ends=2 * torch.arange(1, len(levels) + 1),
    )  # fmt: skip
    return Rollouts(steps, torch.tensor([success] * len(levels)), torch.tensor(levels, dtype=torch.float64))


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A folder with one of two shards."""
    write_json(tmp_path / MANIFEST, {"format": 1, "recipe": RECIPE})
    write_shard(shard_path(tmp_path, 0), rollouts(0.25, 1.0))
    return tmp_path


@pytest.fixture
def finished(begun: Path) -> Path:
    write_shard(shard_path(begun, 1), rollouts(1.0, success=False))
    finish_folder(begun, RECIPE)
    return begun


def test_what_was_written_is_read(finished: Path) -> None:
    data = load_folder(finished)
    parts = concatenated([read_shard(shard_path(finished, index)) for index in range(2)])
    for name in ("observations", "actions", "rewards", "advantages", "ends"):
        assert torch.equal(getattr(data.steps, name), getattr(parts.steps, name)), name
    assert data.steps.ends.tolist() == [2, 4, 6]
    assert data.successes.tolist() == [True, True, False]
    assert data.levels.tolist() == [0.25, 1.0, 1.0]
    assert data.returns.tolist() == [3.0, 3.0, 3.0]
    assert data.facts["recipe"] == RECIPE
    assert (data.facts["observation_size"], data.facts["action_size"], data.facts["steps"]) == (3, 2, 6)
    assert data.facts["levels"][1] == {
        "level": 1.0, "episodes": 2, "successes": 1, "mean_return": 3.0, "mean_advantage": -1.0
    }  # fmt: skip
    assert not list(finished.glob("*.partial"))


def test_levels_are_summed_up_over_their_own_episodes() -> None:
    data = concatenated([rollouts(0.5), rollouts(0.0, 0.5, success=False)])
    assert summarise(data) == [LevelSummary(0.0, 1, 0, 3.0, 0.0), LevelSummary(0.5, 2, 1, 3.0, -0.5)]


def test_an_unfinished_folder_says_how_to_go_on(begun: Path) -> None:
    with pytest.raises(DataError, match="1 of 2 shards") as error:
        load_folder(begun)
    command = (
        f"prefopt control generate drawer-open --output-dir {begun} --episodes 3 --seed 7 --length 2 --shard-episodes 2 "
        "--levels 0.25 1.0 --bias 0.5"
    )
    assert str(error.value).endswith(command)


def test_a_shard_that_is_not_the_one_that_was_written_is_refused(finished: Path) -> None:
    path = shard_path(finished, 1)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"shard-0001\.safetensors is not the file that was written.*--output-dir"):
        load_folder(finished)
    assert sound_shards(finished, json.loads((finished / MANIFEST).read_text())) == [True, False]
    path.unlink()
    with pytest.raises(DataError, match=r"shard-0001\.safetensors is missing"):
        load_folder(finished)


def test_of_an_unfinished_folder_what_can_be_read_is_kept(begun: Path) -> None:
    manifest = json.loads((begun / MANIFEST).read_text())
    shard_path(begun, 1).write_bytes(shard_path(begun, 0).read_bytes()[:-4])
    assert sound_shards(begun, manifest) == [True, False]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format": 2, "recipe": {}}', '{"format": 1}'])
def test_other_folders_are_told_from_data(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(DataError, match="prefopt control generate TASK"):
        load_folder(tmp_path)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is no folder of offline data"):
        load_folder(tmp_path / "file")
