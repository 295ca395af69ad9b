"""Anthropic's HH format: `chosen` and `rejected` are whole dialogues, "\\n\\nHuman: …\\n\\nAssistant: …" (Bai et al.
2022, arXiv 2204.05862), and its dialogue convention, which other files use inside their prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from prefopt.data.records import Message, Text
from prefopt.data.rows import BadRow, Parsed, check_completions, check_text, content, pair_labels

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")


def is_dialogue(text: object) -> bool:
    """True when `text` is written as a dialogue that a human opens."""
    return isinstance(text, str) and text.startswith(HUMAN)


def parse_hh(row: Mapping[str, Any]) -> Parsed:
    """Splits two dialogues into the shared prompt, which ends with the last "\\n\\nAssistant:", and two answers.

    The answers keep their leading space, as in Anthropic's files: "Assistant:" + " Hello".

    Raises:
        BadRow: not a dialogue, prompts that differ, an answer that is empty, or answers that are identical.
    """
    sides = []
    for name in ("chosen", "rejected"):
        text = check_text(row[name], name)
        if not is_dialogue(text):
            raise BadRow(f"{name} is not a dialogue that begins with a human turn")
        at = text.rfind(ASSISTANT)
        if at < 0:
            raise BadRow(f"{name} has no assistant turn")
        end = at + len(ASSISTANT)
        sides.append((text[:end], text[end:]))
    (prompt, chosen), (other_prompt, rejected) = sides
    if any(HUMAN in answer for answer in (chosen, rejected)):
        raise BadRow("a dialogue ends with a human turn")
    if prompt != other_prompt:
        raise BadRow("prompts differ")
    check_completions((chosen, rejected))
    return Parsed(prompt, (chosen, rejected), pair_labels(row))


def parse_turns(dialogue: str) -> tuple[Message, ...]:
    """A dialogue as messages, each without the white space around it; the open "Assistant:" at the end is no turn."""
    pieces = _TURN.split(dialogue)
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [Message(role=roles[who], content=said.strip()) for who, said in zip(pieces[1::2], pieces[2::2], strict=True)]
    if turns and turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
        turns.pop()
    return tuple(turns)


def to_chat(parsed: Parsed) -> Parsed:
    """A text row as a conversation: a dialogue by its turns, any other prompt as one user message.

    Raises:
        BadRow: an empty prompt, for which there is no user message.
    """
    if not isinstance(parsed.prompt, str):
        return parsed
    prompt: tuple[Message, ...]
    if is_dialogue(parsed.prompt):
        prompt = parse_turns(parsed.prompt)
    else:
        prompt = (Message(role="user", content=parsed.prompt.strip()),)
    if not prompt or not prompt[-1]["content"] or prompt[-1]["role"] != "user":
        raise BadRow("the prompt does not end with a user turn")
    completions = tuple((Message(role="assistant", content=content(text).strip()),) for text in parsed.completions)
    return Parsed(prompt, completions, parsed.labels)


def record_key(prompt: Text, completions: tuple[Text, ...]) -> str:
    """What the role split hashes, white space normalised: the first human turn.

    A dialogue and the same dialogue as messages have one key. A prompt without a human turn is its own key; a record
    without a prompt has nothing to leak but its completions, which then are the key (in an order that ignores the labels).
    """
    turns = prompt if not isinstance(prompt, str) else parse_turns(prompt) if is_dialogue(prompt) else ()
    first = next((message["content"] for message in turns if message["role"] == "user"), "")
    candidates = (first, content(prompt), " ".join(sorted(content(completion) for completion in completions)))
    return next((key for text in candidates if (key := " ".join(text.split()))), "")
