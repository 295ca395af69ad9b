"""The TF-IDF Bradley-Terry judge, and the record of any judge on pairs that people labelled."""

from __future__ import annotations

import builtins
import itertools
from typing import Any

import pytest
import torch

from prefopt.data.records import Labels, Record
from prefopt.errors import ConfigError, DataError
from prefopt.judges.lengths import LENGTHS
from prefopt.judges.record import LabelledPairs, judge_record, labelled_pairs
from prefopt.judges.tfidf import TfidfJudge
from prefopt.judges.verdicts import from_scorer
from prefopt.report.tables import weak

pytest.importorskip("sklearn")
WORDS = LENGTHS["words"]
GOOD, BAD, OTHER = ["kind", "clear", "true"], ["rude", "vague", "false"], ["we", "say", "that", "it", "is"]


def labelled(count: int, *, soft: float = 1.0, noise: bool = False) -> LabelledPairs:
    """Pairs that a good and a bad word tell apart, and nothing does under noise."""
    rows = list(itertools.islice(itertools.cycle(itertools.product(GOOD, BAD, OTHER)), count))
    chosen = [f"{other} {good} {other}" for good, _, other in rows]
    rejected = [f"{other} {bad} {other}" for _, bad, other in rows]
    if noise:
        chosen, rejected = ([one if i % 2 else other for i, (one, other) in enumerate(zip(*pair, strict=True))] for pair in
                            ((chosen, rejected), (rejected, chosen)))  # fmt: skip
    return LabelledPairs(
        ("p",) * count, tuple(chosen), tuple(rejected), (soft,) * count, tuple(f"key {i}" for i in range(count))
    )


def test_it_learns_which_words_are_preferred_and_its_scores_do_not_read_the_prompt() -> None:
    judge = TfidfJudge(labelled(90))
    scores = judge(["p"] * 6, [*GOOD, *BAD])
    assert scores[:3].min() > 0 > scores[3:].max()
    assert torch.equal(scores, judge(["another prompt"] * 6, [*GOOD, *BAD]))
    assert float(judge(["p"], ["unheard-of"])) == 0.0
    assert torch.equal(TfidfJudge(labelled(90))(["p"], ["kind"]), judge(["p"], ["kind"]))


def test_soft_labels_pull_less_and_ties_not_at_all() -> None:
    """The same pairs with probability 0.7: weaker weights. Turned round with 0.3 they would be the same pairs."""
    sure, unsure = (TfidfJudge(labelled(90, soft=soft))(["p"], ["kind"]) for soft in (1.0, 0.7))
    assert float(sure) > float(unsure) > 0
    with pytest.raises(DataError, match="all 90 labels are ties"):
        TfidfJudge(labelled(90, soft=0.5))
    with pytest.raises(DataError, match="no word occurs twice"):
        TfidfJudge(LabelledPairs(("p",), ("one",), ("two",), (1.0,), ("k",)))


def test_the_record_says_what_a_judge_is_worth() -> None:
    """Trained on a rule and measured on it: right, sure, and not weak. On noise it is a coin, and greyed out."""
    judge = from_scorer(TfidfJudge(labelled(120)), log_odds=True)
    good = judge_record("tfidf", judge, labelled(60), WORDS, "a note")
    assert (good.accuracy, good.n, good.length_bias, good.note, weak(good)) == (1.0, 60, None, "a note", False)
    assert good.ece is not None
    assert 0 < good.ece < 0.5
    coin = judge_record("tfidf", judge, labelled(60, noise=True), WORDS)
    assert coin.accuracy == 0.5
    assert weak(coin)
    # Scores that are no log-odds have no calibration.
    assert judge_record("length", from_scorer(lambda p, c: torch.ones(len(c))), labelled(60), WORDS).ece is None


def test_the_record_of_judges_of_pairs() -> None:
    pairs = LabelledPairs(
        ("p",) * 4, ("a b c", "a", "a b", "x y z w"), ("a", "a b", "a b c", "x"), (1.0, 1.0, 1.0, 0.5), ("k", "l", "m", "n")
    )
    longer = lambda p, one, other: torch.tensor([float(len(a) > len(b)) for a, b in zip(one, other, strict=True)])  # noqa: E731
    sure = judge_record("f", longer, pairs, WORDS)
    assert (sure.accuracy, sure.n, sure.ece) == (pytest.approx(1 / 3), 3, None)  # the label that is a tie is left out
    assert sure.length_bias is not None
    assert sure.length_bias > 0.9
    unread = judge_record("f", lambda p, one, other: torch.tensor([0.8, torch.nan, 0.4]), pairs, WORDS, "mine")
    assert (unread.accuracy, unread.n, unread.note) == (0.5, 2, "mine; 1 of 3 verdicts could not be read")
    assert unread.ece == pytest.approx((abs(0.8 - 1) + abs(0.6 - 0)) / 2)
    with pytest.raises(DataError, match="none of its verdicts on 3"):
        judge_record("f", lambda p, one, other: torch.full((3,), torch.nan), pairs, WORDS)
    assert pairs.without({"k", "l"}).keys == ("m", "n")
    with pytest.raises(DataError, match="all 4 held-out pairs have prompts that the judge was fitted on"):
        pairs.without({"k", "l", "m", "n"})


def test_pairs_of_rankings_and_soft_labels_stand_preferred_first() -> None:
    records = [
        Record("a:1", "p", ("x", "y", "z"), Labels(ranks=(0, 1, 1)), "k"),
        Record("a:2", "q", ("x", "y"), Labels(ranks=(0, 1), soft_label=0.25), "l"),
        Record("a:3", "r", ("x",), Labels(), "m"),
    ]
    found = labelled_pairs(records)
    assert list(zip(found.chosen, found.rejected, found.soft_labels, strict=True)) == [
        ("x", "y", 1.0), ("x", "z", 1.0), ("y", "x", 0.75)
    ]  # fmt: skip
    with pytest.raises(DataError, match="no pair in an order"):
        labelled_pairs(records[2:])


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *more: Any, **others: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *more, **others)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"needs scikit-learn, which the 'sentiment' extra has"):
        TfidfJudge(labelled(4))
