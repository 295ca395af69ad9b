from __future__ import annotations

import io
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from prefopt.report import print_summary, results_markdown, results_table
from prefopt.report.grid import Column, Entry, Grid, to_markdown
from prefopt.report.matched_tables import paired_grids
from prefopt.report.schema import Judge, Metric
from prefopt.report.tables import judges_grid, ledger_grid, results_grid, settings_grid

RANKING_WORDS = re.compile(r"\b(best|worst|better|worse|significant\w*|win|wins|winner|beats?|outperform\w*)\b", re.IGNORECASE)


def on_terminal(*parts: object, width: int = 220) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(*parts)
    return console.file.getvalue()  # type: ignore[attr-defined]


def column_of(grid: Grid, header: str) -> list[str]:
    index = [column.header for column in grid.columns].index(header)
    return [row[index].text for row in grid.rows]


def test_smoke_run_says_so_first_and_ranks_nothing(make_exact) -> None:
    results = replace(make_exact(2), baselines=())
    grid = results_grid(results)
    assert grid.title.startswith("smoke run: no ranking")
    text = on_terminal(results_table(results)) + results_markdown(results)
    assert not RANKING_WORDS.search(text)
    assert "±" not in text
    assert paired_grids(results) == ()
    values = [cell.final["reward"] for cell in results.cells if cell.label == "dpo"]
    assert column_of(grid, "hidden reward\u00a0↑")[1] == f"{values[0]:.3f} / {values[1]:.3f}"


def test_three_seeds_show_scipys_interval_and_keep_the_order(make_exact) -> None:
    results = make_exact(3)
    grid = results_grid(results)
    assert column_of(grid, "setting") == ["reference", *(setting.label for setting in results.settings)]
    values = [cell.final["reward"] for cell in results.cells if cell.label == "ppo"]
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    row = column_of(grid, "setting").index("ppo")
    assert column_of(grid, "hidden reward\u00a0↑")[row] == f"{np.mean(values):.3f} ± {(high - low) / 2:.3f}"
    assert column_of(grid, "hidden reward\u00a0↑")[0] == "0.110"
    assert "smoke" not in grid.title
    assert "3 seeds" in grid.title


def test_tuning_is_always_said(make_exact) -> None:
    results = make_exact(3, ("dpo", "ipo"))
    assert "untuned defaults" in results_grid(results).title
    dpo, ipo = results.settings
    half = replace(results, settings=(replace(dpo, tuned=True), ipo))
    assert "tuned: dpo; untuned defaults: ipo" in results_grid(half).title
    both = replace(results, settings=(replace(dpo, tuned=True), replace(ipo, tuned=True)))
    assert "untuned" not in results_grid(both).title


def test_implicit_accuracies_are_marked_with_the_length_baseline(make_exact) -> None:
    grid = results_grid(make_exact(3))
    diagnostic = [column for column in grid.columns if column.header.endswith("†")]
    assert [column.style for column in diagnostic] == ["dim", "dim"]
    captions = " ".join(grid.captions)
    assert "A diagnostic, not a result" in captions
    assert "longer wins 44.0%" in captions


def test_failed_cells_show_the_first_line_of_their_error(make_exact, fail) -> None:
    results = make_exact(3, ("dpo", "ipo"))
    for seed in results.seeds:
        results = fail(results, "ipo", seed, "TrainingError: loss is [nan]\nTraceback ...")
    results = fail(results, "dpo", 1, "out of memory")
    grid = results_grid(results)
    assert column_of(grid, "hidden reward\u00a0↑")[2] == "failed"
    assert column_of(grid, "hidden reward\u00a0↑")[1].endswith("(2 of 3 seeds)")
    assert "±" not in column_of(grid, "hidden reward\u00a0↑")[1]
    text = on_terminal(results_table(results), width=400)
    assert "seed 1: failed: out of memory" in text
    assert "seed 0: failed: TrainingError: loss is [nan]" in text
    assert "Traceback" not in text


def test_weak_judges_are_grey_in_their_table_and_their_columns(make_text) -> None:
    results = make_text(3)
    good, weak = judges_grid(results.judges).rows
    assert {entry.style for entry in good} == {""}
    assert {entry.style for entry in weak} == {"dim"}
    assert "same backbone as the policy" in weak[-1].text
    styles = {column.header: column.style for column in results_grid(results).columns}
    assert styles["score, big-rm\u00a0↑"] == ""
    assert styles["preferred to reference, tiny-rm\u00a0↑"] == "dim"
    assert any("Greyed out (preferred to reference, tiny-rm)" in caption for caption in results_grid(results).captions)


def test_a_judge_at_the_floor_is_not_grey() -> None:
    styles = [judges_grid([Judge("rm", 0.6, low, 0.7, 100)]).rows[0][0].style for low in (0.55, 0.5499, float("nan"))]
    assert styles == ["", "dim", "dim"]


def test_tests_table_counts_its_family(make_exact) -> None:
    reference, pairs = paired_grids(make_exact(3, ("dpo", "ipo", "ppo", "kto")))
    assert len(reference.rows) == 4
    assert len(pairs.rows) == 6
    assert "over the 6 tests" in pairs.captions[0]


def test_without_scipy_tables_say_so(make_exact, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tables", "statistics", "matched_tables", "summary"):
        monkeypatch.setattr(f"prefopt.report.{module}.scipy_installed", lambda: False)
    results = make_exact(3)
    assert "scipy is not installed" in results_grid(results).title
    assert "±" not in to_markdown(results_grid(results))
    assert paired_grids(results) == ()


def test_missing_metrics_and_unmeasured_memory(make_exact, make_timings) -> None:
    results = make_exact(3, ("dpo", "ipo"))
    results = replace(results, metrics=(*results.metrics, Metric("absent", "absent", None)))
    grid = results_grid(results, make_timings(results))
    assert column_of(grid, "absent") == ["n/a"] * 3
    headers = [column.header for column in grid.columns]
    assert "seconds" in headers
    assert "peak MB" not in headers


def test_seconds_are_those_of_cells_that_finished(make_exact, make_timings, fail) -> None:
    results = fail(make_exact(3, ("dpo", "ipo")), "ipo", 2, "boom")
    assert column_of(results_grid(results, make_timings(results)), "seconds") == ["", "21.0", "20.5"]


def test_ledger_and_settings_show_every_number(make_exact, make_timings) -> None:
    results = make_exact(3, ("dpo", "ppo"))
    ledger = ledger_grid(results, make_timings(results))
    assert column_of(ledger, "generated tokens") == ["0", "350,000"]
    assert column_of(ledger, "seconds") == ["21.0", "21.0"]
    assert any("sft tokens 120,000" in caption for caption in ledger.captions)
    assert any("sft 11.5" in caption for caption in ledger.captions)
    assert column_of(settings_grid(results), "hyper-parameters") == ["beta=0.1, average_log_prob=true"] * 2


def test_labels_are_text_and_not_markup(make_exact) -> None:
    results = make_exact(1, ("dpo",))
    label = "[red]x[/red]|<b>*y*"
    results = replace(
        results, settings=(replace(results.settings[0], label=label),), cells=(replace(results.cells[0], label=label),)
    )
    assert label in on_terminal(results_table(results))
    row = results_markdown(results).splitlines()[5]
    assert r"\|" in row
    assert "<b>" not in row
    assert len(re.findall(r"(?<!\\)\|", row)) == len(results.metrics) + 2


def test_markdown_is_a_table() -> None:
    grid = Grid("t", (Column("a", numeric=False), Column("b")), ((Entry("x"), Entry("1")),), ("c.",))
    assert to_markdown(grid) == "**t**\n\n| a | b |\n|:---|---:|\n| x | 1 |\n\nc.\n"
    with pytest.raises(ValueError, match="a row has 1 entries, the header 2"):
        Grid("t", grid.columns, ((Entry("x"),),))


def test_summary_prints_results_tests_and_judges(make_text, make_timings) -> None:
    results = make_text(3)
    console = Console(file=io.StringIO(), width=200, color_system=None)
    print_summary(results, make_timings(results), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for expected in (results.title, "each against the reference", "tiny-rm", "note: labels are drawn once"):
        assert expected in text
