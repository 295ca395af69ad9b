"""Which answer a reply gives: from the alternatives of its tokens, or from its words."""

from __future__ import annotations

import math

import pytest
import torch

from prefopt.chat.replies import Reply, Token, read_answer, weigh

TEN = [str(number) for number in range(1, 11)]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2", "2"), (" 2.", "2"), ("**2**", "2"), ("Response 2 is better", "2"), ("2/10", "2"), ("10", "10"), ("10/10", "10"),
        ("Rating: 8/10", "8"), ("1 or 2", "1"), ("12", None), ("1st", None), ("neither 1 nor 2", None),
        ("", None), ("both", None),
    ],
)  # fmt: skip
def test_words_are_read(text: str, answer: str | None) -> None:
    assert read_answer(text, TEN) == answer


def token(text: str, **top: float) -> Token:
    return Token(text, {name.removeprefix("_"): math.log(p) for name, p in top.items()})


def test_the_answer_may_stand_behind_other_tokens() -> None:
    reply = Reply("Response 2", (token("Response", _Response=0.9, _1=0.05), token(" 2", **{" 1": 0.2, " 2": 0.6})), 0, 0)
    assert torch.allclose(weigh(reply, ["1", "2"]).exp(), torch.tensor([0.25, 0.75]).double())


def test_an_answer_that_is_not_listed_is_bounded_by_what_is() -> None:
    """Listed: 0.6 and 0.39; what is left is 0.01, less than the least likely token."""
    reply = Reply("1", (token("1", _1=0.6, _the=0.39),), 0, 0)
    assert torch.allclose(weigh(reply, ["1", "2"]).exp(), torch.tensor([0.6, 0.01]).double() / 0.61)


def test_ten_in_two_tokens_is_told_from_one() -> None:
    """P(1) = 0.5, of which 0.8 go on with 0: ten has 0.4, one 0.1, two 0.3."""
    reply = Reply("10", (token("1", _1=0.5, _2=0.3), token("0", _0=0.8, x=0.2)), 0, 0)
    found = weigh(reply, ["1", "2", "10"]).exp()
    assert torch.allclose(found, torch.tensor([0.1, 0.3, 0.4]).double() / 0.8)
