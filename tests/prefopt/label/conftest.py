"""A chat model of known preferences."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from prefopt.chat import Usage
from prefopt.data.records import Labels, Record

_SHOWN = re.compile(r"Response 1:\n(.*?)\n\nResponse 2:\n(.*?)\n\n", re.DOTALL)
Preference = Callable[[str, str], float]


class Synthetic:
    """Says `first(one, other)`, the probability of the first place, of the completions that the last sample shows.

    Attributes:
        asked: every conversation of `choose` and `complete`.
        rationale: what `complete` replies.
    """

    identity, parameters, notes = "synthetic", 1_000, ("not real",)

    def __init__(self, first: Preference, name: str = "synthetic") -> None:
        self.name, self.usage, self.asked, self.rationale = name, Usage(), [], "because"
        self._first = first

    def choose(self, conversations: Sequence[Any], answers: Sequence[str]) -> Tensor:
        self.asked += conversations
        self.usage.calls += len(conversations)
        if len(answers) > 2:  # scores: the number of letters, for sure
            places = [min(len(re.findall("Reply:\n(.*)\n\nRate", c[-1]["content"])[0]), 10) - 1 for c in conversations]
            return torch.nn.functional.one_hot(torch.tensor(places), 10).double().log()
        shown = [_SHOWN.findall("\n\n".join(turn["content"] for turn in c))[-1] for c in conversations]
        first = torch.tensor([self._first(*pair) for pair in shown], dtype=torch.float64)
        return torch.stack([first, 1 - first], -1).log()

    def complete(self, conversations: Sequence[Any], *, max_tokens: int, temperature: float, seed: int) -> list[str]:
        self.asked += conversations
        return [f"{self.rationale}{seed if temperature else ''}" for _ in conversations]


@pytest.fixture
def synthetic() -> type[Synthetic]:
    return Synthetic


def by_length(one: str, other: str) -> float:
    """A labeller without bias: the longer, the likelier."""
    return len(one) / (len(one) + len(other))


@pytest.fixture
def unbiased() -> Preference:
    return by_length


@pytest.fixture
def records() -> list[Record]:
    """Of 40 pairs the chosen completion is the longer one in 30."""
    made = []
    for index in range(40):
        long, short = "x" * (3 + index % 5), "y" * (1 + index % 2)
        completions = (long, short) if index % 4 else (short, long)
        made.append(Record(f"row:{index}", f"prompt {index}", completions, Labels(ranks=(0, 1))))
    return made
