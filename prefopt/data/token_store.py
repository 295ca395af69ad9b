"""Token ids on disk: made once per content, memory-mapped, and turned into examples only where somebody asks for one.

The address of a store is the sha256 of the records (text, ids, labels, selection), the tokenizer (its whole definition
and chat template), the limits, and the code that made it. Every file holds one kind of number: `tokens.bin` all ids,
`ends.bin` where each sequence ends (a prompt, then its completions), `sequences.bin` and `names.bin` where each example
ends in `ends.bin` and in `names.jsonl`, which holds its id and labels.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from prefopt import tokenize as tokenizing
from prefopt.data import read_report, records, rows, token_report
from prefopt.data.record_store import Records
from prefopt.data.records import Example, Labels
from prefopt.data.store_files import code_digest, content_address, new_folder, open_folder
from prefopt.data.token_report import TokenReport
from prefopt.runlog import counter
from prefopt.tokenize import Tokenizing, probe

# What decides how records become ids, besides the libraries: other code means another folder in the cache.
_CODE = (sys.modules[__name__], tokenizing, read_report, records, rows, token_report)
_LIBRARIES = ("transformers", "tokenizers")
_FLUSH = 1 << 18
SHOWN_FROM = 5_000
"""Records from which on progress is shown: a pass of a second or two needs no bar."""


@dataclass(frozen=True)
class Stored:
    """Examples in the order of their records, on disk, and the report."""

    examples: StoredExamples
    report: TokenReport


def tokenize_stored(
    source: Records,
    tokenizer: Any,
    *,
    max_length: int,
    max_completion_length: int | None = None,
    cache: Path,
    console: Console | None = None,
    title: str = "tokenising",
) -> Stored:
    """`prefopt.tokenize.tokenize` through the cache: examples stay on disk, and an equal call later only opens them.

    Args:
        source: records on disk.
        tokenizer: of transformers.
        max_length, max_completion_length: limits, in tokens (see `Tokenizing`).
        cache: folder of all stores.
        console: for progress, and for a message when the cache is damaged.
        title: of the progress bar.

    Raises:
        ConfigError, DataError: as `tokenize` does.
        OutputError: the cache cannot be written.
    """
    # Made before the cache is asked, so that limits out of range are an error whatever the cache holds.
    work = Tokenizing(tokenizer, max_length=max_length, max_completion_length=max_completion_length)
    address = content_address(
        code_digest(*_CODE), source.content, tokenizer_digest(tokenizer), [max_length, max_completion_length]
    )
    folder = cache / "tokens" / address
    facts = open_folder(folder, "token ids", console)
    if facts is None:
        show = counter(console if len(source) >= SHOWN_FROM else None, title)
        with new_folder(folder) as draft:
            highest = _write(draft.path, work.examples(source, show), len(tokenizer))
            facts = draft.facts = {"report": work.report().as_dict(), "highest_id": highest}
    return Stored(StoredExamples(_Arrays(folder, facts["highest_id"])), TokenReport.from_dict(facts["report"]))


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of everything that decides what a tokenizer makes of a text or a conversation, as far as it can be seen.

    That is its definition (vocabulary, merges, normaliser, pre- and post-processing), special tokens, chat template, a
    rendered conversation (templates may write today's date) and the versions of the libraries.
    """
    digest = hashlib.sha256()
    versions = [metadata.version(name) for name in _LIBRARIES]
    options = [type(tokenizer).__qualname__, tokenizer.eos_token_id, getattr(tokenizer, "split_special_tokens", None)]
    # The probe encodes a word, which also takes away a truncation or padding that an earlier caller has left switched on.
    digest.update(json.dumps([versions, options, tokenizer.chat_template, probe(tokenizer)], default=str).encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        digest.update(backend.to_str().encode())
        return digest.hexdigest()
    # A tokenizer written in Python: what it would save is what defines it.
    with tempfile.TemporaryDirectory(prefix="prefopt-") as scratch:
        tokenizer.save_pretrained(scratch)
        for path in sorted(Path(scratch).rglob("*")):
            if path.is_file():
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


class StoredExamples(Sequence[Example]):
    """Examples on disk, or some of them. An item is made when it is asked for; a slice is a selection, which copies nothing.

    Args:
        arrays: the mapped files.
        positions: [n] the examples that belong to it, in its order; None is all.
    """

    def __init__(self, arrays: _Arrays, positions: NDArray[np.int64] | None = None) -> None:
        self._arrays = arrays
        self._positions = np.arange(len(arrays)) if positions is None else positions

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> StoredExamples: ...
    def __getitem__(self, index: int | slice) -> Example | StoredExamples:
        if isinstance(index, slice):
            return StoredExamples(self._arrays, self._positions[index])
        return self._arrays.example(int(self._positions[index]))

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def select(self, positions: Sequence[int] | NDArray[np.int64]) -> StoredExamples:
        """Some of these examples, by position."""
        return StoredExamples(self._arrays, self._positions[np.asarray(positions, dtype=np.int64)])

    @property
    def highest_id(self) -> int:
        """The largest token id of the whole store."""
        return self._arrays.highest_id


class _Arrays:
    """The mapped files of a finished store."""

    def __init__(self, folder: Path, highest_id: int) -> None:
        self.highest_id = highest_id
        self._ends, self._sequences, self._name_ends = (
            np.memmap(folder / f"{name}.bin", dtype="<i8", mode="r") for name in ("ends", "sequences", "names")
        )
        size = (folder / "tokens.bin").stat().st_size // int(self._ends[-1])
        self._tokens = np.memmap(folder / "tokens.bin", dtype=f"<u{size}", mode="r")
        self._names = np.memmap(folder / "names.jsonl", dtype=np.uint8, mode="r")

    def __len__(self) -> int:
        return len(self._sequences)

    def example(self, at: int) -> Example:
        first, last = _range(self._sequences, at)
        begin = int(self._ends[first - 1]) if first else 0
        ends = [end - begin for end in self._ends[first:last].tolist()]
        ids = self._tokens[begin : begin + ends[-1]].tolist()
        prompt, *completions = (tuple(ids[a:b]) for a, b in zip([0, *ends], ends, strict=False))
        name, labels = json.loads(self._names[slice(*_range(self._name_ends, at))].tobytes())
        return Example(name, prompt, tuple(completions), Labels.from_list(labels))


def _range(ends: NDArray[np.int64], at: int) -> tuple[int, int]:
    return int(ends[at - 1]) if at else 0, int(ends[at])


def _write(folder: Path, examples: Iterator[Example], vocabulary: int) -> int:
    """Writes the files of a store; the largest id in it."""
    # As narrow as the vocabulary allows: two bytes per token up to 65,536 entries.
    with (
        _Column(folder / "tokens.bin", "H" if vocabulary <= 1 << 16 else "I") as tokens,
        _Column(folder / "ends.bin", "q") as ends,
        _Column(folder / "sequences.bin", "q") as sequences,
        _Column(folder / "names.bin", "q") as name_ends,
        (folder / "names.jsonl").open("wb") as names,
    ):
        highest = token_count = sequence_count = name_bytes = 0
        for example in examples:
            for ids in (example.prompt_ids, *example.completion_ids):
                highest = max(highest, *ids)
                tokens.extend(ids)
                token_count += len(ids)
                ends.extend((token_count,))
            sequence_count += 1 + len(example.completion_ids)
            sequences.extend((sequence_count,))
            name_bytes += names.write(json.dumps([example.id, example.labels.as_list()]).encode())
            name_ends.extend((name_bytes,))
    return highest


class _Column:
    """A file of numbers of one type (a code of `array`), little-endian, written in pieces."""

    def __init__(self, path: Path, code: str) -> None:
        self._file = path.open("wb")
        self._waiting: array[int] = array(code)

    def __enter__(self) -> _Column:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._file.close()

    def extend(self, values: Sequence[int]) -> None:
        self._waiting.extend(values)
        if len(self._waiting) >= _FLUSH:
            self._flush()

    def _flush(self) -> None:
        if sys.byteorder == "big":
            self._waiting.byteswap()
        self._file.write(self._waiting.tobytes())
        del self._waiting[:]
