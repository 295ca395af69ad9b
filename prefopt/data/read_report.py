"""What reading found: counts by file and reason, never the text of a row."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from prefopt.data.records import Record, Text

EXAMPLES = 5
"""How many row ids a report names for each reason."""


@dataclass(frozen=True)
class Dropped:
    """Rows left out for one reason; `examples` are the first ids, as `file:line`."""

    reason: str
    count: int
    examples: tuple[str, ...]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Dropped:
        return cls(values["reason"], values["count"], tuple(values["examples"]))


class DropCounter:
    """Counts dropped rows by reason, keeping the first ids of each."""

    def __init__(self) -> None:
        self._ids: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}

    def add(self, reason: str, row_id: str) -> None:
        self._counts[reason] = self._counts.get(reason, 0) + 1
        ids = self._ids.setdefault(reason, [])
        if len(ids) < EXAMPLES:
            ids.append(row_id)

    def result(self) -> tuple[Dropped, ...]:
        """All reasons, the most frequent first."""
        reasons = sorted(self._counts, key=lambda reason: (-self._counts[reason], reason))
        return tuple(Dropped(reason, self._counts[reason], tuple(self._ids[reason])) for reason in reasons)


def describe_drops(dropped: Sequence[Dropped]) -> str:
    """One line for an error message: counts, reasons and example rows."""
    return "; ".join(f"{drop.count} x {drop.reason} ({', '.join(drop.examples)})" for drop in dropped) or "no rows at all"


@dataclass(frozen=True)
class LengthBaseline:
    """How far length alone explains the order of pairs: counts of pairs whose preferred side is longer, shorter, equal."""

    longer: int
    shorter: int
    ties: int

    @property
    def longer_wins(self) -> float:
        """Accuracy of "the longer completion is preferred"; a tie counts as half."""
        return (self.longer + self.ties / 2) / (self.longer + self.shorter + self.ties)


class LengthCounter:
    """Counts for a `LengthBaseline`, pair by pair."""

    def __init__(self) -> None:
        self._counts = {1: 0, -1: 0, 0: 0}

    def add(self, preferred: int, other: int) -> None:
        self._counts[(preferred > other) - (preferred < other)] += 1

    def result(self) -> LengthBaseline | None:
        """None without pairs."""
        counts = self._counts
        return LengthBaseline(counts[1], counts[-1], counts[0]) if sum(counts.values()) else None


def is_pair(record: Record) -> bool:
    """True for two completions in a strict order, the preferred one first."""
    return record.labels.ranks == (0, 1)


@dataclass(frozen=True)
class FileReport:
    """One file, or one split of a hub's data set.

    Args:
        name: as in the ids of its rows.
        format: what its rows are; "" when no row was understood.
        rows: rows read, blank lines not counted.
        kept: rows that became records.
        official_test: its name begins with "test".
        dropped: the other rows by reason.
        ignored_columns: columns that nothing reads, which is where a misspelled name shows.
    """

    name: str
    format: str
    rows: int
    kept: int
    official_test: bool
    dropped: tuple[Dropped, ...]
    ignored_columns: tuple[str, ...]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FileReport:
        drops = tuple(map(Dropped.from_dict, values["dropped"]))
        return cls(**{**values, "dropped": drops, "ignored_columns": tuple(values["ignored_columns"])})


@dataclass(frozen=True)
class SourceReport:
    """One source and the length baseline of its pairs, in characters (None without pairs)."""

    name: str
    files: tuple[FileReport, ...]
    length_baseline: LengthBaseline | None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SourceReport:
        baseline = values["length_baseline"]
        files = tuple(map(FileReport.from_dict, values["files"]))
        return cls(values["name"], files, LengthBaseline(**baseline) if baseline else None)


@dataclass(frozen=True)
class ReadReport:
    """Everything that reading found.

    Args:
        sources: in the order in which they were named.
        records: how many records came out.
        kinds: records by kind: pair, ranking, labelled, plain.
        labels: records that carry an optional label, by its name.
        duplicates: records equal to an earlier one in prompt, completions and labels. They are kept.
        contradictions: prompts with two completions that stand in both orders, or one completion with both labels. Kept.
    """

    sources: tuple[SourceReport, ...]
    records: int
    kinds: Mapping[str, int]
    labels: Mapping[str, int]
    duplicates: int
    contradictions: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ReadReport:
        """The inverse of `as_dict`, also after JSON has turned tuples into lists."""
        return cls(**{**values, "sources": tuple(map(SourceReport.from_dict, values["sources"]))})


class ReadCounter:
    """Counts for a `ReadReport`, record by record; of each it keeps three 64-bit digests."""

    def __init__(self) -> None:
        self._kinds: dict[str, int] = {}
        self._labels: dict[str, int] = {}
        self._identities = array("Q")
        # What is ordered (or labelled), and how.
        self._groups, self._orders = array("Q"), array("Q")

    def add(self, record: Record) -> None:
        kind = _kind(record)
        self._kinds[kind] = self._kinds.get(kind, 0) + 1
        for name in ("soft_label", "margin", "scores", "utility_id"):
            if getattr(record.labels, name) is not None:
                self._labels[name] = self._labels.get(name, 0) + 1
        prompt, completions = _digest(record.prompt), [_digest(text) for text in record.completions]
        joined = b"".join(completions)
        self._identities.append(_number(b"row", prompt, joined, repr(record.labels).encode()))
        if is_pair(record):
            self._groups.append(_number(b"pair", prompt, *sorted(completions)))
            self._orders.append(_number(joined))
        elif record.labels.desirable is not None:
            self._groups.append(_number(b"label", prompt, joined))
            self._orders.append(int(record.labels.desirable))

    def result(self, sources: Sequence[SourceReport]) -> ReadReport:
        """Counts over all records that were added."""
        identities = np.array(self._identities, dtype=np.uint64)
        ordered = np.stack([np.array(column, dtype=np.uint64) for column in (self._groups, self._orders)], axis=1)
        _, orders_of = np.unique(np.unique(ordered, axis=0)[:, 0], return_counts=True)
        return ReadReport(
            sources=tuple(sources),
            records=len(identities),
            kinds=self._kinds,
            labels=self._labels,
            duplicates=len(identities) - len(np.unique(identities)),
            contradictions=int((orders_of > 1).sum()),
        )


def _kind(record: Record) -> str:
    if len(record.completions) > 2:
        return "ranking"
    if record.labels.ranks is not None:
        return "pair"
    return "plain" if record.labels.desirable is None else "labelled"


def _digest(text: Text) -> bytes:
    """16 bytes; text and a conversation never agree."""
    content = b"t" + text.encode() if isinstance(text, str) else b"c" + json.dumps(text).encode()
    return hashlib.blake2b(content, digest_size=16).digest()


def _number(*parts: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(b"".join(parts), digest_size=8).digest(), "big")
