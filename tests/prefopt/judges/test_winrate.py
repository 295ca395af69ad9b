"""Win rates: closed forms, intervals that cover, a planted length preference that the length-controlled rate takes out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from prefopt.errors import ConfigError, DataError, TrainingError
from prefopt.evaluate import wilson_interval
from prefopt.judges import BothOrders, agreement, from_scorer, judge_samples, length_controlled, win_rate
from prefopt.judges.lengths import fit_logistic, length_in, matched, matched_win_rate, token_length
from prefopt.judges.verdicts import Orders, outcomes, position_bias

NAN = math.nan


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def study(count: int, slope: float, quality: float, seed: int, *, longer: float = 0.5) -> tuple[Tensor, Tensor]:
    """A judge that prefers ours with probability sigma(slope * log length ratio + quality); ours is longer on average."""
    draw = np.random.default_rng(seed)
    ratios = draw.normal(longer, 0.6, count)
    lengths = np.stack([np.maximum(1, np.round(100 * np.exp(ratios))), np.full(count, 100.0)], 1)
    p = 1 / (1 + np.exp(-slope * np.log(lengths[:, 0] / 100) - quality))
    return torch.from_numpy((draw.random(count) < p).astype(float)), torch.from_numpy(lengths)


def test_wins_ties_and_verdicts_that_are_missing() -> None:
    """3 wins, a tie, a loss: (3 + 1/2) / 5; the unread sixth could have made it 3.5/6 or 4.5/6."""
    found = win_rate(tensor(1, 1, 1, 0.5, 0, NAN))
    assert (found.rate, found.wins, found.ties, found.losses, found.pairs, found.unread) == (0.7, 3, 1, 1, 5, 1)
    assert (found.low, found.high) == wilson_interval(3.5, 5)
    assert found.interval == "wilson"
    assert found.bounds == pytest.approx((3.5 / 6, 4.5 / 6))
    nothing = win_rate(tensor(NAN, NAN))
    assert (nothing.pairs, nothing.unread, nothing.interval, nothing.bounds) == (0, 2, "none", (0.0, 1.0))
    assert math.isnan(nothing.rate)


def test_pairs_of_one_prompt_are_no_independent_evidence() -> None:
    """Every prompt ten times over: the interval is that of the prompts, not of ten times as many."""
    once = torch.from_numpy((np.random.default_rng(0).random(60) < 0.6).astype(float))
    alone = win_rate(once)
    found = win_rate(once.repeat_interleave(10), [str(i // 10) for i in range(600)])
    assert (found.interval, found.pairs, found.prompts) == ("bootstrap", 600, 60)
    assert found.rate == pytest.approx(alone.rate)
    assert found.high - found.low == pytest.approx(alone.high - alone.low, rel=0.1)
    # All prompts agree: resampling has no width, but 5 prompts are no certainty.
    same = win_rate(torch.ones(20).double(), [str(i // 4) for i in range(20)])
    assert (same.low, same.high) == wilson_interval(5, 5)


def test_the_bootstrap_over_prompts_covers() -> None:
    """Prompts with a win rate of their own, three pairs each, truth 0.5: 95% intervals cover in at least 88 of 100 studies."""
    draw = np.random.default_rng(3)
    covered = 0
    for _ in range(100):
        shares = (draw.random((40, 3)) < draw.beta(1, 1, (40, 1))).astype(float)
        found = win_rate(torch.from_numpy(shares.ravel()), [str(i // 3) for i in range(120)])
        covered += found.low <= 0.5 <= found.high
    assert 88 <= covered < 100


@pytest.mark.parametrize(("slope", "quality"), [(3.0, 0.0), (2.0, 0.7), (2.0, -0.7), (0.0, 0.4)])
def test_a_planted_length_preference_is_taken_out(slope: float, quality: float) -> None:
    """Over 60 studies: the raw rate is off by 10 points and more, the controlled one right within its interval."""
    truth = 1 / (1 + math.exp(-quality))
    raw, rates, covered = [], [], 0
    for seed in range(60):
        shares, lengths = study(250, slope, quality, seed)
        found = length_controlled(shares, lengths)
        assert found is not None
        raw.append(win_rate(shares).rate)
        rates.append(found.rate)
        covered += found.low <= truth <= found.high
        assert found.effect * slope >= 0
    assert abs(sum(rates) / 60 - truth) < 0.02
    assert covered >= 53
    if slope:
        assert sum(raw) / 60 > truth + 0.1
    else:
        assert sum(raw) / 60 == pytest.approx(truth, abs=0.02)


def test_equal_lengths_leave_the_win_rate_under_jeffreys_prior() -> None:
    """Without a length term the modified score is sum(y) - n p + 1/2 - p = 0: p = (wins + 1/2) / (n + 1)."""
    shares = tensor(*[1] * 7, *[0] * 3)
    found = length_controlled(shares, torch.full((10, 2), 40))
    assert found is not None
    assert found.rate == pytest.approx(7.5 / 11)
    assert found.effect == 0.0
    assert not found.extrapolated


def test_one_order_of_each_pair_says_what_both_say_and_sklearn_agrees() -> None:
    """Both orders with the sign of the intercept turned, fitted by scikit-learn without a prior: the same coefficients."""
    linear = pytest.importorskip("sklearn.linear_model")
    shares, lengths = study(4_000, 1.5, 0.5, 0)
    ratios = lengths[:, 0].log() - lengths[:, 1].log()
    design = torch.stack([torch.ones_like(ratios), ratios / ratios.square().mean().sqrt()], 1)
    both = torch.cat([design, -design])
    assert both[:, 1].std(correction=0) == pytest.approx(1)
    fitted = linear.LogisticRegression(C=1e9, fit_intercept=False, tol=1e-10).fit(both, torch.cat([shares, 1 - shares]))
    assert fit_logistic(design, shares).tolist() == pytest.approx(fitted.coef_[0].tolist(), abs=5e-3)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0, NAN]), st.integers(0, 300), st.integers(0, 300)),
        min_size=1,
        max_size=30,
    )
)
@example(rows=[(0.0, 10, 7), (0.0, 11, 8)])  # hardly anything is known at equal lengths
@example(rows=[(0.0, 0, 0), (0.0, 0, 15)])  # whole steps of the fit go back and forth here
def test_turning_the_sides_turns_every_rate(rows: list[tuple[float, int, int]]) -> None:
    shares = tensor(*(row[0] for row in rows))
    lengths = torch.tensor([row[1:] for row in rows])
    one, other = win_rate(shares), win_rate(1 - shares)
    assert (one.wins, one.ties, one.losses, one.unread) == (other.losses, other.ties, other.wins, other.unread)
    found, turned = length_controlled(shares, lengths), length_controlled(1 - shares, lengths.flip(1))
    if found is None or turned is None:
        assert one.pairs == 0
        return
    assert one.rate == pytest.approx(1 - other.rate)
    assert found.rate == pytest.approx(1 - turned.rate, abs=1e-6)
    assert found.low == pytest.approx(1 - turned.high, abs=1e-6)
    # Of few pairs that are nearly equal in their ratio of lengths an end may be as close to 0 or 1 as a number can be.
    assert 0 <= found.low <= found.rate <= found.high <= 1
    assert 0 < found.rate < 1
    assert matched(lengths).tolist() == matched(lengths.flip(1)).tolist()


def test_where_length_decides_everything_the_rate_stays_finite_and_unsure() -> None:
    """The longer one always wins: what would be at equal lengths is hardly known, and it is not certain victory."""
    ratios = torch.linspace(-1, 2, 60)
    lengths = torch.stack([(100 * ratios.exp()).round(), torch.full((60,), 100.0)], 1)
    found = length_controlled((ratios > 0).double(), lengths)
    assert found is not None
    assert found.low < 0.3 < 0.5 < 0.7 < found.high
    assert found.effect > 5
    aside = length_controlled(torch.ones(8).double(), torch.tensor([[20, 10]] * 8))
    assert aside is not None
    assert aside.extrapolated


def test_the_matched_subset_is_by_the_longer_one() -> None:
    lengths = torch.tensor([[100, 90], [90, 100], [100, 89], [0, 0], [5, 0]])
    assert matched(lengths).tolist() == [True, True, False, True, False]
    found = matched_win_rate(tensor(1, 0, 1, NAN, 1), lengths, list("aabbc"))
    assert (found.rate, found.pairs, found.prompts, found.unread) == (0.5, 2, 1, 1)


def test_agreement_is_cohens_kappa_over_three_verdicts() -> None:
    """By hand: 4 of 5 the same; chance (3/5 2/5 + 1/5 1/5 + 1/5 2/5) = 0.36; kappa (0.8 - 0.36) / 0.64."""
    one, other = tensor(1, 1, 1, 0.5, 0, NAN), tensor(1, 1, 0, 0.5, 0.0, 1)
    (found,) = agreement({"a": one, "b": other})
    assert (found.pairs, found.same) == (5, 0.8)
    assert found.kappa == pytest.approx(0.44 / 0.64)
    metrics = pytest.importorskip("sklearn.metrics")
    assert found.kappa == pytest.approx(metrics.cohen_kappa_score([2, 2, 2, 1, 0], [2, 2, 0, 1, 0]))
    assert found.decided == 0.75
    (constant,) = agreement({"a": tensor(1, 1), "b": tensor(1, 1)})
    assert constant.same == 1
    assert math.isnan(constant.kappa)
    assert [(item.one, item.other) for item in agreement({"a": one, "b": other, "c": one})] == [
        ("a", "b"),
        ("a", "c"),
        ("b", "c"),
    ]
    assert outcomes(tensor(0.5 + 1e-9, 0.6, 0.4)).tolist() == [0, 1, -1]


def test_a_place_that_decides_is_counted_and_taken_out() -> None:
    """A judge of quality 0.7 that adds 0.25 to whatever stands first: the mean of both orders is 0.7 again."""
    found = Orders(tensor(0.95, 0.55, 0.3, NAN), tensor(0.45, 0.05, 0.8, 1))
    assert found.shares[:3].tolist() == pytest.approx([0.7, 0.3, 0.55])
    bias = position_bias(found)
    assert (bias.pairs, bias.rate, bias.first) == (3, 1.0, pytest.approx(2 / 3))
    quality = lambda prompts, first, second: tensor(*(0.7 if one == "good" else 0.3 for one in first)) + 0.25  # noqa: E731
    judge = BothOrders(quality)
    assert judge(["p"] * 2, ["good", "bad"], ["bad", "good"]).tolist() == pytest.approx([0.7, 0.3])


def test_judging_samples_gives_numbers_and_rows() -> None:
    judges = {"longer": from_scorer(lambda prompts, texts: torch.tensor([float(len(t)) for t in texts]))}
    judged = judge_samples(judges, ["p", "q", "p"], ["aaa b", "a", "c c c"], ["a", "bb", "c c d"])
    assert judged.prompts == ("0", "1", "0")
    summary = judged.summary("longer")
    assert (summary.win_rate.wins, summary.win_rate.losses, summary.win_rate.ties, summary.win_rate.prompts) == (1, 1, 1, 2)
    assert [row["share"] for row in judged.rows()] == [1.0, 0.0, 0.5]
    assert judged.as_dict()["mean_lengths"] == [2.0, 5 / 3]
    with pytest.raises(DataError, match="1 of 2 ids are repeated"):
        judge_samples(judges, ["p", "q"], ["a", "b"], ["c", "d"], ids=["x", "x"])
    with pytest.raises(DataError, match="at least one pair"):
        judge_samples(judges, [], [], [])
    with pytest.raises(TrainingError, match=r"shape \[1\] for 2 pairs"):
        judge_samples({"bad": lambda p, a, b: tensor(1)}, ["p", "q"], ["a", "b"], ["c", "d"])
    with pytest.raises(TrainingError, match="returned 3 for pair 1; expected the probability"):
        judge_samples({"bad": lambda p, a, b: tensor(1, 3)}, ["p", "q"], ["a", "b"], ["c", "d"])


def test_lengths_have_a_unit() -> None:
    assert [length_in(unit)("two words") for unit in ("words", "characters")] == [2, 9]
    assert token_length(lambda text, add_special_tokens: {"input_ids": list(text.split("o"))})("two words") == 3
    with pytest.raises(ConfigError, match="expected one of words, characters"):
        length_in("pages")
