"""Tokenisers are built here from `tokenizers`: a BPE over five letters that merges "ab" and "abc", and a word level one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prefopt.data.records import Labels, Message, Record, Text
from prefopt.errors import ConfigError, DataError
from prefopt.tokenize import Tokenizing, check_vocabulary, tokenize

PAIR = Labels(ranks=(0, 1))
VOCABULARY = {"a": 0, "b": 1, "c": 2, "d": 3, " ": 4, "ab": 5, "abc": 6, "<eos>": 7, "<bos>": 8}
CHATML = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
NO_END = (
    "{% for m in messages %} {{ m['role'] }} {{ m['content'] }}{% endfor %}{% if add_generation_prompt %} assistant{% endif %}"
)


def letters(*, bos: bool = False, **special: Any) -> PreTrainedTokenizerFast:
    """BPE with the merges a+b and ab+c; pad is EOS, as in many models."""
    core = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[("a", "b"), ("ab", "c")]))
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>", special_tokens=[("<bos>", VOCABULARY["<bos>"]), ("<eos>", VOCABULARY["<eos>"])]
        )
    names = {"eos_token": "<eos>", "pad_token": "<eos>", **({"bos_token": "<bos>"} if bos else {}), **special}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def words(template: str | None, eos: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    """One token a word."""
    names = ["<unk>", "<|im_start|>", "<|im_end|>", "<eos>", "system", "user", "assistant", "hi", "yes", "no", "well", "then"]
    core = Tokenizer(models.WordLevel(vocab={name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=eos, pad_token=eos, unk_token="<unk>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = template
    return tokenizer


def record(prompt: Text, *completions: Text, labels: Labels = PAIR, name: str = "f:1") -> Record:
    return Record(name, prompt, completions, labels)


def chat(*said: str, prompt: str = "hi") -> Record:
    return record((Message(role="user", content=prompt),), *((Message(role="assistant", content=text),) for text in said))


def ids(text: str) -> tuple[int, ...]:
    """Ids of text without merges, "$" for EOS."""
    return tuple(VOCABULARY["<eos>" if char == "$" else char] for char in text)


def test_completions_follow_one_prompt_and_end_with_eos() -> None:
    [example] = tokenize([record("cd", "da", "d")], letters(), max_length=10).examples
    assert example.prompt_ids == ids("cd")
    assert example.completion_ids == (ids("da$"), ids("d$"))
    assert example.labels == PAIR


@pytest.mark.fault(24)
def test_a_merge_over_the_boundary_moves_the_end_of_the_prompt_into_every_completion() -> None:
    """ "ca" + "b" is [c, ab]: the prompt that both completions share is [c], and "a" is scored with them."""
    result = tokenize([record("ca", "b", "d"), record("c", "d", "b")], letters(), max_length=10)
    first = result.examples[0]
    assert first.prompt_ids == ids("c")
    assert first.completion_ids == ((VOCABULARY["ab"], VOCABULARY["<eos>"]), ids("ad$"))
    assert result.report.boundary_merges == 1


@pytest.mark.fault(24)
def test_a_prompt_that_merges_away_is_dropped_with_its_reason() -> None:
    result = tokenize([record("a", "b", "d"), record("c", "b", "d", name="f:2")], letters(), max_length=10)
    assert [example.id for example in result.examples] == ["f:2"]
    assert [(drop.reason, drop.examples) for drop in result.report.dropped] == [
        ("the whole prompt merges with a completion", ("f:1",))
    ]


@settings(max_examples=150, deadline=None)
@given(
    prompt=st.text(alphabet="abcd ", max_size=8),
    completions=st.lists(st.text(alphabet="abcd ", max_size=8), min_size=1, max_size=4),
)
@pytest.mark.fault(24)
def test_prompt_and_completion_are_always_the_tokens_of_the_whole_text(prompt: str, completions: list[str]) -> None:
    """The law of the boundary: nothing is lost, doubled or tokenised otherwise; with a BOS every prompt is usable."""
    tokenizer = letters(bos=True)
    [example] = tokenize([record(prompt, *completions, labels=Labels())], tokenizer, max_length=64).examples
    for text, completion in zip(completions, example.completion_ids, strict=True):
        whole = tokenizer(prompt + text, add_special_tokens=False)["input_ids"]
        assert [*example.prompt_ids, *completion] == [VOCABULARY["<bos>"], *whole, VOCABULARY["<eos>"]]


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(*[st.text(alphabet="bcd", min_size=1, max_size=9)] * 3), min_size=1, max_size=4),
    limits=st.integers(2, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1))),
)
@pytest.mark.fault(18)
def test_limits_hold_and_what_was_cut_is_counted(rows: Sequence[tuple[str, str, str]], limits: tuple[int, int]) -> None:
    """Without merges a token is a letter, so lengths can be counted by hand; unpaired labels, so that nothing is dropped."""
    max_length, limit = limits
    result = tokenize(
        [record(*row, labels=Labels()) for row in rows], letters(), max_length=max_length, max_completion_length=limit
    )
    prompts = completions = 0
    for (prompt, *texts), example in zip(rows, result.examples, strict=True):
        assert len(example.prompt_ids) + max(map(len, example.completion_ids)) <= max_length
        assert ids(prompt)[-len(example.prompt_ids) :] == example.prompt_ids
        prompts += len(prompt) - len(example.prompt_ids)
        for text, completion in zip(texts, example.completion_ids, strict=True):
            assert completion == ids(text + "$")[:limit]
            completions += len(text) + 1 - len(completion)
    assert (result.report.prompt_tokens_cut, result.report.completion_tokens_cut) == (prompts, completions)


@pytest.mark.fault(18)
def test_truncation_cuts_completions_on_the_right_and_the_prompt_for_the_longest() -> None:
    result = tokenize([record("bcdbcd", "dddddd", "c")], letters(), max_length=7, max_completion_length=4)
    [example] = result.examples
    assert example.prompt_ids == ids("bcd")
    assert example.completion_ids == (ids("dddd"), ids("c$"))
    report = result.report
    assert (report.prompts_truncated, report.prompt_tokens_cut) == (1, 3)
    assert (report.completions_truncated, report.completion_tokens_cut) == (1, 3)


@pytest.mark.fault(18)
def test_without_a_completion_limit_one_prompt_token_stays() -> None:
    [example] = tokenize([record("bcd", "dddddd", "c")], letters(), max_length=4).examples
    assert (example.prompt_ids, example.completion_ids[0]) == (ids("d"), ids("ddd"))


def test_a_bos_that_the_tokenizer_adds_stays_when_the_prompt_is_cut() -> None:
    tokenizer = letters(bos=True)
    [example] = tokenize([record("bcdbcd", "d", "c")], tokenizer, max_length=5).examples
    assert example.prompt_ids == (VOCABULARY["<bos>"], *ids("cd"))
    [example] = tokenize([record("bcdbcd", "ddd", "c")], tokenizer, max_length=5).examples
    assert example.prompt_ids == ids("d")


@pytest.mark.fault(17)
def test_pairs_that_truncation_makes_identical_are_dropped_and_counted() -> None:
    rows = [record("c", "ddb", "ddc"), record("c", "b", "d", name="f:2")]
    result = tokenize(rows, letters(), max_length=4, max_completion_length=2)
    assert [example.id for example in result.examples] == ["f:2"]
    assert [(drop.reason, drop.count) for drop in result.report.dropped] == [("identical after truncation", 1)]
    assert (result.report.rows, result.report.kept, result.report.completions_truncated) == (2, 1, 0)
    unpaired = [dataclasses.replace(rows[0], labels=Labels())]
    assert len(tokenize(unpaired, letters(), max_length=4, max_completion_length=2).examples) == 1


@pytest.mark.fault(18)
def test_nothing_left_is_an_error_with_the_counts() -> None:
    with pytest.raises(DataError, match=r"1 x identical after tokenising \(f:1\)"):
        tokenize([record("c", "d", "d")], letters(), max_length=4)


def test_an_empty_completion_is_eos_alone() -> None:
    [example] = tokenize([record("cd", "", "d")], letters(), max_length=4).examples
    assert example.completion_ids == (ids("$"), ids("d$"))


@pytest.mark.fault(23)
def test_eos_is_scored_once_even_if_the_text_brings_it_and_pad_is_the_same_id() -> None:
    tokenizer = letters()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    [example] = tokenize([record("c", "d<eos>", "b")], tokenizer, max_length=8).examples
    assert example.completion_ids == (ids("d$"), ids("b$"))


def test_eos_inside_the_prompt_is_an_ordinary_token() -> None:
    result = tokenize([record("c<eos>d", "d", "b")], letters(), max_length=8)
    assert result.examples[0].prompt_ids == ids("c$d")
    assert result.report.lengths["prompt"].max == 3


@pytest.mark.fault(23)
def test_a_tokenizer_without_eos_is_refused() -> None:
    with pytest.raises(ConfigError, match="no EOS token"):
        tokenize([record("c", "d", "b")], letters(eos_token=None, pad_token=None), max_length=8)


def test_an_empty_prompt_needs_a_bos() -> None:
    assert tokenize([record("", "d", "b")], letters(bos=True), max_length=8).examples[0].prompt_ids == (VOCABULARY["<bos>"],)
    with pytest.raises(DataError, match="f:1: the prompt has no token"):
        tokenize([record("", "d", "b")], letters(), max_length=8)


@pytest.mark.parametrize(("max_length", "limit"), [(1, None), (4, 4), (4, 0)])
def test_limits_out_of_range_are_refused(max_length: int, limit: int | None) -> None:
    with pytest.raises(ConfigError, match="max_"):
        tokenize([record("c", "d", "b")], letters(), max_length=max_length, max_completion_length=limit)


def decoded(tokenizer: PreTrainedTokenizerFast, tokens: tuple[int, ...]) -> list[str]:
    return [str(token) for token in tokenizer.convert_ids_to_tokens(list(tokens))]


@pytest.mark.parametrize("eos", ["<|im_end|>", "<eos>"])
def test_a_conversation_ends_with_the_templates_end_of_turn_once(eos: str) -> None:
    tokenizer = words(CHATML, eos)
    [example] = tokenize([chat("yes", "well no")], tokenizer, max_length=16).examples
    assert decoded(tokenizer, example.prompt_ids) == ["<|im_start|>", "user", "hi", "<|im_end|>", "<|im_start|>", "assistant"]
    assert [decoded(tokenizer, c) for c in example.completion_ids] == [["yes", "<|im_end|>"], ["well", "no", "<|im_end|>"]]


def test_a_template_without_an_end_of_turn_gets_eos() -> None:
    tokenizer = words(NO_END, "<eos>")
    [example] = tokenize([chat("yes", "no")], tokenizer, max_length=16).examples
    assert [decoded(tokenizer, c) for c in example.completion_ids] == [["yes", "<eos>"], ["no", "<eos>"]]


def test_the_white_space_behind_the_end_of_turn_is_not_scored() -> None:
    core = Tokenizer(models.BPE(vocab={**VOCABULARY, "\n": 9}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<eos>\n{% endfor %}"
    [example] = tokenize([chat("b", "c", prompt="a")], tokenizer, max_length=16).examples
    assert example.prompt_ids == (*ids("a$"), 9)
    assert example.completion_ids == (ids("b$"), ids("c$"))


def test_a_conversation_needs_a_chat_template() -> None:
    with pytest.raises(ConfigError, match="f:1 is a conversation, but the tokenizer has no chat template"):
        tokenize([chat("yes", "no")], words(None), max_length=16)


def test_a_conversation_that_the_template_refuses_is_dropped_with_its_message() -> None:
    template = "{% if messages[0]['content'] == 'then' %}{{ raise_exception('then is not a beginning') }}{% endif %}" + CHATML
    result = tokenize([chat("yes", "no"), chat("yes", "no", prompt="then")], words(template), max_length=16)
    assert (result.report.kept, result.report.dropped[0].count) == (1, 1)
    assert "then is not a beginning" in result.report.dropped[0].reason


def test_text_and_conversations_keep_their_order() -> None:
    rows = [record("hi", " yes", " no", name="f:1"), dataclasses.replace(chat("yes", "no"), id="f:2")]
    rows.append(record("hi", " well", " no", name="f:3"))
    result = tokenize(rows, words(CHATML), max_length=16)
    assert [example.id for example in result.examples] == ["f:1", "f:2", "f:3"]


def test_lengths_and_the_baseline_are_reported_in_tokens() -> None:
    rows = [record("cc", "ddd", "d"), record("c", "d", "dd"), record("c", "ddddd", "dd")]
    report = tokenize(rows, letters(), max_length=16).report
    assert set(report.lengths) == {"prompt", "chosen", "rejected"}
    chosen = report.lengths["chosen"]
    assert (chosen.mean, chosen.p50, chosen.max) == (4.0, 4.0, 6)
    assert report.length_baseline is not None
    assert report.length_baseline.longer_wins == pytest.approx(2 / 3)
    ranking = [record("c", "d", "dd", "ddd", labels=Labels(ranks=(0, 1, 2)))]
    assert set(tokenize(ranking, letters(), max_length=16).report.lengths) == {
        "prompt",
        "completion 0",
        "completion 1",
        "completion 2",
    }
    assert report.as_dict()["lengths"]["chosen"]["max"] == 6


@pytest.mark.fault(23)
def test_check_vocabulary_names_record_and_id() -> None:
    examples = tokenize([record("c", "d", "b")], letters(), max_length=8).examples
    check_vocabulary(examples, VOCABULARY["<eos>"] + 1)
    with pytest.raises(DataError, match=r"f:1: token id 7, .* has 7 rows"):
        check_vocabulary(examples, VOCABULARY["<eos>"])


def test_batches_change_nothing_and_are_read_no_further_than_one_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [record("c" * (1 + i % 3), "d" * (1 + i % 5), "b", name=f"f:{i}") for i in range(23)]
    rows[20] = record("a", "b", "d", name="f:20")  # dropped
    whole = tokenize(rows, letters(), max_length=6, max_completion_length=3)
    monkeypatch.setattr("prefopt.tokenize.BATCH", 5)
    read: list[str] = []

    class Watched(list[Record]):
        def __iter__(self) -> Any:
            for row in super().__iter__():
                read.append(row.id)
                yield row

    work = Tokenizing(letters(), max_length=6, max_completion_length=3)
    progress: list[tuple[int, int]] = []
    found, ahead = [], []
    for example in work.examples(Watched(rows), lambda done, total: progress.append((done, total))):
        ahead.append(len(read) - len(found))
        found.append(example)
    assert found == whole.examples
    assert work.report() == whole.report
    assert progress == [(5, 23), (10, 23), (15, 23), (20, 23), (23, 23)]
    assert max(ahead) <= 2 * 5 + 1


def test_a_tokenizer_that_fails_in_its_thread_stops_the_pass() -> None:
    class Broken:
        eos_token_id, eos_token, chat_template = 0, "$", None

        def __call__(self, *_: Any, **__: Any) -> Any:
            raise OverflowError("broken")

        def apply_chat_template(self, *_: Any, **__: Any) -> Any:
            raise NotImplementedError

    with pytest.raises(OverflowError, match="broken"):
        tokenize([record("c", "d", "b")], Broken(), max_length=8)
