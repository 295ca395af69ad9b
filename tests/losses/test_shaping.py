"""Token rewards: closed forms, what every spread of a score keeps, the KL estimators, and the controller."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from losses.advantages import gae
from losses.shaping import adapted_kl_coef, explained_variance, redistribute, token_kls, token_rewards


def completions(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, weights and a mask of four completions of up to five tokens."""
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(4, generator=generator, dtype=torch.float64)
    weights = torch.rand(4, 5, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 6, (4, 1), generator=generator)
    return scores, weights, (torch.arange(5) < lengths).double()


def test_the_penalty_stands_on_every_token_and_the_score_on_the_last() -> None:
    """Log-ratios (0.5, -0.25) at a price of 0.1, a score of 2, and a third token that does not exist."""
    logps = torch.tensor([[-1.0, -2.0, -9.0]])
    reference = torch.tensor([[-1.5, -1.75, 0.0]])
    mask = torch.tensor([[1, 1, 0]])
    rewards = token_rewards(torch.tensor([2.0]), logps, reference, mask, kl_coef=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 2.025, 0.0]]))


@pytest.mark.parametrize(
    ("kl_estimator", "wanted"), [("k1", 0.5), ("k2", 0.125), ("k3", math.exp(-0.5) - 1 + 0.5)], ids=["k1", "k2", "k3"]
)
def test_estimators_of_one_log_ratio(kl_estimator: str, wanted: float) -> None:
    found = token_kls(
        torch.tensor([[-1.0, -9.0]]), torch.tensor([[-1.5, 0.0]]), torch.tensor([[1, 0]]), kl_estimator=kl_estimator
    )  # type: ignore[arg-type]
    torch.testing.assert_close(found, torch.tensor([[wanted, 0.0]]))


def test_an_unknown_estimator() -> None:
    one = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="unknown kl_estimator 'k4'; expected k1, k2, k3"):
        token_kls(one, one, one, kl_estimator="k4")  # type: ignore[arg-type]


@given(st.integers(0, 10_000), st.floats(0, 1))
def test_a_spread_score_sums_to_the_score(seed: int, credit_beta: float) -> None:
    """For every share, with the score's sign everywhere, and nothing outside of the completion."""
    scores, weights, mask = completions(seed)
    spread = redistribute(scores, weights, mask, credit_beta=credit_beta)
    torch.testing.assert_close(spread.sum(-1), scores, atol=1e-12, rtol=1e-12)
    assert (spread * scores[:, None] >= 0).all()
    assert (spread[mask == 0] == 0).all()


@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0.01, 100))
def test_the_scale_of_weights_and_what_stands_outside_do_not_matter(seed: int, credit_beta: float, scale: float) -> None:
    scores, weights, mask = completions(seed)
    other = torch.where(mask.bool(), scale * weights, torch.nan)
    torch.testing.assert_close(
        redistribute(scores, other, mask, credit_beta=credit_beta), redistribute(scores, weights, mask, credit_beta=credit_beta)
    )


@given(st.integers(0, 10_000))
def test_limits_of_the_share(seed: int) -> None:
    """0 and no weights: the last token has it all; 1 with equal weights: score / length."""
    scores, weights, mask = completions(seed)
    last = torch.zeros_like(mask).scatter(1, mask.sum(-1, keepdim=True).long() - 1, 1.0) * scores[:, None]
    torch.testing.assert_close(redistribute(scores, weights, mask, credit_beta=0.0), last)
    torch.testing.assert_close(redistribute(scores, None, mask, credit_beta=1.0), last)
    torch.testing.assert_close(redistribute(scores, torch.zeros_like(weights), mask), last)
    torch.testing.assert_close(redistribute(scores, mask, mask), mask * (scores / mask.sum(-1))[:, None])


@given(st.integers(0, 10_000), st.floats(0, 1))
def test_the_first_tokens_return_does_not_depend_on_the_spread(seed: int, credit_beta: float) -> None:
    """Undiscounted, with a value head of 0 and lambda 1, the advantage of the first token is the score (Chan et al. 2024)."""
    scores, weights, mask = completions(seed)
    spread = redistribute(scores, weights, mask, credit_beta=credit_beta)
    first = gae(spread, torch.zeros_like(spread), mask, gae_lambda=1.0, whiten_advantages=False)["advantages"][:, 0]
    torch.testing.assert_close(first, scores)


@pytest.mark.parametrize("credit_beta", [-0.1, 1.1])
def test_a_share_outside_of_its_range(credit_beta: float) -> None:
    with pytest.raises(ValueError, match=r"expected a share in \[0, 1\]"):
        redistribute(torch.ones(1), None, torch.ones(1, 2), credit_beta=credit_beta)


def test_negative_weights() -> None:
    with pytest.raises(ValueError, match=r"smallest weight is -1, expected none below 0"):
        redistribute(torch.ones(1), torch.tensor([[2.0, -1.0]]), torch.ones(1, 2))


def test_the_controller_by_hand() -> None:
    """KL 9 at target 6 is 50% too high, cut to 20%; 256 of a horizon of 10,000: times 1 + 0.2*0.0256."""
    found = adapted_kl_coef(0.05, 9.0, target=6.0, horizon=10_000, samples=256)
    assert found == pytest.approx(0.05 * (1 + 0.2 * 0.0256), rel=1e-12)
    assert adapted_kl_coef(0.05, 6.6, target=6.0, horizon=10_000, samples=256) == pytest.approx(0.05 * (1 + 0.1 * 0.0256))
    assert adapted_kl_coef(0.05, 0.0, target=6.0, horizon=10_000, samples=256) == pytest.approx(0.05 * (1 - 0.2 * 0.0256))


@given(st.floats(0, 100), st.floats(0.1, 50), st.floats(10, 1e5), st.integers(1, 10**6))
def test_the_controller_moves_towards_the_target_and_stays_positive_or_zero(
    kl: float, target: float, horizon: float, samples: int
) -> None:
    found = adapted_kl_coef(0.1, kl, target=target, horizon=horizon, samples=samples)
    assert found >= 0
    assert (found >= 0.1) if kl >= target else (found <= 0.1)


def test_the_controller_needs_a_target() -> None:
    with pytest.raises(ValueError, match="target and horizon must be positive, got 0 and 1"):
        adapted_kl_coef(0.1, 1.0, target=0, horizon=1, samples=1)


def test_explained_variance() -> None:
    """1 for values that are the returns, 0 for constant ones, -3 for the returns' negatives; padding does not count."""
    returns = torch.tensor([[1.0, 3.0, 50.0], [5.0, -1.0, 2.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    assert float(explained_variance(returns, returns, mask)) == 1
    assert float(explained_variance(torch.full_like(returns, 4.0), returns, mask)) == pytest.approx(0, abs=1e-6)
    assert float(explained_variance(-returns, returns, mask)) == pytest.approx(-3, abs=1e-6)
    assert float(explained_variance(returns, torch.ones_like(returns), mask)) == 0
