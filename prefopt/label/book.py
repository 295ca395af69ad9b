"""Judgements on disk: kept batch by batch before the next batch is asked for, and never asked for twice.

A book is named by all that its judgements depend on (labeller, how it is asked, pairs, seed), so other settings have another
book. It grows by whole batches: one that a crash cut short is dropped, and sampled rationales come out as without the crash.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefopt.errors import OutputError
from prefopt.files import parse_json
from prefopt.label.labellers import Judgement, Pair


def book_name(identity: str, pairs: Sequence[Pair], seed: int, batch: int) -> str:
    """The file name of a book."""
    digest = hashlib.sha256(json.dumps([identity, seed, batch], ensure_ascii=False).encode())
    for pair in pairs:
        digest.update(json.dumps([pair.id, pair.prompt, pair.a, pair.b], ensure_ascii=False).encode())
    return f"{digest.hexdigest()[:16]}.jsonl"


class Book:
    """The judgements of a list of pairs, in its order.

    Args:
        path: of the book; made with its first batch.
        pairs: that it is about.
        batch: pairs of a batch.

    Raises:
        OutputError: the file holds something else.
    """

    def __init__(self, path: Path, pairs: Sequence[Pair], batch: int) -> None:
        self._path = path
        self._ids = [pair.id for pair in pairs]
        self.judgements: list[Judgement] = []
        self._read(batch)

    def append(self, judgements: Sequence[Judgement]) -> None:
        """Returns when the judgements of the next pairs are on the disk.

        Raises:
            OutputError: the disk is full, or the folder cannot be written.
        """
        begin = len(self.judgements)
        lines = [
            json.dumps({"id": self._ids[begin + i], **_plain(judgement)}, ensure_ascii=False) + "\n"
            for i, judgement in enumerate(judgements)
        ]
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                file.write("".join(lines).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"{self._path} cannot be written ({error.strerror}); labels so far are kept.") from error
        self.judgements += judgements

    def _read(self, batch: int) -> None:
        data = self._path.read_bytes() if self._path.exists() else b""
        lines = data.rpartition(b"\n")[0].splitlines(keepends=True)
        whole = len(lines) if len(lines) == len(self._ids) else len(lines) // batch * batch
        lines = [line if line.endswith(b"\n") else line + b"\n" for line in lines[:whole]]
        kept = sum(map(len, lines))
        if kept < len(data):
            with self._path.open("r+b") as file:
                file.truncate(kept)
                os.fsync(file.fileno())
        for number, line in enumerate(lines, start=1):
            try:
                found = parse_json(line)
                if found["id"] != self._ids[number - 1]:
                    raise ValueError("another row's")
                self.judgements.append(_judgement(found))
            except (ValueError, KeyError, TypeError, IndexError) as error:
                raise OutputError(
                    f"{self._path}:{number}: not its row's label ({error}). Delete the file to have all rows labelled anew."
                ) from error


def _plain(judgement: Judgement) -> dict[str, Any]:
    """JSON has no NaN: what could not be read is null."""
    orders, scores = judgement.orders, judgement.scores
    return {
        "p": _number(judgement.p),
        "orders": None if orders is None else [_number(value) for value in orders],
        "scores": None if scores is None else [_number(value) for value in scores],
        "rationales": list(judgement.rationales),
        "hard": judgement.hard,
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _judgement(found: Any) -> Judgement:
    orders, scores = _two(found["orders"]), _two(found["scores"])
    return Judgement(_float(found["p"]), orders, scores, tuple(found["rationales"]), bool(found["hard"]))


def _two(values: Any) -> tuple[float, float] | None:
    if values is None:
        return None
    one, other = map(_float, values)
    return one, other


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)
