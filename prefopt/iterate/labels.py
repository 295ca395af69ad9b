"""A round's labels: asked for row by row, kept on disk before the next row is asked for, never asked for twice.

labels.jsonl grows by whole lines that are on the disk when `append` returns. After a crash, what it holds is read back and only
the rows without a label are asked for; a last line that was cut short is dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from prefopt.data.exact_world.labels import LabelModel, parse_labels
from prefopt.errors import ConfigError, OutputError, TrainingError
from prefopt.files import parse_json
from prefopt.iterate.options import LABELS, draws
from prefopt.iterate.samples import Row
from prefopt.rewards import RewardError, Scorer, score
from prefopt.rollouts.online import Ranking, rank
from prefopt.runlog import counter

FILE = "labels.jsonl"


@dataclass(frozen=True)
class Label:
    """What a labeller said of one row.

    Args:
        id: the row's.
        ranks: of its K completions in the order of sampling, 0 = best.
        soft_label: of a pair: probability that the completion of rank 0 is the better one; 0.5 is a tie.
        scores: of the K completions, where the labeller gives scores.
        left: which completion people saw on the left.
    """

    id: str
    ranks: tuple[int, ...]
    soft_label: float | None = None
    scores: tuple[float, ...] | None = None
    left: int | None = None

    @property
    def tie(self) -> bool:
        return self.soft_label == 0.5

    @property
    def order(self) -> list[int]:
        """Completions from best to worst."""
        return sorted(range(len(self.ranks)), key=lambda k: self.ranks[k])


class LabelBook:
    """The labels of a round on disk.

    Args:
        folder: of the round.
        rows: that labels are for.

    Raises:
        OutputError: the file holds something else than labels of these rows.
    """

    def __init__(self, folder: Path, rows: Sequence[Row]) -> None:
        self._path = folder / FILE
        self._rows = rows
        self.labels: dict[str, Label] = {}
        self._read()

    @property
    def missing(self) -> list[Row]:
        """Rows without a label, in their order."""
        return [row for row in self._rows if row.id not in self.labels]

    def append(self, labels: Sequence[Label]) -> None:
        """Returns when the labels are on the disk."""
        with self._path.open("ab") as file:
            file.write("".join(json.dumps(asdict(label)) + "\n" for label in labels).encode())
            file.flush()
            os.fsync(file.fileno())
        self.labels |= {label.id: label for label in labels}

    def _read(self) -> None:
        data = self._path.read_bytes() if self._path.exists() else b""
        whole, _, torn = data.rpartition(b"\n")
        if torn:
            # What was being written at a crash: nobody was told that it was kept.
            with self._path.open("r+b") as file:
                file.truncate(len(data) - len(torn))
                os.fsync(file.fileno())
        known = {row.id: len(row.completions) for row in self._rows}
        for number, text in enumerate(whole.splitlines(), start=1):
            try:
                label = _read_label(parse_json(text))
                if label.id in self.labels or len(label.ranks) != known[label.id]:
                    raise ValueError("a second label of a row, or one of another number of completions")
            except (ValueError, KeyError, TypeError) as error:
                raise OutputError(
                    f"{self._path}:{number}: not a label of this round's rows ({error}). Restore the file, or delete it to "
                    "have all rows labelled anew."
                ) from error
            self.labels[label.id] = label


def _read_label(found: Any) -> Label:
    scores = None if found["scores"] is None else tuple(found["scores"])
    return Label(found["id"], tuple(found["ranks"]), found["soft_label"], scores, found["left"])


def check_label_model(text: str, temperature: float, samples: int) -> LabelModel:
    """The label model of a loop.

    Raises:
        ConfigError: one that does not exist, that is about which pairs are drawn, or that says nothing of rankings.
    """
    model = parse_labels(text, temperature)
    if model.name == "shifted":
        raise ConfigError("labels 'shifted' is about other pairs than the policy's own samples; use bt with --temperature 2.")
    if samples > 2 and model.name not in ("bt", "deterministic"):
        raise ConfigError(f"labels {text!r} is about pairs; with samples_per_prompt {samples} use bt or deterministic.")
    return model


def label_by_reward(
    book: LabelBook, scorer: Scorer, model: LabelModel, *, batch: int, seed: int, number: int, console: Console | None = None
) -> None:
    """Labels the rows that have no label yet, `batch` at a time.

    Args:
        seed, number: of the loop and of the round; a row's label noise follows from them and from the row alone.

    Raises:
        TrainingError: the reward failed; the message names round, row and prompt. Labels so far are kept.
    """
    waiting, total = book.missing, len(book.labels) + len(book.missing)
    show = counter(console, f"round {number}: labelling")
    for begin in range(0, len(waiting), batch):
        part = waiting[begin : begin + batch]
        scores = _scores(scorer, part, number, len(book.labels), total)
        book.append([_label(row, own, model, seed, number) for row, own in zip(part, scores, strict=True)])
        if show is not None:
            show(len(book.labels), total)


def _scores(scorer: Scorer, rows: Sequence[Row], number: int, done: int, total: int) -> list[torch.Tensor]:
    """[K] checked scores of each row."""
    flat = [(row, text) for row in rows for text in row.completions]
    try:
        found = score(scorer, [row.prompt for row, _ in flat], [text for _, text in flat], [row.prompt_id for row, _ in flat])
    except TrainingError as error:
        at = flat[error.index][0] if isinstance(error, RewardError) else rows[0]
        raise TrainingError(
            f"round {number}, row {at.id}: {error} {done} of {total} labels are kept: mend it, and go on with --resume."
        ) from error
    return list(found.split([len(row.completions) for row in rows]))


def _label(row: Row, scores: torch.Tensor, model: LabelModel, seed: int, number: int) -> Label:
    noise = draws(seed, LABELS, number, int(row.id.rpartition(":")[2]))
    kept = tuple(scores.tolist())
    if len(kept) > 2:
        generator = torch.Generator().manual_seed(int(noise.integers(2**31)))
        ranking: Ranking = "bt" if model.name == "bt" else "hard"
        order = rank(scores[None], ranking, model.temperature, generator)[0].tolist()
        return Label(row.id, tuple(order.index(k) for k in range(len(kept))), None, kept)
    gap = (scores[0] - scores[1]).double()
    longer = torch.tensor(float(len(row.completion_ids[0]) - len(row.completion_ids[1])), dtype=torch.float64)
    if model.name == "soft":
        first_wins, soft = bool(gap >= 0), float(model.probability(gap.abs(), longer))
    else:
        first_wins, soft = bool(noise.random() < float(model.probability(gap, longer))), None
    return Label(row.id, (0, 1) if first_wins else (1, 0), soft, kept)


def agreement(rows: Sequence[Row], labels: Mapping[str, Label], scores: torch.Tensor) -> float:
    """The share of labelled rows whose best completion beats their worst by `scores` [N, K] too; equal scores count half.

    Ties are left out; NaN when nothing else is there.
    """
    places = [(i, labels[row.id].order) for i, row in enumerate(rows) if row.id in labels and not labels[row.id].tie]
    gaps = torch.tensor([float(scores[i, order[0]] - scores[i, order[-1]]) for i, order in places])
    return float((0.5 + 0.5 * gaps.sign()).mean()) if len(places) else float("nan")
