"""Equal tuning: as many trials for every algorithm, over a space that holds the learning rate, elsewhere than the report."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from prefopt import tuning
from prefopt.errors import ConfigError
from prefopt.optimization import Optimization
from prefopt.options import Options, TuningOptions
from prefopt.report.schema import Cell, CellTiming, Metric, Results, Timings
from prefopt.study import Entry, Study, entries_of, study_of


def a_study(*items: Any, **changes: Any) -> Study:
    return study_of({"algorithms": items or ("dpo", "ipo"), "trials": 5, "learning_rate": 1e-3, **changes})


def test_every_algorithm_gets_as_many_trials_and_the_first_is_as_given() -> None:
    study = a_study("dpo", "ipo", "cpl", space=["dpo.beta=0.01:1"])
    made = tuning.tuning_study(study)
    assert len(made.entries) == 15
    by_algorithm = [[e for e in made.entries if e.algorithm == name] for name in ("dpo", "ipo", "cpl")]
    assert [len(each) for each in by_algorithm] == [5, 5, 5]
    for own in by_algorithm:
        assert own[0].values == {}
        assert all("learning_rate" in trial.optimization for trial in own[1:])
        rates = [trial.optimization["learning_rate"] for trial in own[1:]]
        assert len(set(rates)) == 4
        assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert all("beta" in trial.hyper for trial in by_algorithm[0][1:])
    assert all(trial.hyper == {} for trial in by_algorithm[1])
    assert not set(made.seeds) & set(study.seeds)
    assert not made.tuning.trials


def test_a_longer_tuning_begins_like_a_shorter_one() -> None:
    short, long = (tuning.tuning_study(a_study("dpo", trials=n)).entries for n in (4, 9))
    assert [entry.values for entry in long[:4]] == [entry.values for entry in short]


def test_tuning_never_sees_what_the_report_sees() -> None:
    exact = tuning.tuning_study(a_study("dpo"))
    assert exact.options.data.world != a_study("dpo").options.data.world
    text = tuning.tuning_study(a_study("dpo", data=["pairs.jsonl"]))
    assert text.options.evaluation.eval_rows == "tuning"
    assert a_study("dpo").options.evaluation.eval_rows == "test"


def test_strengths_are_tuned_together_at_the_middle_one() -> None:
    study = a_study({"dpo": {"beta": [0.01, 0.1, 1.0]}}, "ipo")
    made = tuning.tuning_study(study).entries
    assert [entry.algorithm for entry in made] == ["dpo"] * 5 + ["ipo"] * 5
    assert {entry.hyper["beta"] for entry in made[:5]} == {0.1}
    with pytest.raises(ConfigError, match="beta has a grid of strengths"):
        tuning.tuning_study(a_study({"dpo": {"beta": [0.01, 0.1]}}, space=["dpo.beta=0.01:1"]))


def test_spaces_that_make_no_sense_are_refused() -> None:
    for line, message in (
        ("beta", "expected NAME=LOW:HIGH"), ("dpo.beta=1:0.1", "0 < LOW < HIGH"), ("dpo.beta=a:b", "expected float"),
        ("dqo.beta=0.1:1", "did you mean 'dpo'"), ("dpo.betta=0.1:1", "did you mean 'beta'"),
        ("betta=0.1:1", "no algorithm of the study has"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            tuning.tuning_study(a_study(space=[line]))


METRIC = Metric("reward", "reward", "up", primary=True)


def results_of(study: Study, values: dict[str, float], paths: dict[str, Any] | None = None) -> Results:
    """Every trial's cell with the number that `values` gives to its label (0 where it gives none)."""
    cells = []
    for entry in study.entries:
        value = values.get(entry.label, 0.0)
        status = "ok" if math.isfinite(value) else "failed"
        final = {"reward": value, "kl": 1.0}
        path = (paths or {}).get(entry.label, ({"step": 1.0, **final},))
        cells += [
            Cell(entry.algorithm, entry.label, seed, status, None if status == "ok" else "boom", final, path)  # type: ignore[arg-type]
            for seed in study.seeds
        ]
    return Results(1, "t", "exact", (), study.seeds, (METRIC,), tuple(cells), reference={"reward": 0.0, "kl": 0.0})


def timings_of(study: Study) -> Timings:
    return Timings(tuple(CellTiming(entry.label, seed, 1.0) for entry in study.entries for seed in study.seeds))


def test_the_best_trial_is_chosen_and_the_report_can_say_how() -> None:
    study = a_study(tuning_seeds=2)
    made = tuning.tuning_study(study)
    records = tuning.chosen(study, results_of(made, {"dpo, trial 3": 2.0, "ipo, trial 1": 1.0}), timings_of(made))
    assert [record.group for record in records] == ["dpo", "ipo"]
    third = next(entry for entry in made.entries if entry.label == "dpo, trial 3")
    assert records[0].chosen == {"learning_rate": third.optimization["learning_rate"]}
    assert (records[0].value, len(records[0].trials), len(records[0].seeds)) == (2.0, 5, 2)
    assert records[1].chosen == {"learning_rate": 1e-3}
    assert records[0].space == {"learning_rate": "0.0001 to 0.01, logarithmic"}
    tuned = tuning.tuned(study, records)
    assert [entry.label for entry in tuned.entries] == ["dpo", "ipo"]
    assert all(entry.tuned for entry in tuned.entries)
    assert tuned.entries[0].options(study.options).optimization.learning_rate == third.optimization["learning_rate"]


def test_a_number_at_the_border_of_its_range_is_said() -> None:
    range_ = tuning.Dimension("learning_rate", 1e-4, 1e-2)
    assert [range_.at_border(rate) for rate in (1e-4, 1.1e-4, 1e-3, 9.5e-3)] == [True, True, False, True]
    choice = tuning.Dimension("beta", values=(0.1, 0.3, 1.0))
    assert [choice.at_border(value) for value in choice.values] == [True, False, True]


def test_a_failed_trial_cannot_be_chosen_and_all_failing_is_an_error() -> None:
    study = a_study("dpo")
    made = tuning.tuning_study(study)
    broken = {entry.label: math.nan for entry in made.entries}
    kept = tuning.chosen(study, results_of(made, {**broken, "dpo, trial 2": -5.0}), timings_of(made))
    assert kept[0].value == -5.0
    assert [trial["criterion"] for trial in kept[0].trials] == [None, -5.0, None, None, None]
    with pytest.raises(ConfigError, match="every trial failed; the first: boom"):
        tuning.chosen(study, results_of(made, broken), timings_of(made))


def test_with_kl_targets_a_trial_is_judged_within_the_first() -> None:
    """The trial that ends highest has paid 9 nats for it; within 1 nat the other one is better."""
    study = a_study("dpo", kl_targets=[1.0], trials=2)
    made = tuning.tuning_study(study)
    paths = {
        "dpo, trial 1": ({"step": 1.0, "kl": 0.5, "reward": 0.6}, {"step": 2.0, "kl": 0.8, "reward": 0.7}),
        "dpo, trial 2": ({"step": 1.0, "kl": 9.0, "reward": 1.5}, {"step": 2.0, "kl": 12.0, "reward": 5.0}),
    }
    (record,) = tuning.chosen(study, results_of(made, {}, paths), timings_of(made))
    assert [trial["criterion"] for trial in record.trials] == pytest.approx([0.7, 0.5])
    assert record.value == pytest.approx(0.7)
    assert "within 1 nats" in record.criterion


def test_an_untuned_study_stays_as_it_is() -> None:
    options = Options(optimization=Optimization(learning_rate=1e-3))
    study = Study([Entry("dpo")], (0,), options, tuning=TuningOptions())
    assert replace(study) == study
    assert entries_of("dpo", {})[0].tuned is False
