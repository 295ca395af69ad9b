"""Simulated tasks: starts, scripted policies, success rates, and data that is a function of its recipe. Episodes are short."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from prefopt.control import render
from prefopt.control.folder import file_digest, load_folder, shard_path
from prefopt.control.generate import Noise, Recipe, generate, make_episode
from prefopt.control.simulate import (
    DATA,
    TASKS,
    Environment,
    make_environments,
    mujoco_conflict,
    rollout,
    scripted_policy,
    success_rate,
)
from prefopt.errors import ConfigError, DataError, OutputError, TrainingError

TASK = "drawer-open"
RECIPE = Recipe(TASK, episodes=2, length=6, shard_episodes=1, seed=3)


@pytest.fixture(scope="module")
def environment() -> Environment:
    return Environment(TASK)


@pytest.fixture(scope="module")
def pair() -> list[Environment]:
    return make_environments("plate-slide", 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generate(RECIPE, tmp_path / "data", workers=0)
    return tmp_path / "data"


def digests(folder: Path) -> list[str]:
    return [file_digest(path) for path in sorted(folder.iterdir())]


def as_act_for_all(task: str) -> Callable[[Tensor], Tensor]:
    act = scripted_policy(task)
    return lambda rows: torch.from_numpy(np.stack([act(row) for row in rows.double().numpy()]))


# ---- starts, steps, success rates


@pytest.mark.parametrize("task", TASKS)
def test_the_first_observation_shows_the_start_that_was_drawn(task: str) -> None:
    """The simulator's own reset shows the bodies of the episode before."""
    env = Environment(task)
    first = env.start(0, 0)
    after, reward, success = env.step(np.zeros(4, dtype=np.float32))
    assert first.shape == (env.observation_size,) == (39,)
    assert first[4:7] == pytest.approx(after[4:7], abs=2e-3)  # an object may settle
    assert first[-3:].any()
    assert np.isfinite(reward)
    assert not success


def test_a_start_is_a_function_of_seed_and_episode_alone(environment: Environment) -> None:
    one = environment.start(0, 1)
    for _ in range(3):
        environment.step(np.ones(4, dtype=np.float32))
    others = [environment.start(0, 2), environment.start(1, 1), environment.start(0, 1, DATA)]
    assert np.array_equal(one, environment.start(0, 1))
    assert np.array_equal(one, Environment(TASK).start(0, 1))
    assert not any(np.array_equal(one, other) for other in others)


def test_a_scripted_policy_leaves_its_observation_alone() -> None:
    """Meta-World's policy for door-open writes into it."""
    observation = Environment("door-open").start(0, 0)
    before = observation.copy()
    scripted_policy("door-open")(observation)
    assert np.array_equal(observation, before)


def test_success_rates_are_those_of_episodes_one_by_one(pair: list[Environment]) -> None:
    length = 50  # two of the three episodes have not succeeded by then
    act, script = as_act_for_all("plate-slide"), scripted_policy("plate-slide")
    found = success_rate(act, pair, episodes=3, seed=1, length=length)
    alone = [rollout(pair[0], script, pair[0].start(1, number), length=length) for number in range(3)]
    assert found.returns is not None
    assert found.successes.tolist() == [episode.success for episode in alone] == [False, True, False]
    assert found.returns.tolist() == pytest.approx([float(episode.rewards.sum()) for episode in alone], rel=0.05)
    stopped = success_rate(act, pair, episodes=3, seed=1, length=length, stop_at_success=True)
    assert stopped.returns is None
    assert stopped.successes.tolist() == found.successes.tolist()
    assert stopped.rate == pytest.approx(float(found.successes.double().mean()))


def test_episodes_end_at_success_when_asked_to(pair: list[Environment], monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    monkeypatch.setattr(Environment, "step", lambda self, action: steps.append(1) or (np.zeros(39), 1.0, True))
    still = lambda rows: torch.zeros(len(rows), 4)  # noqa: E731
    assert success_rate(still, pair, episodes=2, seed=0, length=5, stop_at_success=True).rate == 1
    assert len(steps) == 2
    found = success_rate(still, pair, episodes=2, seed=0, length=5)
    assert found.returns is not None
    assert found.returns.tolist() == [5, 5]


def test_actions_that_are_not_finite_stop_an_evaluation(pair: list[Environment]) -> None:
    with pytest.raises(TrainingError, match="not finite"):
        success_rate(lambda rows: torch.full((len(rows), 4), torch.nan), pair, episodes=1, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_scripted_policies_succeed(task: str) -> None:
    assert success_rate(as_act_for_all(task), make_environments(task, 3), episodes=3, seed=0).rate == 1


# ---- what is missing is named


def test_unknown_tasks_are_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"unknown control task 'drawer' \(did you mean 'drawer-open'\?\)"):
        Environment("drawer")


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(ConfigError, match=r"'control' extra: pip install -e '\.\[control\]'"):
        Environment(TASK)


@pytest.mark.slow
def test_an_opengl_that_is_not_there_is_not_taken_for_a_missing_extra() -> None:
    program = f"from prefopt.control.simulate import Environment; Environment({TASK!r})"
    environ = {**os.environ, "MUJOCO_GL": "telepathy"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environ, check=False)
    assert "metaworld cannot be imported (RuntimeError: invalid value" in done.stderr.splitlines()[-1]


def test_a_mujoco_that_metaworld_does_not_run_on_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mujoco_conflict() is None
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "3.9.1" if name == "mujoco" else version(name))
    with pytest.raises(ConfigError, match=r"needs mujoco==3\.3\.0, got 3\.9\.1: pip install 'mujoco==3\.3\.0'.*prefopt doctor"):
        Environment(TASK)


# ---- episodes of a recipe


def test_an_episode_does_not_know_which_were_made_before() -> None:
    first, advantages, level = make_episode(RECIPE, 1)
    make_episode(RECIPE, 0)
    make_episode(replace(RECIPE, seed=9), 1)
    again, advantages_again, level_again = make_episode(replace(RECIPE, episodes=5), 1)
    for name in ("observations", "actions", "rewards"):
        assert np.array_equal(getattr(first, name), getattr(again, name)), name
    assert np.array_equal(advantages, advantages_again)
    assert level == level_again


def test_advantages_are_the_distance_from_the_scripted_action() -> None:
    episode, advantages, _ = make_episode(replace(RECIPE, noise=Noise(levels=(1.0,))), 0)
    script = scripted_policy(TASK)
    right = np.stack([script(row.astype(np.float64)) for row in episode.observations])
    expected = -np.square(episode.actions - right).sum(-1)
    assert advantages == pytest.approx(expected, abs=1e-4)
    assert (advantages < 0).all()
    assert np.abs(episode.actions).max() <= 1


def test_level_0_is_the_scripted_policy() -> None:
    _, advantages, level = make_episode(replace(RECIPE, noise=Noise(levels=(0.0,))), 0)
    assert level == 0
    assert not advantages.any()


def test_bias_is_common_to_episodes_and_offset_is_not() -> None:
    def errors(number: int, **noise: float) -> np.ndarray:
        recipe = replace(RECIPE, noise=Noise(levels=(0.5,), **{"bias": 0.0, "offset": 0.0, "jitter": 0.0, **noise}))
        episode, _, _ = make_episode(recipe, number)
        script = scripted_policy(TASK)
        error = episode.actions - np.stack([script(row.astype(np.float64)) for row in episode.observations])
        return np.where(np.abs(episode.actions) < 1, error, np.nan)  # what was clipped tells nothing

    biased = [errors(number, bias=0.2) for number in range(2)]
    for one in biased:
        assert np.abs(one[:, :2]) == pytest.approx(0.1, abs=1e-4)
    assert np.sign(biased[0][:, :2]).tolist() == np.sign(biased[1][:, :2]).tolist()
    own = [errors(number, offset=0.1)[:, 0] for number in range(2)]
    for one in own:
        assert one == pytest.approx(one[0], abs=1e-4)
    assert abs(own[0][0] - own[1][0]) > 1e-3
    assert np.ptp(errors(0, jitter=0.1)[:, 0]) > 1e-3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"episodes": 0}, "episodes must be at least 1"),
        ({"length": 501}, "length must be at most 500"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_recipes_out_of_range_are_refused(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(TASK, **wrong)


@pytest.mark.parametrize(
    "wrong",
    [{"levels": ()}, {"levels": (0.5, 0.5)}, {"levels": (-1.0,)}, {"levels": (float("inf"),)}, {"jitter": float("nan")}],
)
def test_noise_out_of_range_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        Noise(**wrong)  # type: ignore[arg-type]


# ---- folders


def test_an_interrupted_folder_goes_on_to_the_same_bytes(folder: Path) -> None:
    """Killed while it wrote its first shard: a staged file, no manifest of the whole."""
    whole = digests(folder)
    content = shard_path(folder, 0).read_bytes()
    shard_path(folder, 0).unlink()
    shard_path(folder, 0).with_name("shard-0000.safetensors.partial").write_bytes(content[:100])
    kept = shard_path(folder, 1).stat().st_mtime_ns
    with pytest.raises(DataError, match=r"shard-0000\.safetensors is missing"):
        load_folder(folder)
    data = generate(RECIPE, folder, workers=0)
    assert digests(folder) == whole
    assert shard_path(folder, 1).stat().st_mtime_ns == kept
    assert data.steps.ends.tolist() == [6, 12]
    assert data.facts["recipe"]["noise"]["levels"] == list(Noise().levels)


def test_a_damaged_shard_is_made_anew(folder: Path) -> None:
    whole = digests(folder)
    shard_path(folder, 1).write_bytes(shard_path(folder, 0).read_bytes())
    generate(RECIPE, folder, workers=0)
    assert digests(folder) == whole


def test_data_of_other_options_is_neither_mixed_nor_lost(folder: Path) -> None:
    whole = digests(folder)
    other = replace(RECIPE, seed=4, noise=Noise(bias=0.1))
    with pytest.raises(OutputError, match=r"made with other options \(noise.bias, seed\)"):
        generate(other, folder, workers=0)
    assert digests(folder) == whole
    assert generate(other, folder, workers=0, overwrite=True).facts["recipe"]["seed"] == 4
    assert digests(folder) != whole


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="holds no offline data"):
            generate(RECIPE, tmp_path, workers=0, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_equal_recipes_give_equal_bytes_whatever_the_processes(folder: Path, tmp_path: Path, workers: int) -> None:
    generate(RECIPE, tmp_path / "other", workers=workers)
    assert digests(tmp_path / "other") == digests(folder)


# ---- pictures


def test_a_strip_is_its_frames_side_by_side(tmp_path: Path) -> None:
    frames = [np.full((4, 3, 3), value, dtype=np.uint8) for value in (10, 20)]
    made = render.strip(frames)
    assert made.shape == (4, 8, 3)
    assert made[0, :, 0].tolist() == [10, 10, 10, 255, 255, 20, 20, 20]
    render.save_strip(frames, tmp_path / "strip.png")
    render.save_gif(frames, tmp_path / "clip.gif")
    assert (tmp_path / "strip.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "clip.gif").read_bytes().startswith(b"GIF89a")


def test_a_machine_that_cannot_render_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "telepathy")
    assert "cannot render (ModuleNotFoundError: No module named 'mujoco.telepathy')" in (render.why_no_rendering(TASK) or "")


@pytest.mark.slow
def test_a_film_shows_an_episode_from_its_start_to_its_end(environment: Environment) -> None:
    if render.why_no_rendering(TASK):  # nothing to see on such a machine but that it says so
        with pytest.raises(ConfigError, match="cannot render"):
            render.film(environment, scripted_policy(TASK), seed=0, frames=3, length=5, size=64)
        return
    frames = render.film(environment, scripted_policy(TASK), seed=0, frames=3, length=5, size=64)
    assert [frame.shape for frame in frames] == [(64, 64, 3)] * 3
    assert frames[0].std() > 10
    assert not np.array_equal(frames[0], frames[2])
