"""Pictures of episodes: a strip of frames, or a GIF. Optional: what needs them asks `why_no_rendering` first, and tells.

Without a display MuJoCo draws through EGL, also on machines without a GPU (in software, 10 to 20 ms a frame at 64 to 240 pixels
once multisampling and shadows are off, 100 ms with them). H, W pixels.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prefopt.control.simulate import EPISODE_STEPS, EVALUATION, Act, Environment, rollout
from prefopt.errors import ConfigError

_CAMERA = "corner2"  # sees the table, the arm and the object of every task
_GAP = 2  # white pixels between the frames of a strip
_MOST_SHAPES = 1000


class Camera:
    """Looks at an environment.

    Args:
        environment: what it sees; frames show its state of the moment.
        size: H and W, at most 480.

    Raises:
        ConfigError: this machine cannot render; the message says why.
    """

    def __init__(self, environment: Environment, size: int = 240) -> None:
        import mujoco

        self._model, self._data = environment.simulator.model, environment.simulator.data
        # Both are most of a frame's time where there is no GPU, and tell nothing at this size.
        self._model.vis.quality.offsamples = self._model.vis.quality.shadowsize = 0
        try:
            self._gl = _gl_context(size)
            self._gl.make_current()
            self._target = mujoco.MjrContext(self._model, mujoco.mjtFontScale.mjFONTSCALE_100)
        except Exception as error:  # of whichever of four OpenGL libraries was tried; they share no class
            raise ConfigError(
                f"this machine cannot render ({type(error).__name__}: {error}). MUJOCO_GL=egl needs libEGL (Debian: libegl1 "
                "and libgl1-mesa-dri), MUJOCO_GL=osmesa needs libOSMesa (libosmesa6); everything but pictures works without."
            ) from error
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._target)
        self._scene, self._options = mujoco.MjvScene(self._model, _MOST_SHAPES), mujoco.MjvOption()
        self._view = mujoco.MjvCamera()
        self._view.type, self._view.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, self._model.camera(_CAMERA).id
        self._area = mujoco.MjrRect(0, 0, size, size)

    def frame(self) -> np.ndarray:
        """[H, W, 3] uint8."""
        import mujoco

        self._gl.make_current()
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self._model, self._data, self._options, None, self._view, everything, self._scene)
        mujoco.mjr_render(self._area, self._scene, self._target)
        pixels = np.empty((self._area.height, self._area.width, 3), dtype=np.uint8)
        mujoco.mjr_readPixels(pixels, None, self._area, self._target)
        # OpenGL's rows run upwards and the camera hangs upside down, so that columns alone are the wrong way round.
        return np.ascontiguousarray(pixels[:, ::-1])

    def close(self) -> None:
        """Frees the memory of its pictures."""
        self._target.free()
        self._gl.free()


def why_no_rendering(task: str) -> str | None:
    """Why this machine cannot draw a task; None when it can.

    Raises:
        ConfigError: see `Environment`.
    """
    try:
        Camera(Environment(task), 64).close()
    except ConfigError as error:
        return str(error)
    return None


def film(
    environment: Environment,
    act: Act,
    *,
    seed: int,
    episode: int = 0,
    frames: int = 8,
    length: int = EPISODE_STEPS,
    size: int = 240,
) -> list[np.ndarray]:
    """Evenly spaced frames [H, W, 3] of an episode that starts as the evaluation's do, its first and last state among them.

    Raises:
        ConfigError: this machine cannot render.
    """
    observation = environment.start(seed, episode, EVALUATION)
    camera = Camera(environment, size)
    wanted = set(np.linspace(0, length - 1, frames).round().astype(int).tolist())
    taken: list[np.ndarray] = []
    step = 0

    def watched(seen: np.ndarray) -> np.ndarray:
        nonlocal step
        if step in wanted:
            taken.append(camera.frame())
        step += 1
        return act(seen)

    rollout(environment, watched, observation, length=length)
    camera.close()
    return taken


def strip(frames: Sequence[np.ndarray]) -> np.ndarray:
    """Frames [H, W, 3] side by side: [H, sum of W and gaps, 3]."""
    gap = np.full((frames[0].shape[0], _GAP, 3), 255, dtype=np.uint8)
    pieces = [piece for frame in frames for piece in (gap, frame)][1:]
    return np.concatenate(pieces, axis=1)


def save_strip(frames: Sequence[np.ndarray], path: Path) -> None:
    """Writes a strip as PNG; equal frames give equal files."""
    from matplotlib.image import imsave

    imsave(path, strip(frames), format="png")


def save_gif(frames: Sequence[np.ndarray], path: Path, *, seconds: float = 4.0) -> None:
    """Writes an endless GIF that takes `seconds` for all frames."""
    import imageio.v3

    imageio.v3.imwrite(path, np.stack(frames), duration=1000 * seconds / len(frames), loop=0)


def _gl_context(size: int) -> Any:
    """What `MUJOCO_GL` names (egl, osmesa, glfw, cgl); else the platform's own, which without a display is EGL."""
    chosen = os.environ.get("MUJOCO_GL", "").lower()
    if not chosen:
        shown = any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
        chosen = "cgl" if sys.platform == "darwin" else "egl" if sys.platform == "linux" and not shown else "glfw"
    return importlib.import_module(f"mujoco.{chosen}").GLContext(size, size)
