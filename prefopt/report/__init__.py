"""The report of a comparison: tables, figures and one self-contained HTML page, made from results.json."""

from prefopt.report.html import write_report
from prefopt.report.schema import Results, Timings, load_results, load_timings, parse_results, save_results, save_timings
from prefopt.report.summary import answer, print_summary
from prefopt.report.tables import results_markdown, results_table

__all__ = [
    "Results",
    "Timings",
    "answer",
    "load_results",
    "load_timings",
    "parse_results",
    "print_summary",
    "results_markdown",
    "results_table",
    "save_results",
    "save_timings",
    "write_report",
]
