"""A loss added as one decorated function in a file of its own: it trains, has help and enters the laws, with no other edit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from losses.laws import LAWS

ROOT = Path(__file__).parents[2]

HINGE = '''
from losses import LossOutput, register
from torch import Tensor, ones_like


@register("my_hinge")
def my_hinge_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float = 0.25,
    wide_gap: bool = True,
) -> LossOutput:
    """L = max(0, gap - beta*(log pi/ref(y_w) - log pi/ref(y_l))).

    Args:
        beta: strength against the reference.
        wide_gap: the gap is 1; without it, 1/2.
    """
    margin = beta * (policy_chosen_logps - reference_chosen_logps - policy_rejected_logps + reference_rejected_logps)
    loss = ((1.0 if wide_gap else 0.5) - margin).clamp(min=0)
    return LossOutput(loss, ones_like(loss))
'''


@pytest.fixture
def hinge(tmp_path: Path, new_losses: None) -> Path:
    path = tmp_path / "my_hinge.py"
    path.write_text(HINGE)
    return path


def test_a_loss_of_ones_own_trains_and_shows_its_flags(cli: Any, hinge: Path, tmp_path: Path) -> None:
    shown = cli("train", "my_hinge", "--import", hinge, "--help")
    assert "my_hinge options" in shown.out
    assert "L = max(0, gap - beta*(log pi/ref(y_w) - log pi/ref(y_l)))" in shown.flat
    assert "--beta FLOAT Strength against the reference. [default: 0.25]" in shown.flat
    assert "--no-wide-gap" in shown.out
    run = tmp_path / "run"
    done = cli(
        "train", "my_hinge", f"--import={hinge}", "--no-wide-gap", "--pairs", 64, "--max-steps", 2, "--checkpoints", 1,
        "--batch-size", 8, "--log-every", 1, "--output-dir", run,
    )  # fmt: skip
    assert done.code == 0, done.err
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.5, abs=1e-5)  # policy = reference: the gap itself
    assert json.loads((run / "config.json").read_text())["hyper"] == {"beta": 0.25, "wide_gap": False}
    assert AutoModelForCausalLM.from_pretrained(run / "policy").num_parameters() > 0


def test_without_its_file_it_does_not_exist(cli: Any, new_losses: None) -> None:
    done = cli("train", "my_hinge", "--help")
    assert done.code == 2
    assert "unknown algorithm 'my_hinge'" in done.err


def test_a_comparison_knows_it(cli: Any, hinge: Path) -> None:
    done = cli("compare", "my_hinge", "dpo", "--import", hinge, "--set", "my_hinge.wide-gap=no", "--dry-run")
    assert done.code == 0, done.err
    assert "my_hinge wide_gap=False" in done.out


@pytest.mark.slow
def test_worker_processes_know_it(
    cli: Any, hinge: Path, tmp_path: Path, tiny_model: Path, jsonl: Callable[..., Path], pairs: list[Any]
) -> None:
    study = tmp_path / "study"
    done = cli(
        "compare", "my_hinge", "--import", hinge, "--data", jsonl(pairs), "--model", tiny_model, "--seeds", 1, "--workers", 1,
        "--max-steps", 2, "--checkpoints", 1, "--eval-prompts", 4, "--eval-pairs", 8, "--output-dir", study,
    )  # fmt: skip
    assert done.code == 0, done.err
    [cell] = json.loads((study / "results.json").read_text())["cells"]
    assert (cell["status"], cell["error"]) == ("ok", None)


def test_it_enters_the_laws_of_the_command_line(cli: Any, hinge: Path) -> None:
    done = cli("laws", "my_hinge", "--import", hinge)
    assert (done.code, done.last) == (0, f"{len(LAWS)} laws checked, none broken")


def test_a_broken_law_fails_the_command(cli: Any, tmp_path: Path, new_losses: None) -> None:
    """A loss of the sum over the batch is not the same on two halves; without a name, the file's losses are checked."""
    path = tmp_path / "my_sum.py"
    path.write_text(
        "from losses import LossOutput, register\n"
        "from torch import Tensor, ones_like\n"
        "@register('my_sum')\n"
        "def my_sum_loss(policy_chosen_logps: Tensor) -> LossOutput:\n"
        "    loss = policy_chosen_logps * policy_chosen_logps.sum()\n"
        "    return LossOutput(loss, ones_like(loss))\n"
    )
    done = cli("laws", "--import", path)
    assert done.code == 1
    assert "my_sum split_equals_whole failed" in done.flat
    assert done.last.endswith(f"of {len(LAWS)} broken")


def test_it_enters_the_test_suite_from_the_root(hinge: Path) -> None:
    """`pytest --import=FILE`, without a path, from the repository's root."""
    options = ["-q", "-p", "no:cacheprovider", "--ignore=tests/prefopt", "-k", "laws and my_hinge"]

    def run(file: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", *options, f"--import={file}"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    done = run(hinge)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    absent = run("absent.py")
    assert absent.returncode == 4
    assert "absent.py: no such file" in absent.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "import losses\n@losses.register('bad')\ndef bad_loss(policy_chosen_logp): ...",
            "did you mean 'policy_chosen_logps'?",
        ),
        ("1 / 0", "ZeroDivisionError"),
        (HINGE.replace('"my_hinge"', '"dpo"'), "already registered"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(cli: Any, tmp_path: Path, new_losses: None, text: str, message: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    done = cli("laws", "bad", "--import", path)
    assert done.code == 2
    assert f"--import {path}" in done.err
    assert message in done.err


def test_a_flag_that_every_run_has_cannot_be_a_hyper_parameter(cli: Any, tmp_path: Path, new_losses: None) -> None:
    path = tmp_path / "greedy.py"
    path.write_text(HINGE.replace("beta: float", "learning_rate: float").replace("beta *", "learning_rate *"))
    done = cli("train", "my_hinge", "--import", path, "--help")
    assert done.code == 2
    assert "the flag 'learning_rate' is in 'my_hinge options' and 'Optimization'" in done.err
