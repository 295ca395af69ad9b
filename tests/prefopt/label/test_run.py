"""Labels on disk, and the command: an interruption loses nothing, the output trains, errors say what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from prefopt.data.records import Record
from prefopt.data.sources import load
from prefopt.errors import ConfigError, OutputError
from prefopt.label import build as label_build
from prefopt.label.labellers import Asking, ChatLabeller
from prefopt.label.run import label_rows, preference_rows


class Stops:
    """A labeller that fails at its n-th batch."""

    def __init__(self, inner: Any, at: int) -> None:
        self._inner, self._left = inner, at

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def judge(self, pairs: Any, seed: int) -> Any:
        self._left -= 1
        if self._left < 0:
            raise RuntimeError("stopped")
        return self._inner.judge(pairs, seed)


@pytest.mark.parametrize("cut", [0, 30])
def test_an_interrupted_run_goes_on_to_the_same_labels(
    synthetic: Any, unbiased: Any, records: list[Record], tmp_path: Path, cut: int
) -> None:
    """Sampled rationales too; `cut` bytes of the last line are lost, as in a crash."""
    asking = Asking(rationales=2)
    whole = label_rows(records, ChatLabeller(synthetic(unbiased), asking), batch=8)
    with pytest.raises(RuntimeError, match="stopped"):
        label_rows(records, Stops(ChatLabeller(synthetic(unbiased), asking), 3), batch=8, folder=tmp_path)
    (book,) = tmp_path.iterdir()
    data = book.read_bytes()
    book.write_bytes(data[: len(data) - cut])
    chat = synthetic(unbiased)
    again = label_rows(records, ChatLabeller(chat, asking), batch=8, folder=tmp_path)
    assert again == whole
    assert chat.usage.calls == 2 * 2 * (16 if cut == 0 else 24)
    silent = synthetic(unbiased)
    assert label_rows(records, ChatLabeller(silent, asking), batch=8, folder=tmp_path) == whole
    assert silent.usage.calls == 0


def test_other_settings_have_another_book_and_a_damaged_one_is_an_error(
    synthetic: Any, unbiased: Any, records: list[Record], tmp_path: Path
) -> None:
    label_rows(records, ChatLabeller(synthetic(unbiased)), folder=tmp_path)
    (book,) = tmp_path.iterdir()
    label_rows(records, ChatLabeller(synthetic(unbiased), Asking(preamble="harmless")), folder=tmp_path)
    label_rows(records, ChatLabeller(synthetic(unbiased)), folder=tmp_path, seed=1)
    label_rows(records[:-1], ChatLabeller(synthetic(unbiased)), folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    lines = book.read_text().splitlines(keepends=True)
    book.write_text("".join([*lines[1:], lines[0]]))
    with pytest.raises(OutputError, match=r":1: not its row's label .*Delete the file"):
        label_rows(records, ChatLabeller(synthetic(unbiased)), folder=tmp_path)


def test_what_is_no_pair_is_refused(synthetic: Any, unbiased: Any) -> None:
    with pytest.raises(ConfigError, match="file:1, which is no pair"):
        label_rows([Record("file:1", "q", ("a",))], ChatLabeller(synthetic(unbiased)))
    with pytest.raises(ConfigError, match="0 records"):
        label_rows([], ChatLabeller(synthetic(unbiased)))


def test_rows_are_read_back_with_their_soft_labels(synthetic: Any, unbiased: Any, jsonl: Any) -> None:
    """HH dialogues and conversations keep their form."""
    dialogue = "\n\nHuman: hi\n\nAssistant:"
    messages = [{"role": "user", "content": "hi"}]

    def says(words: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": words}]

    sources = [
        [{"chosen": f"{dialogue} x{i}", "rejected": f"{dialogue} yyyyy{i}"} for i in range(3)],
        [{"prompt": messages, "chosen": says("x"), "rejected": says(words)} for words in ("yy", "yyy")],
    ]
    for number, rows in enumerate(sources):
        records = load([str(jsonl(rows, f"in{number}.jsonl"))]).records
        made = list(preference_rows(label_rows(records, ChatLabeller(synthetic(unbiased)))))
        back = load([str(jsonl(made, f"out{number}.jsonl"))]).records
        for record, label in zip(records, back, strict=True):
            assert label.prompt == record.prompt
            assert label.completions == record.completions[::-1]  # the longer one wins
            assert label.labels.ranks == (0, 1)
            assert label.labels.soft_label is not None
            assert label.labels.soft_label > 0.5


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, synthetic: Any, unbiased: Any) -> None:
    """`small` and `large` are synthetic chat models."""

    def chat_model(spec: str, **_: Any) -> Any:
        made = synthetic(unbiased if spec == "large" else lambda one, other: unbiased(one, other) + 0.2, spec)
        made.identity, made.parameters = spec, {"small": 1_000_000, "large": 30_000_000}[spec]
        return made

    monkeypatch.setattr(label_build, "chat_model", chat_model)


@pytest.mark.usefixtures("fake")
def test_the_command_labels_reports_and_repeats(cli: Any, pairs: Any, jsonl: Any, tmp_path: Path) -> None:
    data, out = jsonl(pairs[:20]), tmp_path / "new" / "ai.jsonl"
    done = cli("label", data, "--labeller", "large", "--output", out, "--limit", 10)
    assert done.code == 0, done.err
    assert "large: 10 of 10 rows:" in done.out
    assert "20 conversations asked" in done.out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("d d b", "c a")] * 10
    assert rows[0]["soft_label"] == pytest.approx(5 / 8)
    report = json.loads((out.parent / "ai.report.json").read_text())
    assert report["labellers"][0]["agreement"]["both orders"]["value"] == 0
    assert (report["pairs"], report["longer_wins"]["value"], report["asking"]["preamble"]) == (10, 0, "helpful")
    refused = cli("label", data, "--labeller", "large", "--output", out, "--limit", 10)
    assert (refused.code, "--overwrite" in refused.err) == (2, True)
    again = cli("label", data, "--labeller", "large", "--output", out, "--limit", 10, "--overwrite")
    assert again.code == 0
    assert "conversations asked" not in again.out  # all labels were kept
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows


@pytest.mark.usefixtures("fake")
def test_several_labellers_are_compared_by_size(cli: Any, pairs: Any, jsonl: Any, tmp_path: Path) -> None:
    out = tmp_path / "ai.jsonl"
    done = cli("label", jsonl(pairs[:12]), "--labeller", "large", "small", "--output", out)
    assert done.code == 0, done.err
    assert done.out.index("│ small") < done.out.index("│ large")
    assert (tmp_path / "ai.small.jsonl").exists()
    assert (tmp_path / "ai.large.jsonl").exists()
    assert (tmp_path / "ai.size.png").read_bytes().startswith(b"\x89PNG")
    assert not out.exists()


def test_a_function_labels_and_the_output_trains(cli: Any, pairs: Any, jsonl: Any, tmp_path: Path, tiny_model: Path) -> None:
    reward = tmp_path / "own.py"
    reward.write_text("def short(prompts, completions):\n    return [-len(text) for text in completions]\n")
    out = tmp_path / "ai.jsonl"
    done = cli("label", jsonl(pairs), "--labeller", f"{reward}:short", "--output", out)
    assert done.code == 0, done.err
    trained = cli(
        "train", "dpo", "--data", out, "--model", tiny_model, "--output-dir", tmp_path / "run", "--max-steps", 1,
        "--sft-epochs", 0, "--eval-prompts", 4, "--eval-pairs", 4, "--eval-tokens", 4,
    )  # fmt: skip
    assert trained.code == 0, trained.err


def test_a_local_model_labels_by_the_command(cli: Any, pairs: Any, jsonl: Any, tmp_path: Path, letters: Path) -> None:
    out = tmp_path / "ai.jsonl"
    done = cli("label", jsonl(pairs[:4]), "--labeller", letters, "--output", out, "--rationales", 1, "--rationale-tokens", 3)
    assert done.code == 0, done.err
    assert "no chat template" in done.flat
    assert len(out.read_text().splitlines()) == 4


@pytest.fixture(scope="session")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model over bytes, which knows numbers."""
    from prefopt.models.small import small_llama, train_tokenizer

    folder = tmp_path_factory.mktemp("models") / "letters"
    tokenizer = train_tokenizer(["1 2 3"], 300)
    torch.manual_seed(0)
    small_llama(tokenizer, 4096).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "name data, labeller and output"),
        (("--labeller", "{data}:f", "--rationales", 1), "about chat models"),
        (("--labeller", "http://localhost:1/v1"), "http(s)://host/v1#model"),
        (("--labeller", "gold:"), "gold:FILE"),
        (("--labeller", "nowhere"), "is no local file or folder"),
        (("--labeller", "a", "a"), "named twice"),
        (("--labeller", "a", "--limit", 0), "at least 1"),
    ],
)
def test_errors_say_what_to_do(cli: Any, pairs: Any, jsonl: Any, tmp_path: Path, arguments: Any, words: str) -> None:
    data = jsonl(pairs[:4])
    done = cli("label", data, "--output", tmp_path / "ai.jsonl", *(str(a).format(data=data) for a in arguments))
    assert done.code == 2
    assert words in done.err


def test_the_gold_reward_of_sentiment_labels(cli: Any, jsonl: Any, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    reviews = [
        {"text": f"{word} film number {i}", "label": int(word == "great")} for i in range(60) for word in ("great", "awful")
    ]
    source = jsonl(reviews, "reviews.jsonl")
    data = jsonl([{"prompt": f"This film {i}", "chosen": " is awful", "rejected": " is great"} for i in range(4)])
    out = tmp_path / "ai.jsonl"
    done = cli("label", data, "--labeller", f"gold:{source}", "--output", out)
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["chosen"] for row in rows} == {" is great"}
    assert all(row["soft_label"] > 0.5 and row["chosen_score"] > row["rejected_score"] for row in rows)
