"""The benchmark of AI labels: its synthetic table, averages anew, and a run on a small model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import ai_labels
from prefopt.data.records import Record
from prefopt.label.labellers import Judgement
from prefopt.label.run import Labelled
from prefopt.models.small import small_llama, train_tokenizer


def test_each_average_removes_its_own_bias_alone() -> None:
    for row in ai_labels.synthetic_table().rows:
        own, other = ("probabilities", "logits") if row["bias"] == "additive" else ("logits", "probabilities")
        assert float(row[f"averaged_{own}"]) < 1e-13
        assert float(row[f"averaged_{other}"]) > 1e-4
        assert float(row["one_order"]) > 0.05


def labelled(*p: float) -> Labelled:
    records = [Record(f"row:{i}", "q", ("xx", "y")) for i in range(len(p))]
    return Labelled(records, (0, 1) * (len(p) // 2), tuple(Judgement(value, (value, 1 - value)) for value in p))


def test_gains_are_paired_over_what_both_have() -> None:
    """A is the human's choice in rows 0 and 2. Right: 1, 0, -, 1 against 0, 0, 1, 1: differences 1, 0, 0."""
    gain = ai_labels.agreement_gain(labelled(0.9, 0.9, math.nan, 0.1), labelled(0.1, 0.9, 0.9, 0.1))
    assert gain is not None
    assert (gain.n, gain.value) == (3, pytest.approx(1 / 3))


def test_orders_are_averaged_anew() -> None:
    one = Labelled(labelled(0.5, 0.5).records, (0, 1), (Judgement(0.6, (0.9, 0.7)), Judgement(0.5, (0.5, 0.5))))
    found = ai_labels.reaverage(one, "logits")
    assert [judgement.p for judgement in found.judgements] == pytest.approx([0.6626, 0.5], abs=1e-4)


def test_the_script_runs_and_goes_on(
    jsonl: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    tokenizer = train_tokenizer(["1 2 3"], 300)
    torch.manual_seed(0)
    small_llama(tokenizer, 4096).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    start = "\n\nHuman: hi\n\nAssistant:"
    data = jsonl([{"chosen": f"{start} good {i}", "rejected": f"{start} bad {i}"} for i in range(6)], "harmless.jsonl")
    command = ["--hh", str(data), "--model", str(tmp_path / "model"), "--pairs", "4", "--rationale-pairs", "2"]
    command += ["--rationale-tokens", "3", "--labels", str(tmp_path / "labels"), "--json", str(tmp_path / "out.json")]
    ai_labels.main(command)
    first = json.loads((tmp_path / "out.json").read_text())
    assert [(row["asked"], row["pairs"]) for row in first["reports"]] == [
        ("harmless", 4),
        ("plain", 4),
        ("harmless, rationale", 2),
    ]
    assert "longer wins 100.0%" in first["tables"][1]["title"]
    assert "on the same 2 pairs" in capsys.readouterr().out
    ai_labels.main(command)
    again = json.loads((tmp_path / "out.json").read_text())
    assert [row["usage"]["calls"] for row in again["reports"]] == [0, 0, 0]
    assert [row["agreement"] for row in again["reports"]] == [row["agreement"] for row in first["reports"]]
