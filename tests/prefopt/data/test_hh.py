from __future__ import annotations

from typing import Any

import pytest

from prefopt.data.hh import parse_hh, parse_turns, record_key, to_chat
from prefopt.data.records import Labels
from prefopt.data.rows import BadRow, Parsed

PROMPT = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman:  How  are\nyou?\n\nAssistant:"


def pair(chosen: Any = " Fine.", rejected: Any = " Bad.", prompt: str = PROMPT) -> dict[str, Any]:
    return {"chosen": prompt + chosen, "rejected": prompt + rejected}


def test_hh_prompt_ends_with_the_last_assistant_marker_and_answers_keep_their_space() -> None:
    parsed = parse_hh(pair())
    assert parsed == Parsed(PROMPT, (" Fine.", " Bad."), Labels(ranks=(0, 1)))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (pair(chosen=""), "empty completion"),
        (pair(rejected=" \n "), "empty completion"),
        (pair(rejected=" Fine. "), "identical completions"),
        ({"chosen": PROMPT + " a", "rejected": "\n\nHuman: Ho\n\nAssistant: b"}, "prompts differ"),
        ({"chosen": PROMPT + " a\n\nHuman: b\n\nAssistant: c", "rejected": PROMPT + " d"}, "prompts differ"),
        (pair(chosen=" a\n\nHuman: and?"), "a dialogue ends with a human turn"),
        ({"chosen": "\n\nHuman: Hi", "rejected": PROMPT + " b"}, "chosen has no assistant turn"),
        ({"chosen": PROMPT + " b", "rejected": "Hi"}, "rejected is not a dialogue that begins with a human turn"),
        ({"chosen": PROMPT + " b", "rejected": None}, "rejected is None"),
    ],
)
def test_hh_rows_that_cannot_be_used_say_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        parse_hh(row)
    assert caught.value.reason == reason


def test_hh_dialogue_becomes_a_conversation() -> None:
    chat = to_chat(parse_hh(pair()))
    assert [(m["role"], m["content"]) for m in chat.prompt if not isinstance(m, str)] == [
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "How  are\nyou?"),
    ]
    assert chat.completions == (({"role": "assistant", "content": "Fine."},), ({"role": "assistant", "content": "Bad."},))


def test_plain_prompt_becomes_one_user_message() -> None:
    assert to_chat(Parsed("Why? ", (" So.",))).prompt == ({"role": "user", "content": "Why?"},)
    with pytest.raises(BadRow, match="user turn"):
        to_chat(Parsed("", ("So.",)))


def test_turns_without_an_open_assistant_turn_are_all_kept() -> None:
    assert [turn["content"] for turn in parse_turns("\n\nHuman: a\n\nAssistant: b")] == ["a", "b"]


def test_record_key_is_the_first_human_turn_as_text_and_as_chat() -> None:
    long = "\n\nHuman:  What\n is  it?\n\nAssistant: x\n\nHuman: second\n\nAssistant:"
    text = Parsed(long, (" a", " b"))
    chat = to_chat(text)
    assert record_key(text.prompt, text.completions) == record_key(chat.prompt, chat.completions) == "What is it?"


def test_record_key_without_a_human_turn() -> None:
    assert record_key(" Plain\tprompt ", ("a",)) == "Plain prompt"
    assert record_key("", ("b c", "a")) == record_key("", ("a", "b c")) == "a b c"
