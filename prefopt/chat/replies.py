"""What an endpoint's reply says: its text, its tokens' alternatives, and which answer that makes. A answers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Token:
    """A token of a reply: its text, and the log-probs of the likeliest tokens at its place, itself among them."""

    text: str
    top: Mapping[str, float]


@dataclass(frozen=True)
class Reply:
    """A reply of a chat-completion endpoint.

    Args:
        text: what it says.
        tokens: with their alternatives; None where the endpoint gives none.
        prompt_tokens, completion_tokens: as the endpoint counts them.
    """

    text: str
    tokens: tuple[Token, ...] | None
    prompt_tokens: int
    completion_tokens: int


def parse_reply(found: Any) -> Reply:
    """A reply from the JSON of a chat completion.

    Raises:
        ValueError: it is none; the message says what is missing.
    """
    try:
        choice = found["choices"][0]
        text = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise ValueError("it holds no choices[0].message.content") from None
    # None: a refusal, or a model that spent all its tokens on hidden reasoning. It is a reply, and it says nothing.
    if text is not None and not isinstance(text, str):
        raise ValueError(f"choices[0].message.content is of type {type(text).__name__}, not text")
    usage = found.get("usage") or {}
    counts = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
    return Reply(text or "", _tokens(choice.get("logprobs")), *counts)


def _tokens(logprobs: Any) -> tuple[Token, ...] | None:
    listed = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not listed:
        return None
    try:
        tokens = []
        for item in listed:
            top = {other["token"]: float(other["logprob"]) for other in item.get("top_logprobs") or ()}
            tokens.append(Token(item["token"], {item["token"]: float(item["logprob"]), **top}))
    except (KeyError, TypeError, ValueError):
        raise ValueError("choices[0].logprobs.content holds no tokens with log-probs") from None
    # A server that ignores top_logprobs says how likely its own word was, and nothing of the other answers.
    return tuple(tokens) if any(len(token.top) > 1 for token in tokens) else None


def weigh(reply: Reply, answers: Sequence[str]) -> Tensor:
    """[A] log-probs over `answers`, normalised: from the tokens' alternatives, or 0 and -inf from the text alone; NaN where
    the reply names no answer, or several."""
    if reply.tokens is not None:
        place = next((i for i, token in enumerate(reply.tokens) if token.text.strip() in answers), None)
        if place is not None:
            return _from_tokens(reply.tokens, place, answers)
    said = read_answer(reply.text, answers)
    if said is None:
        return torch.full((len(answers),), math.nan, dtype=torch.float64)
    found = torch.full((len(answers),), -math.inf, dtype=torch.float64)
    found[answers.index(said)] = 0.0
    return found


def _from_tokens(tokens: Sequence[Token], place: int, answers: Sequence[str]) -> Tensor:
    """From the place where the reply gives its answer.

    An answer that is not listed there is less likely than every token that is, and than all that are not together; the
    smaller of the two bounds is taken for it. An answer of two tokens ("1", "0") that begins with another answer is told
    apart by the alternatives of the second token, which are known where the reply itself takes the first.
    """
    top = tokens[place].top
    mass = dict.fromkeys(answers, 0.0)
    for text, logp in top.items():
        if text.strip() in mass:
            mass[text.strip()] += math.exp(logp)
    taken = tokens[place].text.strip()
    following = tokens[place + 1].top if place + 1 < len(tokens) else {}
    first = mass[taken]
    for answer in answers:
        if answer != taken and answer.startswith(taken):
            share = sum(math.exp(logp) for text, logp in following.items() if text == answer.removeprefix(taken))
            mass[answer] += first * share
            mass[taken] -= first * share
    bound = min(math.exp(min(top.values())), max(1 - sum(map(math.exp, top.values())), _LEAST))
    values = torch.tensor([mass[answer] or bound for answer in answers], dtype=torch.float64)
    return values.clamp(min=_LEAST).log().log_softmax(-1)


# A probability of zero has no logit; listed log-probs are rounded to about this.
_LEAST = 1e-12


def read_answer(text: str, answers: Sequence[str]) -> str | None:
    """The answer that a text gives: the word that it begins with, or the only one that it names; None where neither is one.

    "2", "**2**", "Response 2 is better" and "2/10" give 2; "1 or 2" gives 1, since it begins so; "neither 1 nor 2" gives none.
    """
    text = re.sub(r"/\s*\d+", "", text)
    words = re.findall("|".join(rf"(?<!\w){re.escape(a)}(?!\w)" for a in sorted(answers, key=len, reverse=True)), text)
    begins = re.match(r"\W*", text)
    assert begins is not None
    if words and text[begins.end() :].startswith(words[0]):
        return str(words[0])
    return words[0] if len(set(words)) == 1 else None
