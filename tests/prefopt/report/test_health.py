"""The health table: means of the last quarter, ratios to the start, and marks where a value leaves its range."""

from __future__ import annotations

from dataclasses import replace

from prefopt.report.health import WATCHED, health_grid


def on_rollouts(results, curve):
    """Every cell of the first setting with this training log."""
    label = results.settings[0].label
    cells = tuple(replace(cell, curve=tuple(curve)) if cell.label == label else cell for cell in results.cells)
    return replace(results, cells=cells)


def healthy(steps: int = 40):
    return [
        {"step": step, "completion_length": 10.0, "kl": 0.1 * step, "clip_frac": 0.1, "eos_share": 0.9, "score/spread": 1.0}
        for step in range(steps)
    ]


def test_a_healthy_run_has_no_mark(make_exact) -> None:
    grid = health_grid(on_rollouts(make_exact(), healthy()))
    (row,) = grid.rows
    assert not any(entry.style == "failed" for entry in row)
    # Steps 30 to 39: the mean of 0.1 * step is 3.45.
    assert [entry.text for entry in row][1] == "3.45"
    assert len(grid.captions) == 2


def test_what_leaves_its_range_is_marked_and_said(make_exact) -> None:
    """Length doubles and more, three tokens in four are clipped: two marks, two sentences that say where to look."""
    lines = [{**line, "completion_length": 10.0 + line["step"], "clip_frac": 0.75} for line in healthy()]
    grid = health_grid(on_rollouts(make_exact(), lines))
    marked = [column.header for column, entry in zip(grid.columns, grid.rows[0], strict=True) if entry.style == "failed"]
    assert marked == ["clipped tokens", "length, of its start"]
    assert "learning rate or epochs too high" in grid.captions[2]
    # (10 + 34.5) over the mean of the first tenth, 10 + 1.5.
    assert "length, of its start is 3.87, expected 0.5 to 2 times" in grid.captions[3]


def test_settings_that_sample_nothing_have_no_row(make_exact) -> None:
    assert health_grid(make_exact()).rows == ()
    assert health_grid(make_exact()).captions == ()


def test_ranges_are_ranges() -> None:
    assert len({watched.key for watched in WATCHED}) == len(WATCHED)
    assert all(watched.low < watched.high for watched in WATCHED)
