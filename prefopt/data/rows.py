"""One row of a file: the checks that every format shares.

A row that cannot be used raises `BadRow` with a reason that never holds the row's text, so that reports can show it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefopt.data.records import Labels, Message, Text

ROLES = ("system", "user", "assistant")


class BadRow(Exception):
    """A row that cannot be used. `reason` is short and the same for all such rows, since rows are counted by it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class MixedFormats(Exception):
    """A row in another format than its file, or with fields in two formats: a defect of the file, never dropped."""


@dataclass(frozen=True)
class Parsed:
    """A row as read: prompt, K completions, labels."""

    prompt: Text
    completions: tuple[Text, ...]
    labels: Labels = field(default_factory=Labels)


def safe(name: object, limit: int = 40) -> str:
    """A column or file name fit for a terminal: no control characters, not endless."""
    text = "".join(char if char.isprintable() else "?" for char in str(name))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def check_text(value: object, name: str) -> str:
    """`value` as text that can be encoded.

    Raises:
        BadRow: None, another type, or a lone surrogate (half of a character, which no tokenizer takes).
    """
    if value is None:
        raise BadRow(f"{name} is None")
    if not isinstance(value, str):
        raise BadRow(f"{name} has the wrong type")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"{name} has a lone surrogate") from error
    return value


def check_messages(value: object, name: str) -> tuple[Message, ...]:
    """`value` as a conversation: a list of {"role", "content"} with known roles and text contents.

    Raises:
        BadRow: anything else.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise BadRow(f"{name} has the wrong type")
    if not value:
        raise BadRow(f"{name} is empty")
    messages = []
    for message in value:
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise BadRow(f"{name} has a message without role and content")
        role = check_text(message["role"], f"{name} role")
        if role not in ROLES:
            raise BadRow(f"{name} has a role other than {', '.join(ROLES)}")
        messages.append(Message(role=role, content=check_text(message["content"], f"{name} content")))
    return tuple(messages)


def check_field(value: object, name: str) -> Text:
    """Text or conversation, by the type of `value`."""
    return check_messages(value, name) if isinstance(value, list | tuple) else check_text(value, name)


def check_number(value: object, name: str) -> float:
    """`value` as a finite float.

    Raises:
        BadRow: another type (booleans included), infinite or not a number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"{name} has the wrong type")
    try:
        number = float(value)
    except OverflowError as error:
        raise BadRow(f"{name} is not finite") from error
    if not math.isfinite(number):
        raise BadRow(f"{name} is not finite")
    return number


def content(text: Text) -> str:
    """Everything said in `text`, without roles."""
    return text if isinstance(text, str) else "\n".join(message["content"] for message in text)


def common_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items two sequences have in common at their beginning."""
    if one == other[: len(one)]:
        return len(one)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def check_completions(completions: Sequence[Text]) -> None:
    """Completions must say something, and two of them must not say the same.

    Raises:
        BadRow: an empty completion, or two that are equal up to the white space around them.
    """
    said = [content(completion).strip() for completion in completions]
    if not all(said):
        raise BadRow("empty completion")
    if len(set(said)) < len(said):
        raise BadRow("identical completions")


def pair_labels(row: Mapping[str, Any]) -> Labels:
    """The labels of a preference row: its order, and the optional columns `margin`, `soft_label` (or `soft_labels`),
    `chosen_score` with `rejected_score`, `utility_id`. A column that is absent or None is no label.

    Raises:
        BadRow: a value out of range, or one score without the other.
    """
    found = {name: check_number(row[name], name) for name in PAIR_LABELS if row.get(name) is not None}
    if "soft_label" in found and "soft_labels" in found:
        raise BadRow("both soft_label and soft_labels")
    soft_label = found.get("soft_label", found.get("soft_labels"))
    if soft_label is not None and not 0 <= soft_label <= 1:
        raise BadRow("soft_label is outside [0, 1]")
    margin = found.get("margin")
    if margin is not None and margin < 0:
        raise BadRow("margin is negative")
    if ("chosen_score" in found) != ("rejected_score" in found):
        raise BadRow("only one of chosen_score and rejected_score")
    scores = (found["chosen_score"], found["rejected_score"]) if "chosen_score" in found else None
    return Labels(ranks=(0, 1), soft_label=soft_label, margin=margin, scores=scores, utility_id=utility_id(row))


def utility_id(row: Mapping[str, Any]) -> int | None:
    """The optional column `utility_id` of a pair or ranking: which of `rank_utility`'s utilities its prompt uses.

    Raises:
        BadRow: it is there, and no whole number from 0 on.
    """
    value = row.get("utility_id")
    if value is None:
        return None
    number = check_number(value, "utility_id")
    if number < 0 or not number.is_integer():
        raise BadRow("utility_id is not a whole number from 0 on")
    return int(number)


PAIR_LABELS = ("margin", "soft_label", "soft_labels", "chosen_score", "rejected_score", "utility_id")
