"""Measures of a policy against enumeration, closed forms and scipy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from scipy.stats import binomtest, norm, pearsonr
from torch import Tensor

import losses
from prefopt import algorithms
from prefopt.data.exact_world import ExactWorld, WorldConfig
from prefopt.data.records import Example
from prefopt.evaluate import (
    Samples,
    correlation,
    distinct_n,
    measure_pairs,
    perplexity,
    repetition,
    sample_and_measure,
    wilson_interval,
)
from prefopt.models.causal_lm import CausalLMPolicy, FrozenReference, build_policy
from prefopt.models.fingerprint import fingerprint
from prefopt.models.lora import LoRA
from prefopt.models.packed import head_names
from prefopt.packing import flat_roles, pack
from prefopt.reference import ReferenceCache

WORLD = ExactWorld(WorldConfig.tabular())


def build_model(seed: int) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(WORLD.model_config()).double()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.12)
    return model.eval()


def build_pair(policy_seed: int = 0, reference_seed: int = 1) -> tuple[CausalLMPolicy, FrozenReference]:
    reference = CausalLMPolicy(build_model(reference_seed), WORLD.tokenizer)
    return CausalLMPolicy(build_model(policy_seed), WORLD.tokenizer), FrozenReference(reference, fingerprint(reference.model))


def exact_logps(seed: int) -> Tensor:
    """[G, C] of every completion."""
    return WORLD.sequence_logps(WORLD.next_logps(build_model(seed)))


def measure(policy: CausalLMPolicy, reference: FrozenReference, per_prompt: int, **changes: Any) -> Samples:
    prompts = [Example(f"{g}.{i}", ids, ()) for g, ids in enumerate(WORLD.prompt_ids) for i in range(per_prompt)]
    texts = {prompt.id: WORLD.layout.text(prompt.prompt_ids) for prompt in prompts}
    given = {
        "max_new_tokens": 3,
        "eos_ids": (WORLD.layout.eos,),
        "seed": 0,
        "judges": {},
        "micro_batch_tokens": 20_000,
        **changes,
    }
    return sample_and_measure(policy, reference, prompts, texts, **given)


def test_both_kl_estimates_are_unbiased_and_the_exact_one_is_sharper() -> None:
    """2,000 samples a prompt against the sum over all 40 completions of p * (log p - log q), within 4 standard errors."""
    samples = measure(*build_pair(), per_prompt=2000)
    p, q = exact_logps(0), exact_logps(1)
    enumerated = (p.exp() * (p - q)).sum(-1)
    assert (enumerated > 0.1).all()
    for values in (samples.kl, samples.k1):
        by_prompt = values.view(len(WORLD.prompts), -1)
        error = by_prompt.std(-1) / math.sqrt(by_prompt.shape[1])
        assert ((by_prompt.mean(-1) - enumerated).abs() < 4 * error).all()
    assert (samples.kl >= 0).all()
    assert (samples.k1 < 0).any()
    assert samples.kl.std() < 0.6 * samples.k1.std()


def test_kl_of_one_token_completions_is_the_enumeration_itself() -> None:
    """With one token every sample carries the same number: the KL of the next-token distribution."""
    policy, reference = build_pair()
    samples = measure(policy, reference, per_prompt=3, max_new_tokens=1)
    p, q = (WORLD.next_logps(build_model(seed))[:, 0] for seed in (0, 1))
    enumerated = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(samples.kl.view(-1, 3), enumerated.unsqueeze(-1).expand(-1, 3), atol=1e-9, rtol=0)
    assert samples.lengths.eq(1).all()


def test_a_policy_at_its_reference_has_no_kl() -> None:
    samples = measure(*build_pair(1, 1), per_prompt=20)
    assert samples.kl.abs().max() < 1e-9
    assert samples.k1.abs().max() < 1e-9


def test_adapters_are_measured_against_their_base() -> None:
    """LoRA: the reference shares the weights; new adapters have KL 0, moved ones the KL of the merged model."""
    policy = CausalLMPolicy(build_model(0), WORLD.tokenizer, lora=LoRA(r=4, alpha=8))
    reference = FrozenReference(policy, "")
    assert measure(policy, reference, per_prompt=4).kl.abs().max() == 0
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    samples = measure(policy, reference, per_prompt=2, max_new_tokens=1)
    with policy.plain_attention() as model:
        p = WORLD.next_logps(model)[:, 0]
    q = WORLD.next_logps(build_model(0))[:, 0]
    enumerated = (p.exp() * (p - q)).sum(-1)
    assert (enumerated > 1e-4).all()
    torch.testing.assert_close(samples.kl.view(-1, 2)[:, 0], enumerated, atol=1e-9, rtol=0)


def test_means_of_samples() -> None:
    """Names and definitions of what the report shows; the judge sees prompt and completion as text."""
    seen: list[tuple[str, str]] = []

    def judge(prompts: Sequence[Any], completions: Sequence[str]) -> Tensor:
        seen.extend(zip(prompts, completions, strict=True))
        return torch.tensor([float(len(text)) for text in completions])

    policy, reference = build_pair()
    samples = measure(policy, reference, per_prompt=50, judges={"reader": judge})
    assert [prompt for prompt, _ in seen[::50]] == list(WORLD.prompts)
    symbols = samples.lengths - samples.finished.long()
    assert samples.scores["reader"].tolist() == symbols.tolist()
    assert [len(text) for text in samples.texts] == symbols.tolist()
    found = samples.metrics()
    assert found == pytest.approx(
        {
            "kl": float(samples.kl.mean()),
            "kl_k1": float(samples.k1.mean()),
            "nats_per_token": float(samples.kl.sum()) / int(samples.lengths.sum()),
            "length": float(samples.lengths.sum()) / 200,
            "truncated": 1 - int(samples.finished.sum()) / 200,
            "score/reader": float(symbols.sum()) / 200,
            "distinct_2": distinct_n(samples.completions, 2),
            "repetition": 0.0,  # completions of three tokens have no 4-gram
        }
    )
    assert 0 < found["truncated"] < 1
    assert "score/reader" not in measure(policy, reference, per_prompt=1).metrics()
    rows = samples.rows(7)
    assert [(row.seed, row.judge, row.prompt_id) for row in rows] == [(7, "reader", id) for id in samples.ids]
    assert [(row.score, row.length) for row in rows] == list(zip(symbols.tolist(), samples.lengths.tolist(), strict=True))
    assert [row.kl for row in rows] == samples.kl.tolist()


def test_distinct_n_by_hand() -> None:
    """ababa and abc: pairs ab, ba, ab, ba, ab, bc: 3 different ones of 6; single tokens a, b, c: 3 of 8."""
    completions = [(0, 1, 0, 1, 0), (0, 1, 2)]
    assert distinct_n(completions, 2) == 3 / 6
    assert distinct_n(completions, 1) == 3 / 8
    assert distinct_n([(0,)], 2) == 1.0


def test_repetition_by_hand() -> None:
    """aaaaaa has three 4-grams, two of them repeats; abcde has two, none; abc has none and does not count."""
    assert repetition([(0,) * 6, (0, 1, 2, 3, 4), (0, 1, 2)]) == pytest.approx((2 / 3 + 0) / 2)
    assert repetition([(0, 1, 0, 1, 0)], n=2) == 2 / 4
    assert repetition([(0, 1, 2)]) == 0.0


def test_perplexity_is_that_of_the_enumerated_log_probs() -> None:
    policy, _ = build_pair()
    examples = [Example("a", WORLD.prompt_ids[0], ((0, 1, 2),)), Example("b", WORLD.prompt_ids[1], ((2, WORLD.layout.eos),))]
    logps = exact_logps(0)
    total = sum(float(logps[g, WORLD.layout.index(e.completion_ids[0])]) for g, e in enumerate(examples))
    for budget in (5, 1000):
        assert perplexity(policy, examples, budget) == pytest.approx(math.exp(-total / 5), rel=1e-9)


def test_the_same_seed_draws_the_same_samples() -> None:
    policy, reference = build_pair()
    one, same, other = (measure(policy, reference, per_prompt=20, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(one.kl, same.kl)
    assert not torch.equal(one.kl, other.kl)


def test_batching_does_not_change_the_measurement() -> None:
    policy, reference = build_pair()
    one, other = (measure(policy, reference, per_prompt=10, micro_batch_tokens=tokens) for tokens in (7, 100_000))
    torch.testing.assert_close(one.kl, other.kl, atol=1e-10, rtol=0)
    torch.testing.assert_close(one.k1, other.k1, atol=1e-10, rtol=0)


def pairs() -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    completions = torch.randperm(WORLD.layout.completions, generator=generator)[:24].tolist()
    ids = [tuple(WORLD.layout.ids[c][: int(WORLD.layout.lengths[c])].tolist()) for c in completions]
    return [Example(f"pair:{i}", WORLD.prompt_ids[i % 4], (ids[2 * i], ids[2 * i + 1])) for i in range(12)]


@pytest.mark.parametrize("tokens", [10, 100_000])
def test_pairs_are_measured_as_by_hand(tokens: int) -> None:
    """Log-ratios of whole completions from the enumerated tables."""
    policy, reference = build_pair()
    log_ratio = exact_logps(0) - exact_logps(1)
    chosen, rejected = (
        torch.stack([log_ratio[i % 4, WORLD.layout.index(pair.completion_ids[k])] for i, pair in enumerate(pairs())])
        for k in (0, 1)
    )
    found = measure_pairs(policy, ReferenceCache(reference), pairs(), algorithms.get("dpo").setting().loss, tokens).metrics
    accuracy = float((chosen > rejected).double().mean())
    assert 0 < accuracy < 1
    assert found == pytest.approx(
        {
            "accuracy": accuracy,
            "own_accuracy": accuracy,
            "margin": float((chosen - rejected).mean()),
            "chosen_log_ratio": float(chosen.mean()),
            "rejected_log_ratio": float(rejected.mean()),
        },
        abs=1e-9,
    )


def test_an_algorithms_own_score_may_disagree() -> None:
    """CPL scores by the policy alone: its own accuracy is that of log-probs without a reference."""
    policy, reference = build_pair()
    logps = exact_logps(0)
    scores = [[float(logps[i % 4, WORLD.layout.index(ids)]) for ids in pair.completion_ids] for i, pair in enumerate(pairs())]
    loss = algorithms.get("cpl").setting(bias=1.0).loss
    found = measure_pairs(policy, ReferenceCache(reference), pairs(), loss, 1000).metrics
    assert found["own_accuracy"] == pytest.approx(sum(c > r for c, r in scores) / 12)
    assert found["own_accuracy"] != found["accuracy"]


def test_losses_that_score_no_pairs_have_no_score_of_their_own() -> None:
    policy, reference = build_pair()
    cache = ReferenceCache(reference)
    common = measure_pairs(policy, cache, pairs(), None, 1000).metrics
    assert "own_accuracy" not in common
    for name in ("ppo", "sft"):
        assert measure_pairs(policy, cache, pairs(), algorithms.get(name).setting().loss, 1000).metrics == common


# Of every stream one loss or more; True where the loss gives each pair a score.
OWN_SCORE = {
    "wpo": True, "tdpo": True, "aot": True, "bradley_terry": True, "sft": False, "kto": False, "bco": False, "pl_dpo": False,
    "plackett_luce": False, "entropy": False, "value": False, "grpo": False,
}  # fmt: skip


@pytest.mark.parametrize("name", OWN_SCORE)
def test_a_loss_of_any_stream_lets_pairs_be_measured(name: str) -> None:
    """The common columns are those of no loss; accuracies of one's own are shares of the twelve pairs, ties counted half."""
    loss = losses.get(name).bind()
    policy, reference = build_policy(build_model(0), WORLD.tokenizer, heads=head_names(loss.needs))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double())
    cache = ReferenceCache(reference)
    found = measure_pairs(policy, cache, pairs(), loss, 100_000).metrics
    own = found.pop("own_accuracy", None)
    assert found == measure_pairs(policy, cache, pairs(), None, 100_000).metrics
    assert (own is not None) == OWN_SCORE[name]
    if own is not None:
        assert 0 < own < 1
        assert 24 * own == pytest.approx(round(24 * own))


def test_the_own_score_of_a_reward_model_is_that_of_its_head() -> None:
    policy, reference = build_policy(build_model(0), WORLD.tokenizer, heads=("reward",))
    head: Any = policy.heads["reward"]
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))
    found = measure_pairs(policy, ReferenceCache(reference), pairs(), losses.get("bradley_terry").bind(), 1000).metrics
    alone = [Example(pair.id, pair.prompt_ids, (ids,)) for pair in pairs() for ids in pair.completion_ids]
    rewards = policy.rows(pack(alone, roles=flat_roles), ["rewards"])["rewards"].view(-1, 2)
    assert found["own_accuracy"] == pytest.approx(float((rewards[:, 0] > rewards[:, 1]).double().mean()))
    assert 0 < found["own_accuracy"] < 1
    assert found["accuracy"] == 0.5, "the backbone is still the reference"


def test_ties_count_half() -> None:
    """At the reference every margin is zero up to rounding: accuracy one half, not what the rounding says."""
    policy, reference = build_pair(1, 1)
    found = measure_pairs(policy, ReferenceCache(reference), pairs(), None, 1000).metrics
    assert found["accuracy"] == 0.5
    assert found["margin"] == pytest.approx(0, abs=1e-9)
    same = [Example("same", WORLD.prompt_ids[0], ((0, 1), (0, 1)))]
    policy, reference = build_pair()
    assert measure_pairs(policy, ReferenceCache(reference), same, None, 1000).metrics["accuracy"] == 0.5


@pytest.mark.parametrize(("right", "n"), [(0, 5), (5, 5), (1, 2), (166, 332), (331, 332)])
def test_wilson_interval_equals_scipy(right: int, n: int) -> None:
    low, high = wilson_interval(right, n, z=float(norm.ppf(0.975)))
    interval = binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert (low, high) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert -1e-12 <= low <= right / n <= high <= 1 + 1e-12


def test_wilson_interval_of_nothing_is_everything() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_correlation_equals_scipy_and_is_absent_where_undefined() -> None:
    one, other = [1.0, 2.0, 4.0, 8.0], [3.0, 1.0, 9.0, 2.0]
    assert correlation(one, other) == pytest.approx(pearsonr(one, other).statistic, abs=1e-12)
    assert correlation([1.0, 2.0], [2.0, 3.0]) is None
    assert correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
