"""Reviews with a label, for controlled sentiment: reading, folds by a hash of the text, and prompts.

The task is that of Rafailov et al. 2023 [rafailov2023dpo], section 6.1: continue the first words of a review, so that it sounds
positive. The folds keep apart what must not know each other: the gold reward, the language model, and the prompts.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prefopt.data import sources
from prefopt.data.hub import hub_splits
from prefopt.data.read_report import DropCounter, FileReport, ReadCounter, ReadReport, SourceReport, describe_drops
from prefopt.data.records import Labels, Record
from prefopt.data.rows import BadRow, check_text, safe
from prefopt.errors import DataError

Fold = Literal["gold", "gold_test", "language", "neutral", "policy", "test"]
FOLDS: Mapping[Fold, float] = {
    "gold": 0.35,  # fits the gold reward
    "gold_test": 0.08,  # its accuracy, and the lexicon's
    "language": 0.37,  # trains the language model
    "neutral": 0.04,  # perplexity of a policy on texts that nothing was trained on
    "policy": 0.10,  # prompts that algorithms train on
    "test": 0.06,  # prompts of the evaluation
}
"""The expected share of reviews in each fold."""

PROMPT_WORDS = (2, 3, 4, 5, 6)
"""How many of a sentence's words make a prompt: those of GPT-2's 2 to 8 tokens in the paper."""

_LABELS = {"1": True, "pos": True, "positive": True, "true": True, "0": False, "neg": False, "negative": False, "false": False}
# A longer line is a paragraph, which is cut where its sentences end; a sentence this long is left whole.
_LONGEST_SENTENCE = 40
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=\S)")
_LINE_BREAK = re.compile(r"\n|<br\s*/?>")
_LETTERS = re.compile(r"[\W_]+")


@dataclass(frozen=True)
class Review:
    """A text and whether it is positive. `id` is where it was read, as `file:line`."""

    id: str
    text: str
    positive: bool


@dataclass(frozen=True)
class Opening:
    """The first words of a sentence, and how it went on: `rest` begins with its space."""

    id: str
    prompt: str
    rest: str


@dataclass(frozen=True)
class Reviews:
    """Reviews in the order of their files, and what reading found."""

    reviews: Sequence[Review]
    report: ReadReport


def read_reviews(source: str, *, on_bad_row: sources.OnBadRow = "drop") -> Reviews:
    """Reads rows with the columns `text` and `label` (0 or 1, neg or pos, negative or positive, false or true).

    Args:
        source: a file (.jsonl, .jsonl.gz), a folder of such files, or a hub id, as `prefopt.data.sources.load` takes them.
        on_bad_row: "drop" leaves unusable rows out and counts them by reason; "error" stops at the first.

    Raises:
        DataError: no such source, a damaged file, or no usable row; the message names file and row.
        ConfigError, HubError: of a hub id.
    """
    found: list[Review] = []
    counter, files = ReadCounter(), []
    for name, rows in _parts(source):
        drops, count, before = DropCounter(), 0, len(found)
        for line, row in rows:
            count += 1
            try:
                review = _parse(f"{name}:{line}", row)
            except BadRow as error:
                if on_bad_row == "error":
                    raise DataError(
                        f"{name}:{line}: {error.reason}; mend the row, or leave such rows out with --on-bad-row drop."
                    ) from error
                drops.add(error.reason, f"{name}:{line}")
                continue
            counter.add(Record(review.id, "", (review.text,), Labels(desirable=review.positive)))
            found.append(review)
        files.append(FileReport(name, "text, label", count, len(found) - before, False, drops.result(), ()))
    if not found:
        left_out = "; ".join(f"{file.name}: {describe_drops(file.dropped)}" for file in files)
        raise DataError(f"{source}: no usable row; a review has the columns text and label. Left out: {left_out}.")
    return Reviews(found, counter.result([SourceReport(safe(source), tuple(files), None)]))


def _parts(source: str) -> Iterator[tuple[str, Iterable[tuple[int, Mapping[str, Any] | BadRow]]]]:
    """(name, numbered rows) of each file, or of each split of a hub's data set."""
    paths = sources.find_files(source)
    names = sources.short_names(paths, 1)
    for path in paths:
        yield names[path], sources.read_lines(path, names[path])
    if not paths:
        for split, rows in hub_splits(source):
            yield f"{source}/{safe(split)}", enumerate(rows, start=1)


def _parse(row_id: str, row: Mapping[str, Any] | BadRow) -> Review:
    if isinstance(row, BadRow):
        raise row
    for column in ("text", "label"):
        if column not in row:
            raise BadRow(f"{column} is missing")
    text = check_text(row["text"], "text")
    if not _form(text):
        raise BadRow("text has no word")
    label = _LABELS.get(str(row["label"]).lower())
    if label is None:
        raise BadRow("label is neither 0 or 1 nor neg or pos")
    return Review(row_id, text, label)


def split_folds(reviews: Sequence[Review]) -> dict[Fold, list[Review]]:
    """Every review in its fold, in the order given.

    The fold is drawn by a hash of the text's letters and digits alone, so it does not change with the order of the rows or with
    other rows, and texts that differ in case, punctuation or spacing only stand in one fold.

    Raises:
        DataError: a fold stays empty.
    """
    folds: dict[Fold, list[Review]] = {fold: [] for fold in FOLDS}
    for review in reviews:
        folds[fold_of(review.text)].append(review)
    empty = [fold for fold, members in folds.items() if not members]
    if empty:
        raise DataError(
            f"{len(reviews)} reviews are too few for {len(FOLDS)} folds: none fell to {', '.join(empty)}. Give more reviews."
        )
    return folds


def fold_of(text: str) -> Fold:
    """The fold of a text."""
    point = _digest(f"fold:{_form(text)}") / 2**64
    for fold, share in FOLDS.items():
        point -= share
        if point < 0:
            return fold
    return "language"


def sentences(text: str) -> list[str]:
    """A review's sentences with single spaces: its lines, and lines that are paragraphs cut where sentences end."""
    found: list[str] = []
    for line in _LINE_BREAK.split(text):
        line = " ".join(line.split())
        found += [line] if line.count(" ") < _LONGEST_SENTENCE else _SENTENCE_END.split(line)
    # Shorter than this, the longest prompt would leave nothing to say.
    return [sentence for sentence in found if sentence.count(" ") > PROMPT_WORDS[-1]]


def openings(reviews: Iterable[Review], *, every_length: bool = False) -> list[Opening]:
    """The beginnings of all sentences, each prompt once, in an order drawn by hash: the first n are a sample.

    Args:
        reviews: of one fold.
        every_length: a sentence gives a prompt of each length in `PROMPT_WORDS`; otherwise one, drawn by its hash.
    """
    found: dict[str, Opening] = {}
    for review in reviews:
        for index, sentence in enumerate(sentences(review.text)):
            drawn = PROMPT_WORDS[_digest(f"words:{sentence}") % len(PROMPT_WORDS)]
            for words in PROMPT_WORDS if every_length else (drawn,):
                opening = cut(sentence, words, f"{review.id}/{index}/{words}")
                found.setdefault(opening.prompt, opening)
    return sorted(found.values(), key=lambda opening: _digest(f"order:{opening.prompt}"))


def cut(sentence: str, words: int, id: str) -> Opening:
    """The first `words` words, separated by single spaces, and the rest."""
    parts = sentence.split(" ", words)
    prompt = " ".join(parts[:words])
    return Opening(id, prompt, sentence[len(prompt) :])


def source_name(source: str) -> str:
    """A source as a report names it: the last part of a path, a hub id whole."""
    return safe(Path(source).name if Path(source).exists() else source)


def _form(text: str) -> str:
    return _LETTERS.sub("", text.lower())


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
