"""Diagnostics of held-out pairs: numbers by hand, and figures of what there is."""

from __future__ import annotations

import numpy as np
import pytest

from prefopt.report import pairs
from prefopt.report.plotting import styled, to_png
from prefopt.report.schema import Cell, PairRow, Results, Setting


def row(label: str, pair: str, chosen: float, rejected: float, longer: int = 0, seed: int = 0) -> PairRow:
    return PairRow(label, seed, pair, chosen, rejected, 5 + longer, 5)


ROWS = [
    row("a", "p", 1.0, 0.0, 2), row("a", "q", -1.0, -3.0, -1), row("a", "r", 0.0, 0.5), row("a", "s", 0.0, 0.0),
    row("b", "p", -1.0, 0.0, 2), row("b", "q", 0.0, -1.0, -1), row("b", "r", 2.0, 0.5), row("b", "s", 0.0, 1.0),
    row("b", "only b", 0.0, 1.0),
]  # fmt: skip


def test_margins_are_means_over_seeds_on_common_pairs() -> None:
    table = pairs.pair_table([*ROWS, row("a", "p", 4.0, 1.0, 2, seed=1)], ["a", "b", "never ran"])
    assert table is not None
    assert (table.ids, table.labels) == (("p", "q", "r", "s"), ("a", "b"))
    np.testing.assert_allclose(table.margins, [[2.0, 2.0, -0.5, 0.0], [-1.0, 1.0, 1.5, -1.0]])
    np.testing.assert_array_equal(table.longer, [2, -1, 0, 0])
    np.testing.assert_array_equal(table.right, [[1, 1, 0, 0.5], [0, 1, 1, 0]])
    assert pairs.pair_table([row("a", "p", 1, 0), row("b", "q", 1, 0)], ["a", "b"]) is None
    assert pairs.pair_table([], ["a"]) is None


def test_accuracy_by_length_and_confidence() -> None:
    table = pairs.pair_table(ROWS, ["a", "b"])
    assert table is not None
    grid = pairs.accuracy_grid(table)
    assert [column.header for column in grid.columns[:5]] == [
        "setting",
        "all pairs",
        "chosen longer",
        "chosen shorter",
        "same length",
    ]
    texts = [[entry.text for entry in line] for line in grid.rows]
    assert texts[0][:5] == ["a", "62.5%", "100.0%", "100.0%", "25.0%"]
    # a's margins by size: s 0 (tie), r -0.5 (wrong), p 1, q 2
    assert texts[0][5:] == ["50.0%", "0.0%", "100.0%", "100.0%"]


def test_disagreement_and_disputed_pairs() -> None:
    table = pairs.pair_table(ROWS, ["a", "b"])
    assert table is not None
    grid = pairs.disagreement_grid(table)
    assert grid is not None
    # p and r are ordered differently, q alike; s is a tie to a, which disagrees with nobody
    assert [[entry.text for entry in line] for line in grid.rows] == [["a", "", "50%"], ["b", "50%", ""]]
    disputed = pairs.disputed_grid(table)
    assert disputed is not None
    assert [line[0].text for line in disputed.rows] == ["p", "r"]
    alone = pairs.pair_table(ROWS, ["a"])
    assert alone is not None
    assert pairs.disagreement_grid(alone) is None
    assert pairs.disputed_grid(alone) is None


@pytest.mark.parametrize("path", [(), ({"step": 1.0, "chosen_log_ratio": -1.0, "rejected_log_ratio": -4.0},)])
def test_figures(path: tuple[dict[str, float], ...]) -> None:
    settings = (Setting("dpo", "a"), Setting("ipo", "b"))
    cells = tuple(Cell("dpo", label, 0, "ok", path=path) for label in ("a", "b"))
    results = Results(1, "t", "text", settings, (0,), (), cells)
    table = pairs.pair_table(ROWS, ["a", "b"])
    assert table is not None
    with styled():
        assert to_png(pairs.margins_figure(results, table)).startswith(b"\x89PNG")
        sides = pairs.sides_figure(results)
        assert (sides is None) == (not path)
        if sides is not None:
            assert to_png(sides).startswith(b"\x89PNG")
