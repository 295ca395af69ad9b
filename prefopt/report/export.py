"""Every figure and every table of a report as a file of its own: PNG and SVG; CSV, Markdown and LaTeX."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from prefopt.report.figures import Picture
from prefopt.report.grid import Grid, to_csv, to_latex, to_markdown

FIGURES_FOLDER, TABLES_FOLDER = "figures", "tables"


def write_figures(pictures: Iterable[Picture], folder: Path) -> None:
    """folder/figures/NAME.png and .svg."""
    target = folder / FIGURES_FOLDER
    target.mkdir(exist_ok=True)
    for picture in pictures:
        (target / f"{picture.name}.png").write_bytes(picture.png)
        (target / f"{picture.name}.svg").write_bytes(picture.svg)


def write_tables(grids: Mapping[str, Grid], folder: Path) -> None:
    """folder/tables/NAME.csv, .md and .tex of every table that has rows."""
    target = folder / TABLES_FOLDER
    target.mkdir(exist_ok=True)
    for name, grid in grids.items():
        if grid.rows:
            for suffix, text in ((".csv", to_csv(grid)), (".md", to_markdown(grid)), (".tex", to_latex(grid))):
                (target / f"{name}{suffix}").write_text(text, encoding="utf-8")


def cell_folders(folder: Path) -> dict[tuple[str, int], str]:
    """Of each label and seed, the folder below folder/cells that says it is of them, as seen from `folder`."""
    found = {}
    for file in sorted((folder / "cells").glob("*/config.json")):
        raw = json.loads(file.read_text(encoding="utf-8"))
        if "label" in raw and "seed" in raw:
            found[raw["label"], raw["seed"]] = os.path.relpath(file.parent, folder).replace(os.sep, "/") + "/"
    return found
