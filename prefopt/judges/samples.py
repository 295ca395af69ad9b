"""Samples files: prompts with completions, and the pairs that two of them make."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt.data import hh, sources, trl_formats
from prefopt.data.records import Text
from prefopt.data.rows import BadRow, MixedFormats, check_field, content
from prefopt.errors import DataError

_EXPECTED = "expected prompt with completion, completions (several samples of a prompt), or chosen and rejected"


@dataclass(frozen=True)
class Sample:
    """A completion of a prompt, and where it was read: `file:line`, of a list `file:line.place`."""

    prompt: Text
    completion: str
    where: str


@dataclass(frozen=True)
class SamplePairs:
    """Pairs of two samples of one prompt, in the order of the first file.

    Args:
        ids: N unique names of the pairs: where ours was read.
        prompts, ours, theirs: N.
        only_ours, only_theirs: samples without a partner.
    """

    ids: tuple[str, ...]
    prompts: tuple[Text, ...]
    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    only_ours: int
    only_theirs: int

    @property
    def keys(self) -> tuple[str, ...]:
        """N keys of the prompts, as the split of roles hashes them."""
        return tuple(hh.record_key(prompt, ()) for prompt in self.prompts)


def read_samples(path: Path) -> list[Sample]:
    """The samples of a JSONL file (.gz too), in its order.

    A row is `prompt` with `completion`, or with `completions`, a list of samples (as `prefopt iterate` writes them); or
    preference data, of which the chosen completion is taken. Empty completions are samples like others.

    Raises:
        DataError: the file cannot be read, or a row is none of these; the message names file and row.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; {_EXPECTED}, one JSON object a line.")
    found: list[Sample] = []
    for number, row in sources.read_lines(path, str(path)):
        where = f"{path}:{number}"
        try:
            if isinstance(row, BadRow):
                raise row
            prompt, completions = _read(row)
        except (BadRow, MixedFormats) as error:
            raise DataError(f"{where}: {error}; {_EXPECTED}.") from error
        where = f"{path.name}:{number}"
        names = [where] if len(completions) == 1 else [f"{where}.{k + 1}" for k in range(len(completions))]
        found += [Sample(prompt, text, name) for text, name in zip(completions, names, strict=True)]
    if not found:
        raise DataError(f"{path}: no row; {_EXPECTED}.")
    return found


def _read(row: Mapping[str, Any]) -> tuple[Text, list[str]]:
    if "chosen" in row:
        parsed, _ = trl_formats.parse(row, None)
        return parsed.prompt, [content(parsed.completions[0])]
    if "prompt" not in row or not ("completion" in row or "completions" in row):
        raise BadRow("missing columns")
    prompt = check_field(row["prompt"], "prompt")
    if "completion" in row:
        return prompt, [content(check_field(row["completion"], "completion"))]
    values = row["completions"]
    if not isinstance(values, list) or not values:
        raise BadRow("completions is not a list of samples")
    return prompt, [content(check_field(value, "completions")) for value in values]


def pair_samples(ours: Sequence[Sample], theirs: Sequence[Sample]) -> SamplePairs:
    """The k-th sample of a prompt on one side with its k-th on the other.

    Prompts are equal when they say the same: a conversation and its text differ, white space at the ends does not.

    Raises:
        DataError: no prompt is in both.
    """
    waiting: dict[object, list[Sample]] = defaultdict(list)
    for sample in reversed(theirs):
        waiting[same_prompt(sample.prompt)].append(sample)
    pairs = [(sample, waiting[same_prompt(sample.prompt)].pop()) for sample in ours if waiting[same_prompt(sample.prompt)]]
    if not pairs:
        raise DataError(
            f"no prompt of {ours[0].where.rpartition(':')[0]} ({len(ours)} samples) is in "
            f"{theirs[0].where.rpartition(':')[0]} ({len(theirs)}): completions are compared on the same prompts, as the same "
            "text or the same conversation."
        )
    return SamplePairs(
        tuple(one.where for one, _ in pairs), tuple(one.prompt for one, _ in pairs),
        tuple(one.completion for one, _ in pairs), tuple(other.completion for _, other in pairs),
        len(ours) - len(pairs), len(theirs) - len(pairs),
    )  # fmt: skip


def same_prompt(prompt: Text) -> object:
    """What two prompts share that say the same."""
    if isinstance(prompt, str):
        return prompt.strip()
    return tuple((turn["role"], turn["content"].strip()) for turn in prompt)
