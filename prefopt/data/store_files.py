"""Folders of derived data, made once per content: staged, summed up in a manifest, renamed; verified when opened.

A folder that is absent, cut short or damaged is a miss: what it held is made again from its sources, never guessed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console

from prefopt.errors import OutputError
from prefopt.files import write_json

MANIFEST = "manifest.json"
_CHUNK = 1 << 20


def content_address(*parts: Any) -> str:
    """sha256 over plain values, 32 hex digits: the name of a folder."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def code_digest(*modules: ModuleType) -> str:
    """sha256 of modules' source files: a store made by other code is another store, without a version to remember."""
    digest = hashlib.sha256()
    for module in modules:
        assert module.__file__ is not None
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()


def open_folder(folder: Path, title: str, console: Console | None = None) -> Any | None:
    """The facts that `new_folder` was given, once sizes and checksums of all files are verified; None for a miss.

    A damaged folder is removed with a message on the console (a warning without one).
    """
    if not folder.exists():
        return None
    problem, facts = _verify(folder)
    if problem is None:
        return facts
    message = f"{title} in the cache are damaged ({problem}) and are made again: {folder}"
    if console is not None:
        console.print(message, highlight=False, soft_wrap=True, markup=False)
    else:
        warnings.warn(message, stacklevel=2)
    shutil.rmtree(folder, ignore_errors=True)
    return None


class Draft:
    """A folder that is being made. What stands in `facts` at the end goes into its manifest."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts: Any = None


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Draft]:
    """A staged folder beside `folder`, which takes its name when the block ends without an error.

    Raises:
        OutputError: the cache cannot be written.
    """
    staged = folder.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        staged.mkdir(parents=True)
        draft = Draft(staged)
        yield draft
        files = {path.name: [path.stat().st_size, _checksum(path)] for path in sorted(staged.iterdir())}
        write_json(staged / MANIFEST, {"files": files, "facts": draft.facts})
        try:
            os.rename(staged, folder)
        except OSError:
            # Another process may have made the same folder meanwhile; a damaged one that cannot be removed is none.
            if not folder.exists() or _verify(folder)[0] is not None:
                raise
    except OSError as error:
        raise OutputError(
            f"the cache {folder.parent} cannot be written ({error.strerror or error}); set PREFOPT_CACHE to a folder with room."
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _verify(folder: Path) -> tuple[str | None, Any]:
    """(what is wrong or None, facts)."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, (size, checksum) in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes, expected {size:,}", None
            if _checksum(path) != checksum:
                return f"{name} has another checksum", None
        return None, manifest["facts"]
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}", None
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read", None


def _checksum(path: Path) -> int:
    # CRC: the enemy is a crash or a bad disk, and several gigabytes a second keep a warm start short. Read, not mapped,
    # so that the pages do not count as this process's memory.
    value = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value
