"""A task is what a comparison runs on: rows, the shared start, a reward and the metrics.

`text` reads preference data and a causal LM; `exact` is the world in which every metric is exact; `sentiment` continues reviews
under a known reward; `gridworld` and `simulated` are control. The rest of prefopt knows only the protocol.
"""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from prefopt.hydra import check_hydra
from prefopt.machine import keep_freed_memory
from prefopt.options import GRIDWORLD, Options
from prefopt.tasks.protocol import Measured, Shared, Task, Training

__all__ = ["Measured", "Shared", "Task", "Training", "build_task", "prepare_process"]


def prepare_process(options: Options, workers: int) -> None:
    """Threads and memory of a process that trains.

    One thread where threads only get in each other's way: a tiny model, or processes side by side.
    """
    keep_freed_memory()
    if options.tiny or workers > 1:
        torch.set_num_threads(1)


def build_task(options: Options, cache: Path, console: Console | None = None) -> Task:
    """The task that `--data` names.

    Raises:
        ConfigError, DataError, HubError: with what to do.
    """
    check_hydra(options)
    if options.data.exact:
        from prefopt.tasks.exact import ExactTask

        return ExactTask(options, cache, console)
    if options.data.task == "sentiment":
        from prefopt.tasks.sentiment import SentimentTask

        return SentimentTask(options, cache, console)
    if options.data.task == "control":
        if options.data.source == GRIDWORLD:
            from prefopt.tasks.gridworld import GridworldTask

            return GridworldTask(options, cache, console)
        from prefopt.tasks.simulated import SimulatedTask

        return SimulatedTask(options, cache, console)
    from prefopt.tasks.text import TextTask

    return TextTask(options, cache, console)
