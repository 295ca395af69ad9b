"""Best of n drawn from a table: its reward and KL against enumeration, and the bound that is commonly reported for it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from prefopt.best_of_n import BestOfN, best_of_n, kl_bound, kl_of_ranks
from prefopt.data.exact_world import ExactWorld, WorldConfig, best_of_n_logps, expected, kl
from prefopt.engines import OwnEngine
from prefopt.errors import ConfigError, TrainingError
from prefopt.generate import Decoding, Sample
from prefopt.models.tabular import build_tabular

WORLD = ExactWorld(WorldConfig.tabular(seed=2))
LAYOUT = WORLD.layout
REFERENCE = LAYOUT.path_sums(WORLD.source_next_logps)
DRAWS = 800
REWARD = {pair: WORLD.reward_text(*pair) for pair in itertools.product(WORLD.prompts, LAYOUT.texts)}


def hidden_reward(prompts: object, completions: object) -> Tensor:
    pairs = zip(prompts, completions, strict=True)  # type: ignore[call-overload]
    return torch.tensor([REWARD[pair] for pair in pairs], dtype=torch.float64)


def draw(n: int, count: int, seed: int = 0) -> BestOfN:
    """`count` draws of each prompt's best of n from the reference."""
    engine = OwnEngine((LAYOUT.eos,))
    engine.sync(build_tabular(WORLD, WORLD.source_next_logps)[0])
    ids = [prompt for prompt in WORLD.prompt_ids for _ in range(count)]
    texts = [prompt for prompt in WORLD.prompts for _ in range(count)]
    return best_of_n(
        engine, hidden_reward, WORLD.tokenizer, ids, texts, n, decoding=Decoding(LAYOUT.limit, batch_size=4096), seed=seed
    )


@pytest.mark.parametrize("n", [3, 16])
def test_sampled_kl_and_reward_match_enumeration_and_the_bound_holds(n: int) -> None:
    """The mean of log(best-of-n / reference) over kept samples is an unbiased estimate of the KL, prompt by prompt.

    Of 3 the KL is so near to the bound (0.008 nats) that a mean of samples may lie above it; of 16 it is 0.06 below, four
    standard errors.
    """
    exact = best_of_n_logps(REFERENCE, WORLD.rewards, n)
    found = draw(n, DRAWS)
    kept = torch.tensor([LAYOUT.index(sample.ids) for sample in found.chosen]).view(len(WORLD.prompts), DRAWS)
    for values, truth in (
        ((exact - REFERENCE).gather(1, kept), kl(exact, REFERENCE)),
        (found.chosen_scores.view_as(kept), expected(WORLD.rewards, exact)),
    ):
        error = values.std(-1) / math.sqrt(DRAWS)
        assert ((values.mean(-1) - truth).abs() < 3 * error).all()
    assert (kl(exact, REFERENCE) <= kl_bound(n)).all()
    if n == 16:
        assert float((exact - REFERENCE).gather(1, kept).mean()) < kl_bound(n)


@pytest.mark.parametrize("n", [2, 16])
def test_the_kl_of_ranks_is_near_the_truth_and_never_above_the_bound(n: int) -> None:
    """20,000 draws of each prompt: 40 completions of a known probability to about one in a hundred."""
    scores = draw(16, 1250).scores.view(len(WORLD.prompts), -1)
    found = kl_of_ranks(scores, n)
    assert torch.allclose(found, kl(best_of_n_logps(REFERENCE, WORLD.rewards, n), REFERENCE), rtol=0.01)
    assert (found <= kl_bound(n)).all()
    # As few draws as are kept from: by hand for 2, kept masses 1/4 and 3/4 of equal ones.
    few = kl_of_ranks(torch.tensor([[0.3, 0.7]]), 2)
    assert float(few) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert float(kl_of_ranks(torch.ones(1, 50), n)) == pytest.approx(0.0, abs=1e-12)


def test_one_set_of_draws_serves_every_smaller_n() -> None:
    many, few = draw(4, 3), draw(4, 3).first(2)
    assert few.scores.shape == (12, 2)
    assert torch.equal(few.scores, many.scores[:, :2])
    for sample, text, score in zip(few.chosen, few.chosen_texts, few.chosen_scores, strict=True):
        assert WORLD.tokenizer.decode(sample.ids, skip_special_tokens=True) == text
        assert score in few.scores
    assert torch.equal(few.chosen_scores, few.scores.amax(-1))
    with pytest.raises(ConfigError, match="there are 4 samples"):
        many.first(5)


class Fixed:
    """An engine that draws what it is told."""

    def __init__(self, *completions: tuple[int, ...]) -> None:
        self._completions = completions

    def sync(self, policy: object) -> None:
        """Nothing to take over."""

    def generate(self, prompts: object, decoding: Decoding, seed: int, samples_per_prompt: int = 1) -> list[Sample]:
        return [Sample(ids, True, None) for ids in self._completions]


def test_the_best_is_kept_and_of_equals_the_first() -> None:
    a, b, c = (0, 3), (1, 3), (2, 3)
    scores = torch.tensor([1.0, 2.0, 2.0, 0.0, -1.0, -5.0])
    found = best_of_n(
        Fixed(a, b, c, c, b, a), lambda p, t: scores, WORLD.tokenizer, [(0,), (1,)], ["one", "two"], 3,
        decoding=Decoding(3), seed=0,
    )  # fmt: skip
    assert [sample.ids for sample in found.chosen] == [b, c]
    assert found.chosen_texts == ["b", "c"]
    assert found.chosen_scores.tolist() == [2.0, 0.0]


def test_a_score_that_is_not_finite_is_named() -> None:
    scores = torch.tensor([1.0, float("nan")])
    with pytest.raises(TrainingError, match="prompt 0, draw 1"):
        best_of_n(Fixed((0, 3), (1, 3)), lambda p, t: scores, WORLD.tokenizer, [(0,)], ["one"], 2, decoding=Decoding(3), seed=0)


def test_the_bound_by_hand() -> None:
    assert kl_bound(1) == 0.0
    assert kl_bound(4) == pytest.approx(1.3862944 - 0.75)
    with pytest.raises(ConfigError, match="n >= 1"):
        kl_bound(0)
