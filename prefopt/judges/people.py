"""People as judges: a page with blind pairs, and the votes of one or several people as verdicts and as training rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefopt.data.rows import BadRow, check_field
from prefopt.errors import ConfigError, DataError, OutputError
from prefopt.files import parse_json
from prefopt.iterate.folder import write_lines
from prefopt.iterate.labels import Label
from prefopt.iterate.options import SAMPLES, SIDES, draws
from prefopt.iterate.rows import FILE as ROWS_FILE
from prefopt.iterate.rows import write_data
from prefopt.iterate.samples import Row
from prefopt.iterate.votes import PAGE_FILE, read_votes, votes_on_left, write_page
from prefopt.judges.judged import JudgedPairs
from prefopt.judges.lengths import LENGTHS, Length, measure
from prefopt.judges.samples import SamplePairs
from prefopt.judges.verdicts import Verdicts
from prefopt.stages import content_key

PAIRS_FILE = "pairs.jsonl"
PEOPLE = "people"


@dataclass(frozen=True)
class Page:
    """What a page shows.

    Args:
        rows: pairs as the page has them: which of the two completions is ours cannot be seen.
        ours: which completion of each is ours, 0 or 1.
        pairs: the name of each pair in its samples file.
    """

    rows: tuple[Row, ...]
    ours: tuple[int, ...]
    pairs: tuple[str, ...]


def make_page(folder: Path, pairs: SamplePairs, *, count: int = 0, seed: int = 0) -> tuple[Path, int]:
    """Writes the page to vote on, and pairs.jsonl, which says whose completions are whose and stays with who asks.

    Pairs of equal completions are left out, since nobody could prefer one; the order of the pairs is drawn.

    Args:
        folder: new or empty; its name is the page's title.
        count: pairs drawn at most; 0 takes all.

    Returns:
        The page, and how many pairs it shows.

    Raises:
        ConfigError: a negative count.
        DataError: all pairs are equal.
        OutputError: the folder holds something.
    """
    if count < 0:
        raise ConfigError(f"count is {count}; expected the number of pairs, or 0 for all of them.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} is not empty: votes belong to the page that they were given on; name a new folder.")
    differ = [i for i in range(len(pairs.ids)) if pairs.ours[i].strip() != pairs.theirs[i].strip()]
    if not differ:
        raise DataError(f"all {len(pairs.ids)} pairs hold two equal completions: there is nothing to vote on.")
    chosen = [differ[i] for i in draws(seed, SAMPLES).permutation(len(differ))[: count or None]]
    # Not `left`, which the page must know: the places in the page's own data give nothing away either.
    ours = [int(side) for side in draws(seed, SIDES).integers(2, size=len(chosen))]
    shown = [(pairs.ours[i], pairs.theirs[i])[:: -1 if side else 1] for i, side in zip(chosen, ours, strict=True)]
    # Votes name the page by its content, so that those on another page are refused.
    name = content_key([[pairs.prompts[i], texts] for i, texts in zip(chosen, shown, strict=True)])[:8]
    rows = [
        Row(f"{name}:{number}", pairs.ids[i], pairs.prompts[i], texts, (), ())
        for number, (i, texts) in enumerate(zip(chosen, shown, strict=True), start=1)
    ]
    write_lines(
        folder / PAIRS_FILE,
        [
            {"id": row.id, "pair": row.prompt_id, "prompt": row.prompt, "completions": row.completions, "ours": side}
            for row, side in zip(rows, ours, strict=True)
        ],
    )
    # The name of a samples file would say which policy a pair belongs to.
    blind = [Row(row.id, "", row.prompt, row.completions, (), ()) for row in rows]
    return write_page(folder, blind, seed, 1), len(rows)


def read_page(folder: Path) -> Page:
    """What `make_page` wrote.

    Raises:
        DataError: no page, or a damaged one; the message names file and row.
    """
    path = folder / PAIRS_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read; votes need the folder that `prefopt judge page` wrote.") from error
    rows, ours, pairs = [], [], []
    for number, text in enumerate(lines, start=1):
        try:
            line: dict[str, Any] = parse_json(text)
            (first, second), side = line["completions"], line["ours"]
            if side not in (0, 1):
                raise ValueError(f"ours is {side!r}")
            rows.append(Row(line["id"], line["pair"], check_field(line["prompt"], "prompt"), (first, second), (), ()))
        except (ValueError, KeyError, TypeError, BadRow) as error:
            raise DataError(f"{path}:{number}: not a pair of this page ({error}). Restore the file.") from error
        ours.append(side)
        pairs.append(line["pair"])
    if not rows:
        raise DataError(f"{path}: no pair. Restore the file.")
    return Page(tuple(rows), tuple(ours), tuple(pairs))


@dataclass(frozen=True)
class Votes:
    """Votes of one or several people on a page.

    Args:
        judged: verdicts of all of them together, by the mean of the votes on a pair, under "people".
        persons: verdicts of each.
        labels: mean votes by row: rank by majority, the share of votes for it as soft label.
        on_left: by person, the share of votes, ties left out, for what stood on the left.
        votes: by person, how many.
    """

    judged: JudgedPairs
    persons: JudgedPairs
    labels: Mapping[str, Label]
    on_left: Mapping[str, float]
    votes: Mapping[str, int]


def import_people(page: Page, paths: Sequence[Path], *, length: Length = LENGTHS["words"], unit: str = "words") -> Votes:
    """Reads votes; each file is one person's.

    Raises:
        DataError: file and line of what is no vote on this page, or of a second and different vote; a file twice; or no vote.
    """
    names = _voters(paths)
    labels = {name: _labels(path, page) for name, path in names.items()}
    shares = {name: torch.tensor([_share(own.get(row.id)) for row in page.rows]).double() for name, own in labels.items()}
    together = torch.stack(list(shares.values())).nanmean(0)  # [N], of completion 0; NaN where nobody voted
    if bool(together.isnan().all()):
        raise DataError(f"{', '.join(map(str, paths))}: no vote at all.")
    sides = torch.tensor(page.ours)
    ours = [row.completions[side] for row, side in zip(page.rows, page.ours, strict=True)]
    theirs = [row.completions[1 - side] for row, side in zip(page.rows, page.ours, strict=True)]
    first_of: dict[object, str] = {}
    keys = tuple(first_of.setdefault(str(row.prompt), pair) for row, pair in zip(page.rows, page.pairs, strict=True))
    lengths = measure(length, ours, theirs)
    judged, persons = (
        JudgedPairs(page.pairs, keys, lengths, unit, {name: Verdicts(_of_ours(own, sides)) for name, own in found.items()})
        for found in ({PEOPLE: together}, shares)
    )
    merged = {row.id: _merged(row.id, share) for row, share in zip(page.rows, together.tolist(), strict=True) if share == share}
    on_left = {name: votes_on_left(list(own.values())) for name, own in labels.items()}
    return Votes(judged, persons, merged, on_left, {name: len(own) for name, own in labels.items()})


def write_rows(folder: Path, page: Page, votes: Votes) -> Path:
    """folder/rows.jsonl: pairs with soft labels, which `--data` reads. Returns its path."""
    write_data(folder, [(row, votes.labels[row.id]) for row in page.rows if row.id in votes.labels])
    return folder / ROWS_FILE


def find_page(folder: Path | None, votes: Sequence[Path]) -> Path:
    """The folder of the page that votes belong to: as it is named, else the one in which the first file lies.

    Raises:
        ConfigError: neither holds a page.
    """
    place = folder if folder is not None else votes[0].parent
    if not (place / PAIRS_FILE).is_file():
        raise ConfigError(
            f"{place} holds no {PAIRS_FILE}: name the folder that `prefopt judge page` wrote ({PAGE_FILE} is in it) by --page."
        )
    return place


def _voters(paths: Sequence[Path]) -> dict[str, Path]:
    """Names of people, from their files."""
    if not paths:
        raise ConfigError("name the files with votes, one for each person.")
    resolved = [path.resolve() for path in paths]
    if len({*resolved}) < len(resolved):
        raise DataError(f"a file of votes is named twice in {', '.join(map(str, paths))}.")
    apart = len({path.stem for path in paths}) == len(paths)
    return {path.stem if apart else str(path): path for path in paths}


def _labels(path: Path, page: Page) -> dict[str, Label]:
    return {name: label for name, (label, _) in read_votes(path, page.rows, "page").items()}


def _share(label: Label | None) -> float:
    """For completion 0; NaN without a vote."""
    if label is None:
        return float("nan")
    return 0.5 if label.tie else float(label.order[0] == 0)


def _of_ours(shares: Tensor, ours: Tensor) -> Tensor:
    return torch.where(ours == 0, shares, 1 - shares)


def _merged(name: str, share: float) -> Label:
    return Label(name, (0, 1) if share >= 0.5 else (1, 0), max(share, 1 - share))
