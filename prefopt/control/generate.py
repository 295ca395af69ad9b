"""Offline data from Meta-World's scripted policies with graded errors. E episodes, A numbers of an action.

The data of Hejna et al. 2023 [hejna2023cpl], section 4.1, are rollouts of half-trained SAC policies with Gaussian noise of 0.3,
and their labels come from the advantages of a trained SAC oracle. Differences: (1) the behaviour is the scripted policy with
errors that a level scales. (2) The advantage is a proxy, -||a - a*||^2 with a* the scripted policy's action in that state: it
knows what is right and nothing of what an error costs.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import KW_ONLY, asdict, dataclass, field
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from prefopt.control.folder import (
    FORMAT,
    MANIFEST,
    OfflineData,
    Rollouts,
    finish_folder,
    load_folder,
    read_manifest,
    shard_path,
    sound_shards,
    write_shard,
)
from prefopt.control.simulate import (
    BEHAVIOUR,
    BIAS,
    DATA,
    EPISODE_STEPS,
    Environment,
    Episode,
    draws,
    rollout,
    scripted_policy,
)
from prefopt.control.steps import Steps
from prefopt.errors import ConfigError, DataError, OutputError
from prefopt.files import differences, write_json
from prefopt.machine import end_with_parent
from prefopt.runlog import counter

_LONGEST = 500  # Meta-World's own limit
_VERSIONS = ("metaworld", "mujoco", "gymnasium", "numpy")


@dataclass(frozen=True, kw_only=True)
class Noise:
    """How the behaviour errs. Each episode draws a level, and what is added to the scripted action is scaled by it.

    Behaviour cloning averages what it sees, so errors have to be of a kind that its average keeps. Jitter alone is averaged
    out: on drawer-open, the clone of behaviour that fails in a sixth of its episodes succeeds in all. An offset that lasts an
    episode is not, because the places that it leads to tell it; and a bias is the average.

    Args:
        levels: The grid of levels; 0 is the scripted policy itself, which any filter would find.
        bias: The size of an error in every dimension of the action that all episodes have in common; its signs are drawn once,
            by task and seed.
        offset: The standard deviation of an error that lasts an episode.
        jitter: The standard deviation of an error that is drawn at every step.
    """

    levels: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    bias: float = 0.3
    offset: float = 0.3
    jitter: float = 0.5

    def __post_init__(self) -> None:
        sound = all(0 <= level < np.inf for level in self.levels)
        if not self.levels or not sound or len(set(self.levels)) != len(self.levels):
            raise ConfigError(f"levels must be different numbers of at least 0, got {list(self.levels)}.")
        for name in ("bias", "offset", "jitter"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ConfigError(f"{name} must be a number of at least 0, got {getattr(self, name)}.")


@dataclass(frozen=True)
class Recipe:
    """What a folder is made of: equal recipes give equal bytes, however many processes made them.

    Args:
        task: One of `prefopt.control.simulate.TASKS`.
        episodes: How many.
        seed: Of starts and errors; more episodes of the same seed begin with the same episodes.
        length: Steps of an episode.
        shard_episodes: Episodes of a file, and of what an interruption may cost.
        noise: How the behaviour errs.
    """

    task: str
    _: KW_ONLY
    episodes: int = 500
    seed: int = 0
    length: int = EPISODE_STEPS
    shard_episodes: int = 20
    noise: Noise = field(default_factory=Noise)

    def __post_init__(self) -> None:
        for name, lowest in (("episodes", 1), ("seed", 0), ("length", 1), ("shard_episodes", 1)):
            if getattr(self, name) < lowest:
                raise ConfigError(f"{name} must be at least {lowest}, got {getattr(self, name)}.")
        if self.length > _LONGEST:
            raise ConfigError(f"length must be at most {_LONGEST}, where Meta-World ends an episode, got {self.length}.")

    def as_dict(self) -> dict[str, Any]:
        """As the manifest holds it, with the versions of what else decides the numbers."""
        versions = {name: metadata.version(name) for name in _VERSIONS}
        return json.loads(json.dumps({**asdict(self), "versions": versions}))


def generate(
    recipe: Recipe, folder: Path, *, workers: int | None = None, overwrite: bool = False, console: Console | None = None
) -> OfflineData:
    """Makes a folder of offline data, or what of it is missing.

    Args:
        workers: processes side by side; None takes one a core, 0 works in this process.
        overwrite: deletes other data that the folder holds.
        console: for people; None is silent.

    Raises:
        ConfigError: an unknown task, or the extra is not installed.
        OutputError: the folder holds other data, or something else, or cannot be written.
    """
    _tools(recipe.task)  # before anything is written
    manifest = _claim(folder, recipe, overwrite)
    sound = sound_shards(folder, manifest)
    missing = [index for index, there in enumerate(sound) if not there]
    if console is not None and len(missing) < len(sound):
        console.print(f"{len(sound) - len(missing)} of {len(sound)} shards were made before and are kept.", highlight=False)
    if missing:
        _make_all(recipe, folder, missing, workers, console)
    if missing or "shards" not in manifest:
        finish_folder(folder, manifest["recipe"])
    return load_folder(folder)


def make_episode(recipe: Recipe, number: int) -> tuple[Episode, np.ndarray, float]:
    """An episode, the advantages [T] of its actions, and its noise level; all functions of recipe and number alone."""
    environment, expert = _tools(recipe.task)
    noise, size = recipe.noise, environment.action_size
    signs = draws(recipe.task, recipe.seed, 0, BIAS).choice([-1.0, 1.0], size)
    draw = draws(recipe.task, recipe.seed, number, BEHAVIOUR)
    level = float(draw.choice(noise.levels))
    lasting = noise.bias * signs + noise.offset * draw.standard_normal(size)
    advantages: list[float] = []

    def act(observation: np.ndarray) -> np.ndarray:
        right = expert(observation)
        error = level * (lasting + noise.jitter * draw.standard_normal(size))
        action = np.clip(right + error, -1.0, 1.0).astype(np.float32)
        advantages.append(-float(np.square(action - right).sum()))
        return action

    episode = rollout(environment, act, environment.start(recipe.seed, number, DATA), length=recipe.length)
    return episode, np.array(advantages, dtype=np.float32), level


def _make_all(recipe: Recipe, folder: Path, missing: Sequence[int], workers: int | None, console: Console | None) -> None:
    show = counter(console, f"{recipe.task}: shards")
    if workers == 0:
        for done, index in enumerate(missing, start=1):
            _make_shard(recipe, folder, index)
            if show:
                show(done, len(missing))
        return
    count = min(workers or os.cpu_count() or 1, len(missing))
    with ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_prepare_worker) as pool:
        futures = [pool.submit(_make_shard, recipe, folder, index) for index in missing]
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                if show:
                    show(done, len(missing))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # else all that wait would still be made
            raise


def _prepare_worker() -> None:
    end_with_parent()
    torch.set_num_threads(1)


def _make_shard(recipe: Recipe, folder: Path, index: int) -> None:
    first = index * recipe.shard_episodes
    made = [make_episode(recipe, number) for number in range(first, min(first + recipe.shard_episodes, recipe.episodes))]
    episodes, advantages, levels = zip(*made, strict=True)
    steps = Steps(
        observations=torch.from_numpy(np.concatenate([episode.observations for episode in episodes])),
        actions=torch.from_numpy(np.concatenate([episode.actions for episode in episodes])),
        rewards=torch.from_numpy(np.concatenate([episode.rewards for episode in episodes])),
        advantages=torch.from_numpy(np.concatenate(advantages)),
        ends=torch.tensor([len(episode.rewards) for episode in episodes]).cumsum(0),
    )
    successes = torch.tensor([episode.success for episode in episodes])
    write_shard(shard_path(folder, index), Rollouts(steps, successes, torch.tensor(levels, dtype=torch.float64)))


@functools.lru_cache(maxsize=1)
def _tools(task: str) -> tuple[Environment, Any]:
    """A process's environment, which serves all its episodes, and the scripted policy."""
    return Environment(task), scripted_policy(task)


def _claim(folder: Path, recipe: Recipe, overwrite: bool) -> dict[str, Any]:
    """The folder's manifest, after taking an empty one for this recipe. Raises OutputError; see `generate`."""
    own = {"format": FORMAT, "recipe": recipe.as_dict()}
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"--output-dir {folder} is a file; name a folder.")
    if folder.is_dir() and any(folder.iterdir()):
        try:
            held = read_manifest(folder)
        except DataError as error:
            raise OutputError(f"{folder} is not empty and holds no offline data; name another --output-dir.") from error
        if held["recipe"] == own["recipe"]:
            return held
        # One that stopped before its first shard left nothing worth keeping.
        if not overwrite and any(folder.glob("shard-*")):
            differing = ", ".join(sorted(differences(held["recipe"], own["recipe"])))
            raise OutputError(
                f"{folder} holds offline data made with other options ({differing}). Name another --output-dir, or pass "
                "--overwrite to delete it."
            )
        shutil.rmtree(folder)
    try:
        write_json(folder / MANIFEST, own)
    except OSError as error:
        raise OutputError(f"{error.filename or folder}: {error.strerror or error}; name another --output-dir.") from error
    return own
