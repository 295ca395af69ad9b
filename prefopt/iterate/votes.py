"""People as labellers: a page to vote on, which stands alone, and the votes that come back from it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from prefopt.errors import DataError
from prefopt.files import parse_json
from prefopt.iterate.folder import write_text
from prefopt.iterate.labels import Label, LabelBook
from prefopt.iterate.options import SIDES, draws
from prefopt.iterate.samples import Row
from prefopt.stages import content_key

PAGE_FILE, VOTES_FILE = "label.html", "votes.jsonl"
TIE = "tie"


def write_page(folder: Path, rows: Sequence[Row], seed: int, number: int) -> Path:
    """folder/label.html: prompts with two completions each, on sides drawn by the seed; nothing says which is which.

    The page asks the network for nothing (its policy forbids it), keeps votes in the browser and hands them out as JSON lines.
    """
    environment = Environment(
        loader=PackageLoader("prefopt.iterate", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    script = files("prefopt.iterate").joinpath("templates", "label.js").read_text(encoding="utf-8")
    shown = [
        {"id": row.id, "prompt": row.prompt, "left": _left(row, seed, number), "completions": row.completions} for row in rows
    ]
    page = environment.get_template("label.html.jinja").render(
        name=folder.name,
        # Votes that a browser kept belong to these very rows.
        content={"key": f"prefopt {folder.name} {content_key([asdict(row) for row in rows])}", "rows": shown},
        file=f"votes-{folder.name}.jsonl",
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
    )
    write_text(folder / PAGE_FILE, page)
    return folder / PAGE_FILE


def _left(row: Row, seed: int, number: int) -> int:
    return int(draws(seed, SIDES, number, int(row.id.rpartition(":")[2])).integers(2))


def import_votes(path: Path, book: LabelBook, rows: Sequence[Row]) -> int:
    """Adds votes as labels: all of the file, or nothing where a line cannot be used. Votes that are labels already are no news.

    A line is `{"id": "round-01:17", "preferred": 0, "left": 1}`: `preferred` is 0 or 1, which completion of samples.jsonl, or
    "tie", which becomes the soft label 0.5; `left`, which one stood on the left, may be absent.

    Returns:
        How many labels are new.

    Raises:
        DataError: file and line of a row that this round does not have, of a second and different vote on a row, or of what is
            no vote at all.
    """
    found = read_votes(path, rows)
    for label, line in found.values():
        earlier = book.labels.get(label.id)
        if earlier is not None and not _same_vote(earlier, label):
            raise DataError(f"{path}:{line}: {label.id} has another vote in labels.jsonl, from an import before. {_KEEP}")
    fresh = [label for label, _ in found.values() if label.id not in book.labels]
    if fresh:
        book.append(fresh)
    return len(fresh)


def read_votes(path: Path, rows: Sequence[Row], what: str = "round") -> dict[str, tuple[Label, int]]:
    """The votes of a file as labels, each with its line, by row.

    Args:
        what: the rows belong to, for messages: a round of a loop, or a page.

    Raises:
        DataError: as `import_votes`.
    """
    known = {row.id for row in rows}
    found: dict[str, tuple[Label, int]] = {}
    for number, text in enumerate(_lines(path), start=1):
        if not text.strip():
            continue
        where = f"{path}:{number}"
        label = _parse(text, where)
        if label.id not in known:
            other = label.id.rpartition(":")[0] or f"no {what}"
            raise DataError(
                f"{where}: {label.id!r} is no row of this {what} ({rows[0].id} to {rows[-1].id}), but of {other}. Votes are "
                f"for the {what} that waits for them."
            )
        earlier = found.setdefault(label.id, (label, number))
        if not _same_vote(earlier[0], label):
            raise DataError(f"{where}: {label.id} has another vote in line {earlier[1]}. {_KEEP}")
    return found


_KEEP = "Keep one of the two."


def _same_vote(one: Label, other: Label) -> bool:
    return (one.ranks, one.soft_label) == (other.ranks, other.soft_label)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise DataError(f"{path}: votes cannot be read ({reason}).") from error


def _parse(text: str, where: str) -> Label:
    try:
        vote: Any = parse_json(text)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}).") from error
    if not isinstance(vote, dict) or not isinstance(vote.get("id"), str):
        raise DataError(f'{where}: expected {{"id": ..., "preferred": ...}}, got {text[:60]!r}.')
    preferred, left = vote.get("preferred"), vote.get("left")
    if isinstance(preferred, bool) or preferred not in (0, 1, TIE):
        raise DataError(
            f"{where}: preferred is {preferred!r}; expected 0 or 1 (the completion's place in samples.jsonl) or {TIE!r}."
        )
    if isinstance(left, bool) or left not in (0, 1, None):
        raise DataError(f"{where}: left is {left!r}; expected 0 or 1, or nothing.")
    return Label(vote["id"], (1, 0) if preferred == 1 else (0, 1), 0.5 if preferred == TIE else 1.0, None, left)


def votes_on_left(labels: Sequence[Label]) -> float:
    """The share of votes, ties left out, for what stood on the left: far from a half, the place decided. NaN without any."""
    sides = [label.order[0] == label.left for label in labels if label.left is not None and not label.tie]
    return sum(sides) / len(sides) if sides else float("nan")
