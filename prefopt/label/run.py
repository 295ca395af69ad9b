"""Labels for the pairs of a data set, and the preference rows that they make."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from prefopt.data.records import Record, Text
from prefopt.errors import ConfigError
from prefopt.label.book import Book, book_name
from prefopt.label.labellers import Judgement, Labeller, as_pair, shown_first
from prefopt.runlog import counter


@dataclass(frozen=True)
class Labelled:
    """Pairs and what a labeller said of them. N pairs.

    Args:
        records: the pairs, in the order of their data.
        firsts: which completion (0 or 1) of each was shown first, as A.
        judgements: of each.
    """

    records: Sequence[Record]
    firsts: tuple[int, ...]
    judgements: tuple[Judgement, ...]

    @property
    def probabilities(self) -> Tensor:
        """[N] float64 probability that completion 0 of the record is better; NaN where a reply could not be read."""
        p = torch.tensor([judgement.p for judgement in self.judgements], dtype=torch.float64)
        return torch.where(torch.tensor(self.firsts) == 0, p, 1 - p)


def label_rows(
    records: Sequence[Record],
    labeller: Labeller,
    *,
    seed: int = 0,
    batch: int = 32,
    folder: Path | None = None,
    console: Console | None = None,
) -> Labelled:
    """Has pairs labelled, `batch` at a time.

    Args:
        records: pairs; their order is not shown to the labeller, who sees them in an order drawn by `seed` and their ids.
        labeller: a chat model or a reward.
        seed: of the order in which a pair is shown first, and of sampled rationales.
        batch: pairs that are asked about, and kept, together.
        folder: of the book that keeps them; an interrupted run goes on from it. None keeps nothing.
        console: for progress.

    Raises:
        ConfigError: a record that is no pair, or no record.
        OutputError: a damaged book, or one that cannot be written.
    """
    wrong = next((record.id for record in records if len(record.completions) != 2), None)
    if batch < 1 or not records or wrong is not None:
        raise ConfigError(
            f"label_rows: expected pairs and a batch of at least 1; got {len(records)} records, {batch} as batch"
            f"{f', and {wrong}, which is no pair' if wrong else ''}."
        )
    firsts = tuple(shown_first(record.id, seed) for record in records)
    pairs = [as_pair(r.id, r.prompt, r.completions, first) for r, first in zip(records, firsts, strict=True)]
    book = None
    if folder is not None:
        book = Book(folder / book_name(labeller.identity, pairs, seed, batch), pairs, batch)
    judged: list[Judgement] = [] if book is None else list(book.judgements)
    show = counter(console, f"labelling by {labeller.name}")
    for begin in range(len(judged), len(pairs), batch):
        # A batch's own seed: what is sampled does not depend on where a run was interrupted.
        found = labeller.judge(pairs[begin : begin + batch], seed * _SEEDS_APART + begin)
        if book is not None:
            book.append(found)
        judged += found
        if show is not None:
            show(len(judged), len(pairs))
    return Labelled(records, firsts, tuple(judged))


# More than any data set has rows, so that the batches of two seeds share no seed.
_SEEDS_APART = 1 << 32


def preference_rows(labelled: Labelled) -> Iterator[dict[str, Any]]:
    """Rows that `--data` reads: prompt, chosen (what the labeller prefers), rejected, and what it said.

    `soft_label` is its probability that chosen is better, at least 1/2; a tie has an order by coin. A reward's or a direct
    score's values go into `chosen_score` and `rejected_score`; direct scores have no probability. Left out: pairs whose reply
    could not be read, and direct scores that are equal, which have no order.
    """
    for record, first, judgement in zip(labelled.records, labelled.firsts, labelled.judgements, strict=True):
        p = judgement.p
        if math.isnan(p) or (judgement.hard and p == 0.5):
            continue
        # What was shown first was drawn by coin: a tie must not hand on the order of the data, which is its human label.
        best = first if p >= 0.5 else 1 - first
        row: dict[str, Any] = {"prompt": _plain(record.prompt)}
        row |= {"chosen": _plain(record.completions[best]), "rejected": _plain(record.completions[1 - best])}
        if not judgement.hard:
            row["soft_label"] = max(p, 1 - p)
        if judgement.scores is not None:
            row["chosen_score"], row["rejected_score"] = judgement.scores if best == first else judgement.scores[::-1]
        yield row


def _plain(text: Text) -> Any:
    return text if isinstance(text, str) else [dict(message) for message in text]
