"""Files and folders that are never seen half written, and folders that one process works in at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prefopt.errors import OutputError

LOCK = ".lock"
"""The file in a folder that the process which works there holds; it is let go of when the process ends, however it ends."""


def parse_json(text: str | bytes) -> Any:
    """A JSON text. Raises JSONDecodeError for one that is none, and for one whose brackets are nested too deep to be read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise json.JSONDecodeError("brackets nested too deep", "", 0) from error


def write_json(path: Path, value: Any) -> None:
    """Writes JSON beside its place and renames it; the folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f"{path.name}.partial")
    staged.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(staged, path)


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """A folder beside its place for the block to fill, which takes its place when the block ends well."""
    staged = target.with_name(f".{target.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        yield staged
        shutil.rmtree(target, ignore_errors=True)
        os.replace(staged, target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder for this process; it is made if need be.

    Raises:
        OutputError: another process holds it; it is a file, or cannot be written.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder / LOCK, timeout=0))
        except Timeout as error:
            raise OutputError(f"another process works in {folder}: wait for it, end it, or name another folder.") from error
        except FileExistsError as error:
            raise OutputError(f"{folder} is a file; name a folder.") from error
        except (OSError, ValueError) as error:  # ValueError: a name that no system takes
            reason = error.strerror if isinstance(error, OSError) else error
            raise OutputError(f"{folder} cannot be written ({reason}); name another folder.") from error
        yield


def contents(folder: Path) -> list[Path]:
    """What a locked folder holds besides the lock."""
    return [path for path in folder.iterdir() if path.name != LOCK]


def empty(folder: Path) -> None:
    """Deletes what a locked folder holds besides the lock; links, not what they lead to."""
    for path in contents(folder):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def differences(one: Any, other: Any, path: str = "") -> set[str]:
    """The dotted names at which two trees of plain values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = one.keys() | other.keys()
        return set().union(*(differences(one.get(n), other.get(n), f"{path}.{n}" if path else n) for n in names))
    return set() if one == other else {path}
