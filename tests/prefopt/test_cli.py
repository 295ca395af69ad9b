"""The command line on good input: help, training, comparing, and what lies on disk afterwards."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from losses.laws import LAWS
from prefopt import __version__, algorithms
from prefopt.cli import INTERRUPTED, main, train
from prefopt.errors import ConfigError
from prefopt.files import contents, locked
from prefopt.study import study_of

# Small, and large enough for a last step that is not the first.
TINY = ("--pairs", 64, "--max-steps", 2, "--checkpoints", 1, "--batch-size", 8)
SMALL_TEXT = (
    "--max-steps",
    2,
    "--checkpoints",
    1,
    "--batch-size",
    4,
    "--eval-prompts",
    4,
    "--eval-pairs",
    8,
    "--eval-tokens",
    4,
)


def test_help_lists_commands_and_examples_and_does_not_wait_for_torch() -> None:
    program = "import sys; from prefopt.cli import main; main(['--help']); print('torch' in sys.modules, 'yaml' in sys.modules)"
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert time.perf_counter() - begin < 10
    for word in ("train", "compare", "report", "data", "losses", "laws", "doctor", "prefopt train ipo --help"):
        assert word in done.stdout
    assert done.stdout.splitlines()[-1] == "False False"


def test_bare_prefopt_is_its_help(cli: Any) -> None:
    assert (cli().out, cli().code) == (cli("--help").out, 0)
    assert cli("--version").out.strip() == __version__


def test_help_of_an_algorithm_begins_with_its_equation_and_its_own_flags(cli: Any) -> None:
    done = cli("train", "ipo", "--help")
    assert done.code == 0
    assert "L = (h - 1/(2 tau))^2" in done.flat
    assert done.out.index("ipo options") < done.out.index("--tau") < done.out.index(" Run ") < done.out.index(" Data ")
    assert "strength against the reference" in done.flat.lower()
    assert done.out.index(" Data ") < done.out.index("--learning-rate")
    assert "--beta" not in done.out.replace("--adam-beta", "")


@pytest.mark.parametrize("name", algorithms.trainable_names())
def test_every_flag_of_every_algorithm_is_in_its_help(cli: Any, name: str) -> None:
    done = cli("train", name, "--help")
    for flag in algorithms.get(name).flags:
        assert f"--{flag.replace('_', '-')}" in done.out
    assert cli("train", "--help").flat.count(f" {name} ") >= 1


@pytest.mark.fault(15)
def test_train_leaves_everything_in_its_folder(cli: Any, tmp_path: Path) -> None:
    """Also: finished runs resume as a no-op, and neither another run nor this one again is started in it."""
    run = tmp_path / "run"
    command = ("train", "dpo", "--beta", 0.5, *TINY, "--output-dir", run)
    done = cli(*command)
    assert done.code == 0, done.err
    assert done.last == f"policy: {run / 'policy'}"
    assert done.out.index("Records: 64 of 64") < done.out.index("step 2/2")
    config = json.loads((run / "config.json").read_text())
    assert (config["algorithm"], config["hyper"]["beta"], config["data"]["pairs"]) == ("dpo", 0.5, 64)
    assert config["logging"]["save_every"] == train.SAVE_EVERY
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2
    assert json.loads((run / "data_report.json").read_text())["tokens"]["rows"] == 64
    assert "Records: 64 of 64" in (run / "data_report.txt").read_text()
    assert (run / "checkpoint-2").is_dir()
    result = json.loads((run / "result.json").read_text())
    assert result["cell"]["status"] == "ok"
    assert result["cell"]["final"]["kl"] > 0
    assert AutoModelForCausalLM.from_pretrained(run / "policy").num_parameters() > 0

    written = (run / "result.json").stat().st_mtime_ns
    again = cli(*command, "--resume")
    assert (again.code, again.last) == (0, f"already finished; the policy is in {run / 'policy'}")
    assert (run / "result.json").stat().st_mtime_ns == written
    refused = cli(*command)
    assert refused.code == 2
    assert "--resume goes on with it, --overwrite deletes it" in refused.err
    other = cli("train", "dpo", *TINY, "--output-dir", run, "--resume")
    assert other.code == 2
    assert "other options (hyper.beta)" in other.err
    assert (run / "result.json").stat().st_mtime_ns == written


@pytest.mark.fault(15)
def test_overwrite_deletes_a_run_and_nothing_else(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train.claim(run, {"algorithm": "dpo"}, resume=False, overwrite=False)
    (run / "metrics.jsonl").write_text("old")
    train.claim(run, {"algorithm": "ipo"}, resume=False, overwrite=True)
    assert [path.name for path in run.iterdir()] == ["config.json"]
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.tex").write_text("years")
    with pytest.raises(train.OutputError, match="holds no run of prefopt train"):
        train.claim(tmp_path / "own", {"algorithm": "ipo"}, resume=False, overwrite=True)
    assert (tmp_path / "own" / "thesis.tex").read_text() == "years"


@pytest.mark.fault(15)
def test_two_processes_do_not_share_a_run(cli: Any, tmp_path: Path) -> None:
    """The second is refused whatever it is told, and the folder is as it was; the lock is no part of a run."""
    run = tmp_path / "run"
    with locked(run):
        for flags in ((), ("--resume",), ("--overwrite",)):
            refused = cli("train", "dpo", *TINY, "--output-dir", run, *flags)
            assert refused.code == 2
            assert f"another process works in {run}: wait for it, end it, or name another folder." in refused.err
        assert contents(run) == []
    train.claim(run, {"algorithm": "dpo"}, resume=False, overwrite=False)
    assert [path.name for path in contents(run)] == ["config.json"]


def test_what_changes_no_number_may_be_otherwise_when_a_run_goes_on(tmp_path: Path) -> None:
    def config(**recovery: Any) -> dict[str, Any]:
        return {"algorithm": "dpo", "logging": {"keep": len(recovery) + 1, "log_every": 1}, "recovery": recovery}

    train.claim(tmp_path, config(), resume=False, overwrite=False)
    (tmp_path / "metrics.jsonl").write_text("")
    train.claim(tmp_path, config(skip_bad_steps=3), resume=True, overwrite=False)
    assert json.loads((tmp_path / "config.json").read_text()) == config(skip_bad_steps=3)
    other = {**config(), "logging": {"keep": 1, "log_every": 2}}
    with pytest.raises(train.OutputError, match=r"other options \(logging\.log_every\)"):
        train.claim(tmp_path, other, resume=True, overwrite=False)


@pytest.mark.fault(8)
def test_an_interrupted_run_goes_on_to_the_same_weights(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by ctrl-C after step 2 of 4; the seams of the run do not show."""
    from prefopt import trainer

    options = ("train", "dpo", "--pairs", 64, "--max-steps", 4, "--checkpoints", 1, "--batch-size", 8, "--save-every", 1)
    assert cli(*options, "--output-dir", tmp_path / "whole").code == 0
    update = trainer._Run.update

    def interrupted(self: Any, micro_batches: Any) -> None:
        if self.step == 2 and self.folder is not None:
            raise KeyboardInterrupt
        update(self, micro_batches)

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Run, "update", interrupted)
        stopped = cli(*options, "--output-dir", tmp_path / "parts")
    assert stopped.code == INTERRUPTED
    assert "--resume" in stopped.err
    assert not (tmp_path / "parts" / "policy").exists()
    resumed = cli(*options, "--output-dir", tmp_path / "parts", "--resume")
    assert resumed.code == 0, resumed.err
    assert "resumed after step 2" in resumed.out
    whole, parts = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "policy") for name in ("whole", "parts"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name


@pytest.mark.parametrize("lora", [0, 4])
def test_a_text_policy_loads_with_its_tokenizer(
    cli: Any, tmp_path: Path, tiny_model: Path, jsonl: Callable[..., Path], pairs: list[Any], lora: int
) -> None:
    policy = tmp_path / "run" / "policy"
    done = cli(
        "train", "dpo", "--data", jsonl(pairs), "--model", tiny_model, *SMALL_TEXT, "--learning-rate", 1e-2, "--lora", lora,
        "--output-dir", tmp_path / "run",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "Roles" in done.out
    assert (tmp_path / "run" / "per_prompt.jsonl").exists()
    assert AutoTokenizer.from_pretrained(policy)("a d").input_ids == [2, 5]
    ids = torch.tensor([[2, 3, 4]])
    start = AutoModelForCausalLM.from_pretrained(tiny_model)(ids).logits
    if lora:
        from peft import PeftModel

        trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), policy)(ids).logits
    else:
        trained = AutoModelForCausalLM.from_pretrained(policy)(ids).logits
    assert not torch.allclose(start, trained, atol=1e-4)


@pytest.mark.slow
def test_compare_ends_with_the_path_of_its_report(cli: Any, tmp_path: Path) -> None:
    study = tmp_path / "study"
    done = cli("compare", "dpo", "ipo", *TINY, "--seeds", 1, "--workers", 0, "--set", "dpo.beta=0.5", "--output-dir", study)
    assert done.code == 0, done.err
    assert done.last == str(study / "report.html")
    stored = json.loads((study / "results.json").read_text())
    assert [setting["label"] for setting in stored["settings"]] == ["dpo beta=0.5", "ipo"]
    assert [cell["status"] for cell in stored["cells"]] == ["ok", "ok"]
    assert (study / "timings.json").exists()

    (study / "report.html").unlink()
    rebuilt = cli("report", study)
    assert (rebuilt.code, rebuilt.out.strip()) == (0, str(study / "report.html"))
    assert "dpo beta=0.5" in (study / "report.html").read_text()


def test_a_dry_run_trains_nothing(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefopt import jobs

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a dry run trained")

    monkeypatch.setattr(jobs, "run_cell", never)
    done = cli("compare", "dpo", "cpl", "--seeds", 4, "--dry-run", "--output-dir", tmp_path / "study")
    assert done.code == 0
    assert "8 cells" in done.out
    assert not (tmp_path / "study").exists()
    for flags, message in (
        (("--probe",), "add --dry-run"), (("--trials", 2, "--space", "dpo.beta=1:0.1", "--dry-run"), "0 < LOW < HIGH"),
    ):  # fmt: skip
        refused = cli("compare", "dpo", *flags, "--output-dir", tmp_path / "study")
        assert refused.code == 2
        assert message in refused.err
    assert not (tmp_path / "study").exists()


def test_a_study_file_may_stand_where_algorithms_do(cli: Any, tmp_path: Path) -> None:
    """With a grid of strengths, named seeds and tuning; flags win."""
    file = tmp_path / "study.yaml"
    file.write_text("algorithms: [{dpo: {beta: [0.1, 0.3]}}, ipo]\nseeds: [4, 7]\nkl_targets: [1]\ntrials: 2\n")
    shown = cli("compare", file, "--dry-run")
    assert shown.code == 0, shown.err
    assert "10 cells on exact, 4 of them trials of tuning" in shown.flat
    assert "4, 7" in shown.flat
    assert "7 cells on exact" in cli("compare", file, "--seeds", 1, "--dry-run").flat


def test_a_config_file_stands_in_for_flags_that_are_not_given(cli: Any, tmp_path: Path) -> None:
    config = tmp_path / "study.yaml"
    config.write_text("algorithms: [dpo, ipo]\nseeds: 2\nbatch_size: 7\nlearning_rate: 1e-3\nset: [ipo.tau=0.25]\n")
    done = cli("compare", "--config", config, "--dry-run")
    assert done.code == 0, done.err
    assert "4 cells on exact. Batch 7" in done.out
    assert "ipo tau=0.25" in done.out
    assert "cpl" not in done.out
    given = cli("compare", "cpl", "--config", config, "--dry-run", "--batch-size", 5, "--set", "cpl.bias=0.7")
    assert "2 cells on exact. Batch 5" in given.out
    assert "cpl bias=0.7" in given.out
    config.write_text("batch_sizes: 7\n")
    unknown = cli("compare", "dpo", "--config", config, "--dry-run")
    assert unknown.code == 2
    assert "Did you mean --batch-size?" in unknown.err


def test_options_named_like_commands_are_read_from_a_config_file(cli: Any, tmp_path: Path) -> None:
    """`data` and `losses` are commands too; a config's `data` once was dropped without a word, and the exact world trained."""
    config = tmp_path / "study.yaml"
    config.write_text("losses: [dpo]\ndata: [no-such.jsonl]\nmodel: tiny\n")
    done = cli("compare", "--config", config, "--dry-run")
    assert done.code == 2
    assert "no-such.jsonl" in done.err


def test_a_preset_is_a_config_that_comes_with_prefopt(cli: Any, tmp_path: Path) -> None:
    """dpo_vs_ppo names its four settings and their prices of KL; an own config wins over it."""
    done = cli("compare", "--preset", "dpo_vs_ppo", "--dry-run", "--seeds", 1)
    assert done.code == 0, done.err
    assert "4 cells" in done.out
    assert all(f"{name} " in done.out for name in ("dpo", "online_dpo", "ppo_offline", "ppo", "online pairs"))
    config = tmp_path / "own.yaml"
    config.write_text("set: [dpo.beta=0.7]\n")
    own = cli("compare", "--preset", "dpo_vs_ppo", "--config", config, "--dry-run")
    assert "dpo beta=0.7" in own.out
    unknown = cli("compare", "--preset", "dpo_vs_pp", "--dry-run")
    assert unknown.code == 2
    assert "there is none (did you mean 'dpo_vs_ppo'?)" in unknown.err


def numbers(names: list[str], assignments: list[str]) -> dict[str, dict[str, Any]]:
    """What --set makes of algorithms."""
    study = study_of({"algorithms": names, "set": assignments})
    return {entry.algorithm: entry.values for entry in study.entries}


def test_set_values_have_the_types_of_their_flags() -> None:
    assignments = ["ipo.average-log-prob=false", "ipo.tau=1", "ppo.ppo_epochs=3", "ppo.dual_clip=none"]
    found = numbers(["ipo", "ppo"], assignments)
    assert found == {"ipo": {"average_log_prob": False, "tau": 1.0}, "ppo": {"ppo_epochs": 3, "dual_clip": None}}
    assert isinstance(found["ipo"]["tau"], float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dpo", "expected ALGO.NAME=VALUE"),
        ("beta=1", "expected ALGO.NAME=VALUE"),
        ("dpo:1.0+sft:0.2=1", "expected ALGO.NAME=VALUE"),
        ("dop.beta=1", "'dop' is not compared (did you mean 'dpo'?)"),
        ("dpo.bta=1", "did you mean 'beta'?"),
        ("dpo.epsilon=1", "peers' 'epsilon' is 'label_smoothing' here"),
        ("dpo.beta=high", "dpo.beta: expected float, got 'high'"),
    ],
)
def test_a_wrong_set_says_what_is_right(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        numbers(["dpo", "ipo"], [text])
    assert message in str(caught.value)


def test_laws_hold_for_the_shipped_losses(cli: Any) -> None:
    done = cli("laws", "dpo", "sft", "--seed", 3)
    assert (done.code, done.last) == (0, f"{2 * len(LAWS)} laws checked, none broken")


def test_doctor_names_versions_and_every_extra(cli: Any) -> None:
    shown = cli("doctor").out
    assert torch.__version__ in shown
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, packages in extras.items():
        for package in packages if extra != "dev" else ():
            name = package.partition(">")[0]
            assert re.search(rf"^\[{extra}\] +{name} ", shown, re.MULTILINE), package


def test_inspect_reports_roles_and_with_a_model_tokens(
    cli: Any, tiny_model: Path, jsonl: Callable[..., Path], pairs: list[Any]
) -> None:
    path = jsonl([*pairs, {**pairs[0], "prompt": "secret words ", "chosen": ""}])
    done = cli("data", "inspect", path)
    assert done.code == 0, done.err
    assert "Roles" in done.out
    assert "Tokens" not in done.out
    with_model = cli("data", "inspect", path, "--model", tiny_model)
    assert "Tokens" in with_model.out
    assert "Records: 200 of 200" in with_model.flat
    assert "secret" not in done.out + with_model.out


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ConfigError, match="name the folder"):
        main(["train", "dpo", "--debug"])


def test_errors_that_are_not_the_users_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(train, "train", broken)
    with pytest.raises(ZeroDivisionError):
        main(["train", "dpo", "--output-dir", "unused"])
