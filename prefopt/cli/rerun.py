"""`prefopt rerun CELL`: train a cell of a comparison once more, and say whether the same came out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.table import Table

from prefopt.cli.flags import parameter_defaults
from prefopt.decode import decode
from prefopt.environment import environment
from prefopt.errors import DataError, OutputError
from prefopt.files import differences
from prefopt.jobs import CELL_FILE, CONFIG_FILE, ENVIRONMENT_FILE, Job, run_job
from prefopt.machine import standard_console
from prefopt.options import default_cache, options_of
from prefopt.study import Entry, Study

DIFFERENT = 1


def build(tokens: Sequence[str]) -> App:
    """`rerun`."""
    app = App("rerun", version_flags=(), default_parameter=parameter_defaults(), help_format="plaintext")

    def rerun(
        cell: Annotated[Path, Parameter(help="Folder of a cell: STUDY/cells/NAME.")],
        *,
        output_dir: Annotated[Path | None, Parameter(help="Where it is run (STUDY-rerun).")] = None,
    ) -> int:
        return run(cell, output_dir)

    app.default(rerun)
    return app


def run(cell: Path, output: Path | None = None) -> int:
    """Runs a cell again from its config and compares what it measures, number by number.

    Returns:
        0 when everything is equal, 1 when something differs.

    Raises:
        DataError: no cell, or one that another version wrote.
        OutputError: the folder holds this cell already.
    """
    console = standard_console()
    config = _read(cell / CONFIG_FILE)
    if "entry" not in config:
        raise DataError(
            f"{cell / CONFIG_FILE}: written by an earlier version, which did not keep all that a cell follows from."
        )
    entry = decode(Entry, config["entry"], str(cell / CONFIG_FILE))
    study = Study([entry], (config["seed"],), options_of(config, str(cell / CONFIG_FILE)), tuple(config["imports"]))
    output = output or cell.resolve().parent.parent.with_name(f"{cell.resolve().parent.parent.name}-rerun")
    job = Job(study, 0, config["seed"], output, default_cache(), workers=1)
    if job.done:
        raise OutputError(f"{job.folder} holds this cell already; name another --output-dir, or delete it.")
    job.folder.mkdir(parents=True, exist_ok=True)
    failed = run_job(job)
    if failed is not None:
        console.print(f"failed: {failed}", highlight=False, markup=False)
        return DIFFERENT
    changed = sorted(differences(_read(cell / ENVIRONMENT_FILE), environment()))
    if changed:
        console.print(f"the environment differs in {', '.join(changed)}", highlight=False)
    first, second = _read(cell / CELL_FILE), json.loads(json.dumps(asdict(job.result())))
    differing = sorted(differences(_comparable(first), _comparable(second)))
    console.print(_table(first["final"], second["final"]))
    console.print(
        f"{job.folder}: " + (f"differs in {', '.join(differing[:8])}" if differing else "equal in every number"),
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return DIFFERENT if differing else 0


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected a cell of `prefopt compare`, got none ({error}). Name STUDY/cells/NAME.") from error


def _comparable(cell: Mapping[str, Any]) -> Any:
    """NaN is not equal to itself, and an equal NaN is no difference."""
    return json.loads(json.dumps(cell), parse_constant=str)


def _table(first: Mapping[str, float], second: Mapping[str, float]) -> Table:
    table = Table(title="final values", title_justify="left")
    for column in ("metric", "then", "now", "difference"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, value in first.items():
        now = second.get(name, math.nan)
        table.add_row(name, f"{value:.6g}", f"{now:.6g}", f"{now - value:.3g}")
    return table
