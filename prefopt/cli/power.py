"""`prefopt power`: what a number of seeds and prompts can show, before a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from prefopt.errors import ConfigError, OutputError
from prefopt.machine import standard_console
from prefopt.report.grid import to_rich
from prefopt.report.matched import endpoint
from prefopt.report.plotting import styled, to_png, to_svg
from prefopt.report.power import POWER
from prefopt.report.power_plan import Plan, needed_line, plan_grid, power_curves, prompts_line
from prefopt.report.schema import load_prompt_rows, load_results
from prefopt.report.statistics import NO_SCIPY, scipy_installed, summarise_prompts

_HELP = """What a number of seeds and prompts can show, before a run.

Algorithms are compared by differences paired by seed, so the standard deviation that counts is that of these differences over \
seeds; --results takes it from an earlier comparison. `prefopt power --prompts 332` is the case of a win rate."""


def build(tokens: Sequence[str]) -> App:
    app = App("power", version_flags=(), help_format="plaintext", help=_HELP)
    app.default(_power)
    return app


def _power(
    *,
    seeds: Annotated[int, Parameter(help="Seeds up to which the table goes.")] = 10,
    deviation: Annotated[float | None, Parameter(help="Of differences paired by seed, over seeds; the metric's unit.")] = None,
    results: Annotated[Path | None, Parameter(help="A comparison's folder, for deviations that are not given.")] = None,
    difference: Annotated[float | None, Parameter(help="A difference to be found: its power, and the seeds it needs.")] = None,
    tests: Annotated[int, Parameter(help="Tests at the primary end point; Holm's strictest has the level 0.05 / tests.")] = 1,
    power: Annotated[float, Parameter(help="Probability with which a difference is to be found.")] = POWER,
    prompts: Annotated[int | None, Parameter(help="Test prompts: what they alone resolve.")] = None,
    prompt_deviation: Annotated[
        float | None, Parameter(help="Of scores over prompts; by default that of --results, or 0.5 as for a win rate.")
    ] = None,
    figure: Annotated[Path | None, Parameter(help="Draw power against seeds to this .png or .svg.")] = None,
) -> None:
    _check(seeds, deviation, difference, tests, power, prompts, prompt_deviation)
    console = standard_console()
    if results is not None:
        deviation = _measured_deviation(results) if deviation is None else deviation
        prompts, prompt_deviation = _measured_prompts(results, prompts, prompt_deviation)
    if deviation is None and prompts is None:
        raise ConfigError("power needs a spread: --deviation X, --results FOLDER of an earlier comparison, or --prompts N.")
    if deviation is None and (figure is not None or difference is not None):
        raise ConfigError("--figure and --difference need the spread over seeds: give --deviation X or --results FOLDER.")
    if deviation is not None:
        plan = Plan(deviation, seeds, difference, tests, power)
        console.print(to_rich(plan_grid(plan)))
        if difference is not None:
            console.print(needed_line(plan), highlight=False)
        if figure is not None:
            _draw(plan, figure)
            console.print(str(figure), highlight=False, soft_wrap=True)
    if prompts is not None:
        console.print(prompts_line(prompts, 0.5 if prompt_deviation is None else prompt_deviation, power), highlight=False)


def _check(
    seeds: int,
    deviation: float | None,
    difference: float | None,
    tests: int,
    power: float,
    prompts: int | None,
    prompt_deviation: float | None,
) -> None:
    if not scipy_installed():
        raise ConfigError(f"{NO_SCIPY}: pip install 'prefopt[stats]'.")
    positive = {
        "--deviation": deviation, "--difference": difference, "--prompts": prompts, "--prompt-deviation": prompt_deviation,
    }  # fmt: skip
    for name, value in positive.items():
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{name} is {value:g}; expected a number above 0.")
    if not 3 <= seeds <= 1000 or tests < 1 or not 0.05 < power < 0.999:
        raise ConfigError(
            f"--seeds {seeds} --tests {tests} --power {power:g}: expected 3 to 1000 seeds, at least 1 test, and a power "
            "between 0.05 and 0.999."
        )


def _measured_deviation(folder: Path) -> float:
    """The root mean square over pairs of the deviation of their differences at the primary end point."""
    end = endpoint(load_results(folder))
    found = [pair.deviation for pair in (end.pairs if end else ()) if pair.deviation is not None]
    if not found:
        raise ConfigError(f"--results {folder}: no pair has three seeds at the primary end point; give --deviation.")
    return math.sqrt(math.fsum(value**2 for value in found) / len(found))


def _measured_prompts(folder: Path, prompts: int | None, deviation: float | None) -> tuple[int | None, float | None]:
    """Prompts and their deviation (root mean square over settings and judges) where they are not given and were measured."""
    found = [item for item in summarise_prompts(load_prompt_rows(folder)) if math.isfinite(item.deviation)]
    if not found:
        return prompts, deviation
    spread = math.sqrt(math.fsum(item.deviation**2 for item in found) / len(found))
    most = max(item.prompts for item in found)
    return prompts if prompts is not None else most, deviation if deviation is not None else spread


def _draw(plan: Plan, file: Path) -> None:
    if file.suffix not in (".png", ".svg"):
        raise ConfigError(f"--figure {file}: expected a name that ends in .png or .svg.")
    with styled():
        drawn = power_curves(plan)
        made = to_png(drawn)
        if file.suffix == ".svg":
            made = to_svg(drawn)
    try:
        file.write_bytes(made)
    except OSError as error:
        raise OutputError(f"--figure {file}: {error.strerror}; name a file in a folder that exists.") from error
