"""The report as one HTML file that asks the network for nothing: pictures are embedded, styles are inline."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from prefopt.errors import OutputError
from prefopt.report.cite import cite
from prefopt.report.export import cell_folders, write_figures, write_tables
from prefopt.report.figures import FOREST, FRONTIER, PLANE, Picture, draw_all
from prefopt.report.grid import Grid, to_markdown
from prefopt.report.health import health_grid
from prefopt.report.matched_tables import matched_grid, paired_grids
from prefopt.report.pairs import MARGINS, SIDES, PairTable, pair_grids, pair_table
from prefopt.report.schema import (
    MINIMUM_SEEDS,
    REPEAT_FILE,
    Results,
    Timings,
    load_pair_rows,
    load_prompt_rows,
    load_results,
    load_timings,
)
from prefopt.report.statistics import PromptSummary, scipy_installed, summarise_prompts
from prefopt.report.summary import answer, facts
from prefopt.report.tables import (
    cells_grid,
    heading,
    judges_grid,
    ledger_grid,
    number,
    plain,
    prompts_grid,
    results_grid,
    seeds_line,
    settings_grid,
    tuning_line,
    words,
)
from prefopt.report.tuning import tuning_grid

REPORT_FILE, TABLE_FILE = "report.html", "table.md"
# The tables of table.md, for READMEs.
_SHORT = ("results", "equal_kl", "against_reference", "pairs", "cost")

# Figures that stand in a section of their own, not among the others.
_IN_SECTIONS = ("tuning", SIDES, MARGINS)


def write_report(folder: Path) -> Path:
    """Makes report.html, table.md, figures/ and tables/ from folder/results.json and what lies beside it.

    Returns:
        The path of report.html, which stands alone; its links to cells lead into `folder`.

    Raises:
        DataError: results that are missing or cannot be read.
        OutputError: the folder cannot be written.
    """
    results, timings = load_results(folder), load_timings(folder)
    prompts = summarise_prompts(load_prompt_rows(folder))
    pairs = pair_table(load_pair_rows(folder), [setting.label for setting in results.settings])
    pictures = draw_all(results, timings, pairs)
    grids = report_grids(results, timings, prompts, cell_folders(folder), pairs)
    repeat = REPEAT_FILE if (folder / REPEAT_FILE).is_file() else ""
    page = render_report(results, pictures, grids, max((item.prompts for item in prompts), default=0), repeat)
    report = folder / REPORT_FILE
    try:
        write_figures(pictures, folder)
        write_tables(grids, folder)
        short = [to_markdown(grids[name]) for name in _SHORT if grids[name].rows]
        (folder / TABLE_FILE).write_text("\n".join(short), encoding="utf-8")
        report.write_text(page, encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"{folder}: expected a folder that can be written, got {error.strerror}: copy the results elsewhere."
        ) from error
    return report


def report_grids(
    results: Results,
    timings: Timings | None = None,
    prompts: tuple[PromptSummary, ...] = (),
    folders: Mapping[tuple[str, int], str] | None = None,
    pairs: PairTable | None = None,
) -> dict[str, Grid]:
    """Every table of the report by the name of its file; one without rows has nothing to say."""
    none = Grid("", (), ())
    tests = dict(zip(("against_reference", "pairs"), paired_grids(results), strict=False))
    return {
        "results": results_grid(results, timings),
        "equal_kl": matched_grid(results),
        "against_reference": tests.get("against_reference", none),
        "pairs": tests.get("pairs", none),
        "cells": cells_grid(results, folders or {}),
        "judges": judges_grid(results.judges),
        "prompts": prompts_grid(prompts),
        **pair_grids(pairs),
        "health": health_grid(results),
        "tuning": tuning_grid(results),
        "settings": settings_grid(results),
        "cost": ledger_grid(results, timings),
    }


def render_report(
    results: Results, pictures: tuple[Picture, ...], grids: Mapping[str, Grid], test_prompts: int = 0, repeat: str = ""
) -> str:
    """The page as text. Everything that comes from the results is escaped.

    Args:
        results, pictures, grids: what it shows.
        test_prompts: distinct ones, where per-prompt results are at hand.
        repeat: the file beside the page that repeats the study.
    """
    environment = Environment(
        loader=PackageLoader("prefopt.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(words=words, plain=plain, base64=lambda data: base64.b64encode(data).decode("ascii"))
    drawn = {picture.name: picture for picture in pictures}
    first = [drawn[name] for name in (FOREST, FRONTIER if FRONTIER in drawn else PLANE) if name in drawn]
    return environment.get_template("report.html.jinja").render(
        results=results,
        heading=heading(results),
        answer=answer(results),
        repeat=repeat,
        facts=facts(results, test_prompts),
        seeds_line=seeds_line(results),
        tuning_line=tuning_line(results),
        first=first,
        pictures=[picture for picture in pictures if picture not in first and picture.name not in _IN_SECTIONS],
        tuning_picture=drawn.get("tuning"),
        pair_pictures=[drawn[name] for name in (SIDES, MARGINS) if name in drawn],
        grids=grids,
        no_tests=_why_no_tests(results),
        citation=cite(results),
        failed=[cell for cell in results.cells if cell.status == "failed"],
        number=number,
    )


def _why_no_tests(results: Results) -> str:
    """The sentence that stands where the tests would be."""
    if results.smoke:
        return f"{len(results.seeds)} of at least {MINIMUM_SEEDS} seeds: no intervals over seeds and no tests. Run more seeds."
    if results.primary is None:
        return "The comparison declares no primary end point, so nothing is tested."
    if not scipy_installed():
        return "No intervals and no tests: scipy is not installed. Install the extra: pip install 'prefopt[stats]'."
    return "No tests: neither the reference nor a second setting has values of the primary end point."
