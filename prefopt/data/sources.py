"""From the names of sources (files, folders, hub ids) to records and a report of what was left out."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from rich.console import Console

from prefopt.data import hh, keys, read_report, record_store, records, rows, trl_formats
from prefopt.data.hh import record_key, to_chat
from prefopt.data.hub import hub_splits, is_hub_id
from prefopt.data.read_report import (
    DropCounter,
    FileReport,
    LengthCounter,
    ReadCounter,
    ReadReport,
    SourceReport,
    describe_drops,
    is_pair,
)
from prefopt.data.record_store import Part, Records, RecordWriter, open_records
from prefopt.data.records import Record
from prefopt.data.rows import BadRow, MixedFormats, content, safe
from prefopt.data.store_files import code_digest, content_address, new_folder, open_folder
from prefopt.data.trl_formats import Format, Style, parse, unused_columns
from prefopt.errors import ConfigError, DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
OnBadRow = Literal["drop", "error"]
_Row = tuple[int, Mapping[str, Any] | BadRow]
# What decides how a file is read: other code means another folder in the cache.
_CODE = (sys.modules[__name__], hh, keys, read_report, record_store, records, rows, trl_formats)


@dataclass(frozen=True)
class Loaded:
    """Records in the order of their sources, on disk, and what reading found."""

    records: Records
    report: ReadReport


@dataclass(frozen=True)
class _Options:
    on_bad_row: OnBadRow
    as_chat: bool
    limit: int | None


@dataclass(frozen=True)
class _Rows:
    """A part and its rows, read as they are asked for."""

    part: Part
    rows: Iterator[_Row]


def load(
    sources: Sequence[str],
    *,
    on_bad_row: OnBadRow = "drop",
    as_chat: bool = False,
    limit: int | None = None,
    cache: Path | None = None,
    console: Console | None = None,
) -> Loaded:
    """Reads preference data.

    A source is a file (.jsonl, .jsonl.gz; .json with one object per line), a folder (all such files in it), or a hub id
    (`owner/name`, `owner/name:subset`). What exists locally is never looked up on the hub. The format is found from the
    columns (`prefopt.data.trl_formats`). Files and splits named test* are marked as the official test split.

    Records go to disk as they are read, so memory does not grow with their text. With a cache, files of equal bytes are
    read once; hub data sets have no bytes to compare and are read every time.

    Args:
        sources: at least one.
        on_bad_row: "drop" leaves unusable rows out and counts them by reason; "error" stops at the first.
        as_chat: turns text into conversations, which the model's chat template then renders.
        limit: at most so many records of each file or hub split.
        cache: folder for what was read; None uses a temporary file that goes with the records.
        console: for a message when the cache is damaged.

    Raises:
        ConfigError: an option out of range, or the `data` extra is missing.
        DataError: a file that is missing or damaged, formats mixed in a file, or a source without one usable row.
        HubError: a hub data set that cannot be had.
        OutputError: the cache cannot be written.
    """
    if not sources:
        raise ConfigError("no data source is named; give a .jsonl file, a folder or a hub id.")
    if on_bad_row not in ("drop", "error"):
        raise ConfigError(f"on_bad_row is {on_bad_row!r}; it must be 'drop' or 'error'.")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; it must be at least 1.")
    options = _Options(on_bad_row, as_chat, limit)
    files = {source: find_files(source) for source in sources}
    if len(files) < len(sources):
        raise ConfigError(f"a data source is named twice in {', '.join(sources)}.")
    file_names = short_names([path for paths in files.values() for path in paths], 2)
    source_names = short_names([Path(source) for source, paths in files.items() if paths], 1)
    named = {source: source_names[Path(source)] if paths else source for source, paths in files.items()}

    def read(folder: Path) -> dict[str, Any]:
        parts = {
            name: _file_rows(files[source], file_names, name) if files[source] else _hub_rows(source)
            for source, name in named.items()
        }
        return _write(folder, parts, options)

    if cache is None or not all(files.values()):
        with tempfile.TemporaryDirectory(prefix="prefopt-") as scratch:
            return _loaded(Path(scratch), read(Path(scratch)))
    contents = [[named[s], file_names[path], path.name, _sha256(path, file_names[path])] for s in files for path in files[s]]
    folder = cache / "records" / content_address(code_digest(*_CODE), asdict(options), contents)
    facts = open_folder(folder, "records", console)
    if facts is None:
        with new_folder(folder) as draft:
            draft.facts = read(draft.path)
            return _loaded(draft.path, draft.facts)
    return _loaded(folder, facts)


def _loaded(folder: Path, facts: Mapping[str, Any]) -> Loaded:
    return Loaded(open_records(folder, facts), ReadReport.from_dict(facts["report"]))


def _write(folder: Path, sources: Mapping[str, Iterator[_Rows]], options: _Options) -> dict[str, Any]:
    """Reads all sources into a record store; the facts to open it with, and the report."""
    counter = ReadCounter()
    with RecordWriter(folder) as writer:
        reports = [_read_source(name, rows, options, writer, counter) for name, rows in sources.items()]
        return {**writer.finish(), "report": counter.result(reports).as_dict()}


def _read_source(
    name: str, parts: Iterator[_Rows], options: _Options, writer: RecordWriter, counter: ReadCounter
) -> SourceReport:
    before, lengths = len(writer), LengthCounter()
    reports: list[FileReport] = []
    for part in parts:
        writer.begin(part.part)
        for line, record in _read_part(part, options, reports):
            writer.add(record, line)
            counter.add(record)
            if is_pair(record):
                lengths.add(*(len(content(text)) for text in record.completions))
    if len(writer) == before:
        drops = "; ".join(f"{report.name}: {describe_drops(report.dropped)}" for report in reports)
        raise DataError(f"{name}: no usable row. Left out: {drops or 'it has no rows'}.")
    return SourceReport(name, tuple(reports), lengths.result())


def _read_part(found: _Rows, options: _Options, reports: list[FileReport]) -> Iterator[tuple[int, Record]]:
    """(line, record) of the usable rows; at the end the part's report is appended to `reports`."""
    part = found.part
    drops = DropCounter()
    expected: tuple[Format, Style] | None = None
    ignored: set[str] = set()
    rows = kept = 0
    for line, row in found.rows:
        rows += 1
        row_id = f"{part.name}:{line}"
        try:
            if isinstance(row, BadRow):
                raise row
            parsed, expected = parse(row, expected)
            ignored |= unused_columns(row, expected[0])
            parsed = to_chat(parsed) if options.as_chat else parsed
        except MixedFormats as error:
            raise DataError(f"{row_id}: {error}; use one format per file, all text or all conversational.") from error
        except BadRow as error:
            if options.on_bad_row == "error":
                raise DataError(
                    f"{row_id}: {error.reason}; mend the row, or leave such rows out with on_bad_row='drop'."
                ) from error
            drops.add(error.reason, row_id)
            continue
        key = record_key(parsed.prompt, parsed.completions)
        kept += 1
        yield line, Record(row_id, parsed.prompt, parsed.completions, parsed.labels, key, part.source, part.official_test)
        if kept == options.limit:
            break
    if not rows:
        drops.add("empty file", part.name)
        if options.on_bad_row == "error":
            raise DataError(f"{part.name}: the file is empty; expected one JSON object per line.")
    name = f"{expected[0].name}, {expected[1]}" if expected else ""
    reports.append(FileReport(part.name, name, rows, kept, part.official_test, drops.result(), tuple(sorted(ignored))))


def find_files(source: str) -> list[Path]:
    """The files of a local source; none for a hub id.

    Raises:
        DataError: nothing of that name, another suffix, a folder without data, or a link out of the folder.
    """
    path = Path(source)
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"{source}: expected a file that ends in {', '.join(SUFFIXES)}.")
        return [path]
    if path.is_dir():
        return _walk(path)
    if is_hub_id(source) and not source.endswith(SUFFIXES):
        return []
    raise DataError(f"{source}: no such file or folder, and no hub id of the form owner/name or owner/name:subset.")


def _walk(folder: Path) -> list[Path]:
    root = folder.resolve()
    found: dict[Path, Path] = {}
    for parent, folders, files in os.walk(folder):
        # Downloaders keep their own records in hidden folders.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in [*folders, *sorted(files)]:
            path = Path(parent, name)
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise DataError(f"{path}: a link that leaves the folder {folder}; copy what it names, or name it as a source.")
            if name.endswith(SUFFIXES) and not name.startswith(".") and path.is_file():
                # A link and its target inside the folder are one file.
                found.setdefault(path.resolve(), path)
    if not found:
        raise DataError(f"{folder}: a folder without {', '.join(SUFFIXES)} files.")
    return list(found.values())


def short_names(paths: Sequence[Path], least: int) -> dict[Path, str]:
    """The last `least` parts of each path, and more of them only where that is needed to tell two paths apart.

    Raises:
        ConfigError: one file is reached through two sources.
    """
    parts = {path: path.resolve().parts for path in paths}
    if len(set(parts.values())) < len(paths):
        twice = next(path for path in paths if list(parts.values()).count(parts[path]) > 1 or paths.count(path) > 1)
        raise ConfigError(f"{twice} is read through two sources; name each file once.")
    names: dict[Path, str] = {}
    for path in paths:
        depth = least
        while sum(other[-depth:] == parts[path][-depth:] for other in parts.values()) > 1:
            depth += 1
        names[path] = "/".join(safe(part) for part in parts[path][-depth:])
    return names


def _file_rows(paths: Sequence[Path], names: Mapping[Path, str], source: str) -> Iterator[_Rows]:
    for path in paths:
        yield _Rows(Part(names[path], source, path.name.startswith("test")), read_lines(path, names[path]))


def _sha256(path: Path, name: str) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: OSError) -> DataError:
    return DataError(f"{name}: cannot be read ({error.strerror or error}).")


def read_lines(path: Path, name: str) -> Iterator[_Row]:
    """(line number, row or what is wrong with it); blank lines are no rows.

    Raises:
        DataError: the file cannot be opened, its compression is damaged, or it is one JSON array.
    """
    line = 0
    try:
        with gzip.open(path, "rb") if name.endswith(".gz") else open(path, "rb") as file:
            for raw in file:
                line += 1
                raw = raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
                if line == 1 and raw.lstrip().startswith(b"["):
                    raise DataError(f"{name}:1: a JSON array; expected one JSON object per line (convert it with jq -c '.[]').")
                if raw.strip():
                    yield line, _read_row(raw)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{name}:{line + 1}: the compressed file is damaged or cut off ({error}).") from error
    except OSError as error:
        raise _unreadable(name, error) from error


def _read_row(raw: bytes) -> Mapping[str, Any] | BadRow:
    try:
        row = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        return BadRow("not UTF-8")
    # RecursionError: brackets nested thousands deep. ValueError: broken JSON, or a number of thousands of digits.
    except (ValueError, RecursionError):
        return BadRow("broken JSON")
    return row if isinstance(row, dict) else BadRow("not a JSON object")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _hub_rows(source: str) -> Iterator[_Rows]:
    for split, found in hub_splits(source):
        part = Part(f"{source}/{safe(split)}", source, split.startswith("test"))
        yield _Rows(part, zip(itertools.count(1), found, strict=False))
