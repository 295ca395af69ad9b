"""The column formats of TRL's data sets (https://huggingface.co/docs/trl/dataset_formats), and rankings.

| kind | columns | record |
|---|---|---|
| pair | prompt, chosen, rejected | K=2, ordered |
| implicit pair | chosen, rejected, which share a beginning | K=2, ordered |
| labelled | prompt, completion, label (true or false) | K=1, desirable |
| plain | prompt, completion | K=1 |
| ranking | prompt, completions (or responses), ranks and/or scores | K>=2, ordered |

Pairs and rankings may name their prompt's utility: `utility_id`.
Every field is text, or every field is a conversation (a list of {"role", "content"}).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from prefopt.data.hh import is_dialogue, parse_hh
from prefopt.data.records import Labels, Message, Text
from prefopt.data.rows import (
    PAIR_LABELS,
    BadRow,
    MixedFormats,
    Parsed,
    check_completions,
    check_field,
    check_messages,
    check_number,
    common_prefix,
    content,
    pair_labels,
    safe,
    utility_id,
)

Style = Literal["text", "conversational"]


@dataclass(frozen=True)
class Format:
    """A set of columns that is understood.

    Args:
        name: for people and for reports.
        columns: all of them must be there.
        optional: read when there.
        parse: row -> Parsed, raising BadRow.
        texts: the columns that hold text or conversations.
    """

    name: str
    columns: tuple[str, ...]
    optional: tuple[str, ...]
    texts: tuple[str, ...]
    parse: Callable[[Mapping[str, Any]], Parsed]


def _prompt(row: Mapping[str, Any]) -> Text:
    prompt = check_field(row["prompt"], "prompt")
    if not isinstance(prompt, str) and prompt[-1]["role"] != "user":
        raise BadRow("the prompt does not end with a user turn")
    return prompt


def _completion(value: object, name: str) -> Text:
    completion = check_field(value, name)
    if not isinstance(completion, str) and (completion[0]["role"] != "assistant" or completion[-1]["role"] != "assistant"):
        raise BadRow(f"{name} does not begin and end with an assistant turn")
    return completion


def parse_pair(row: Mapping[str, Any]) -> Parsed:
    """A pair with its prompt in a column of its own."""
    completions = (_completion(row["chosen"], "chosen"), _completion(row["rejected"], "rejected"))
    check_completions(completions)
    return Parsed(_prompt(row), completions, pair_labels(row))


def parse_implicit_pair(row: Mapping[str, Any]) -> Parsed:
    """A pair whose prompt is what both sides begin with.

    For text this is TRL's rule: the common characters, without a last space, which belongs to the completions. For
    conversations it is the common messages.
    """
    chosen, rejected = check_field(row["chosen"], "chosen"), check_field(row["rejected"], "rejected")
    if content(chosen).strip() == content(rejected).strip():
        raise BadRow("identical completions")
    if isinstance(chosen, str) and isinstance(rejected, str):
        same = common_prefix(chosen, rejected)
        if same and chosen[same - 1] == " ":
            same -= 1
        prompt: Text = chosen[:same]
        sides: tuple[Text, Text] = (chosen[same:], rejected[same:])
    else:
        one, other = check_messages(chosen, "chosen"), check_messages(rejected, "rejected")
        same = common_prefix(one, other)
        prompt, sides = one[:same], (one[same:], other[same:])
        _check_implicit_conversation(one[:same], sides)
    check_completions(sides)
    return Parsed(prompt, sides, pair_labels(row))


def _check_implicit_conversation(prompt: tuple[Message, ...], sides: tuple[Text, Text]) -> None:
    if not all(sides):
        raise BadRow("empty completion")
    if not prompt:
        raise BadRow("prompts differ")
    for side in sides:
        assert not isinstance(side, str)
        if side[0]["role"] != "assistant":
            raise BadRow("prompts differ")
        if side[-1]["role"] != "assistant":
            raise BadRow("a conversation ends without an assistant turn")
    if prompt[-1]["role"] != "user":
        raise BadRow("the prompt does not end with a user turn")


def parse_labelled(row: Mapping[str, Any]) -> Parsed:
    """A completion with a yes-or-no label."""
    if not isinstance(row["label"], bool):
        raise BadRow("label is None" if row["label"] is None else "label is neither true nor false")
    parsed = parse_plain(row)
    return Parsed(parsed.prompt, parsed.completions, Labels(desirable=row["label"]))


def parse_plain(row: Mapping[str, Any]) -> Parsed:
    """A completion without a label: SFT."""
    completion = _completion(row["completion"], "completion")
    check_completions((completion,))
    return Parsed(_prompt(row), (completion,))


def parse_ranking(row: Mapping[str, Any], column: str) -> Parsed:
    """K completions in an order: by `ranks` (smallest is best; 0- or 1-based), or by `scores` (largest is best).

    They come out best first with dense ranks from 0; ties share a rank.
    """
    values = row[column]
    if not isinstance(values, list | tuple):
        raise BadRow(f"{column} has the wrong type")
    if len(values) < 2:
        raise BadRow(f"{column} holds fewer than two completions")
    completions = [_completion(value, column) for value in values]
    check_completions(completions)
    prompt = _prompt(row)
    if len({type(text) for text in (prompt, *completions)}) > 1:
        raise MixedFormats(f"prompt and {column} are partly text and partly conversational")
    numbers = {name: _numbers(row[name], name, len(values)) for name in ("ranks", "scores") if row.get(name) is not None}
    if not numbers:
        raise BadRow("neither ranks nor scores")
    scores = numbers.get("scores")
    cost = numbers["ranks"] if "ranks" in numbers else [-score for score in scores or ()]
    order = sorted(range(len(values)), key=lambda i: cost[i])
    levels = sorted(set(cost))
    labels = Labels(
        ranks=tuple(levels.index(cost[i]) for i in order),
        scores=tuple(scores[i] for i in order) if scores is not None else None,
        utility_id=utility_id(row),
    )
    return Parsed(prompt, tuple(completions[i] for i in order), labels)


def _numbers(value: object, name: str, count: int) -> list[float]:
    if not isinstance(value, list | tuple):
        raise BadRow(f"{name} has the wrong type")
    if len(value) != count:
        raise BadRow(f"{name} and completions differ in number")
    return [check_number(number, name) for number in value]


PAIR = Format("pair", ("prompt", "chosen", "rejected"), PAIR_LABELS, ("prompt", "chosen", "rejected"), parse_pair)
IMPLICIT = Format("implicit pair", ("chosen", "rejected"), PAIR_LABELS, ("chosen", "rejected"), parse_implicit_pair)
HH = Format("hh dialogue pair", ("chosen", "rejected"), PAIR_LABELS, ("chosen", "rejected"), parse_hh)
LABELLED = Format("labelled", ("prompt", "completion", "label"), (), ("prompt", "completion"), parse_labelled)
PLAIN = Format("plain", ("prompt", "completion"), (), ("prompt", "completion"), parse_plain)
RANKINGS = tuple(
    Format("ranking", ("prompt", column), ("ranks", "scores", "utility_id"), ("prompt",), partial(parse_ranking, column=column))
    for column in ("completions", "responses")
)

# By columns, most specific first: a row with prompt, chosen and rejected is an explicit pair.
FORMATS = (PAIR, IMPLICIT, LABELLED, PLAIN, *RANKINGS)


def detect(row: Mapping[str, Any]) -> tuple[Format, Style]:
    """The format of a row, from its columns and the types in them.

    Raises:
        BadRow: no known set of columns, or a field that is neither text nor a conversation.
        MixedFormats: one field is text and another conversational.
    """
    form = _by_columns(row)
    if form is None:
        expected = "; ".join(", ".join(form.columns) for form in FORMATS)
        found = ", ".join(sorted(safe(column) for column in row)[:10]) or "no columns"
        raise BadRow(f"wrong columns: found {found}; expected one of: {expected}")
    styles: dict[str, Style] = {}
    for name in form.texts:
        check_field(row[name], name)
        styles[name] = "text" if isinstance(row[name], str) else "conversational"
    if len(set(styles.values())) > 1:
        raise MixedFormats(", ".join(f"{name} is {style}" for name, style in styles.items()))
    if form is IMPLICIT and (is_dialogue(row["chosen"]) or is_dialogue(row["rejected"])):
        form = HH
    return form, next(iter(styles.values()))


def parse(row: Mapping[str, Any], expected: tuple[Format, Style] | None) -> tuple[Parsed, tuple[Format, Style]]:
    """Reads a row in its file's format, which the first row that is understood sets.

    Raises:
        BadRow: a row to drop.
        MixedFormats: a row in another format than the file's.
    """
    if expected is None:
        expected = detect(row)
    else:
        if _by_columns(row) is None:
            missing = next(column for column in expected[0].columns if column not in row)
            raise BadRow(f"missing column {missing}")
        found = detect(row)
        if found != expected and not (expected[0] is HH and found[0] is IMPLICIT):
            first, now = (f"{form.name}, {style}" for form, style in (expected, found))
            raise MixedFormats(f"the row is {now}; the file began as {first}")
    return expected[0].parse(row), expected


def _by_columns(row: Mapping[str, Any]) -> Format | None:
    return next((form for form in FORMATS if all(column in row for column in form.columns)), None)


def unused_columns(row: Mapping[str, Any], form: Format) -> set[str]:
    """Columns of a row that its format does not read."""
    return {safe(name) for name in row if name not in form.columns and name not in form.optional}
