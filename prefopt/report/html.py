"""The report as one HTML file that asks the network for nothing: pictures are embedded, styles are inline."""

from __future__ import annotations

import base64
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from prefopt.errors import OutputError
from prefopt.report.figures import Picture, draw_all
from prefopt.report.grid import to_markdown
from prefopt.report.health import health_grid
from prefopt.report.schema import MINIMUM_SEEDS, Results, Timings, load_prompt_rows, load_results, load_timings
from prefopt.report.statistics import PromptSummary, scipy_installed, summarise_prompts
from prefopt.report.tables import (
    heading,
    judges_grid,
    ledger_grid,
    number,
    paired_grids,
    plain,
    prompts_grid,
    results_grid,
    seeds_line,
    settings_grid,
    tuning_line,
    words,
)

REPORT_FILE, TABLE_FILE, FIGURES_FOLDER = "report.html", "table.md", "figures"


def write_report(folder: Path) -> Path:
    """Makes report.html, table.md and figures/*.png from folder/results.json (and timings.json, per_prompt.jsonl beside it).

    Returns:
        The path of report.html, which stands alone.

    Raises:
        DataError: results that are missing or cannot be read.
        OutputError: the folder cannot be written.
    """
    results, timings = load_results(folder), load_timings(folder)
    pictures = draw_all(results, timings)
    page = render_report(results, timings, pictures, summarise_prompts(load_prompt_rows(folder)))
    tables = [results_grid(results, timings), *paired_grids(results), ledger_grid(results, timings)]
    report = folder / REPORT_FILE
    try:
        (folder / FIGURES_FOLDER).mkdir(exist_ok=True)
        for picture in pictures:
            (folder / FIGURES_FOLDER / f"{picture.name}.png").write_bytes(picture.png)
        (folder / TABLE_FILE).write_text("\n".join(to_markdown(table) for table in tables), encoding="utf-8")
        report.write_text(page, encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"{folder}: expected a folder that can be written, got {error.strerror}: copy the results elsewhere."
        ) from error
    return report


def render_report(
    results: Results, timings: Timings | None, pictures: tuple[Picture, ...], prompts: tuple[PromptSummary, ...] = ()
) -> str:
    """The page as text. Everything that comes from the results is escaped."""
    environment = Environment(
        loader=PackageLoader("prefopt.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(words=words, plain=plain, base64=lambda data: base64.b64encode(data).decode("ascii"))
    failed = [cell for cell in results.cells if cell.status == "failed"]
    return environment.get_template("report.html.jinja").render(
        results=results,
        heading=heading(results),
        seeds_line=seeds_line(results),
        tuning_line=tuning_line(results),
        main=results_grid(results, timings),
        pictures=pictures,
        paired=paired_grids(results),
        no_tests=_why_no_tests(results),
        judges=judges_grid(results.judges),
        health=health_grid(results),
        prompts=prompts_grid(prompts),
        settings=settings_grid(results),
        cost=ledger_grid(results, timings),
        failed=failed,
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
