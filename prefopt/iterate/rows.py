"""Labelled samples as training rows: as examples for this loop, and as a file that `--data` reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from losses.registry import BoundLoss
from prefopt.data.records import Example, Labels
from prefopt.iterate.folder import write_lines
from prefopt.iterate.labels import Label
from prefopt.iterate.samples import Row
from prefopt.rewards import as_reply

FILE = "rows.jsonl"

Labelled = Sequence[tuple[Row, Label]]


def labelled_rows(rows: Sequence[Row], labels: Mapping[str, Label]) -> list[tuple[Row, Label]]:
    """Rows that have a label, with it."""
    return [(row, labels[row.id]) for row in rows if row.id in labels]


def make_examples(labelled: Labelled, kind: str, loss: BoundLoss) -> list[Example]:
    """Rows as a stream learns from them, best completion first, with the tokens that were sampled.

    Args:
        kind: "pairs" (of a ranking the best and the worst), "completions" (the best), "labelled" or "groups".
        loss: ties are left out for one that takes no soft labels: it could only read them as a preference.
    """
    soft = "soft_labels" in loss.needs | loss.optional
    return [_example(row, label, kind) for row, label in labelled if soft or not label.tie]


def make_pairs(labelled: Labelled) -> list[Example]:
    """Best and worst completion of every row that is no tie: what accuracies are measured on."""
    return [_example(row, label, "pairs") for row, label in labelled if not label.tie]


def _example(row: Row, label: Label, kind: str) -> Example:
    order = _kept(label, kind)
    ranks = tuple(range(len(order)))
    scores = None if label.scores is None else tuple(label.scores[k] for k in order)
    known = Labels() if kind == "completions" else Labels(ranks=ranks, soft_label=label.soft_label, scores=scores)
    return Example(row.id, row.prompt_ids, tuple(row.completion_ids[k] for k in order), known)


def _kept(label: Label, kind: str) -> list[int]:
    order = label.order
    if kind == "completions":
        return order[:1]
    return [order[0], order[-1]] if kind == "pairs" else order


def write_data(folder: Path, labelled: Labelled) -> None:
    """folder/rows.jsonl: pairs or rankings in the columns of TRL's data sets, whole or not at all.

    `--data` reads them as text; an empty completion, which the loop trains on, is dropped there with a count.
    """
    write_lines(folder / FILE, _lines(labelled))


def _lines(labelled: Labelled) -> Iterator[dict[str, Any]]:
    for row, label in labelled:
        order = label.order
        texts = [as_reply(row.prompt, row.completions[k]) for k in order]
        scores = None if label.scores is None else [label.scores[k] for k in order]
        line: dict[str, Any] = {"id": row.id, "prompt": row.prompt}
        if len(texts) > 2:
            line |= {"completions": texts, "ranks": list(range(len(texts)))} | ({"scores": scores} if scores else {})
        else:
            line |= {"chosen": texts[0], "rejected": texts[1]}
            line |= {} if label.soft_label is None else {"soft_label": label.soft_label}
            line |= {} if scores is None else {"chosen_score": scores[0], "rejected_score": scores[1]}
        yield line
