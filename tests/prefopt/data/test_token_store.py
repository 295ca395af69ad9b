from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prefopt.data import token_store
from prefopt.data.record_store import Records
from prefopt.data.sources import load
from prefopt.data.token_store import Stored, tokenize_stored, tokenizer_digest
from prefopt.errors import ConfigError, DataError
from prefopt.tokenize import Tokenizing, tokenize

WORDS = [f"w{i}" for i in range(50)]


def words(*, more: int = 0, bos: bool = False, **special: Any) -> PreTrainedTokenizerFast:
    """One token a word; `more` unused entries in front widen the vocabulary."""
    names = ["<unk>", "</s>", "<s>", *(f"unused{i}" for i in range(more)), *WORDS, "user", "assistant"]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **{"eos_token": "</s>", "unk_token": "<unk>", **special})
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s>\n{% endfor %}"
    return tokenizer


def mixed_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rankings of three with scores and ties."""
    draw = random.Random(seed)
    say = lambda most: " ".join(draw.choices(WORDS, k=draw.randint(1, most)))  # noqa: E731
    return [
        {
            "prompt": say(30) + " ",
            "completions": [f"a{i} " + say(9) for i in range(3)],
            "scores": draw.choices([0.5, 1.25, 2], k=3),
        }
        for _ in range(count)
    ]


def pair_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    say = lambda: " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))  # noqa: E731
    return [{"prompt": say() + " ", "chosen": say(), "rejected": "w0 " + say(), "margin": draw.random()} for _ in range(count)]


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., Records]:
    def make(rows: Sequence[dict[str, Any]], name: str = "é.jsonl", **options: Any) -> Records:
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        return load([str(tmp_path / name)], cache=tmp_path / "cache", **options).records

    return make


@pytest.fixture
def stored(tmp_path: Path) -> Callable[..., Stored]:
    def make(records: Records, tokenizer: Any, **options: Any) -> Stored:
        limits = {"max_length": 24, "max_completion_length": 8}
        return tokenize_stored(records, tokenizer, **{**limits, **options}, cache=tmp_path / "cache")

    return make


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many records each pass over text tokenised: a hit makes none."""
    seen: list[int] = []
    original = Tokenizing.examples

    def counted(self: Tokenizing, records: Any, *arguments: Any) -> Any:
        seen.append(len(records))
        return original(self, records, *arguments)

    monkeypatch.setattr(Tokenizing, "examples", counted)
    return seen


@pytest.mark.parametrize("rows", [pair_rows, mixed_rows])
@pytest.mark.parametrize("more", [0, 70_000])
@pytest.mark.parametrize("as_chat", [False, True])
def test_stored_examples_are_those_of_tokenize_in_memory(
    source: Any, stored: Any, rows: Any, more: int, as_chat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several batches and flushes, for narrow and wide ids, with every kind of label."""
    monkeypatch.setattr("prefopt.tokenize.BATCH", 40)
    monkeypatch.setattr(token_store, "_FLUSH", 64)
    records, tokenizer = source(rows(150), as_chat=as_chat), words(more=more, bos=not as_chat)
    expected = tokenize(list(records), tokenizer, max_length=24, max_completion_length=8)
    for _ in range(2):  # made, then opened
        found = stored(records, tokenizer)
        assert list(found.examples) == expected.examples
        assert found.report == expected.report
        assert found.examples.highest_id == max(
            max(ids) for e in expected.examples for ids in (e.prompt_ids, *e.completion_ids)
        )


def test_slices_and_selections_are_lazy_views(source: Any, stored: Any) -> None:
    examples = stored(source(pair_rows(20)), words()).examples
    whole = list(examples)
    assert list(examples[3:9:2]) == whole[3:9:2]
    assert list(examples.select([5, 2])[1:]) == [whole[2]]
    assert (examples[-1], len(examples[4:])) == (whole[-1], 16)
    with pytest.raises(IndexError):
        examples[20]


@pytest.mark.parametrize(("more", "size"), [(0, 2), (70_000, 4)])
def test_ids_take_two_bytes_until_the_vocabulary_needs_four(
    source: Any, stored: Any, tmp_path: Path, more: int, size: int
) -> None:
    tokens = sum(example.tokens for example in stored(source(pair_rows(20)), words(more=more)).examples)
    [path] = (tmp_path / "cache" / "tokens").glob("*/tokens.bin")
    assert path.stat().st_size == tokens * size


def test_an_equal_call_only_opens_what_is_there(source: Any, stored: Any, runs: list[int]) -> None:
    first = stored(source(pair_rows(20)), words())
    second = stored(source(pair_rows(20)), words())
    assert runs == [20]
    assert list(first.examples) == list(second.examples)


@pytest.mark.parametrize(
    "change",
    ["row", "label", "selection", "name", "max_length", "max_completion_length", "vocabulary", "bos", "eos", "template"],
)
def test_whatever_matters_makes_another_store(source: Any, stored: Any, runs: list[int], change: str) -> None:
    rows, tokenizer, options = pair_rows(20), words(), {}
    stored(source(rows), tokenizer)
    records = source(rows)
    if change == "row":
        records = source([*rows[:-1], {**rows[-1], "chosen": "w1"}])
    elif change == "label":
        records = source([*rows[:-1], {**rows[-1], "margin": 2.5}])
    elif change == "selection":
        records = records[:-1]
    elif change == "name":
        records = source(rows, "other.jsonl")
    elif change in ("max_length", "max_completion_length"):
        options = {"max_length": {"max_length": 20}, "max_completion_length": {"max_completion_length": 7}}[change]
    elif change == "vocabulary":
        tokenizer = words(more=1)
    elif change == "bos":
        tokenizer = words(bos=True)
    elif change == "eos":
        tokenizer = words(eos_token="w3")
    else:
        tokenizer.chat_template += " "
    expected = tokenize(list(records), tokenizer, **{"max_length": 24, "max_completion_length": 8, **options})
    runs.clear()
    found = stored(records, tokenizer, **options)
    assert runs == [len(records)]
    assert list(found.examples) == expected.examples


def test_truncation_left_switched_on_by_others_neither_cuts_nor_changes_the_address(
    source: Any, stored: Any, runs: list[int]
) -> None:
    records, tokenizer = source(pair_rows(20)), words()
    expected = list(stored(records, tokenizer).examples)
    tokenizer.backend_tokenizer.enable_truncation(2)
    assert list(stored(records, tokenizer).examples) == expected
    assert runs == [20]


def test_damaged_ids_are_made_again_with_a_message(source: Any, tmp_path: Path, runs: list[int]) -> None:
    records, tokenizer, console = source(pair_rows(20)), words(), Console(file=io.StringIO(), width=200)

    def get() -> Stored:
        return tokenize_stored(records, tokenizer, max_length=24, cache=tmp_path / "cache", console=console)

    expected = list(get().examples)
    [path] = (tmp_path / "cache" / "tokens").glob("*/tokens.bin")
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    assert list(get().examples) == expected
    assert runs == [20, 20]
    assert isinstance(console.file, io.StringIO)
    assert "token ids in the cache are damaged (tokens.bin has another checksum)" in console.file.getvalue()


def test_errors_of_tokenising_leave_no_store(source: Any, stored: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "w1 ", "chosen": "w2 w3", "rejected": "w2 w4"}]
    with pytest.raises(DataError, match="1 x identical after truncation"):
        stored(source(rows), words(), max_completion_length=1)
    with pytest.raises(ConfigError, match="max_completion_length"):
        stored(source(rows), words(), max_completion_length=24)
    assert not list((tmp_path / "cache" / "tokens").iterdir())


def test_a_template_that_writes_the_date_has_an_address_for_every_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Llama 3's does: the rendered conversation is part of the digest."""
    tokenizer = words()
    rendered = iter(["1 May", "2 May"])
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *_, **__: next(rendered))
    assert tokenizer_digest(tokenizer) != tokenizer_digest(tokenizer)


def test_a_tokenizer_without_a_backend_is_known_by_what_it_saves() -> None:
    class Written:
        """As much of a tokenizer written in Python as the digest looks at."""

        eos_token_id, chat_template = 1, None

        def __init__(self, vocabulary: str) -> None:
            self.vocabulary = vocabulary

        def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[0]] * len(texts)}

        def save_pretrained(self, folder: str) -> None:
            Path(folder, "vocab.txt").write_text(self.vocabulary)

    assert tokenizer_digest(Written("a b")) == tokenizer_digest(Written("a b")) != tokenizer_digest(Written("a c"))
