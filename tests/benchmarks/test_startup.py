"""The cold start: both sides read the same rows, and each reaches its first batch in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.startup import SIDES, model_folder, time_start, write_rows

STAGES = ["imports", "data", "model, tokens and trainer", "first batch"]


def write_hh(path: Path, name: str, count: int) -> Path:
    """HH rows of words that the tiny model knows; `name` is in every prompt."""
    rows = [
        {
            "chosen": f"\n\nHuman: {name} w{n}\n\nAssistant: w1 w2",
            "rejected": f"\n\nHuman: {name} w{n}\n\nAssistant: w3 w4 w5",
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_of_several_sources_are_taken_in_turn_and_as_they_were(tmp_path: Path) -> None:
    sources = [write_hh(tmp_path / f"{name}.jsonl", name, count) for name, count in (("one", 2), ("two", 5))]
    write_rows([str(source) for source in sources], 5, tmp_path / "out.jsonl")
    got = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["chosen"].split()[1] for row in got] == ["one", "two", "one", "two", "two"]
    assert got[0] == json.loads(sources[0].read_text().splitlines()[0])


def test_too_few_rows_are_an_error(tmp_path: Path) -> None:
    source = write_hh(tmp_path / "one.jsonl", "one", 3)
    with pytest.raises(SystemExit, match="hold 3 pairs; 4 are asked for"):
        write_rows([str(source)], 4, tmp_path / "out.jsonl")


def test_a_timed_process_begins_with_the_standard_library_alone() -> None:
    """What the script imports for itself would be counted as the side's time."""
    code = (
        "import sys; import benchmarks.startup; print(sorted({'torch', 'prefopt', 'trl', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("side", SIDES)
def test_each_side_reaches_its_first_batch(side: str, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from benchmarks.duel import tiny_model

    model, tokenizer = tiny_model()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert model_folder(str(tmp_path / "model"), tmp_path / "copy") == str(tmp_path / "model")
    stages = time_start(side, write_hh(tmp_path / "one.jsonl", "one", 40), str(tmp_path / "model"))
    assert list(stages) == STAGES
    assert 0 < stages["imports"] < stages["data"] < stages["model, tokens and trainer"] < stages["first batch"]


@pytest.mark.slow
@pytest.mark.peer
def test_a_start_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="prefopt did not reach its first batch"):
        time_start("prefopt", write_hh(tmp_path / "one.jsonl", "one", 4), str(tmp_path / "nothing"))
