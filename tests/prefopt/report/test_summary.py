"""The first sentences, the tuning section, what is cited, and tables for other programs."""

from __future__ import annotations

import csv
import io
import math
import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

import prefopt
from prefopt.report import save_results
from prefopt.report.cite import bibliography, cite, papers_of, short
from prefopt.report.grid import Column, Entry, Grid, to_csv, to_latex
from prefopt.report.matched import endpoint
from prefopt.report.schema import Results, Setting, Tuning
from prefopt.report.summary import answer, facts
from prefopt.report.tuning import criteria, expected_maximum, tuning_grid


def with_values(results: Results, values: dict[str, list[float]]) -> Results:
    """The comparison with these final rewards."""
    cells = [replace(c, final={**c.final, "reward": values[c.label][c.seed]}) for c in results.cells if c.label in values]
    settings = tuple(setting for setting in results.settings if setting.label in values)
    return replace(results, cells=tuple(cells), settings=settings)


def test_answer_names_the_highest_and_those_it_is_told_apart_from(make_exact) -> None:
    values = {"dpo": [0.5, 0.51, 0.49], "ppo": [0.9, 0.91, 0.92], "kto": [0.91, 0.9, 0.911]}
    results = with_values(make_exact(3), values)
    text = answer(results)
    pairs = {(pair.left, pair.right): pair for pair in endpoint(results).pairs}
    pair = pairs["dpo", "ppo"]
    assert text.startswith(
        "At the end of training, ppo has the highest hidden reward (0.910 ± 0.025) and is told apart from dpo"
    )
    assert (
        f"from dpo (by 0.410, p = {pair.p_holm:.2g} after Holm's correction over 3 tests); it cannot be told apart from kto "
        "(difference +0.003, 95% interval" in text
    )
    assert "Against the reference (0.110): all are above it." in text


def test_the_answer_stays_one_sentence_however_many_cannot_be_told_apart(make_exact) -> None:
    values = {"dpo": [0.1, 0.11, 0.09], "ppo": [0.9, 0.91, 0.92], "kto": [0.93, 0.89, 0.88], "ipo": [0.91, 0.9, 0.914]}
    text = answer(with_values(make_exact(3), values))
    assert re.search(
        r"ppo has the highest .* told apart from dpo \(by 0.810, p = [^()]* over 6 tests\); it cannot be told apart from "
        r"ipo and kto: differences of 0.002 to 0.010, which [\w ]+ seeds would be needed to tell apart\. Against",
        text,
    ), text


def test_answer_with_less_is_better_names_the_lowest(make_exact) -> None:
    values = {"dpo": [0.5, 0.51, 0.49], "ppo": [0.9, 0.91, 0.92]}
    results = with_values(make_exact(3), values)
    metrics = tuple(replace(metric, better="down") if metric.primary else metric for metric in results.metrics)
    assert "dpo has the lowest hidden reward" in answer(replace(results, metrics=metrics))


def test_answer_where_nothing_is_told_apart_names_nobody_as_highest(make_exact) -> None:
    results = with_values(make_exact(3), {"dpo": [0.0, 0.9, 0.5], "ppo": [0.5, 0.1, 0.9]})
    text = answer(results)
    assert "no two of the 2 can be told apart at 3 seeds: mean hidden reward lies between 0.467 and 0.500" in text
    assert "highest" not in text
    assert "none can be told apart from it" in text


def test_equal_runs_are_said_to_be_equal(make_exact) -> None:
    results = with_values(make_exact(3), {"dpo": [0.3, 0.6, 0.5], "ppo": [0.3, 0.6, 0.5]})
    assert "no test could be made: all seeds are equal" in answer(results)


def test_answer_says_what_does_not_reach_and_which_judge_is_weak(make_exact, make_text) -> None:
    results = replace(make_exact(3), kl_targets=(0.25,))
    assert "Not compared: ipo, not reached (0.149 nats)." in answer(results)
    text = make_text(3)
    metrics = tuple(replace(metric, primary=metric.key == "win_rate/tiny-rm") for metric in text.metrics)
    assert "tiny-rm, may be right less than 55% of the time, so this says little" in answer(replace(text, metrics=metrics))


def test_smoke_runs_and_missing_end_points_have_no_answer(make_exact) -> None:
    assert answer(make_exact(2)).startswith("No answer yet: 2 seeds of at least 3.")
    results = make_exact(3)
    assert "declares no primary end point" in answer(replace(results, metrics=results.metrics[1:]))


def test_facts_are_one_line_with_everything_that_the_answer_rests_on(make_text, fail) -> None:
    text = facts(fail(make_text(3), "kto", 1, "boom"), prompts=332)
    for fact in ("3 seeds", "332 test prompts", "big-rm right on 71.0% (68.0% to 74.0%)", "1 of 12 cells failed",
                 "labels (38,400 each)", "smallest detectable difference", "untuned defaults"):  # fmt: skip
        assert fact in text


@pytest.mark.parametrize("values", [[1.0], [3.0, 1.0, 2.0], [0.5, 0.5, -1.0, 4.0, 2.0]])
def test_expected_maximum_is_the_mean_over_all_subsets(values: list[float]) -> None:
    expected = [np.mean([max(some) for some in combinations(values, n)]) for n in range(1, len(values) + 1)]
    assert expected_maximum(values) == pytest.approx(expected)


def test_tuning_table_counts_failures_and_warns_of_borders(make_exact) -> None:
    trials = ({"beta": 0.1, "criterion": 0.3}, {"beta": 0.2, "criterion": None}, {"beta": 0.4, "criterion": math.nan})
    tuning = Tuning("dpo", "hidden reward", "up", {"beta": "0.1 to 0.4"}, trials, {"beta": 0.1}, 0.3, ("beta",), (1000,))
    assert criteria(tuning) == [0.3]
    (row,) = tuning_grid(replace(make_exact(3), tuning=(tuning,))).rows
    texts = [entry.text for entry in row]
    assert texts[:5] == ["dpo", "beta: 0.1 to 0.4", "3 (2 failed)", "beta=0.1", "0.3"]
    assert "at the border: beta" in texts[-1]
    assert tuning_grid(make_exact(3)).rows == ()


def test_a_study_cites_its_losses_its_statistics_and_its_data(make_exact) -> None:
    citation = cite(replace(make_exact(3, ("dpo", "ppo")), kl_targets=(0.5,), train={"data": {"data": ["Anthropic/hh-rlhf"]}}))
    assert {"rafailov2023dpo", "schulman2017ppo", "schulman2015gae", "bai2022hh", "holm1979simple"} <= {*citation.keys}
    assert "dpo (Rafailov et al. 2023)" in citation.methods
    assert "hidden reward at 0.5 nats of KL from the reference, a target fixed before the run" in citation.methods
    assert re.findall(r"^@\w+\{([^,]+),", citation.bibtex, re.MULTILINE) == list(citation.keys)
    assert "holm1979simple" not in cite(make_exact(1, ("dpo",))).keys


def test_sums_and_online_losses_cite_their_parts_and_unknown_ones_nothing() -> None:
    assert {"rafailov2023dpo"} <= {*papers_of("dpo:1.0+sft:0.2")}
    assert {"rafailov2023dpo", "guo2024oaif"} <= {*papers_of("online_dpo")}
    assert papers_of("a_loss_of_mine") == ()


def test_the_bibliography_comes_with_the_package() -> None:
    root = Path(__file__).parents[3]
    assert (root / "references.bib").read_text() == (root / "prefopt" / "references.bib").read_text()
    assert short("hejna2023cpl") == "Hejna et al. 2023"
    assert all(short(key) for key in bibliography())


def test_cite_command_prints_paragraph_and_bibtex(cli, make_exact, tmp_path: Path) -> None:
    results = make_exact(3, ("dpo",))
    unknown = Setting("my_hinge", "my_hinge")
    save_results(replace(results, settings=(*results.settings, unknown)), tmp_path)
    done = cli("cite", tmp_path)
    assert done.code == 0, done.err
    assert "We compared dpo (Rafailov et al. 2023) and my_hinge with prefopt" in done.flat
    assert "@article{rafailov2023dpo," in done.out


def test_latex_and_csv_escape_what_they_must() -> None:
    grid = Grid(
        "50% & more", (Column("a_b", numeric=False), Column("x ↑")), ((Entry("[1]\\{~}"), Entry("1.0 ± 0.1")),), ("c, d.",)
    )
    made = to_latex(grid)
    assert r"\caption{50\% \& more. c, d.}" in made
    assert r"{[}1{]}\textbackslash{}\{\textasciitilde{}\} & 1.0 $\pm$ 0.1 \\" in made
    assert r"\begin{tabular}{lr}" in made
    assert (
        made.index(r"\toprule") < made.index(r"a\_b & x $\uparrow$ \\") < made.index(r"\midrule") < made.index(r"\bottomrule")
    )
    table = Grid("t", grid.columns, ((Entry('say "x", y'), Entry("1")),))
    assert list(csv.reader(io.StringIO(to_csv(table)))) == [["a_b", "x ↑"], ['say "x", y', "1"]]


def test_results_are_loaded_from_the_package(make_exact, tmp_path: Path) -> None:
    save_results(make_exact(3, ("dpo", "ppo")), tmp_path)
    assert prefopt.load_results(tmp_path).compare("ppo", "dpo").n == 3
    with pytest.raises(AttributeError, match="no attribute 'load_result'"):
        prefopt.load_result  # noqa: B018
