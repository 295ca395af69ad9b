"""Digests of records' keys, as columns: what the role split needs of a hundred thousand records, in a few megabytes.

Equality of keys is equality of 64-bit digests; among ten million different keys two agree with probability 3e-6.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prefopt.data.records import Record
from prefopt.errors import DataError

_NOT_LETTERS = re.compile(r"[\W_]+")  # all but letters and digits


@dataclass(frozen=True)
class Keys:
    """One entry per record (n records).

    Args:
        draws: [n] uint64, digest of the key: draws the role, and tells keys apart.
        redraws: [n] uint64, a second digest, for keys that may not be test rows.
        forms: [n] uint64, digest of the key's lower-cased letters and digits; 0 where there are none.
        official_test: [n] bool.
        sources: [n] int32, positions in `source_names`.
    """

    draws: NDArray[np.uint64]
    redraws: NDArray[np.uint64]
    forms: NDArray[np.uint64]
    official_test: NDArray[np.bool_]
    sources: NDArray[np.int32]
    source_names: tuple[str, ...]

    @classmethod
    def of(cls, records: Iterable[Record]) -> Keys:
        """Digests of records in memory.

        Raises:
            DataError: a record without a key.
        """
        writer = KeyWriter()
        names: dict[str, int] = {}
        sources, official = array("i"), array("b")
        for record in records:
            writer.add(record)
            sources.append(names.setdefault(record.source, len(names)))
            official.append(record.official_test)
        return cls(
            **writer.columns(),
            official_test=np.array(official, dtype=bool),
            sources=np.array(sources, dtype=np.int32),
            source_names=tuple(names),
        )

    def take(self, rows: NDArray[np.int64]) -> Keys:
        """The entries of some records."""
        return Keys(
            self.draws[rows], self.redraws[rows], self.forms[rows], self.official_test[rows], self.sources[rows],
            self.source_names,
        )  # fmt: skip


class KeyWriter:
    """Digests record by record."""

    def __init__(self) -> None:
        self._draws, self._redraws, self._forms = array("Q"), array("Q"), array("Q")

    def add(self, record: Record) -> None:
        if not record.key:
            raise DataError(f"{record.id}: the record has no key to split by; `prefopt.data.hh.record_key` makes one.")
        draw, redraw = draw_points(record.key)
        self._draws.append(draw)
        self._redraws.append(redraw)
        letters = _NOT_LETTERS.sub("", record.key.lower())
        self._forms.append(_digest(letters) or 1 if letters else 0)

    def columns(self) -> dict[str, NDArray[np.uint64]]:
        """By name of the field of `Keys`."""
        found = {"draws": self._draws, "redraws": self._redraws, "forms": self._forms}
        return {name: np.array(values, dtype=np.uint64) for name, values in found.items()}


def draw_points(key: str) -> tuple[int, int]:
    """The two digests that decide a key's role, each uniform on [0, 2^64)."""
    return _digest(f"role:{key}"), _digest(f"instead:{key}")


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
