"""`prefopt control generate TASK` and `prefopt control show FOLDER`: offline data of simulated tasks."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

from losses.declaration import read_options
from prefopt.cli.flags import Flag, make_command, parameter_defaults
from prefopt.control.folder import OfflineData, load_folder, summarise
from prefopt.control.generate import Noise, Recipe, generate
from prefopt.control.simulate import TASKS
from prefopt.errors import ConfigError
from prefopt.machine import standard_console

_RUN, _RECIPE, _NOISE = "Run", "Recipe", "Noise"
_HELP = f"""Offline data of a Meta-World task: episodes of its scripted policy with errors in grades, each step with its \
observation, action, reward and regret proxy.

Tasks: {", ".join(TASKS)}. An episode is a function of task, seed, number and noise, so that equal options give equal bytes \
with any number of --workers. The same command goes on with an interrupted folder and makes damaged shards anew. \
`prefopt train cpl --data control:FOLDER` learns from it. Needs the extra `control`."""


def build(tokens: Sequence[str]) -> App:
    app = App("control", version_flags=(), help_format="plaintext", default_parameter=parameter_defaults())
    made = App("generate", version_flags=(), help_format="plaintext", help=_HELP)
    task = inspect.Parameter(
        "task", inspect.Parameter.POSITIONAL_ONLY, annotation=Annotated[str, Parameter(help=f"One of {', '.join(TASKS)}.")]
    )
    made.default(make_command(_generate, [*_run_flags(), *_recipe_flags(), *_flags(Noise, _NOISE)], _RUN, task))
    app.command(made)
    app.command(_show, name="show", help="Episodes, successes and returns by noise level, and how the data was made.")
    return app


def _generate(
    task: str, *, output_dir: Path | None = None, workers: int | None = None, overwrite: bool = False, **values: Any
) -> None:
    if output_dir is None:
        raise ConfigError("name the folder of this data: prefopt control generate TASK --output-dir FOLDER.")
    noise = Noise(**{flag.name: values.pop(flag.name) for flag in _flags(Noise, _NOISE) if flag.name in values})
    recipe = Recipe(task, noise=noise, **values)
    console = standard_console()
    begin = time.perf_counter()
    data = generate(recipe, output_dir, workers=workers, overwrite=overwrite, console=console)
    console.print(f"{len(data.steps)} steps in {time.perf_counter() - begin:.0f} s", highlight=False)
    _print(data, console)
    console.print(str(output_dir), highlight=False, soft_wrap=True)


def _show(folder: Annotated[Path, Parameter(help="What `prefopt control generate` made.")], /) -> None:
    _print(load_folder(folder), standard_console())


def _print(data: OfflineData, console: Console) -> None:
    recipe = data.facts["recipe"]
    versions = ", ".join(f"{name} {version}" for name, version in recipe["versions"].items())
    errors = ", ".join(f"{name} {value}" for name, value in recipe["noise"].items() if name != "levels")
    console.print(
        f"{recipe['task']}: {len(data.successes)} episodes of {recipe['length']} steps, seed {recipe['seed']}; observations of "
        f"{data.facts['observation_size']} numbers, actions of {data.facts['action_size']}.\nNoise at level 1: {errors}. Made "
        f"with {versions}.",
        highlight=False,
    )
    table = Table()
    for column in ("noise level", "episodes", "succeeded", "mean return", "mean advantage of a step"):
        table.add_column(column, justify="right")
    for level in summarise(data):
        share = f"{level.successes} ({level.successes / level.episodes:.0%})"
        cells = (f"{level.level:g}", str(level.episodes), share, f"{level.mean_return:.1f}", f"{level.mean_advantage:.3f}")
        table.add_row(*cells)
    rate = float(data.successes.double().mean())
    of_step = float(data.steps.advantages.double().mean())
    table.add_section()
    table.add_row(
        "all", str(len(data.successes)), f"{int(data.successes.sum())} ({rate:.0%})", f"{float(data.returns.mean()):.1f}",
        f"{of_step:.3f}",
    )  # fmt: skip
    console.print(table)


def _run_flags() -> list[Flag]:
    workers = "Processes side by side, one a core by default; 0 works in this one."
    return [
        Flag("output_dir", Path | None, None, "Folder of the data (required).", _RUN),
        Flag("workers", int | None, None, workers, _RUN),
        Flag("overwrite", bool, False, "Delete other data that the folder holds.", _RUN),
    ]


def _recipe_flags() -> list[Flag]:
    return [flag for flag in _flags(Recipe, _RECIPE) if flag.name != "noise"]


def _flags(declared: Any, group: str) -> list[Flag]:
    return [Flag(o.name, o.annotation, o.default, o.help, group) for o in read_options(declared, group).values()]
