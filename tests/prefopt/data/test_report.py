from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prefopt.data.report import DataReport, render, render_plain
from prefopt.data.roles import split_roles
from prefopt.data.sources import load
from prefopt.tokenize import tokenize

SECRET = "zebra"


def make(folder: Path) -> DataReport:
    """A file whose name is markup, with good rows, an empty one, a duplicate and texts that no report may show."""
    rows = [
        {"prompt": f"{SECRET} {i}", "chosen": f" {SECRET} {SECRET}", "rejected": f" {SECRET}", "note": SECRET}
        for i in range(40)
    ]
    rows += [{**rows[0]}, {**rows[1], "chosen": ""}]
    (folder / "[red]x.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    loaded = load([str(folder)])
    core = Tokenizer(models.WordLevel(vocab={"<unk>": 0, "<eos>": 1, SECRET: 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")
    tokens = tokenize(loaded.records, tokenizer, max_length=4).report
    return DataReport(loaded.report, split_roles(loaded.records).report, tokens)


def test_report_shows_the_counts_and_never_the_text(tmp_path: Path) -> None:
    text = render_plain(make(tmp_path))
    for expected in (
        "[red]x.jsonl",
        "pair, text",
        "1   empty completion",
        "[red]x.jsonl:42",
        "Records: 41 (41 pair)",
        "Duplicates: 1; contradictions: 0",
        "Columns that nothing reads: note.",
        "preferred in 100.0% of 41 pairs (in characters)",
        "First turns in more than one role: 0",
        "41 prompts (41 tokens, on the left)",
        "preferred in 100.0% of 41 pairs (in tokens)",
    ):
        assert expected in text
    assert SECRET not in text
    assert "\x1b" not in text


def test_report_renders_the_same_words_in_colour(tmp_path: Path) -> None:
    report = make(tmp_path)
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system="standard")
    console.print(render(report))
    assert isinstance(console.file, io.StringIO)
    coloured = console.file.getvalue()
    assert "\x1b[33m" in coloured  # the duplicate is a warning
    assert "Duplicates: 1" in coloured


def test_report_is_plain_values_for_json(tmp_path: Path) -> None:
    report = make(tmp_path)
    back = json.loads(json.dumps(report.as_dict()))
    assert back["read"]["records"] == 41
    assert back["roles"]["shared_keys"] == 0
    assert back["tokens"]["kept"] == 41
    assert SECRET not in json.dumps(back)


def test_steps_that_were_not_taken_are_left_out() -> None:
    assert render_plain(DataReport()).strip() == ""
    assert DataReport().as_dict() == {"read": None, "roles": None, "tokens": None}
