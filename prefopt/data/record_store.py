"""Records in a file: written once while they are read, and parsed again only where somebody asks for one.

A store is two files: `records.jsonl` (text and labels) and `columns.safetensors` (where each record begins, where it was
read, digests of its key). In memory there are some fifty bytes per record, never its text.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from prefopt.data.keys import Keys, KeyWriter
from prefopt.data.records import Labels, Record, Text

_RECORDS, _COLUMNS = "records.jsonl", "columns.safetensors"
_encode = json.JSONEncoder(ensure_ascii=False, check_circular=False).encode


@dataclass(frozen=True)
class Part:
    """A file or hub split that records were read from: its name in their ids, its source, whether it is a test split."""

    name: str
    source: str
    official_test: bool


class RecordWriter:
    """Writes records in the order in which they are read; the parts follow each other, lines ascend within a part."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = (folder / _RECORDS).open("wb")
        self._ends, self._parts, self._lines = array("q"), array("i"), array("q")
        self._keys = KeyWriter()
        self._named: list[Part] = []
        self._digest = hashlib.sha256()
        self._size = 0

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._ends)

    def begin(self, part: Part) -> None:
        """The records that follow were read from `part`."""
        self._named.append(part)

    def add(self, record: Record, line: int) -> None:
        self._keys.add(record)
        text = _encode([record.prompt, record.completions, record.labels.as_list(), record.key]).encode()
        self._digest.update(f"{record.id}\n{record.source}\n{record.official_test}\n{len(text)}\n".encode() + text)
        self._file.write(text)
        self._size += len(text)
        self._ends.append(self._size)
        self._parts.append(len(self._named) - 1)
        self._lines.append(line)

    def finish(self) -> dict[str, Any]:
        """Writes the columns; what `open_records` needs besides the folder, as plain values."""
        self._file.close()
        columns = {
            "ends": np.array(self._ends, dtype=np.int64),
            "parts": np.array(self._parts, dtype=np.int32),
            "lines": np.array(self._lines, dtype=np.int64),
            **self._keys.columns(),
        }
        save_file(columns, self._folder / _COLUMNS)
        return {"parts": [asdict(part) for part in self._named], "content": self._digest.hexdigest()}


class _Store:
    """The open files that records and all selections of them share."""

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self._file = (folder / _RECORDS).open("rb", buffering=0)
        weakref.finalize(self, self._file.close)
        columns = load_file(folder / _COLUMNS)
        self.named = tuple(Part(**part) for part in facts["parts"])
        self.content: str = facts["content"]
        self.begins = np.concatenate([[0], columns["ends"]])
        self.parts, self.lines = columns["parts"], columns["lines"]
        names = {name: i for i, name in enumerate(dict.fromkeys(part.source for part in self.named))}
        of_part = np.array([names[part.source] for part in self.named], dtype=np.int32)
        official = np.array([part.official_test for part in self.named], dtype=bool)
        self.keys = Keys(
            columns["draws"], columns["redraws"], columns["forms"], official[self.parts], of_part[self.parts], tuple(names)
        )

    def id(self, row: int) -> str:
        return f"{self.named[self.parts[row]].name}:{self.lines[row]}"

    def fields(self, row: int) -> list[Any]:
        """Prompt, completions, labels, key, as JSON holds them."""
        begin, end = int(self.begins[row]), int(self.begins[row + 1])
        # pread has no position to share, so threads may read at once; the file is never mapped into memory.
        fields: list[Any] = json.loads(os.pread(self._file.fileno(), end - begin, begin))
        return fields

    def row(self, record_id: str) -> int | None:
        """The row of an id; None when there is none."""
        name, _, line = record_id.rpartition(":")
        part = next((i for i, part in enumerate(self.named) if part.name == name), None)
        if part is None or not line.isdecimal():
            return None
        first, last = np.searchsorted(self.parts, [part, part + 1])
        row = int(first + np.searchsorted(self.lines[first:last], int(line)))
        return row if row < last and self.lines[row] == int(line) else None


class Records(Sequence[Record]):
    """Records on disk, or some of them. An item is made when it is asked for; a slice is a selection, which copies nothing.

    Args:
        store: the open files.
        rows: [n] the records that belong to it, in its order.
    """

    def __init__(self, store: _Store, rows: NDArray[np.int64]) -> None:
        self._store, self._rows = store, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Records: ...
    def __getitem__(self, index: int | slice) -> Record | Records:
        if isinstance(index, slice):
            return Records(self._store, self._rows[index])
        row = int(self._rows[index])
        prompt, completions, labels, key = self._store.fields(row)
        part = self._store.named[self._store.parts[row]]
        return Record(
            self._store.id(row), _text(prompt), tuple(map(_text, completions)), Labels.from_list(labels), key, part.source,
            part.official_test,
        )  # fmt: skip

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def select(self, positions: Sequence[int] | NDArray[np.int64]) -> Records:
        """Some of these records, by position."""
        return Records(self._store, self._rows[np.asarray(positions, dtype=np.int64)])

    @property
    def keys(self) -> Keys:
        """Digests of their keys."""
        return self._store.keys.take(self._rows)

    @property
    def content(self) -> str:
        """sha256 of what was read and of the selection: equal for equal records in equal order."""
        return hashlib.sha256(self._store.content.encode() + self._rows.astype("<i8").tobytes()).hexdigest()

    @property
    def prompts(self) -> Mapping[str, Text]:
        """Prompts by record id, each read when it is asked for."""
        return _Prompts(self._store, self._rows)


class _Prompts(Mapping[str, Text]):
    def __init__(self, store: _Store, rows: NDArray[np.int64]) -> None:
        self._store, self._rows = store, np.sort(rows)

    def __getitem__(self, record_id: str) -> Text:
        row = self._store.row(record_id)
        at = 0 if row is None else int(np.searchsorted(self._rows, row))
        if row is None or at == len(self._rows) or self._rows[at] != row:
            raise KeyError(record_id)
        return _text(self._store.fields(row)[0])

    def __iter__(self) -> Iterator[str]:
        return (self._store.id(int(row)) for row in self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def open_records(folder: Path, facts: Mapping[str, Any]) -> Records:
    """All records of a finished store. The files stay open, so the folder may vanish meanwhile.

    Args:
        folder: where a `RecordWriter` wrote.
        facts: what its `finish` returned.
    """
    store = _Store(folder, facts)
    return Records(store, np.arange(len(store.lines)))


def _text(value: Any) -> Text:
    return value if isinstance(value, str) else tuple(value)
