"""Studies from plain values: what a file or flags say becomes entries, grids of strengths and options, or an error."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from prefopt.errors import ConfigError
from prefopt.optimization import Optimization
from prefopt.options import Options, build_options, options_of
from prefopt.study import Entry, Study, assign, entries_of, presets, study_of
from prefopt.tuning import tuning_study


def test_a_list_of_values_is_a_grid_of_strengths() -> None:
    entries = entries_of("dpo", {"beta": [0.03, 0.3], "learning_rate": "1e-4"})
    assert [entry.label for entry in entries] == ["dpo beta=0.03 learning_rate=0.0001", "dpo beta=0.3 learning_rate=0.0001"]
    assert {entry.family for entry in entries} == {"dpo learning_rate=0.0001"}
    assert [entry.setting().hyper["beta"] for entry in entries] == [0.03, 0.3]
    assert entries[0].options(Options()).optimization == Optimization(learning_rate=1e-4)
    named = entries_of("dpo", {"beta": [0.03, 0.3]}, "mine")
    assert [(entry.label, entry.family) for entry in named] == [("mine beta=0.03", "mine"), ("mine beta=0.3", "mine")]


def test_an_entry_alone_is_its_own_family() -> None:
    (entry,) = entries_of("ipo", {"tau": 0.2})
    assert (entry.label, entry.family, entry.group) == ("ipo tau=0.2", "ipo tau=0.2", "")


def test_values_are_read_as_their_types_wherever_they_come_from() -> None:
    (entry,) = entries_of("ppo", {"rollout_size": "64", "kl_coef": "5e-2", "reward_members": 2.0, "reward": "true"})
    assert entry.hyper == {"rollout_size": 64, "kl_coef": 0.05}
    assert entry.reward == {"reward_members": 2, "reward": "true"}
    with pytest.raises(ConfigError, match=r"dpo\.beta: expected float, got 'much'"):
        entries_of("dpo", {"beta": "much"})
    with pytest.raises(ConfigError, match=r"ppo\.rollout_size: expected int"):
        entries_of("ppo", {"rollout_size": 2.5})
    with pytest.raises(ConfigError, match=r"dpo has no option 'betta' \(did you mean 'beta'\?\)|did you mean 'beta'"):
        entries_of("dpo", {"betta": 1.0})


def test_assignments_join_the_items_of_a_file() -> None:
    items = assign(["dpo", {"ipo": {"tau": 0.5}}], ["dpo.beta=0.1,0.3", "ipo.learning-rate=1e-3"])
    assert items == [{"dpo": {"beta": ["0.1", "0.3"]}}, {"ipo": {"tau": 0.5, "learning_rate": "1e-3"}}]
    with pytest.raises(ConfigError, match="'ppo' is not compared"):
        assign(["dpo"], ["ppo.kl_coef=1"])
    with pytest.raises(ConfigError, match=r"expected ALGO\.NAME=VALUE"):
        assign(["dpo"], ["beta=1"])


def test_a_study_file_says_everything(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(
        """
question: Does IPO keep up with DPO at equal KL?
algorithms:
  - dpo: {beta: [0.03, 0.1, 0.3]}
  - ipo: {as: ours, tau: 0.1, learning_rate: 2e-3}
seeds: [3, 4, 5]
kl_targets: [1, 0.5]
pairs: 128
learning_rate: 1e-3
trials: 4
space: ["dpo.label_smoothing=0,0.1"]
"""
    )
    study = Study.load(file)
    assert [entry.label for entry in study.entries] == ["dpo beta=0.03", "dpo beta=0.1", "dpo beta=0.3", "ours"]
    assert (study.seeds, study.kl_targets, study.question[:8]) == ((3, 4, 5), (1.0, 0.5), "Does IPO")
    assert study.options.optimization.learning_rate == 1e-3
    assert study.entries[3].options(study.options).optimization.learning_rate == 2e-3
    assert (study.tuning.trials, study.tuning.space) == (4, ("dpo.label_smoothing=0,0.1",))
    assert Study.load(file, seeds=2).seeds == (0, 1)


def test_the_study_of_the_readme_is_one(tmp_path: Path) -> None:
    """Every line of it, its tuning included."""
    readme = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(question:.*?)```", readme, re.DOTALL)
    file = tmp_path / "study.yaml"
    file.write_text(text)
    study = Study.load(file)
    assert len(study.settings()) == 6
    assert len(tuning_study(study).entries) == 2 * study.tuning.trials


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a study has no 'seed'.*did you mean 'seeds'"):
        study_of({"algorithms": ["dpo"], "seed": 3})
    with pytest.raises(ConfigError, match="dpo has no option 'seed'"):
        study_of({"algorithms": [{"dpo": {"seed": 1}}]})
    with pytest.raises(ConfigError, match="kl_targets must be different positive"):
        study_of({"algorithms": ["dpo"], "kl_targets": [1, 1]})
    with pytest.raises(ConfigError, match="expected a name, or"):
        study_of({"algorithms": [["dpo", "ipo"]]})
    with pytest.raises(ConfigError, match="learning_rate: expected float, got 'fast'"):
        study_of({"algorithms": ["dpo"], "learning_rate": "fast"})
    with pytest.raises(ConfigError, match="trials is 0"):
        study_of({"algorithms": ["dpo"], "space": ["beta=0.1:1"]})
    with pytest.raises(ConfigError, match="cannot be read"):
        Study.load(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("name", presets())
def test_presets_are_studies(name: str) -> None:
    changes = {"data": ["control:FOLDER"]} if name == "metaworld" else {}
    study = Study.load(name, **changes)
    assert study.preset == name
    assert len(study.settings()) == len(study.entries)


def test_options_survive_a_file() -> None:
    options = build_options({"data": ["control:gridworld"], "hidden": [8, 8], "learning_rate": 2e-3, "eval_rows": "tuning"})
    assert options_of(options.as_dict(), "here") == options


def test_entries_take_more_values() -> None:
    entry = Entry("dpo", {"beta": 0.1}).changed({"beta": 0.2, "weight_decay": 0.01})
    assert (entry.hyper, entry.optimization) == ({"beta": 0.2}, {"weight_decay": 0.01})


def test_a_study_repeats_from_its_own_file(tmp_path: Path) -> None:
    """Grids, groups, names, overrides, tuning and options all survive the file that stands beside the report."""
    study = study_of(
        {
            "algorithms": [
                {"dpo": {"beta": [0.1, 0.3], "as": "mine"}},
                {"ppo": {"reward": "true", "learning_rate": 1e-4, "kl_coef": 0.2}},
                "dpo:1.0+sft:0.2",
            ],
            "seeds": [3, 5],
            "kl_targets": [0.5],
            "trials": 4,
            "vary": ["order"],
            "data": ["exact"],
            "title": "A title: with a colon",
            "question": "Is it?",
            "eval_rows": "tuning",
            "epochs": 2.5,
        }
    )
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(study.values(), sort_keys=False))
    again = Study.load(file)
    assert again.settings() == study.settings()
    assert [(e.label, e.group, e.values) for e in again.entries] == [(e.label, e.group, e.values) for e in study.entries]
    for name in ("seeds", "options", "kl_targets", "tuning", "title", "question", "match"):
        assert getattr(again, name) == getattr(study, name), name
