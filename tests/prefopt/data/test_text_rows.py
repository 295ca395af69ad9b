"""What the text task makes of its rows: selections of records on disk, token ids from the cache, prompts on demand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefopt.data.sources import load
from prefopt.data.token_store import StoredExamples
from prefopt.errors import DataError
from prefopt.options import DataOptions, ModelOptions, Options
from prefopt.tasks.text import TextTask
from prefopt.tokenize import Tokenizing


@pytest.fixture
def task(jsonl: Callable[..., Path], pairs: list[Any], tiny_model: Path, tmp_path: Path) -> Callable[..., TextTask]:
    path = jsonl(pairs)

    def make(**data: Any) -> TextTask:
        options = Options(
            data=DataOptions(data=(str(path),), max_length=16, **data), model=ModelOptions(model=str(tiny_model), device="cpu")
        )
        return TextTask(options, tmp_path / "cache")

    return make


def test_prompts_are_found_for_every_training_example(task: Any, pairs: list[Any], tmp_path: Path) -> None:
    training = task().training(0)
    assert isinstance(training.examples, StoredExamples)
    assert len(training.examples) > 100
    by_id = {record.id: record.prompt for record in load([str(tmp_path / "pairs.jsonl")]).records}
    assert {example.id: training.texts[example.id] for example in training.examples}.items() <= by_id.items()


def test_a_second_task_tokenises_nothing_and_reports_the_same(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = task()
    rows, test = list(first.training(0).examples), list(first._test[1])

    def refuse(*_: Any) -> Any:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(Tokenizing, "examples", refuse)
    second = task()
    assert list(second.training(0).examples) == rows
    assert list(second._test[1]) == test
    assert second.report().as_dict() == first.report().as_dict()


def test_limits_select_the_first_rows_of_a_role(task: Any) -> None:
    assert list(task(max_pairs=7).training(0).examples) == list(task().training(0).examples[:7])


def test_an_id_beyond_the_embedding_is_named_with_its_record(task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose configuration has fewer rows than its tokenizer has ids."""
    from prefopt.tasks import language

    original = language.load_model

    def shrunk(*arguments: Any, **options: Any) -> Any:
        loaded = original(*arguments, **options)
        loaded.model.config.vocab_size = 4
        return loaded

    monkeypatch.setattr(language, "load_model", shrunk)
    with pytest.raises(DataError, match=r"pairs\.jsonl:\d+: token id [45], but the model's embedding has 4 rows"):
        task()
