from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from prefopt.errors import DataError
from prefopt.report.schema import (
    load_prompt_rows,
    load_results,
    load_timings,
    parse_results,
    save_results,
    save_timings,
)


def as_json(results) -> dict:
    return json.loads(json.dumps(asdict(results)))


def test_results_and_timings_survive_a_round_trip(make_exact, make_timings, tmp_path: Path) -> None:
    results = make_exact(2)
    timings = make_timings(results)
    save_results(results, tmp_path)
    save_timings(timings, tmp_path)
    assert load_results(tmp_path) == results
    assert load_results(tmp_path / "results.json") == results
    read = load_timings(tmp_path)
    assert read is not None
    assert [cell.seconds for cell in read.cells] == [cell.seconds for cell in timings.cells]
    assert math.isnan(read.cells[0].peak_memory_mb)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "timings.json"]


def test_equal_results_are_equal_bytes(make_exact, tmp_path: Path) -> None:
    first = save_results(make_exact(2), tmp_path / "a").read_bytes()
    assert save_results(make_exact(2), tmp_path / "b").read_bytes() == first


def test_nan_is_null_in_the_file_and_nan_after_reading(make_exact, tmp_path: Path) -> None:
    results = make_exact(1, ("dpo",))
    cell = replace(results.cells[0], final={"reward": math.nan, "kl": math.inf, "length": np.float64(2.5)})
    file = save_results(replace(results, cells=(cell,)), tmp_path)
    assert json.loads(file.read_text())["cells"][0]["final"] == {"reward": None, "kl": None, "length": 2.5}
    assert load_results(tmp_path).values("dpo", "reward") == {}
    assert load_results(tmp_path).values("dpo", "length") == {0: 2.5}


@pytest.mark.parametrize("version", [2, None, "1"])
def test_another_version_is_named(make_exact, version: object) -> None:
    with pytest.raises(DataError, match=r"schema_version is .*reads 1"):
        parse_results(as_json(make_exact(1)) | {"schema_version": version})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.pop("cells"), "field cells is missing"),
        (lambda raw: raw.update(judge=[]), "unknown field judge"),
        (lambda raw: raw["cells"][0].update(status="fine"), r"cells\[0\]: status: expected 'ok' or 'failed', got 'fine'"),
        (lambda raw: raw["cells"][0].update(label="other"), "of no declared setting"),
        (lambda raw: raw["cells"][0].update(seed=7), "of no declared setting and seed"),
        (lambda raw: raw["cells"].append(raw["cells"][0]), "cell dpo seed 0 occurs more than once"),
        (lambda raw: raw["settings"].append(raw["settings"][0]), "label dpo occurs more than once"),
        (lambda raw: raw["metrics"][1].update(primary=True), "more than one metric is primary"),
        (lambda raw: raw["metrics"][0].update(format="d"), "metric 'reward' has format 'd'"),
        (lambda raw: raw["cells"][0].update(status="failed"), "failed without an error"),
        (lambda raw: raw["cells"][0]["final"].update(kl="small"), r"final.kl: expected float, got 'small'"),
        (lambda raw: raw["cells"][0]["ledger"].update(labels=1.5), "labels: expected int, got 1.5"),
        (lambda raw: raw.update(seeds=[True]), r"seeds\[0\]: expected int, got True"),
    ],
)
def test_errors_name_the_place(make_exact, change, message: str) -> None:
    raw = as_json(make_exact(1, ("dpo", "ipo")))
    parse_results(raw)
    change(raw)
    with pytest.raises(DataError, match=message):
        parse_results(raw, "somewhere/results.json")


def test_a_folder_without_results_and_a_broken_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no file"):
        load_results(tmp_path)
    (tmp_path / "results.json").write_text('{"title": ')
    with pytest.raises(DataError, match="expected JSON, got something else at line 1"):
        load_results(tmp_path)


def test_values_that_are_not_json_are_refused(make_exact, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be written as JSON"):
        save_results(replace(make_exact(1), train={"device": object()}), tmp_path)
    assert not (tmp_path / "results.json").exists()


def test_prompt_rows_name_the_line(tmp_path: Path) -> None:
    assert load_prompt_rows(tmp_path) == ()
    good = {
        "label": "dpo",
        "seed": 0,
        "prompt_id": "hh:1",
        "judge": None,
        "score": 0.5,
        "kl": 1,
        "log_ratio": -2.0,
        "length": None,
    }
    file = tmp_path / "per_prompt.jsonl"
    file.write_text(json.dumps(good) + "\n\n")
    (row,) = load_prompt_rows(tmp_path)
    assert (row.prompt_id, row.judge, row.score, row.kl) == ("hh:1", None, 0.5, 1.0)
    assert math.isnan(row.length)
    file.write_text(json.dumps(good) + "\n" + json.dumps(good | {"seed": "x"}) + "\n")
    with pytest.raises(DataError, match=r"per_prompt.jsonl:2: seed: expected int"):
        load_prompt_rows(tmp_path)
