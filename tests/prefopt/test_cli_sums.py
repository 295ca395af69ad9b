"""A weighted sum of losses is a loss wherever the command line takes one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefopt.cli.score import parse_losses
from prefopt.errors import ConfigError
from prefopt.jobs import Job
from prefopt.study import Entry, Study, study_of

SUM = "dpo:1.0+sft:0.2"
TINY = ("--pairs", 64, "--max-steps", 2, "--checkpoints", 1, "--batch-size", 8)


def refused(done: Any, *parts: str) -> None:
    assert done.code == 2, done.out
    assert done.err.startswith("error: ")
    for part in parts:
        assert part in done.err


def test_help_of_a_sum_has_its_equation_and_prefixed_flags_with_their_words(cli: Any) -> None:
    by_word, by_flag = cli("train", SUM, "--help"), cli("train", "--loss", SUM, "--help")
    for done in (by_word, by_flag):
        assert done.code == 0, done.err
        assert "1*dpo + 0.2*sft" in done.flat
        assert done.out.index(f"{SUM} options") < done.out.index("--dpo-beta") < done.out.index(" Run ")
        assert "Strength against the reference; raising it keeps the policy nearer to it. [default: 0.1]" in done.flat
        assert "--dpo-label-smoothing" in done.out
        assert " --beta" not in done.out
    assert ("--loss " in by_flag.out, "--loss " in by_word.out) == (True, False)


def test_the_flag_names_a_loss_as_the_word_does(cli: Any) -> None:
    """The panels are the same but for --loss itself."""

    def lines(done: Any) -> list[str]:
        return [line for line in done.out.splitlines() if "--loss " not in line and not line.startswith("Usage")]

    assert [line.split() for line in lines(cli("train", "--loss=dpo", "--help"))] == [
        line.split() for line in lines(cli("train", "dpo", "--help"))
    ]


def test_a_sum_trains_under_its_own_name(cli: Any, tmp_path: Path) -> None:
    """Both ways to name it make the same run, so the second goes on with the first."""
    run = tmp_path / "run"
    rest = ("--dpo-beta", 0.3, "--data", "exact", *TINY, "--output-dir", run)
    done = cli("train", "--loss", SUM, *rest)
    assert done.code == 0, done.err
    config = json.loads((run / "config.json").read_text())
    assert (config["algorithm"], config["hyper"]) == (SUM, {"dpo_beta": 0.3, "dpo_label_smoothing": 0.0})
    assert json.loads((run / "result.json").read_text())["cell"]["label"] == SUM
    logged = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"nll", "rewards/margins"} <= {*logged}, "each term reports"
    again = cli("train", SUM, *rest, "--resume")
    assert (again.code, again.last) == (0, f"already finished; the policy is in {run / 'policy'}")


@pytest.mark.slow
def test_sums_are_compared_beside_others(cli: Any, tmp_path: Path) -> None:
    study = tmp_path / "study"
    done = cli(
        "compare", "dpo", "--loss", SUM, "--set", f"{SUM}.dpo_beta=0.5", *TINY, "--seeds", 1,
        "--workers", 0, "--output-dir", study,
    )  # fmt: skip
    assert done.code == 0, done.err
    stored = json.loads((study / "results.json").read_text())
    assert [cell["status"] for cell in stored["cells"]] == ["ok"] * 2
    assert [setting["label"] for setting in stored["settings"]] == ["dpo", f"{SUM} dpo_beta=0.5"]
    assert f"{SUM} dpo_beta=0.5" in (study / "report.html").read_text()
    assert len({cell["final"]["kl"] for cell in stored["cells"]}) == 2


def test_folders_of_cells_are_safe_and_differ(tmp_path: Path) -> None:
    names = ["dpo", SUM, "dpo:1.0 + sft:0.2", "dpo:1.0:sft:0.2", "dpo_1.0_sft_0.2"]
    study = Study([Entry(name) for name in names], [0])
    folders = [Job(study, index, 0, tmp_path, tmp_path).folder.name for index in range(len(names))]
    assert len({*folders}) == len(names)
    assert all(set(folder) <= {*"abcdefghijklmnopqrstuvwxyz0123456789_.-"} for folder in folders)
    assert folders[1].startswith("dpo_1.0_sft_0.2-")


def test_a_config_file_names_sums(cli: Any, tmp_path: Path) -> None:
    config = tmp_path / "study.yaml"
    config.write_text(f"algorithms: [ipo, '{SUM}']\nseeds: 1\nset: ['{SUM}.dpo-beta=0.25']\n")
    done = cli("compare", "--config", config, "--dry-run")
    assert done.code == 0, done.err
    assert "2 cells" in done.out
    assert f"{SUM} dpo_beta=0.25" in done.flat


def test_the_last_dot_before_the_first_equals_sign_parts_a_sum_from_its_flag() -> None:
    study = study_of({"algorithms": [SUM, "dpo:.5"], "set": [f"{SUM}.dpo_beta=0.5", "dpo:.5.dpo_beta=1.5"]})
    assert {entry.algorithm: entry.values for entry in study.entries} == {SUM: {"dpo_beta": 0.5}, "dpo:.5": {"dpo_beta": 1.5}}
    with pytest.raises(ConfigError, match=r"dpo:1\.0\+sft:0\.2 has no option 'beta' \(did you mean 'dpo_beta'\?\)"):
        study_of({"algorithms": [SUM], "set": [f"{SUM}.beta=0.5"]})


def test_words_of_score_are_sums_with_values() -> None:
    found = parse_losses([SUM, f"{SUM}:dpo_beta=0.5,dpo-label-smoothing=0.1", "dpo"])
    assert [*found] == [SUM, f"{SUM} dpo_beta=0.5 dpo_label_smoothing=0.1", "dpo"]
    assert {term.name: term.coefficient for term in found[SUM].terms} == {"dpo": 1.0, "sft": 0.2}
    assert [bound.hyper["dpo_beta"] for bound in (*found.values(),)[:2]] == [0.1, 0.5]


def test_a_sum_is_scored(cli: Any, tiny_model: Path, jsonl: Callable[..., Path], pairs: list[Any], tmp_path: Path) -> None:
    output = tmp_path / "scores"
    done = cli("score", "--loss", "dpo", "sft", SUM, "--data", jsonl(pairs), "--model", tiny_model, "--output-dir", output)
    assert done.code == 0, done.err
    objective = {found["label"]: found["objective"] for found in json.loads((output / "scores.json").read_text())["losses"]}
    assert objective[SUM] == pytest.approx(objective["dpo"] + 0.2 * objective["sft"], rel=1e-5)


def test_laws_hold_for_a_sum(cli: Any) -> None:
    done = cli("laws", SUM)
    assert done.code == 0
    assert done.last.endswith("laws checked, none broken")


WRONG = [
    ("dop:1.0+sft:0.2", ("unknown algorithm 'dop'", "did you mean 'dpo")),
    ("dpo:1.0+dpo:0.2", ("'dpo' appears twice",)),
    ("dpo:much+sft", ("'dpo:much' should be NAME:NUMBER",)),
    ("dpo:1.0+", ("NAME:NUMBER",)),
    ("dpo:0+sft:0", ("every term has weight 0",)),
]


@pytest.mark.parametrize(("name", "parts"), WRONG)
@pytest.mark.parametrize("command", ["train", "compare", "laws", "losses", "score"])
def test_a_wrong_sum_is_refused_everywhere(cli: Any, command: str, name: str, parts: tuple[str, ...]) -> None:
    refused(cli(command, *(["--losses"] if command == "score" else []), name), *parts)


@pytest.mark.parametrize("command", [("train",), ("train", "--loss"), ("compare", "--dry-run", "--loss")])
def test_terms_of_different_streams_are_named_with_what_they_need(cli: Any, command: tuple[str, ...]) -> None:
    refused(cli(*command, "rpo+kto:0.5"), "'rpo+kto:0.5' cannot be trained", "dpo needs 'pairs'", "kto needs 'labelled'")


def test_unknown_flags_of_a_sum_are_explained(cli: Any) -> None:
    refused(cli("train", "--loss", SUM, "--dpo-bta", 0.3), f"{SUM} has no option --dpo-bta (did you mean 'dpo_beta'?)")
    refused(cli("train", SUM, "--beta", 0.3), f"{SUM} has no option --beta (did you mean 'dpo_beta'?)")


def test_train_takes_one_loss(cli: Any) -> None:
    refused(cli("train", "dpo", "--loss", "sft"), "one loss, got dpo and sft", "dpo+sft", "prefopt compare dpo sft")
    refused(cli("train", "--loss", "dpo", "--loss", "sft"), "one loss, got dpo and sft")
    refused(cli("train", "--output-dir", "unused"), "name the loss first")
    assert cli("train", "--help").code == 0
