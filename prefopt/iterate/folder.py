"""A loop's folder: one loop and one process at a time, and files that are never seen half written."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prefopt.errors import OutputError
from prefopt.files import contents, differences, empty, locked

CONFIG_FILE = "iterate.json"


def round_name(number: int) -> str:
    """The folder of a round, and the beginning of its rows' ids."""
    return f"round-{number:02d}"


def write_text(path: Path, text: str) -> None:
    """Writes beside the place, waits for the disk, and renames; the folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f"{path.name}.partial")
    with staged.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, path)


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines, whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_json(path: Path, value: Any) -> None:
    """JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def claimed(output: Path, config: Mapping[str, Any], *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Holds the folder for this loop, or goes on with what it holds of it.

    Args:
        config: what makes it this loop.

    Raises:
        OutputError: it holds another loop, this one without `resume`, or something else; another process works in it; or it
            cannot be written.
    """
    try:
        with locked(output):
            _prepare(output, json.loads(json.dumps(config)), resume, overwrite)
            yield
    except OSError as error:
        raise OutputError(
            f"{error.filename or output}: {error.strerror or error}; nothing that was finished is lost."
        ) from error


def _prepare(output: Path, config: Any, resume: bool, overwrite: bool) -> None:
    held = _held(output)
    if held is not None:
        if resume and held == config:
            return
        # A loop that stopped before its first samples, as on a bad model, left nothing worth keeping.
        if (output / round_name(1)).exists():
            if resume:
                names = ", ".join(sorted(differences(held, config)))
                raise OutputError(
                    f"{output} holds a loop with other options ({names}), so --resume cannot go on with it: give it the "
                    "options in its config.json, name another folder, or --overwrite it."
                )
            if not overwrite:
                raise OutputError(
                    f"{output} holds a loop already: --resume goes on with it, --overwrite deletes it; or name another folder."
                )
        empty(output)
    write_json(output / CONFIG_FILE, config)


def _held(output: Path) -> Any:
    """The config of the loop in a folder; None for an empty folder. Raises OutputError when `iterate` did not write it."""
    if not contents(output):
        return None
    try:
        held = json.loads((output / CONFIG_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        held = None
    if not isinstance(held, dict) or "loop" not in held:
        raise OutputError(f"{output} is not empty and holds no loop of prefopt iterate; name another --output-dir.")
    return held
