"""Every offline loss in the exactly solvable world: equal tuning, reward at matched KL, and only the order that can be told.

    python -m benchmarks.zoo --tune        tunes the losses that have no current setting (benchmarks/zoo_tuned.json), and ends
    python -m benchmarks.zoo               the full study: all losses in 3 worlds, eight of them in 5 under four label models
    python -m benchmarks.zoo --quick       3 worlds, Bradley-Terry labels; its cells are taken over by a full run

Writes results.json, README.md (the whole read-out) and block.md (what the project's README shows) to --output-dir. A finished
cell is kept there, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown

from benchmarks import zoo_tuning
from benchmarks.zoo_cells import CellResult, Runner
from benchmarks.zoo_config import Zoo, load
from benchmarks.zoo_figures import draw_comparison
from benchmarks.zoo_gradients import draw_gradients
from benchmarks.zoo_report import Report, blocks, markdown, readme_block
from prefopt.errors import ConfigError, PrefoptError
from prefopt.files import write_json
from prefopt.machine import standard_console
from prefopt.options import default_cache

HERE = Path(__file__).parent


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tune", action="store_true", help="tune losses without a current setting, then end")
    made.add_argument("--quick", action="store_true", help="the parts of the study that its quick section names")
    made.add_argument("--only", nargs="+", metavar="LOSS", help="these losses only, in tuning or in the study")
    made.add_argument("--figures", type=Path, metavar="DIR", help="also write zoo.png and gradients.png there")
    made.add_argument("--output-dir", type=Path, default=Path("runs/zoo"), help="finished cells and results (%(default)s)")
    made.add_argument("--config", type=Path, default=HERE / "zoo.yaml", help="the study (benchmarks/zoo.yaml)")
    made.add_argument("--tuned", type=Path, default=HERE / "zoo_tuned.json", help="tuned settings (benchmarks/zoo_tuned.json)")
    made.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes of one thread each; 0 runs in this one (%(default)s)",
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 when a cell or a tuning failed; 2 for bad options."""
    options = parser().parse_args(arguments)
    console = standard_console()
    try:
        zoo = load(options.config, quick=options.quick)
        names = _chosen_names(zoo, options.only)
        with Runner(default_cache(), options.workers, console) as runner:
            if options.tune:
                return _tune(zoo, names, options, runner, console)
            report, failed = run_study(zoo, names, options, runner, console)
    except PrefoptError as error:
        console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    write_report(report, zoo, options.output_dir, options.figures)
    page = markdown(report)
    console.print(Markdown(page) if console.is_terminal else page, markup=False, highlight=False, soft_wrap=True)
    console.print(f"Written to {options.output_dir}.", highlight=False)
    return 1 if failed else 0


def _chosen_names(zoo: Zoo, only: Sequence[str] | None) -> list[str]:
    unknown = sorted(set(only or ()) - zoo.sweeps.keys())
    if unknown:
        raise ConfigError(f"--only {' '.join(unknown)}: not in the study; its losses are {', '.join(zoo.sweeps)}.")
    return [name for name in zoo.sweeps if only is None or name in only]


def _tune(zoo: Zoo, names: Sequence[str], options: argparse.Namespace, runner: Runner, console: Console) -> int:
    reasons = zoo_tuning.missing(zoo, zoo_tuning.read(options.tuned), names)
    console.print(
        f"{len(names) - len(reasons)} of {len(names)} losses are tuned; {zoo.tuning.trials} trials for each other one."
    )
    failed = zoo_tuning.tune(zoo, list(reasons), options.tuned, runner, options.output_dir / "tuning")
    for name, tuned in zoo_tuning.current(zoo, zoo_tuning.read(options.tuned)).items():
        if name in reasons:
            console.print(f"{name}: {tuned.chosen.text(tuned.border)}; regret {tuned.criterion:.3f}", highlight=False)
    for name, reason in failed.items():
        console.print(f"not tuned: {name}: {reason}", markup=False, highlight=False, soft_wrap=True)
    return 1 if failed else 0


def run_study(
    zoo: Zoo, names: Sequence[str], options: argparse.Namespace, runner: Runner, console: Console
) -> tuple[Report, int]:
    """Runs what is not finished, and reads it out; with the number of cells that failed.

    Raises:
        ConfigError: no loss has a tuned setting.
    """
    tuned = zoo_tuning.read(options.tuned)
    left_out = {name: f"not tuned: {reason}" for name, reason in zoo_tuning.missing(zoo, tuned, names).items()}
    left_out |= dict.fromkeys(zoo.unswept, "no sweep in zoo.yaml")
    for name, reason in left_out.items():
        console.print(f"left out: {name} ({reason})", highlight=False)
    held = {name: entry for name, entry in zoo_tuning.current(zoo, tuned).items() if name in names}
    if not held:
        raise ConfigError(f"none of the losses asked for has a current setting in {options.tuned}; tune them first: --tune.")
    chosen = {name: entry.chosen for name, entry in held.items()}
    worlds = runner.worlds(sorted({*zoo.everything.worlds, *zoo.headline.worlds}), zoo.targets)
    results = runner.cells(list(zoo.cells(chosen)), options.output_dir / "cells", "cells")
    report = Report(
        zoo.targets, zoo.primary, blocks(zoo, zoo.everything, chosen, results), blocks(zoo, zoo.headline, chosen, results),
        {world.seed: world for world in worlds},
        left_out,
        {name: entry.border for name, entry in held.items()}, zoo.tuning.trials, _facts(results, options),
    )  # fmt: skip
    return report, sum(bool(result.error) for result in results.values())


def _facts(results: Mapping[str, CellResult], options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on besides the study; times are those of the cells, whenever they ran."""
    seconds = [result.seconds for result in results.values() if not result.error]
    return {
        "date": datetime.date.today().isoformat(),
        "command": _command(options),
        "machine": f"{os.cpu_count()}-core {platform.machine()} CPU",
        "torch": torch.__version__.split("+")[0],
        "python": platform.python_version(),
        "workers": options.workers or 1,
        "cells": len(results),
        "cell_seconds": sum(seconds) / max(1, len(seconds)),
        "cpu_minutes": sum(seconds) / 60,
    }


def _command(options: argparse.Namespace) -> str:
    """What gives these numbers again."""
    if options.only:
        return f"python -m benchmarks.zoo --only {' '.join(options.only)}{' --quick' if options.quick else ''}"
    return "make bench-zoo" + (" QUICK=1" if options.quick else "")


def write_report(report: Report, zoo: Zoo, folder: Path, figures: Path | None) -> None:
    """results.json, README.md and block.md; with `figures`, the two pictures."""
    write_json(folder / "results.json", report.as_dict())
    (folder / "README.md").write_text(markdown(report))
    (folder / "block.md").write_text(readme_block(report) + "\n")
    if figures is not None:
        figures.mkdir(parents=True, exist_ok=True)
        (figures / "zoo.png").write_bytes(draw_comparison(report))
        (figures / "gradients.png").write_bytes(draw_gradients(zoo))


if __name__ == "__main__":
    raise SystemExit(main())
