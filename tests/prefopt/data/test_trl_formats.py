from __future__ import annotations

from typing import Any

import pytest

from prefopt.data.records import Labels
from prefopt.data.rows import BadRow, MixedFormats
from prefopt.data.trl_formats import FORMATS, detect, parse, unused_columns


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


PAIR = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
CHAT_PAIR = {"prompt": [user("Sky?")], "chosen": [said("Blue.")], "rejected": [said("Green.")]}


def test_explicit_text_pair() -> None:
    parsed, (form, style) = parse(PAIR, None)
    assert (form.name, style) == ("pair", "text")
    assert (parsed.prompt, parsed.completions, parsed.labels) == ("The sky is", (" blue.", " green."), Labels(ranks=(0, 1)))


def test_implicit_text_pair_gives_the_last_space_to_the_completions() -> None:
    parsed, (form, _) = parse({"chosen": "The sky is blue.", "rejected": "The sky is green."}, None)
    assert form.name == "implicit pair"
    assert (parsed.prompt, parsed.completions) == ("The sky is", (" blue.", " green."))


def test_conversational_pairs_with_explicit_and_implicit_prompt_are_one_record() -> None:
    explicit, (_, style) = parse(CHAT_PAIR, None)
    implicit, _ = parse({side: [*CHAT_PAIR["prompt"], *CHAT_PAIR[side]] for side in ("chosen", "rejected")}, None)
    assert style == "conversational"
    assert explicit == implicit
    assert explicit.prompt == (user("Sky?"),)


def test_labelled_and_plain_rows() -> None:
    labelled, (form, _) = parse({"prompt": "p", "completion": " c", "label": False}, None)
    assert (form.name, labelled.completions, labelled.labels) == ("labelled", (" c",), Labels(desirable=False))
    plain, (form, _) = parse({"prompt": [user("p")], "completion": [said("c")]}, None)
    assert (form.name, plain.labels) == ("plain", Labels())


@pytest.mark.parametrize("column", ["completions", "responses"])
def test_ranking_comes_out_best_first_with_dense_ranks(column: str) -> None:
    row = {"prompt": "p", column: ["a", "b", "c"], "ranks": [5, 1, 5], "scores": [0.0, 2, 0.5]}
    parsed, _ = parse(row, None)
    assert parsed.completions == ("b", "a", "c")
    assert parsed.labels == Labels(ranks=(0, 1, 1), scores=(2.0, 0.0, 0.5))


def test_ranking_by_scores_alone() -> None:
    parsed, _ = parse({"prompt": "p", "completions": ["a", "b"], "scores": [0, 1]}, None)
    assert (parsed.completions, parsed.labels.ranks) == (("b", "a"), (0, 1))


@pytest.mark.parametrize("column", ["completions", "responses"])
def test_ranking_may_name_the_utility_of_its_prompt(column: str) -> None:
    row = {"prompt": "p", column: ["a", "b"], "ranks": [0, 1]}
    assert parse({**row, "utility_id": 0}, None)[0].labels == Labels(ranks=(0, 1), utility_id=0)
    assert parse({**row, "utility_id": None}, None)[0].labels.utility_id is None
    assert unused_columns({**row, "utility_id": 0}, parse(row, None)[1][0]) == set()


@pytest.mark.parametrize(
    ("change", "labels"),
    [
        ({"margin": 0}, Labels(ranks=(0, 1), margin=0.0)),
        ({"soft_label": 0.25}, Labels(ranks=(0, 1), soft_label=0.25)),
        ({"soft_labels": 1, "margin": None}, Labels(ranks=(0, 1), soft_label=1.0)),
        ({"chosen_score": 3, "rejected_score": -1.5}, Labels(ranks=(0, 1), scores=(3.0, -1.5))),
        ({"utility_id": 1.0}, Labels(ranks=(0, 1), utility_id=1)),
    ],
)
def test_optional_columns_become_labels(change: dict[str, Any], labels: Labels) -> None:
    assert parse({**PAIR, **change}, None)[0].labels == labels


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**PAIR, "margin": -1}, "margin is negative"),
        ({**PAIR, "margin": True}, "margin has the wrong type"),
        ({**PAIR, "margin": 10**400}, "margin is not finite"),
        ({**PAIR, "soft_label": 1.5}, "soft_label is outside [0, 1]"),
        ({**PAIR, "soft_label": 0.5, "soft_labels": 0.5}, "both soft_label and soft_labels"),
        ({**PAIR, "chosen_score": 1}, "only one of chosen_score and rejected_score"),
        ({**PAIR, "utility_id": -1}, "utility_id is not a whole number from 0 on"),
        ({**PAIR, "utility_id": 0.5}, "utility_id is not a whole number from 0 on"),
        ({**PAIR, "utility_id": "1"}, "utility_id has the wrong type"),
        ({**PAIR, "chosen": None}, "chosen is None"),
        ({**PAIR, "chosen": 3}, "chosen has the wrong type"),
        ({**PAIR, "chosen": " "}, "empty completion"),
        ({**PAIR, "chosen": " green."}, "identical completions"),
        ({**PAIR, "prompt": "\ud800"}, "prompt has a lone surrogate"),
        ({"chosen": "same", "rejected": "same"}, "identical completions"),
        ({"chosen": "The sky", "rejected": "The sky is blue"}, "empty completion"),
        ({"prompt": "p", "completion": "c", "label": 1}, "label is neither true nor false"),
        ({"prompt": "p", "completion": "c", "label": None}, "label is None"),
        ({**CHAT_PAIR, "prompt": []}, "prompt is empty"),
        ({**CHAT_PAIR, "prompt": [said("x")]}, "the prompt does not end with a user turn"),
        ({**CHAT_PAIR, "chosen": [user("x")]}, "chosen does not begin and end with an assistant turn"),
        ({**CHAT_PAIR, "chosen": [{"role": "assistant"}]}, "chosen has a message without role and content"),
        ({**CHAT_PAIR, "chosen": [{"role": "robot", "content": "x"}]}, "chosen has a role other than system, user, assistant"),
        ({**CHAT_PAIR, "chosen": [said(None)]}, "chosen content is None"),  # type: ignore[arg-type]
        ({"chosen": [user("a"), said("x")], "rejected": [user("b"), said("y")]}, "prompts differ"),
        ({"chosen": [user("a"), said("x")], "rejected": [user("a")]}, "empty completion"),
        ({"prompt": "p", "completions": ["a", "b"], "ranks": [1]}, "ranks and completions differ in number"),
        ({"prompt": "p", "completions": ["a", "b"]}, "neither ranks nor scores"),
        ({"prompt": "p", "completions": ["a"], "ranks": [0]}, "completions holds fewer than two completions"),
        ({"prompt": "p", "completions": "ab", "ranks": [0, 1]}, "completions has the wrong type"),
    ],
)
@pytest.mark.fault(19, 22)
def test_rows_that_cannot_be_used_say_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        parse(row, None)
    assert caught.value.reason == reason


@pytest.mark.fault(20)
def test_wrong_columns_name_what_was_found_and_every_format() -> None:
    with pytest.raises(BadRow) as caught:
        detect({"question": "q", "answer": "a"})
    assert "found answer, question; expected one of: " in caught.value.reason
    assert all(", ".join(form.columns) in caught.value.reason for form in FORMATS)


@pytest.mark.fault(21)
def test_a_row_of_text_and_conversation_is_mixed() -> None:
    with pytest.raises(MixedFormats, match="prompt is text, chosen is conversational, rejected is conversational"):
        parse({**CHAT_PAIR, "prompt": "Sky?"}, None)
    with pytest.raises(MixedFormats, match="partly text and partly conversational"):
        parse({"prompt": "p", "completions": ["a", [said("b")]], "ranks": [0, 1]}, None)


@pytest.mark.fault(21)
def test_a_row_in_another_format_than_its_file_is_mixed() -> None:
    _, text = parse(PAIR, None)
    with pytest.raises(MixedFormats, match="the row is pair, conversational; the file began as pair, text"):
        parse(CHAT_PAIR, text)
    with pytest.raises(MixedFormats, match="the row is labelled"):
        parse({"prompt": "p", "completion": "c", "label": True}, text)


@pytest.mark.fault(19)
def test_a_row_that_misses_a_column_is_named_by_it() -> None:
    _, text = parse(PAIR, None)
    with pytest.raises(BadRow, match="missing column rejected"):
        parse({"prompt": "p", "chosen": "c"}, text)


def test_a_row_of_a_dialogue_file_that_is_no_dialogue_is_dropped_and_the_reverse_is_mixed() -> None:
    prompt = "\n\nHuman: Hi\n\nAssistant:"
    dialogue, text = {"chosen": prompt + " a", "rejected": prompt + " b"}, {"chosen": "x a", "rejected": "x b"}
    _, hh = parse(dialogue, None)
    assert hh[0].name == "hh dialogue pair"
    with pytest.raises(BadRow, match="not a dialogue"):
        parse(text, hh)
    _, implicit = parse(text, None)
    with pytest.raises(MixedFormats, match="the file began as implicit pair, text"):
        parse(dialogue, implicit)


def test_column_names_are_made_fit_for_a_terminal() -> None:
    with pytest.raises(BadRow) as caught:
        detect({"\x1b[2J": 1, "x" * 100: 2})
    assert "\x1b" not in caught.value.reason
    assert "x" * 41 not in caught.value.reason
