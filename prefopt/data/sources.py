"""From the names of sources (files, folders, hub ids) to records and a report of what was left out."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from prefopt.data.hh import record_key, to_chat
from prefopt.data.hub import hub_splits, is_hub_id
from prefopt.data.read_report import (
    DropCounter,
    FileReport,
    ReadReport,
    SourceReport,
    describe_drops,
    read_report,
    source_report,
)
from prefopt.data.records import Record
from prefopt.data.rows import BadRow, MixedFormats, safe
from prefopt.data.trl_formats import Format, Style, parse, unused_columns
from prefopt.errors import ConfigError, DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
OnBadRow = Literal["drop", "error"]
_Row = tuple[int, Mapping[str, Any] | BadRow]


@dataclass(frozen=True)
class Loaded:
    """Records in the order of their sources, and what reading found."""

    records: tuple[Record, ...]
    report: ReadReport


@dataclass(frozen=True)
class _Options:
    on_bad_row: OnBadRow
    as_chat: bool
    limit: int | None


@dataclass(frozen=True)
class _Part:
    """A file or a hub split: its name in row ids, whether it is an official test split, its rows."""

    name: str
    official_test: bool
    rows: Iterator[_Row]


def load(sources: Sequence[str], *, on_bad_row: OnBadRow = "drop", as_chat: bool = False, limit: int | None = None) -> Loaded:
    """Reads preference data.

    A source is a file (.jsonl, .jsonl.gz; .json with one object per line), a folder (all such files in it), or a hub id
    (`owner/name`, `owner/name:subset`). What exists locally is never looked up on the hub. The format is found from the
    columns (`prefopt.data.trl_formats`). Files and splits named test* are marked as the official test split.

    Args:
        sources: at least one.
        on_bad_row: "drop" leaves unusable rows out and counts them by reason; "error" stops at the first.
        as_chat: turns text into conversations, which the model's chat template then renders.
        limit: at most so many records of each file or hub split.

    Raises:
        ConfigError: an option out of range, or the `data` extra is missing.
        DataError: a file that is missing or damaged, formats mixed in a file, or a source without one usable row.
        HubError: a hub data set that cannot be had.
    """
    if not sources:
        raise ConfigError("no data source is named; give a .jsonl file, a folder or a hub id.")
    if on_bad_row not in ("drop", "error"):
        raise ConfigError(f"on_bad_row is {on_bad_row!r}; it must be 'drop' or 'error'.")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; it must be at least 1.")
    options = _Options(on_bad_row, as_chat, limit)
    files = {source: _find_files(source) for source in sources}
    if len(files) < len(sources):
        raise ConfigError(f"a data source is named twice in {', '.join(sources)}.")
    file_names = _short_names([path for paths in files.values() for path in paths], 2)
    source_names = _short_names([Path(source) for source, paths in files.items() if paths], 1)
    records: list[Record] = []
    reports: list[SourceReport] = []
    for source, paths in files.items():
        name = source_names[Path(source)] if paths else source
        found, report = _read_source(name, _file_parts(paths, file_names) if paths else _hub_parts(source), options)
        records.extend(found)
        reports.append(report)
    return Loaded(tuple(records), read_report(reports, records))


def _read_source(name: str, parts: Iterator[_Part], options: _Options) -> tuple[list[Record], SourceReport]:
    records: list[Record] = []
    reports: list[FileReport] = []
    for part in parts:
        found, report = _read_part(part, name, options)
        records.extend(found)
        reports.append(report)
    if not records:
        drops = "; ".join(f"{report.name}: {describe_drops(report.dropped)}" for report in reports)
        raise DataError(f"{name}: no usable row. Left out: {drops or 'it has no rows'}.")
    return records, source_report(name, reports, records)


def _read_part(part: _Part, source: str, options: _Options) -> tuple[list[Record], FileReport]:
    records: list[Record] = []
    drops = DropCounter()
    expected: tuple[Format, Style] | None = None
    ignored: set[str] = set()
    rows = 0
    for line, row in part.rows:
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
        records.append(Record(row_id, parsed.prompt, parsed.completions, parsed.labels, key, source, part.official_test))
        if len(records) == options.limit:
            break
    if not rows:
        drops.add("empty file", part.name)
        if options.on_bad_row == "error":
            raise DataError(f"{part.name}: the file is empty; expected one JSON object per line.")
    name = f"{expected[0].name}, {expected[1]}" if expected else ""
    return records, FileReport(part.name, name, rows, len(records), part.official_test, drops.result(), tuple(sorted(ignored)))


def _find_files(source: str) -> list[Path]:
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


def _short_names(paths: Sequence[Path], least: int) -> dict[Path, str]:
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


def _file_parts(paths: Sequence[Path], names: Mapping[Path, str]) -> Iterator[_Part]:
    for path in paths:
        yield _Part(names[path], path.name.startswith("test"), _read_lines(path, names[path]))


def _read_lines(path: Path, name: str) -> Iterator[_Row]:
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
        raise DataError(f"{name}: cannot be read ({error.strerror or error}).") from error


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


def _hub_parts(source: str) -> Iterator[_Part]:
    for split, rows in hub_splits(source):
        yield _Part(f"{source}/{safe(split)}", split.startswith("test"), zip(itertools.count(1), rows, strict=False))
