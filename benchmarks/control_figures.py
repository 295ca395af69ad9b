"""The pictures of benchmarks.control: success while training, and what the policies do."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from benchmarks.control_cells import PIQL, Run, piql_actor
from prefopt.control.policies import Actor, load_actor
from prefopt.control.render import film, strip, why_no_rendering
from prefopt.control.simulate import Act, Environment
from prefopt.report.plotting import DPI, styled, to_png

if TYPE_CHECKING:
    from benchmarks.control import Plan

_STRIP_FRAMES = 7
# The first episode of the evaluation, on the first seed: chosen before any was seen.
_STRIP_SEED, _STRIP_EPISODE, _FRAME = 0, 0, 120
_STRIP_WIDTH, _COLOURS = 4.5, 48


def draw_curves(runs: Sequence[Run]) -> bytes:
    """Success against the share of training done, a panel a task: mean over seeds, and the range of the seeds behind it."""
    tasks = list(dict.fromkeys(run.task for run in runs))
    algorithms = list(dict.fromkeys(run.algorithm for run in runs))
    with styled():
        figure = Figure(figsize=(3.4 * len(tasks), 3.6), dpi=DPI, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
        for axes, task in zip(panels, tasks, strict=True):
            for number, algorithm in enumerate(algorithms):
                own = [run for run in runs if (run.task, run.algorithm) == (task, algorithm)]
                curves = np.array([run.successes for run in own])
                shares = np.array(own[0].updates) / own[0].updates[-1]
                colour = f"C{number % 10}"
                axes.plot(shares, curves.mean(0), color=colour, linewidth=1.6, label=algorithm)
                axes.fill_between(shares, curves.min(0), curves.max(0), color=colour, alpha=0.12, linewidth=0)
            axes.set_title(task)
            axes.set_xlabel("share of training")
            axes.grid(True)
        panels[0].set_ylabel("success")
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=7, frameon=False)
        return to_png(figure)


def draw_strips(plan: Plan, labels: str, output: Path, path: Path, console: Console) -> None:
    """Frames of one episode for each algorithm on the first task; says so where this machine cannot render."""
    task = plan.tasks[0]
    if (reason := why_no_rendering(task)) is not None:
        console.print(f"no picture of episodes: {reason}", highlight=False)
        return
    actors = _actors(output / task, labels)
    rows = [
        strip(film(Environment(task), _act(actor), seed=_STRIP_SEED, episode=_STRIP_EPISODE, frames=_STRIP_FRAMES, size=_FRAME))
        for actor in actors.values()
    ]
    with styled():
        size = (_STRIP_WIDTH, 0.15 * _STRIP_WIDTH * len(rows))
        figure = Figure(figsize=size, dpi=DPI, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
        for axes, name, picture in zip(panels, actors, rows, strict=True):
            axes.imshow(picture)
            axes.set_ylabel(name)
            axes.set_xticks([])
            axes.set_yticks([])
        drawn = to_png(figure)
    # Rendered scenes have few colours: a palette is a tenth of the size.
    Image.open(io.BytesIO(drawn)).convert("RGB").quantize(_COLOURS).save(path, optimize=True)


def _actors(folder: Path, labels: str) -> dict[str, Actor]:
    """The policies of the first seed, by algorithm."""
    found = {}
    for cell in sorted(folder.glob(f"*-{labels}/cells/*-seed{_STRIP_SEED}/policy")):
        label: str = json.loads((cell.parent / "config.json").read_text())["label"]
        found[label] = load_actor(cell)
    found[PIQL] = load_actor(piql_actor(folder / f"piql-{labels}", _STRIP_SEED))
    return found


def _act(actor: Actor) -> Act:
    """One observation at a time, as films ask for."""

    def act(observation: np.ndarray) -> np.ndarray:
        action: np.ndarray = actor.act(torch.from_numpy(observation).float().unsqueeze(0))[0].double().numpy()
        return action

    return act
