"""Meta-World as episodes that are functions of what seeds them, its scripted policies, and success rates on fixed starts.

O numbers of an observation, A of an action, T steps of an episode, E episodes, W environments side by side. Needs the extra
`control`. Tasks and protocol are those of Hejna et al. 2023 [hejna2023cpl], section 4: episodes of 250 steps, and an episode
succeeds if any of its steps does. Differences: (1) version 3 of the environments, which today's MuJoCo runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch
from packaging.requirements import Requirement
from torch import Tensor

from losses.suggestions import suggest
from prefopt.errors import ConfigError, TrainingError

TASKS = ("drawer-open", "button-press", "bin-picking", "door-open", "plate-slide", "sweep-into")
"""Of the paper. The goal is in every observation; in bin-picking and sweep-into it is the object that varies, not the goal."""

EPISODE_STEPS = 250

# One stream of random numbers per purpose: starts of an evaluation are not starts of the data.
EVALUATION, DATA, BEHAVIOUR, BIAS = range(4)

Act = Callable[[np.ndarray], np.ndarray]
"""[O] float64 -> [A] numbers."""

ActForAll = Callable[[Tensor], Tensor]
"""[W, O] float32 -> [W, A]."""


@dataclass(frozen=True)
class Episode:
    """T steps: observations [T, O] and actions [T, A] (both float32, actions as taken), rewards [T] float32 and success."""

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    success: bool


@dataclass(frozen=True)
class Outcomes:
    """E episodes of a policy.

    Args:
        successes: [E] bool.
        returns: [E] sums of rewards; None where episodes ended at their success.
    """

    successes: Tensor
    returns: Tensor | None

    @property
    def rate(self) -> float:
        """The share of episodes that succeeded."""
        return float(self.successes.double().mean())


class Environment:
    """One Meta-World task.

    Args:
        task: one of `TASKS`.

    Raises:
        ConfigError: an unknown task, the extra is not installed, or a MuJoCo that Meta-World does not run on.
    """

    def __init__(self, task: str) -> None:
        self.task = task
        self._env = _metaworld(task).ALL_V3_ENVIRONMENTS[f"{task}-v3"]()
        # What `set_task` does, without its pickled bytes: starts are drawn here.
        self._env._set_task_called = True
        self._env._partially_observable = False
        vars(self._env).pop("sawyer_observation_space", None)  # cached with the goal hidden
        self.observation_size = int(self._env.sawyer_observation_space.shape[0])
        self.action_size = int(self._env.action_space.shape[0])

    @property
    def simulator(self) -> Any:
        """MuJoCo's model and data, for cameras."""
        return self._env

    def start(self, seed: int, episode: int, purpose: int = EVALUATION) -> np.ndarray:
        """[O] float64, the first observation of an episode; a function of the task and these numbers alone."""
        env = self._env
        env.np_random = draws(self.task, seed, episode, purpose)
        env.seeded_rand_vec, env._freeze_rand_vec = True, False
        env.reset_model()  # draws the start, again where the task refuses one
        # The draw reaches the simulator's bodies after the first observation of its own reset; a second one sees it.
        env._freeze_rand_vec = True
        observation, _ = env.reset()
        return observation

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        """Acts. [A] -> (observation [O] float64, reward, success at this step)."""
        observation, reward, _, _, info = self._env.step(np.clip(action, -1.0, 1.0))
        return observation, float(reward), bool(info["success"])


def make_environments(task: str, count: int) -> list[Environment]:
    """Environments to step side by side. Each takes 0.1 s and serves any number of episodes.

    Raises:
        ConfigError: see `Environment`.
    """
    return [Environment(task) for _ in range(count)]


def scripted_policy(task: str) -> Act:
    """Meta-World's own policy for a task, clipped to [-1, 1]; a function of the observation alone.

    Raises:
        ConfigError: see `Environment`.
    """
    policy = _metaworld(task).policies.ENV_POLICY_MAP[f"{task}-v3"]()

    def act(observation: np.ndarray) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is clipped here
            # A copy, because the policy of door-open writes into what it is given.
            return np.clip(policy.get_action(observation.copy()), -1.0, 1.0)

    return act


def rollout(environment: Environment, act: Act, observation: np.ndarray, *, length: int = EPISODE_STEPS) -> Episode:
    """An episode of `length` steps from the observation that `Environment.start` returned. Success does not end it."""
    observations, actions, rewards, success = [], [], [], False
    for _ in range(length):
        action = np.clip(act(observation), -1.0, 1.0).astype(np.float32)
        observations.append(observation.astype(np.float32))
        observation, reward, succeeded = environment.step(action)
        actions.append(action)
        rewards.append(reward)
        success |= succeeded
    return Episode(np.stack(observations), np.stack(actions), np.array(rewards, dtype=np.float32), success)


@torch.no_grad()
def success_rate(
    act: ActForAll,
    environments: Sequence[Environment],
    *,
    episodes: int,
    seed: int,
    length: int = EPISODE_STEPS,
    stop_at_success: bool = False,
) -> Outcomes:
    """Lets a policy act in the same starts as any other policy: episodes 0, 1, ... of the seed.

    Args:
        act: called once a step for all environments, with as many rows as there are environments; rows of finished episodes
            are filled up and their actions not taken. Actions are clipped to [-1, 1].
        environments: of one task, from `make_environments`. More of them make fewer, larger calls; 10 are plenty.
        stop_at_success: ends an episode when it has succeeded, which saves time and leaves no returns.

    Raises:
        TrainingError: the policy's action is not finite.
    """
    successes = torch.zeros(episodes, dtype=torch.bool)
    returns = torch.zeros(episodes, dtype=torch.float64)
    for first in range(0, episodes, len(environments)):
        numbers = range(first, min(first + len(environments), episodes))
        rows = torch.zeros(len(environments), environments[0].observation_size)
        for row, number in enumerate(numbers):
            rows[row] = torch.from_numpy(environments[row].start(seed, number))
        for _ in range(length):
            going = [n for n in numbers if not (stop_at_success and successes[n])]
            if not going:
                break
            actions = _finite(act(rows)).numpy()
            for number in going:
                observation, reward, succeeded = environments[number - first].step(actions[number - first])
                rows[number - first] = torch.from_numpy(observation)
                returns[number] += reward
                successes[number] |= succeeded
    return Outcomes(successes, None if stop_at_success else returns)


def draws(task: str, seed: int, episode: int, purpose: int) -> np.random.Generator:
    """A generator whose numbers depend on these alone."""
    key = int.from_bytes(task.encode(), "little")
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(key, episode, purpose)))


def mujoco_conflict() -> str | None:
    """What to do about a MuJoCo that the installed Meta-World was not made for; None where all is well or one is absent.

    Another MuJoCo breaks its environments or changes their dynamics, and nothing but the package's own metadata says so.
    """
    try:
        required, installed = metadata.requires("metaworld") or (), metadata.version("mujoco")
    except metadata.PackageNotFoundError:
        return None
    wanted = next((need for need in map(Requirement, required) if need.name == "mujoco" and need.marker is None), None)
    if wanted is None or wanted.specifier.contains(installed, prereleases=True):
        return None
    return f"metaworld {metadata.version('metaworld')} needs {wanted}, got {installed}: pip install '{wanted}'"


def _metaworld(task: str) -> Any:
    """The package, which has the task and a MuJoCo that it runs on."""
    if task not in TASKS:
        raise ConfigError(f"unknown control task {task!r}{suggest(task, TASKS)}. There are {', '.join(TASKS)}.")
    if (conflict := mujoco_conflict()) is not None:
        raise ConfigError(f"{conflict}. `prefopt doctor` shows what is installed.")
    try:
        import metaworld
        import metaworld.policies
    except ModuleNotFoundError as error:
        raise ConfigError(f"the control task {task} needs the 'control' extra: pip install -e '.[control]'.") from error
    except Exception as error:  # MuJoCo loads what MUJOCO_GL names as soon as it is imported
        raise ConfigError(
            f"metaworld cannot be imported ({type(error).__name__}: {error}). Unset MUJOCO_GL, or name an OpenGL library that "
            "is there: egl, osmesa or glfw."
        ) from error
    return metaworld


def _finite(actions: Tensor) -> Tensor:
    if not torch.isfinite(actions).all():
        raise TrainingError("the policy's actions are not finite; its training diverged: lower --learning-rate.")
    return actions.detach().float().cpu()
