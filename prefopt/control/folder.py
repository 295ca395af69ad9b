"""A folder of offline data: manifest.json, which says how it was made, and shards of episodes. Nothing in it is pickled.

manifest.json holds the format, the recipe (task, seed, noise, versions of the packages, ...) and, once every shard is there,
the shards with their SHA-256 and what each noise level came to. M steps, E episodes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from prefopt.control.steps import Steps, joined
from prefopt.errors import DataError
from prefopt.files import write_json

FORMAT = 1
MANIFEST = "manifest.json"
_COLUMNS = ("observations", "actions", "rewards", "advantages", "ends")


@dataclass(frozen=True)
class Rollouts:
    """Episodes with how they ended and how they came about.

    Args:
        steps: of E episodes.
        successes: [E] bool.
        levels: [E] float64, the noise level of each.
    """

    steps: Steps
    successes: Tensor
    levels: Tensor

    @property
    def returns(self) -> Tensor:
        """[E] float64 sums of rewards."""
        sums = self.steps.rewards.double().cumsum(0)[self.steps.ends - 1]
        return sums.diff(prepend=sums.new_zeros(1))


@dataclass(frozen=True)
class OfflineData(Rollouts):
    """What a folder holds, and in `facts` its manifest."""

    facts: Mapping[str, Any]


@dataclass(frozen=True)
class LevelSummary:
    """What a noise level came to: its episodes, how many succeeded, and means over episodes and over steps."""

    level: float
    episodes: int
    successes: int
    mean_return: float
    mean_advantage: float


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, finished or not.

    Raises:
        DataError: there is none, or it is none of ours.
    """
    path = folder / MANIFEST
    make = f"`prefopt control generate TASK --output-dir {folder}` makes one."
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{folder} is no folder of offline data: expected {MANIFEST} in it. {make}") from None
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}). {make}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or not isinstance(manifest.get("recipe"), dict):
        raise DataError(f"{path}: expected offline data of format {FORMAT}, got something else. {make}")
    return manifest


def load_folder(folder: Path) -> OfflineData:
    """All episodes of a folder, in the order of their numbers.

    Raises:
        DataError: no such data, an unfinished folder, or a file that is not the one that was written.
    """
    manifest = read_manifest(folder)
    if (shards := manifest.get("shards")) is None:
        expected = shard_count(manifest["recipe"])
        there = sum(shard_path(folder, index).exists() for index in range(expected))
        raise DataError(
            f"{folder} is unfinished: {there} of {expected} shards. Go on with: {generate_command(folder, manifest['recipe'])}"
        )
    for shard in shards:
        if file_digest(folder / shard["file"]) != shard["sha256"]:
            state = "not the file that was written" if (folder / shard["file"]).exists() else "missing"
            raise DataError(
                f"{folder}: {shard['file']} is {state}. This makes it anew: {generate_command(folder, manifest['recipe'])}"
            )
    data = concatenated([read_shard(folder / shard["file"]) for shard in shards])
    return OfflineData(data.steps, data.successes, data.levels, facts=manifest)


def write_shard(path: Path, data: Rollouts) -> None:
    """Writes beside its place and renames."""
    from safetensors.torch import save_file

    tensors = {name: getattr(data.steps, name).contiguous() for name in _COLUMNS}
    staged = path.with_name(f"{path.name}.partial")
    save_file({**tensors, "successes": data.successes, "levels": data.levels}, staged)
    staged.chmod(0o644)  # safetensors takes 0600, but users may share a folder
    os.replace(staged, path)


def read_shard(path: Path) -> Rollouts:
    """The episodes of a shard.

    Raises:
        DataError: it is not there, or no such file.
    """
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        return Rollouts(Steps(*(tensors[name] for name in _COLUMNS)), tensors["successes"], tensors["levels"])
    except (OSError, SafetensorError, KeyError) as error:
        raise DataError(f"{path} is no shard of offline data: {error}.") from error


def concatenated(parts: Sequence[Rollouts]) -> Rollouts:
    """The episodes of several shards, in order."""
    return Rollouts(
        joined([part.steps for part in parts]),
        torch.cat([part.successes for part in parts]),
        torch.cat([part.levels for part in parts]),
    )


def sound_shards(folder: Path, manifest: Mapping[str, Any]) -> list[bool]:
    """Which shards need not be made: those of a finished folder that are what was written, else those that can be read."""
    recorded = {shard["file"]: shard["sha256"] for shard in manifest.get("shards") or ()}
    return [_sound(shard_path(folder, index), recorded) for index in range(shard_count(manifest["recipe"]))]


def _sound(path: Path, recorded: Mapping[str, str]) -> bool:
    if recorded:
        return file_digest(path) == recorded.get(path.name)
    try:
        read_shard(path)
    except DataError:
        return False
    return True


def finish_folder(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Writes the manifest of a folder whose shards are all there; from then on `load_folder` takes it."""
    paths = [shard_path(folder, index) for index in range(shard_count(recipe))]
    data = concatenated([read_shard(path) for path in paths])
    write_json(
        folder / MANIFEST,
        {
            "format": FORMAT,
            "recipe": dict(recipe),
            "steps": len(data.steps),
            "observation_size": data.steps.observations.shape[1],
            "action_size": data.steps.actions.shape[1],
            "levels": [vars(summary) for summary in summarise(data)],
            "shards": [{"file": path.name, "sha256": file_digest(path)} for path in paths],
        },
    )


def summarise(data: Rollouts) -> list[LevelSummary]:
    """What each noise level came to, by rising level."""
    found = []
    of_step = data.levels.repeat_interleave(data.steps.lengths)
    for level in data.levels.unique():
        mine = data.levels == level
        found.append(
            LevelSummary(
                float(level),
                int(mine.sum()),
                int(data.successes[mine].sum()),
                float(data.returns[mine].mean()),
                float(data.steps.advantages[of_step == level].double().mean()),
            )
        )
    return found


def shard_count(recipe: Mapping[str, Any]) -> int:
    """How many shards a recipe fills."""
    return -(-recipe["episodes"] // recipe["shard_episodes"])


def shard_path(folder: Path, index: int) -> Path:
    """Where a shard is."""
    return folder / f"shard-{index:04d}.safetensors"


def generate_command(folder: Path, recipe: Mapping[str, Any]) -> str:
    """The command line that makes a folder of this recipe, or what of it is missing."""
    flags = {name: value for name, value in {**recipe, **recipe["noise"]}.items() if name not in ("task", "noise", "versions")}
    words = [recipe["task"], "--output-dir", str(folder)]
    for name, value in flags.items():
        words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return " ".join(["prefopt control generate", *words])


def file_digest(path: Path) -> str:
    """SHA-256 of a file; "" where there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
