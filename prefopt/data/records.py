"""The one shape of data: a prompt and its K completions.

A preference pair is K=2 with an order, a ranking K>2, an unpaired example K=1 with a label (SFT: K=1 without one), an
AI-labelled pair K=2 with a soft label. `Record` is text as read; `Example` the same after tokenising.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict


class Message(TypedDict):
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


Text = str | tuple[Message, ...]
"""Plain text, or a conversation that the model's chat template renders."""


@dataclass(frozen=True)
class Labels:
    """What is known about the K completions of one prompt.

    Args:
        ranks: rank of each completion, 0 = best; None when unordered. Completions of a pair stand best first.
        desirable: the label of an unpaired completion (K=1).
        soft_label: probability that completion 0 is preferred to completion 1, in [0, 1].
        margin: annotated distance between completion 0 and completion 1, >= 0.
        scores: a frozen scorer's value of each completion.
        utility_id: which of `rank_utility`'s utilities this prompt uses, from 0.
    """

    ranks: tuple[int, ...] | None = None
    desirable: bool | None = None
    soft_label: float | None = None
    margin: float | None = None
    scores: tuple[float, ...] | None = None
    utility_id: int | None = None

    def as_list(self) -> list[Any] | None:
        """Plain values for JSON; None when nothing is known."""
        values = [self.ranks, self.desirable, self.soft_label, self.margin, self.scores, self.utility_id]
        return values if any(value is not None for value in values) else None

    @classmethod
    def from_list(cls, values: Sequence[Any] | None) -> Labels:
        """The inverse of `as_list`, also after JSON has turned tuples into lists."""
        if values is None:
            return cls()
        ranks, desirable, soft_label, margin, scores, utility_id = values
        return cls(_tuple(ranks), desirable, soft_label, margin, _tuple(scores), utility_id)


def _tuple(values: Sequence[Any] | None) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)


@dataclass(frozen=True)
class Record:
    """A prompt and its completions as text.

    Args:
        id: where it was read, as `file:line` (1-based); unique within a data set.
        prompt: everything before the completion.
        completions: K texts (or lists of assistant messages) that continue the prompt.
        labels: order, label or scores.
        key: what the role split hashes: the first human turn, whitespace-normalised.
        source: the source that it came from, so that sources can be reported apart.
        official_test: it belongs to the data set's own test split.
    """

    id: str
    prompt: Text
    completions: tuple[Text, ...]
    labels: Labels = field(default_factory=Labels)
    key: str = ""
    source: str = ""
    official_test: bool = False


@dataclass(frozen=True)
class Example:
    """A record after tokenising: prompt ids shared by all completions, completion ids with EOS where it is scored.

    Args:
        id: the record's id.
        prompt_ids: at least one token; none where a completion stands by itself (a segment of control data).
        completion_ids: K non-empty id sequences: tokens, or numbers of steps.
        labels: the record's labels.
    """

    id: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[tuple[int, ...], ...]
    labels: Labels = field(default_factory=Labels)

    @property
    def tokens(self) -> int:
        """Tokens that the shared forward encodes: the prompt once, every completion."""
        return len(self.prompt_ids) + sum(len(ids) for ids in self.completion_ids)
