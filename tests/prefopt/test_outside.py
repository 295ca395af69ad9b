"""Policies from anywhere: what was trained elsewhere is measured like our own, and marked as not controlled."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefopt.errors import ConfigError
from prefopt.outside import UNCONTROLLED, Outsider, read_outsiders
from prefopt.report import load_results
from prefopt.report.schema import load_prompt_rows

SMALL = (
    "--max-length", 24, "--eval-pairs", 12, "--eval-prompts", 8, "--eval-tokens", 4, "--batch-size", 8,
    "--reward-batch-size", 8, "--judge-pairs", 16,
)  # fmt: skip


def test_words_name_policies_and_their_seeds() -> None:
    found = read_outsiders(["ours=a/b", "theirs=x.jsonl", "ours=c", "runs/final", "more.jsonl.gz"])
    assert found == (
        Outsider("ours", "a/b", 0), Outsider("theirs", "x.jsonl", 0), Outsider("ours", "c", 1),
        Outsider("final", "runs/final", 0), Outsider("more", "more.jsonl.gz", 0),
    )  # fmt: skip
    assert [one.samples for one in found] == [False, True, False, False, True]
    for words in ([], ["=x"], ["x="]):
        with pytest.raises(ConfigError, match=r"NAME="):
            read_outsiders(words)


@pytest.fixture
def changed(tiny_model: Path, tmp_path: Path) -> Path:
    """The model with other weights, as another tool would have saved it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for index, parameter in enumerate(model.parameters()):
        parameter.data.mul_(1.0 + 0.05 * (index % 3))
    model.save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def test_models_and_samples_stand_in_one_report(
    cli: Any, tmp_path: Path, tiny_model: Path, changed: Path, jsonl: Callable[..., Path], pairs: list[Any]
) -> None:
    data = jsonl(pairs)
    flags = ("--data", data, "--model", tiny_model, *SMALL)
    prompts = tmp_path / "prompts.jsonl"
    assert cli("evaluate", *flags, "--prompts-to", prompts).code == 0
    asked = [json.loads(line) for line in prompts.read_text().splitlines()]
    assert len(asked) == 8
    samples = tmp_path / "samples.jsonl"
    samples.write_text("".join(json.dumps({**row, "completion": "c a"}) + "\n" for row in asked[:5]))
    done = cli(
        "evaluate", f"same={tiny_model}", f"changed={changed}", f"file={samples}", *flags, "--output-dir", tmp_path / "report"
    )
    assert done.code == 0, done.err
    assert done.last == str(tmp_path / "report" / "report.html")
    results = load_results(tmp_path / "report")
    assert UNCONTROLLED in results.notes
    same, other, judged = (results.cells_of(name)[0].final for name in ("same", "changed", "file"))
    assert same["kl"] == pytest.approx(0, abs=1e-6)
    assert other["kl"] > 1e-4
    assert same["win_reference/judge"] == 0.5  # the same draws of the same model: all ties
    assert same["win_reference_lc/judge"] == pytest.approx(0.5)
    assert "kl" not in judged
    assert judged["length"] == 2
    assert 0 <= judged["win_chosen/tfidf"] <= 1
    rows = load_prompt_rows(tmp_path / "report")
    assert sum(row.label == "file" and row.judge == "win_chosen/judge" for row in rows) == 5
    assert {judge.name for judge in results.judges} == {"judge", "tfidf"}
    again = cli("evaluate", f"same={tiny_model}", *flags, "--output-dir", tmp_path / "report")
    assert again.code == 2
    assert "not empty" in again.err


def test_another_vocabulary_is_refused_and_foreign_samples_are_named(
    cli: Any, tmp_path: Path, tiny_model: Path, changed: Path, jsonl: Callable[..., Path], pairs: list[Any]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(changed)
    tokenizer.add_tokens(["e"])
    AutoModelForCausalLM.from_pretrained(changed).resize_token_embeddings(7)
    model = AutoModelForCausalLM.from_pretrained(changed)
    model.resize_token_embeddings(7)
    model.save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    flags = ("--data", jsonl(pairs), "--model", tiny_model, *SMALL, "--output-dir", tmp_path / "report")
    wide = cli("evaluate", f"wide={tmp_path / 'wide'}", *flags)
    assert wide.code == 2
    assert "another tokenizer than the reference" in wide.err
    foreign = tmp_path / "foreign.jsonl"
    foreign.write_text(json.dumps({"prompt": "no such prompt", "completion": "x"}) + "\n")
    done = cli("evaluate", f"x={foreign}", *flags)
    assert done.code == 2
    assert "--prompts-to" in done.err
