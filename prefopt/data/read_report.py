"""What reading found: counts by file and reason, never the text of a row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prefopt.data.records import Record
from prefopt.data.rows import content

EXAMPLES = 5
"""How many row ids a report names for each reason."""


@dataclass(frozen=True)
class Dropped:
    """Rows left out for one reason; `examples` are the first ids, as `file:line`."""

    reason: str
    count: int
    examples: tuple[str, ...]


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

    @classmethod
    def of(cls, lengths: Iterable[tuple[int, int]]) -> LengthBaseline | None:
        """From (preferred, other) lengths; None without pairs."""
        counts = {1: 0, -1: 0, 0: 0}
        for preferred, other in lengths:
            counts[(preferred > other) - (preferred < other)] += 1
        return cls(counts[1], counts[-1], counts[0]) if sum(counts.values()) else None

    @property
    def longer_wins(self) -> float:
        """Accuracy of "the longer completion is preferred"; a tie counts as half."""
        return (self.longer + self.ties / 2) / (self.longer + self.shorter + self.ties)


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


@dataclass(frozen=True)
class SourceReport:
    """One source and the length baseline of its pairs, in characters (None without pairs)."""

    name: str
    files: tuple[FileReport, ...]
    length_baseline: LengthBaseline | None


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


def source_report(name: str, files: Sequence[FileReport], records: Iterable[Record]) -> SourceReport:
    """Joins the files of a source and measures the length baseline of its records."""
    lengths = ((len(content(r.completions[0])), len(content(r.completions[1]))) for r in records if is_pair(r))
    return SourceReport(name, tuple(files), LengthBaseline.of(lengths))


def read_report(sources: Sequence[SourceReport], records: Sequence[Record]) -> ReadReport:
    """Counts over all sources."""
    kinds: dict[str, int] = {}
    labels: dict[str, int] = {}
    for record in records:
        kinds[_kind(record)] = kinds.get(_kind(record), 0) + 1
        for name in ("soft_label", "margin", "scores"):
            if getattr(record.labels, name) is not None:
                labels[name] = labels.get(name, 0) + 1
    duplicates, contradictions = _repeats(records)
    return ReadReport(tuple(sources), len(records), kinds, labels, duplicates, contradictions)


def _kind(record: Record) -> str:
    if len(record.completions) > 2:
        return "ranking"
    if record.labels.ranks is not None:
        return "pair"
    return "plain" if record.labels.desirable is None else "labelled"


def _repeats(records: Sequence[Record]) -> tuple[int, int]:
    """(duplicates, contradictions), as `ReadReport` defines them."""
    seen: set[object] = set()
    orders: dict[object, set[object]] = {}
    duplicates = 0
    for record in records:
        prompt, completions, labels = _frozen(record.prompt), tuple(map(_frozen, record.completions)), record.labels
        identity = (prompt, completions, labels)
        duplicates += identity in seen
        seen.add(identity)
        if is_pair(record):
            orders.setdefault((prompt, frozenset(completions)), set()).add(completions)
        elif labels.desirable is not None:
            orders.setdefault((prompt, completions), set()).add(labels.desirable)
    return duplicates, sum(len(found) > 1 for found in orders.values())


def _frozen(text: Any) -> object:
    """Messages are dicts, which have no hash."""
    return text if isinstance(text, str) else tuple((message["role"], message["content"]) for message in text)
