"""`prefopt score` from the command line: files, trained policies, losses of users, and refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import losses
from prefopt.cli.score import parse_losses
from prefopt.errors import ConfigError
from prefopt.models.causal_lm import CausalLMPolicy

TRAINED = ("--max-steps", 3, "--checkpoints", 1, "--batch-size", 4, "--learning-rate", 1e-2)


@pytest.fixture(autouse=True)
def built_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """`all` means the losses of this repository: other tests of the same process register some that break on purpose."""
    known = {name: loss for name in losses.names() if _is_built_in(loss := losses.get(name))}
    monkeypatch.setattr("losses.registry._LOSSES", known)


def _is_built_in(loss: losses.registry.Loss) -> bool:
    return loss.terms[0].function.__module__.startswith("losses.")


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Packed tokens of every forward pass that is made."""
    seen: list[int] = []
    original = CausalLMPolicy.hidden

    def counted(self: CausalLMPolicy, batch: Any) -> Any:
        seen.append(batch.tokens)
        return original(self, batch)

    monkeypatch.setattr(CausalLMPolicy, "hidden", counted)
    return seen


@pytest.fixture
def text(tiny_model: Path, jsonl: Callable[..., Path], pairs: list[Any]) -> tuple[Any, ...]:
    """Pairs for every role, and a model of a moment."""
    return ("--data", jsonl(pairs), "--model", tiny_model)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "per_pair.jsonl").read_text().splitlines()]


def check_dpo(folder: Path, beta: float) -> None:
    """The file's coefficients are -+beta*sigmoid(-margin)/P of the file's own log-ratios."""
    rows = [row for row in read_rows(folder) if row["loss"] == "dpo"]
    for row in rows:
        margin = beta * (row["chosen_log_ratio"] - row["rejected_log_ratio"])
        size = beta / (1 + math.exp(margin)) / len(rows)
        assert row["chosen_coefficient"] == pytest.approx(-size, rel=1e-4)
        assert row["rejected_coefficient"] == pytest.approx(size, rel=1e-4)


def test_every_loss_on_one_forward_pass_over_the_exact_world(cli: Any, encoded: list[int], tmp_path: Path) -> None:
    """The policy is a trained one, so a pass of the reference comes on top, also one a batch."""
    trained, output = tmp_path / "run", tmp_path / "scores"
    assert cli("train", "dpo", "--pairs", 64, *TRAINED, "--output-dir", trained).code == 0
    encoded.clear()
    done = cli(
        "score", "--losses", "all", "dpo:beta=0.5", "--policy", trained, "--eval-pairs", 20, "--output-dir", output
    )  # fmt: skip
    assert done.code == 0, done.err
    stored = json.loads((output / "scores.json").read_text())
    assert (stored["schema_version"], stored["pairs"], stored["forward_passes"], stored["batches"]) == (1, 20, 5, 5)
    # 20 pairs in batches of 4 as the run had them, whatever the number of losses; the reference sees all in one micro-batch.
    assert len(encoded) == 5 + 1
    assert stored["tokens"] == sum(encoded) / 2
    labels = [loss["label"] for loss in stored["losses"]]
    assert labels == sorted(labels)
    assert {"dpo", "dpo beta=0.5", "ipo", "cpl", "sft"} <= {*labels}
    assert sorted([*labels, *stored["not_scored"]]) == sorted([*losses.names(), "dpo beta=0.5"])
    rows = read_rows(output)
    assert len(rows) == 20 * len(labels)
    assert {row["pair"] for row in rows if row["loss"] == "cpl"} == {f"exact:0:2000000:{i}" for i in range(20)}
    assert any(abs(row["chosen_log_ratio"]) > 1e-3 for row in rows)
    dpo, stronger = labels.index("dpo"), labels.index("dpo beta=0.5")
    # Away from the reference a larger beta saturates other pairs first.
    assert 0.5 < stored["cosine"]["values"][dpo][stronger] < 0.9999
    assert (output / "cosine.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((output / "timings.json").read_text())["share_of_others"] > 0
    assert (stored["at_reference"], stored["data"]["pairs"]) == (False, 64)
    assert "Accuracy by the log-ratio sum" in done.flat
    assert "not scored: ppo: needs rollouts" in done.flat
    assert f"the {len(labels) - 1} others together" in done.flat
    check_dpo(output, 0.1)


def test_the_start_is_its_own_reference(cli: Any, text: tuple[Any, ...], encoded: list[int], tmp_path: Path) -> None:
    """One forward pass a batch and none of a reference, for one loss as for all."""
    passes = []
    for words in (["dpo"], ["all"]):
        encoded.clear()
        done = cli("score", "--losses", *words, *text, "--output-dir", tmp_path / words[0])
        assert done.code == 0, done.err
        passes.append(list(encoded))
    stored = json.loads((tmp_path / "all" / "scores.json").read_text())
    assert passes[0] == passes[1]
    assert (stored["at_reference"], stored["forward_passes"], stored["tokens"]) == (True, len(passes[0]), sum(passes[0]))
    assert "all tie" in done.out
    assert "The policy is its own reference" in done.flat
    check_dpo(tmp_path / "all", 0.1)


@pytest.mark.parametrize("lora", [0, 2])
def test_a_text_policy_brings_the_options_of_its_run(cli: Any, text: tuple[Any, ...], tmp_path: Path, lora: int) -> None:
    trained, output = tmp_path / "run", tmp_path / "scores"
    done = cli(
        "train", "dpo", *text, *TRAINED, "--eval-prompts", 2, "--eval-tokens", 3,
        "--lora", lora, "--output-dir", trained,
    )  # fmt: skip
    assert done.code == 0, done.err
    done = cli("score", "--losses", "dpo", "cpl", "--policy", trained, "--output-dir", output)
    assert done.code == 0, done.err
    check_dpo(output, 0.1)
    rows = read_rows(output)
    assert any(abs(row["chosen_log_ratio"]) > 1e-3 for row in rows)
    # "c a" and "d d b" with EOS.
    assert {(row["chosen_length"], row["rejected_length"]) for row in rows} == {(3, 4)}
    result = json.loads((trained / "result.json").read_text())["cell"]["final"]
    stored = json.loads((output / "scores.json").read_text())
    assert stored["log_ratio_accuracy"]["share"] == pytest.approx(result["accuracy"])
    seen = {row["pair"] for row in rows}
    for role in ("policy", "judge"):
        assert cli("score", "--policy", trained / "policy", "--role", role, "--output-dir", tmp_path / role).code == 0
        of_role = {row["pair"] for row in read_rows(tmp_path / role)}
        assert of_role
        assert not seen & of_role
        seen |= of_role


def test_a_shared_supervised_start_is_scored_as_it_trains(cli: Any, text: tuple[Any, ...], tmp_path: Path) -> None:
    found = {}
    for init in ("as-is", "sft-chosen"):
        output = tmp_path / init
        start = ("--init", init, "--sft-learning-rate", 1e-2)
        assert cli("score", "--losses", "sft", *text, *start, "--output-dir", output).code == 0
        found[init] = json.loads((output / "scores.json").read_text())["losses"][0]["objective"]
    assert found["sft-chosen"] < found["as-is"] - 0.1


def test_a_coupled_loss_of_the_user_is_scored_in_batches(
    cli: Any, new_losses: None, text: tuple[Any, ...], tmp_path: Path
) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "import torch\n"
        "from torch import Tensor\n"
        "from losses.registry import register\n"
        "from losses.types import LossOutput\n\n\n"
        "@register('spread', coupled=True)\n"
        "def spread_loss(policy_chosen_logps: Tensor, *, power: float = 2.0) -> LossOutput:\n"
        "    loss = (policy_chosen_logps - policy_chosen_logps.mean()).abs() ** power\n"
        "    return LossOutput(loss, torch.ones_like(loss))\n"
    )
    done = cli("score", "--losses", "spread", "spread:power=4", "--import", own, *text, "--batch-size", 8)
    assert done.code == 0, done.err
    assert "Coupled, so scored in batches of 8 pairs: spread, spread power=4.0." in done.flat


def test_words_become_losses_with_their_values() -> None:
    found = parse_losses(["ipo:tau=1,average-log-prob=false", "all", "dpo"])
    assert found["ipo tau=1.0 average_log_prob=False"].hyper == {"tau": 1.0, "average_log_prob": False}
    assert {*found} == {*losses.names(), "ipo tau=1.0 average_log_prob=False"}
    assert next(iter(found)) == "ipo tau=1.0 average_log_prob=False"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dpo:0.5"], "expected NAME:FLAG=VALUE"),
        (["dpo:bta=1"], "did you mean 'beta'?"),
        (["dpo:beta=high"], "dpo.beta: expected float, got 'high'"),
        (["dpo", "dpo"], "'dpo' is named twice"),
        (["dpo:label_smoothing=0.9"], "label_smoothing is 0.9"),
        (["dpoo:beta=1"], "did you mean 'dpo'?"),
    ],
)
def test_a_wrong_word_says_what_is_right(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_losses(words)
    assert message in str(caught.value)


def test_refusals_say_what_to_do(cli: Any, text: tuple[Any, ...], tmp_path: Path) -> None:
    assert "did you mean 'dpo'?" in cli("score", "--losses", "dpoo").err
    assert "needs rollouts" in cli("score", "--losses", "ppo", *text).err
    assert "set by --losses NAME:FLAG=VALUE" in cli("score", "--beta", 0.5).err
    assert "no such folder" in cli("score", "--policy", tmp_path / "none").err
    assert "use test or policy" in cli("score", "--role", "judge").err
    assert "no model" in cli("score", "--data", "pairs.jsonl").err
    (tmp_path / "notes.txt").write_text("mine")
    assert "holds no scores" in cli("score", *text, "--output-dir", tmp_path).err
    assert "is a file" in cli("score", *text, "--output-dir", tmp_path / "notes.txt").err
    output = tmp_path / "scores"
    assert cli("score", "--losses", "dpo", *text, "--output-dir", output).code == 0
    first = (output / "scores.json").read_bytes()
    again = cli("score", "--losses", "dpo", *text, "--output-dir", output)
    assert (again.code, "--overwrite" in again.err) == (2, True)
    assert cli("score", "--losses", "dpo", *text, "--output-dir", output, "--overwrite").code == 0
    assert (output / "scores.json").read_bytes() == first
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "policy").mkdir()
    assert "is no config of a" in cli("score", "--policy", tmp_path).err


def test_an_adapter_of_another_model_is_refused(cli: Any, text: tuple[Any, ...], tiny_model: Path, tmp_path: Path) -> None:
    import transformers

    other = tmp_path / "other"
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    wider = transformers.LlamaConfig(**{**model.config.to_dict(), "intermediate_size": 24})
    transformers.AutoModelForCausalLM.from_config(wider).save_pretrained(other)
    transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(other)
    trained = tmp_path / "run"
    sizes = ("--eval-prompts", 2, "--eval-tokens", 3)
    assert cli("train", "dpo", *text, *TRAINED, *sizes, "--lora", 2, "--output-dir", trained).code == 0
    done = cli("score", "--losses", "dpo", "--policy", trained, "--model", other)
    assert done.code == 2
    assert "does not fit the model" in done.err
