"""Labellers: chat models that compare or score, and rewards. N pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from prefopt.chat.protocol import ChatModel, Usage
from prefopt.data.records import Text
from prefopt.data.rows import content
from prefopt.errors import ConfigError
from prefopt.label.probabilities import Average, average_orders, average_rationales, expected_score
from prefopt.label.prompts import (
    PLACES,
    SCORES,
    ask_choice,
    ask_rationale,
    ask_score,
    digest_exemplars,
    read_exemplars,
    read_preamble,
)
from prefopt.rewards import Scorer, score


@dataclass(frozen=True)
class Pair:
    """Two completions of a prompt in the order in which they are shown first; the labeller does not know which is better."""

    id: str
    prompt: Text
    a: str
    b: str


@dataclass(frozen=True)
class Judgement:
    """What a labeller said of a pair.

    Args:
        p: probability that A is better; NaN when a reply could not be read.
        orders: the probability of the first place with A first and with B first; None for a labeller that sees no places.
        scores: of A and B, where each is scored by itself.
        rationales: what it wrote before it chose, (A first, B first) for each round.
        hard: `p` is 1, 0 or 1/2 and says which is better, not with which probability.
    """

    p: float
    orders: tuple[float, float] | None = None
    scores: tuple[float, float] | None = None
    rationales: tuple[str, ...] = ()
    hard: bool = False


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How a chat labeller is asked.

    Args:
        preamble: what it is told to look at: plain, helpful, harmless, summary, or a text file.
        exemplars: labelled pairs that are shown first (.jsonl, as --data reads; a column rationale where they are asked for).
        rationales: chain of thought: how many rationales it writes for each order before it chooses; with several their
            distributions are averaged (self-consistency).
        rationale_tokens: the limit of a rationale.
        temperature: of rationales; by default 0 for one, 1 for several.
        average: of the two orders, by probabilities or logits.
        direct: score each completion by itself from 1 to 10 instead of comparing the two (direct RLAIF).
    """

    preamble: str = "helpful"
    exemplars: Path | None = None
    rationales: int = 0
    rationale_tokens: int = 128
    temperature: float | None = None
    average: Average = "probabilities"
    direct: bool = False

    def __post_init__(self) -> None:
        if self.rationales < 0 or self.rationale_tokens < 1 or (self.temperature or 0) < 0:
            raise ConfigError(
                "label: rationales and temperature must not be negative, rationale_tokens at least 1; got "
                f"{self.rationales}, {self.temperature}, {self.rationale_tokens}."
            )
        if self.temperature is not None and not self.rationales:
            raise ConfigError("label: temperature is that of rationales; ask for some with --rationales N.")
        if self.rationales > 1 and self.temperature == 0:
            raise ConfigError(f"label: {self.rationales} rationales at temperature 0 would be the same; leave it out, or 1.")
        if self.direct and (self.rationales or self.exemplars is not None or self.average != "probabilities"):
            raise ConfigError("label: direct scores see one completion at a time: no rationales, exemplars or averages.")


_Shown = tuple[Text, tuple[str, str]]  # a prompt, and its completions by place


class Labeller(Protocol):
    """What says which of two completions is better."""

    @property
    def name(self) -> str:
        """What reports call it."""

    @property
    def identity(self) -> str:
        """All that its labels depend on, besides the pairs and the seed."""

    @property
    def parameters(self) -> int | None:
        """The number of its weights, where it is known."""

    @property
    def usage(self) -> Usage:
        """What was asked of a chat model; zeros for a reward."""

    @property
    def notes(self) -> Sequence[str]:
        """What a report should say of it."""

    def judge(self, pairs: Sequence[Pair], seed: int) -> list[Judgement]:
        """A judgement of each pair; `seed` is of sampled rationales."""


class ChatLabeller:
    """A chat model that compares two completions in both orders, or scores each by itself.

    Raises:
        ConfigError, DataError: the preamble or the exemplars cannot be read.
    """

    def __init__(self, chat: ChatModel, asking: Asking | None = None) -> None:
        self._chat, self._asking = chat, asking or Asking()
        self._preamble = read_preamble(self._asking.preamble)
        path = self._asking.exemplars
        self._exemplars = () if path is None else read_exemplars(path, rationales=self._asking.rationales > 0)
        self.name, self.parameters = chat.name, chat.parameters
        given = self._asking.temperature
        self._temperature = given if given is not None else float(self._asking.rationales > 1)

    @property
    def identity(self) -> str:
        asking = self._asking
        how = ("direct",) if asking.direct else (asking.average, asking.rationales, asking.rationale_tokens, self._temperature)
        return repr((self._chat.identity, self._preamble, digest_exemplars(self._exemplars), how))

    @property
    def usage(self) -> Usage:
        return self._chat.usage

    @property
    def notes(self) -> Sequence[str]:
        return self._chat.notes

    def judge(self, pairs: Sequence[Pair], seed: int) -> list[Judgement]:
        """As `Labeller.judge`; raises what the chat model raises."""
        return self._scored(pairs) if self._asking.direct else self._compared(pairs, seed)

    def _compared(self, pairs: Sequence[Pair], seed: int) -> list[Judgement]:
        shown = [(pair.prompt, (pair.a, pair.b)) for pair in pairs] + [(pair.prompt, (pair.b, pair.a)) for pair in pairs]
        written = [self._rationales(shown, seed, number) for number in range(self._asking.rationales)]
        found = [self._choices(shown, replies) for replies in written] or [self._choices(shown, None)]
        orders = average_rationales(torch.stack(found))
        labels = average_orders(orders, self._asking.average)
        return [
            Judgement(p, (ab, ba), None, tuple(replies[place] for replies in written for place in (i, len(pairs) + i)))
            for i, (p, (ab, ba)) in enumerate(zip(labels.tolist(), orders.tolist(), strict=True))
        ]

    def _rationales(self, shown: Sequence[_Shown], seed: int, number: int) -> list[str]:
        """[2N] rationales; those of any two numbers, batches and seeds are drawn apart."""
        asked = [ask_rationale(self._preamble, self._exemplars, *sample) for sample in shown]
        own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        limit = self._asking.rationale_tokens
        return self._chat.complete(asked, max_tokens=limit, temperature=self._temperature, seed=own)

    def _choices(self, shown: Sequence[_Shown], rationales: Sequence[str] | None) -> Tensor:
        """[N, 2] probability of the first place in both orders; NaN where a reply could not be read or a rationale is empty."""
        given = [None] * len(shown) if rationales is None else rationales
        asked = [
            ask_choice(self._preamble, self._exemplars, *sample, words) for sample, words in zip(shown, given, strict=True)
        ]
        first = self._chat.choose(asked, PLACES)[:, 0].exp()
        first[[words == "" for words in given]] = torch.nan
        return first.view(2, -1).T

    def _scored(self, pairs: Sequence[Pair]) -> list[Judgement]:
        prompts = [pair.prompt for pair in pairs for _ in range(2)]
        scores = direct_scores(self._chat, self._preamble, prompts, [text for pair in pairs for text in (pair.a, pair.b)])
        judged = []
        for a, b in scores.view(-1, 2).tolist():
            # A score says which is better and by how much on its own scale, not with which probability.
            judged.append(Judgement(0.5 + 0.5 * float(np.sign(a - b)), None, (a, b), hard=True))
        return judged


def direct_scores(chat: ChatModel, preamble: str, prompts: Sequence[Text], completions: Sequence[str]) -> Tensor:
    """[N] scores in [-1, 1] of completions by themselves; NaN where a reply could not be read."""
    asked = [ask_score(preamble, prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
    return expected_score(chat.choose(asked, SCORES).exp())


class DirectReward:
    """Direct RLAIF: a chat model's expected score as the reward of on-policy algorithms, a `prefopt.rewards.Scorer`.

    Args:
        chat: the model that is asked.
        preamble: a name of `prompts.PREAMBLES`, or a text file.
    """

    def __init__(self, chat: ChatModel, preamble: str = "helpful") -> None:
        self._chat, self._preamble = chat, read_preamble(preamble)

    def __call__(self, prompts: Sequence[Text], completions: Sequence[str]) -> Tensor:
        """[N] float32 in [-1, 1]; the rollouts name the prompt of one that could not be read."""
        return direct_scores(self._chat, self._preamble, prompts, completions).float()


class ScorerLabeller:
    """A reward as a labeller: P(A) = sigma(r(A) - r(B)) (Bradley and Terry 1952 [bradley1952rank]).

    Args:
        scorer: prompts and completions -> scores.
        name: for reports.
        identity: all that its scores depend on.
        parameters: the number of its weights, where it is known.
    """

    def __init__(self, scorer: Scorer, name: str, identity: str, parameters: int | None = None) -> None:
        self.name, self.identity, self.parameters = name, identity, parameters
        self.usage = Usage()
        self.notes: Sequence[str] = ()
        self._scorer = scorer

    def judge(self, pairs: Sequence[Pair], seed: int) -> list[Judgement]:
        """As `Labeller.judge`.

        Raises:
            TrainingError: the reward failed, or gave something else than a finite number, for a completion.
        """
        texts = [text for pair in pairs for text in (pair.a, pair.b)]
        ids = [pair.id for pair in pairs for _ in range(2)]
        scores = score(self._scorer, [pair.prompt for pair in pairs for _ in range(2)], texts, ids).double().view(-1, 2)
        labels = torch.sigmoid(scores[:, 0] - scores[:, 1])
        return [Judgement(p, None, (a, b)) for p, (a, b) in zip(labels.tolist(), scores.tolist(), strict=True)]


def shown_first(pair_id: str, seed: int) -> int:
    """Which completion (0 or 1) of a pair is A: a coin by its id, since data sets put the better one first."""
    return hashlib.sha256(f"{seed}:{pair_id}".encode()).digest()[0] % 2


def as_pair(pair_id: str, prompt: Text, completions: Sequence[Text], first: int) -> Pair:
    """A pair as it is shown, completion `first` as A."""
    a, b = (content(completions[k]) for k in (first, 1 - first))
    return Pair(pair_id, prompt, a, b)
