"""The exact world against brute force, Monte Carlo and closed forms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from prefopt.data.exact_world import (
    ExactWorld,
    WorldConfig,
    best_of_n_logps,
    beta_at_kl,
    check_normalised,
    entropy,
    expected,
    frontier,
    kl,
    log_partition,
    objective,
    optimal_logps,
    pair_accuracy,
    parse_labels,
    regret,
)
from prefopt.data.exact_world.labels import sample_completions
from prefopt.errors import ConfigError, DataError
from prefopt.models.causal_lm import CausalLMPolicy
from prefopt.packing import pack, pair_roles
from prefopt.tokenize import tokenize


@pytest.fixture(scope="module")
def world() -> ExactWorld:
    return ExactWorld()


@pytest.fixture(scope="module")
def tabular() -> ExactWorld:
    return ExactWorld(WorldConfig.tabular())


@pytest.fixture(scope="module")
def reference(tabular: ExactWorld) -> torch.Tensor:
    """A reference for the tabular world: its source [G, C]."""
    return tabular.sequence_logps(tabular.source_next_logps)


def random_model(world: ExactWorld, seed: int = 0) -> LlamaForCausalLM:
    """A model far from uniform, so that mistakes in order or position show."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(world.model_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


# The enumeration


def test_default_world_has_the_stated_size(world: ExactWorld) -> None:
    assert world.layout.prefixes == 1_555
    assert world.layout.completions == 9_331
    assert world.rewards.shape == (16, 9_331)
    parameters = sum(parameter.numel() for parameter in random_model(world).parameters())
    assert 50_000 <= parameters <= 90_000


def test_completions_are_all_strings_once(tabular: ExactWorld) -> None:
    letters = "abc"
    strings = ["".join(word) for length in range(4) for word in itertools.product(letters, repeat=length)]
    assert list(tabular.layout.texts) == strings
    for index, text in enumerate(strings):
        ids = [letters.index(letter) for letter in text] + ([3] if len(text) < 3 else [])
        assert tabular.layout.ids[index, : len(ids)].tolist() == ids
        assert tabular.layout.lengths[index] == len(ids) == tabular.layout.mask[index].sum()
        assert bool(tabular.layout.terminated[index]) == (ids[-1:] == [3])
        assert tabular.layout.index(ids) == index


@pytest.mark.parametrize("ids", [[], [0, 1], [0, 1, 2, 3], [0, 1, 2, 0], [4, 3], [3, 3], [-1, 0, 0]])
def test_what_is_no_completion_has_no_index(tabular: ExactWorld, ids: list[int]) -> None:
    with pytest.raises(DataError, match="not a completion of this world"):
        tabular.layout.index(ids)


@pytest.mark.parametrize("seed", range(5))
def test_no_prompt_begins_another(seed: int) -> None:
    for config in (WorldConfig(seed=seed), WorldConfig.tabular(seed), WorldConfig(seed, 6, 3, 2, (1, 3, 4))):
        prompts = ExactWorld(config).prompts
        assert len(prompts) == config.prompts
        assert {len(prompt) for prompt in prompts} == set(config.prompt_lengths)
        assert not [(a, b) for a, b in itertools.permutations(prompts, 2) if b.startswith(a)]


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_probabilities_equal_brute_force_with_padding_and_sum_to_one(limit: int) -> None:
    """Each completion alone through the model, right-padded with an attention mask, tokens added one by one."""
    world = ExactWorld(WorldConfig(seed=3, prompts=4, symbols=2, max_completion_length=limit))
    model = random_model(world).eval()
    logps = world.sequence_logps(world.next_logps(model, batch_size=3))
    assert torch.allclose(logps.exp().sum(-1), torch.ones(4, dtype=torch.float64), atol=1e-12)
    token_logps = world.layout.path_values(world.next_logps(model))
    assert torch.allclose(token_logps.sum(-1), logps, atol=1e-12)
    for g, prompt in enumerate(world.prompt_ids):
        for c in range(world.layout.completions):
            length = int(world.layout.lengths[c])
            ids = [*prompt, *world.layout.ids[c, :length].tolist()]
            padded = torch.tensor([ids + [world.layout.eos] * 3])
            mask = (torch.arange(len(ids) + 3) < len(ids)).long()[None]
            with torch.no_grad():
                steps = model(input_ids=padded, attention_mask=mask).logits[0].double().log_softmax(-1)
            each = [float(steps[t - 1, ids[t]]) for t in range(len(prompt), len(ids))]
            assert token_logps[g, c, :length].tolist() == pytest.approx(each, abs=1e-5)
            assert not token_logps[g, c, length:].any()


def test_next_logps_leaves_modes_alone_and_ignores_dropout(tabular: ExactWorld) -> None:
    config = tabular.model_config()
    config.attention_dropout = 0.5
    model = AutoModelForCausalLM.from_config(config)
    model.train()
    model.model.layers[0].eval()
    first = tabular.next_logps(model)
    assert torch.equal(first, tabular.next_logps(model))
    assert model.training
    assert not model.model.layers[0].mlp.training


def test_next_logps_names_a_foreign_vocabulary(world: ExactWorld, tabular: ExactWorld) -> None:
    with pytest.raises(ConfigError, match=r"vocabulary has 7 entries; expected 4"):
        tabular.next_logps(random_model(world))


def test_conditionals_and_sequences_are_inverse(tabular: ExactWorld, reference: torch.Tensor) -> None:
    assert torch.allclose(tabular.layout.next_logps(reference), tabular.source_next_logps, atol=1e-12)


def test_check_normalised_finds_the_row(reference: torch.Tensor) -> None:
    check_normalised(reference)
    broken = reference.clone()
    broken[2] += 1e-6
    with pytest.raises(DataError, match=r"prompt 2 sums to 1\.000001"):
        check_normalised(broken)
    broken[1, 0] = math.nan
    with pytest.raises(DataError, match="prompt 1"):
        check_normalised(broken)


# Text


def test_records_tokenise_to_the_worlds_own_ids(world: ExactWorld) -> None:
    reference = world.sequence_logps(world.source_next_logps)
    records = [*world.pairs(reference, 2_000, seed=0), *world.source_records(500, seed=0)]
    made = tokenize(records, world.tokenizer, max_length=16, max_completion_length=5)
    assert made.examples == [world.example(record) for record in records]
    assert {len(ids) for example in made.examples for ids in example.completion_ids} == {1, 2, 3, 4, 5}


def test_the_shared_forward_gives_the_enumerated_log_probs(world: ExactWorld) -> None:
    """Records through tokenizer, packing and branches, against plain passes over enumerated strings."""
    policy = CausalLMPolicy(random_model(world), world.tokenizer)
    with policy.plain_attention() as model:
        logps = world.sequence_logps(world.next_logps(model))
    pairs = world.sample_pairs(logps, 100, seed=0)
    examples = tokenize(world.pairs(logps, 100, seed=0), world.tokenizer, max_length=16, max_completion_length=5).examples
    with torch.no_grad():
        found = policy.evaluate(pack(examples, roles=pair_roles), {"policy_chosen_logps", "policy_rejected_logps"})
    assert torch.allclose(found["policy_chosen_logps"].double(), logps[pairs.prompt, pairs.chosen], atol=1e-4)
    assert torch.allclose(found["policy_rejected_logps"].double(), logps[pairs.prompt, pairs.rejected], atol=1e-4)


def test_tokenizer_round_trip(world: ExactWorld, tmp_path) -> None:
    world.tokenizer.save_pretrained(tmp_path)
    for tokenizer in (world.tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert len(tokenizer) == 7
        assert tokenizer.eos_token_id == tokenizer.pad_token_id == 6
        assert tokenizer("fabca")["input_ids"] == [5, 0, 1, 2, 0]
        assert tokenizer("f" + "abca<eos>")["input_ids"] == [5, 0, 1, 2, 0, 6]
        assert tokenizer.decode([5, 0, 6], skip_special_tokens=True) == "fa"
        with pytest.raises(Exception, match="UNK"):
            tokenizer("az")


# The hidden reward and the source


def test_reward_is_standard_under_the_source_and_known_by_text(world: ExactWorld) -> None:
    probability = world.sequence_logps(world.source_next_logps).exp()
    assert torch.allclose((probability * world.rewards).sum(-1), torch.zeros(16, dtype=torch.float64), atol=1e-12)
    assert float((probability * world.rewards.square()).sum(-1).mean()) == pytest.approx(1.0)
    for completion in ("", "ab", "abcd", "abcde"):
        ids = [ord(letter) - ord("a") for letter in completion] + ([6] if len(completion) < 5 else [])
        column = world.layout.texts.index(completion)
        assert world.reward_text(world.prompts[7], completion) == float(world.rewards[7, column]) == world.reward_of(7, ids)


def test_reward_has_token_and_sequence_parts(world: ExactWorld) -> None:
    """The best sum of per-position symbol values explains a good part of a prompt's reward, and leaves a good part."""
    full = world.layout.ids[world.layout.prefixes :]
    design = torch.nn.functional.one_hot(full, 6).flatten(1).double()
    rewards = world.rewards[:, world.layout.prefixes :].T
    rewards = rewards - rewards.mean(0)
    # The 30 indicator columns have rank 26: the minimum-norm solution needs the SVD driver.
    fitted = design @ torch.linalg.lstsq(design, rewards, driver="gelsd").solution
    explained = fitted.var(0) / rewards.var(0)
    assert 0.2 < float(explained.mean()) < 0.9
    correlations = torch.corrcoef(rewards.T)
    assert float(correlations[~torch.eye(16, dtype=torch.bool)].max()) < 0.95


@pytest.mark.parametrize(
    ("prompt", "completion", "message"), [("zz", "a", "not a prompt"), (None, "z", "outside"), (None, "abcabc", "not a")]
)
def test_reward_text_refuses_other_text(world: ExactWorld, prompt: str | None, completion: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        world.reward_text(prompt or world.prompts[0], completion)


def test_lengths_vary_and_do_not_decide_the_reward(world: ExactWorld) -> None:
    source = world.sequence_logps(world.source_next_logps)
    measured = world.evaluate(source, source).means()
    assert 0.4 < measured["eos_share"] < 0.9
    assert measured["kl"] == 0
    assert measured["pair_accuracy"] == 0.5
    lengths, probability = world.layout.symbol_counts.double(), source.exp()
    centred = lengths - expected(lengths, source)[:, None]
    covariance = (probability * centred * world.rewards).sum(-1)
    deviations = ((probability * centred**2).sum(-1) * (probability * world.rewards**2).sum(-1)).sqrt()
    assert float((covariance / deviations).abs().max()) < 0.6


def test_worlds_follow_their_seed(world: ExactWorld) -> None:
    again, other = ExactWorld(WorldConfig(seed=0)), ExactWorld(WorldConfig(seed=1))
    assert again.prompts == world.prompts
    assert torch.equal(again.rewards, world.rewards)
    assert torch.equal(again.source_next_logps, world.source_next_logps)
    assert again.source_records(50, seed=3) == world.source_records(50, seed=3)
    assert other.prompts != world.prompts
    assert not torch.allclose(other.rewards, world.rewards)
    assert not torch.allclose(other.source_next_logps, world.source_next_logps)


def test_source_records_follow_the_source(tabular: ExactWorld, reference: torch.Tensor) -> None:
    records = tabular.source_records(40_000, seed=0)
    assert records[:100] == tabular.source_records(100, seed=0)
    assert records[:100] != tabular.source_records(100, seed=1)
    counts = torch.zeros_like(reference)
    for record in records:
        counts[tabular.prompts.index(str(record.prompt)), tabular.layout.texts.index(str(record.completions[0]))] += 1
    assert_frequencies(counts, reference.exp() / 4)


def assert_frequencies(counts: torch.Tensor, probability: torch.Tensor) -> None:
    """Counts are multinomial with these probabilities: Pearson's chi-square within 5 of its standard deviations.

    Cells that expect fewer than 5 are pooled, as the statistic's distribution needs.
    """
    want = (probability * counts.sum()).flatten()
    rare = want < 5
    got, want = (torch.cat([cells[~rare], cells[rare].sum()[None]]) for cells in (counts.flatten(), want))
    degrees = len(want) - 1
    statistic = float(((got - want) ** 2 / want.clamp(min=1e-12)).sum())
    assert abs(statistic - degrees) < 5 * math.sqrt(2 * degrees)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"symbols": 1}, "2 to 26 symbols"),
        ({"max_completion_length": 0}, "max_completion_length >= 1"),
        ({"prompt_lengths": ()}, "at least one length"),
        ({"symbols": 2, "prompts": 5, "prompt_lengths": (2,)}, "cannot all differ"),
        ({"max_completion_length": 9}, "lower the limit"),
    ],
)
def test_impossible_worlds_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WorldConfig(**arguments)


# Closed forms and measures


def test_measures_agree_with_monte_carlo(world: ExactWorld) -> None:
    reference = world.sequence_logps(world.source_next_logps)
    policy = world.sequence_logps(world.next_logps(random_model(world)))
    exact = world.evaluate(policy, reference).means()
    rng = np.random.default_rng(0)
    prompts = rng.integers(16, size=200_000)
    drawn = sample_completions(policy, prompts, rng.random(len(prompts)))
    log_ratio = (policy - reference)[prompts, drawn]
    samples = {
        "reward": world.rewards[prompts, drawn],
        "kl": log_ratio,
        "entropy": -policy[prompts, drawn],
        "length": world.layout.lengths[drawn].double(),
        "eos_share": world.layout.terminated[drawn].double(),
    }
    for name, values in samples.items():
        standard_error = float(values.std()) / math.sqrt(len(values))
        assert abs(float(values.mean()) - exact[name]) < 4 * standard_error, name


def test_kl_and_entropy_of_known_distributions() -> None:
    """KL((1, 0) || (1/4, 3/4)) = log 4; entropy of (1/4, 3/4) = log 4 - 3/4 log 3; probability 0 counts nothing."""
    sure = torch.tensor([[0.0, -math.inf]], dtype=torch.float64)
    skewed = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    assert float(kl(sure, skewed)) == pytest.approx(math.log(4))
    assert float(entropy(skewed)) == pytest.approx(math.log(4) - 0.75 * math.log(3))
    assert float(entropy(sure)) == 0


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_the_optimum_beats_its_neighbours(tabular: ExactWorld, reference: torch.Tensor, beta: float) -> None:
    best = optimal_logps(reference, tabular.rewards, beta)
    check_normalised(best)
    top = objective(best, reference, tabular.rewards, beta)
    assert torch.allclose(top, beta * log_partition(reference, tabular.rewards, beta))
    assert torch.allclose(regret(best, reference, tabular.rewards, beta), torch.zeros(4, dtype=torch.float64), atol=1e-12)
    noise = torch.Generator().manual_seed(0)
    for size in (0.01, 0.1, 1.0):
        for _ in range(20):
            other = (best + size * torch.randn(best.shape, generator=noise, dtype=torch.float64)).log_softmax(-1)
            lost = top - objective(other, reference, tabular.rewards, beta)
            assert bool((lost > 0).all())
            assert torch.allclose(regret(other, reference, tabular.rewards, beta), lost, atol=1e-12)
            assert torch.allclose(lost, beta * kl(other, best), atol=1e-12)


def test_beta_must_be_positive(tabular: ExactWorld, reference: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="beta must be positive"):
        optimal_logps(reference, tabular.rewards, 0.0)


def test_frontier_rises_from_the_reference_to_the_best_completion(tabular: ExactWorld, reference: torch.Tensor) -> None:
    points = frontier(reference, tabular.rewards, [0.003, 0.1, 1.0, 0.3, 3.0, 1e6])
    assert points.betas.tolist() == [1e6, 3.0, 1.0, 0.3, 0.1, 0.003]
    assert bool((points.kl.diff() > 0).all())
    assert bool((points.reward.diff() > 0).all())
    # Concave: a nat buys less reward the farther out, and the exchange rate is beta.
    slopes = points.reward.diff() / points.kl.diff()
    assert bool((slopes.diff() < 0).all())
    assert float(points.kl[0]) == pytest.approx(0, abs=1e-9)
    assert float(points.reward[0]) == pytest.approx(float(expected(tabular.rewards, reference).mean()), abs=1e-5)
    assert float(points.reward[-1]) == pytest.approx(float(tabular.rewards.amax(-1).mean()), abs=1e-3)


def test_beta_at_kl_hits_its_target_or_says_why_not(tabular: ExactWorld, reference: torch.Tensor) -> None:
    for target in (0.01, 0.7, 3.0):
        policy = optimal_logps(reference, tabular.rewards, beta_at_kl(reference, tabular.rewards, target))
        assert float(kl(policy, reference).mean()) == pytest.approx(target, rel=1e-6)
    with pytest.raises(ConfigError, match="no optimal policy has KL 100"):
        beta_at_kl(reference, tabular.rewards, 100.0)


@pytest.mark.parametrize("decimals", [12, 0])
def test_best_of_n_equals_enumeration(tabular: ExactWorld, reference: torch.Tensor, decimals: int) -> None:
    """All n-tuples of samples, the best kept, ties shared; rewards rounded to whole numbers have many ties."""
    rewards = tabular.rewards.round(decimals=decimals)[:1]
    logps = reference[:1]
    probability = logps[0].exp()
    for n in (1, 2):
        kept = torch.zeros_like(probability)
        for draw in itertools.product(range(len(probability)), repeat=n):
            values = rewards[0, list(draw)]
            winners = [draw[i] for i in torch.nonzero(values == values.max()).flatten().tolist()]
            share = math.prod(float(probability[i]) for i in draw) / len(winners)
            for winner in winners:
                kept[winner] += share
        policy = best_of_n_logps(logps, rewards, n)
        assert torch.allclose(policy[0].exp(), kept, atol=1e-12)


def test_best_of_n_kl_is_within_the_bound_and_less_with_ties(world: ExactWorld) -> None:
    reference = world.sequence_logps(world.source_next_logps)
    for n in (1, 2, 16, 256):
        bound = math.log(n) - (n - 1) / n
        spread = kl(best_of_n_logps(reference, world.rewards, n), reference)
        tied = kl(best_of_n_logps(reference, world.rewards.round(), n), reference)
        assert bool((spread <= bound + 1e-9).all())
        assert bool((tied <= spread + 1e-9).all())
    # With a thousand distinct rewards the bound is nearly reached at small n.
    assert float(kl(best_of_n_logps(reference, world.rewards, 2), reference).mean()) == pytest.approx(
        math.log(2) - 0.5, abs=0.01
    )
    with pytest.raises(ConfigError, match="n >= 1"):
        best_of_n_logps(reference, world.rewards, 0)


def test_pair_accuracy_equals_all_pairs_with_ties(tabular: ExactWorld, reference: torch.Tensor) -> None:
    noise = torch.Generator().manual_seed(1)
    rewards = tabular.rewards.round()
    policy = (reference + torch.randn(reference.shape, generator=noise, dtype=torch.float64).round()).log_softmax(-1)
    ratio = (policy - reference).round(decimals=6)
    probability = reference.exp()
    want = []
    for g in range(4):
        hit = total = 0.0
        for a, b in itertools.combinations(range(40), 2):
            if rewards[g, a] != rewards[g, b]:
                weight = float(probability[g, a] * probability[g, b])
                same = float(torch.sign(ratio[g, a] - ratio[g, b]) * torch.sign(rewards[g, a] - rewards[g, b]))
                total += weight
                hit += weight * (same + 1) / 2
        want.append(hit / total)
    assert pair_accuracy(reference + ratio, reference, rewards).tolist() == pytest.approx(want, abs=1e-9)
    assert pair_accuracy(optimal_logps(reference, tabular.rewards, 1.0), reference, tabular.rewards).tolist() == pytest.approx(
        [1.0] * 4
    )


# Pairs and labels


def test_pairs_are_the_population(tabular: ExactWorld, reference: torch.Tensor) -> None:
    """Frequencies of (pair, who won) against the listed population, for noisy and for flattened pairs."""
    for labels in ("bt", "length_biased", "shifted:3"):
        population = tabular.exact_soft_pairs(reference, labels=labels)
        assert float(population.weight.sum()) == pytest.approx(1.0)
        drawn = tabular.sample_pairs(reference, 60_000, labels=labels, seed=5)
        assert bool((drawn.chosen != drawn.rejected).all())
        probability = torch.zeros(4, 40, 40, dtype=torch.float64)
        probability[population.prompt, population.chosen, population.rejected] = population.weight * population.soft_labels
        probability[population.prompt, population.rejected, population.chosen] = population.weight * (
            1 - population.soft_labels
        )
        counts = torch.zeros_like(probability).index_put_(
            (drawn.prompt, drawn.chosen, drawn.rejected), torch.ones(60_000, dtype=torch.float64), accumulate=True
        )
        assert_frequencies(counts, probability)


def test_pairs_nest_and_follow_their_seed(tabular: ExactWorld, reference: torch.Tensor) -> None:
    records = tabular.pairs(reference, 500, seed=0)
    assert records[:200] == tabular.pairs(reference, 200, seed=0)
    other_world = ExactWorld(WorldConfig.tabular(1))
    for other in (tabular.sample_pairs(reference, 500, seed=1), other_world.sample_pairs(reference, 500, seed=0)):
        # Independent prompts agree on a quarter of the rows.
        same = float((tabular.sample_pairs(reference, 500, seed=0).prompt == other.prompt).double().mean())
        assert same == pytest.approx(0.25, abs=0.08)
    assert len({record.id for record in records} | {record.id for record in tabular.pairs(reference, 500, seed=1)}) == 1_000
    assert all(record.labels.scores is None and record.labels.margin is None for record in records)
    unordered = [{record.prompt, *record.completions} for record in records]
    for labels in ("soft", "deterministic", "flipped:0.3", "length_biased"):
        same = tabular.pairs(reference, 500, labels=labels, seed=0)
        assert [{record.prompt, *record.completions} for record in same] == unordered


def test_label_models_prefer_as_they_say(world: ExactWorld) -> None:
    reference = world.sequence_logps(world.source_next_logps)
    n = 20_000

    def agreement(labels: str, temperature: float = 1.0) -> float:
        records = world.pairs(reference, n, labels=labels, temperature=temperature, seed=2)
        gaps = [
            world.reward_text(str(r.prompt), str(r.completions[0])) - world.reward_text(str(r.prompt), str(r.completions[1]))
            for r in records
        ]
        return sum(gap > 0 for gap in gaps) / n

    soft = world.pairs(reference, n, labels="soft", seed=2)
    probabilities = [float(r.labels.soft_label or 0) for r in soft]
    gaps = [
        world.reward_text(str(r.prompt), str(r.completions[0])) - world.reward_text(str(r.prompt), str(r.completions[1]))
        for r in soft
    ]
    assert probabilities == pytest.approx([1 / (1 + math.exp(-gap)) for gap in gaps])
    assert min(probabilities) >= 0.5
    # Bradley-Terry keeps the better first as often as its probabilities say; 4 standard errors of 20,000 coins are 0.014.
    assert agreement("bt") == pytest.approx(sum(probabilities) / n, abs=0.014)
    assert agreement("bt", temperature=0.05) > 0.95
    assert agreement("bt", temperature=50.0) == pytest.approx(0.5, abs=0.02)
    assert agreement("deterministic") == 1.0
    assert agreement("flipped:0.2") == pytest.approx(0.8, abs=0.012)


def test_length_bias_and_shift_move_what_they_should(world: ExactWorld) -> None:
    reference = world.sequence_logps(world.source_next_logps)

    def drawn(labels: str) -> tuple[float, float]:
        """Mean excess length of chosen in tokens; mean log-prob of both completions under the reference."""
        pairs = world.sample_pairs(reference, 20_000, labels=labels, seed=0)
        longer = (world.layout.lengths[pairs.chosen] - world.layout.lengths[pairs.rejected]).double().mean()
        likely = reference[pairs.prompt, pairs.chosen] + reference[pairs.prompt, pairs.rejected]
        return float(longer), float(likely.mean() / 2)

    plain, biased, against, shifted = (drawn(labels) for labels in ("bt", "length_biased:1", "length_biased:-1", "shifted"))
    assert biased[0] > plain[0] + 0.3
    assert against[0] < plain[0] - 0.3
    assert biased[1] == pytest.approx(plain[1])
    assert shifted[1] < plain[1] - 0.5


def test_equal_rewards_toss_a_coin() -> None:
    nothing = torch.zeros(1, dtype=torch.float64)
    for labels in ("bt", "deterministic", "flipped:0.1"):
        assert float(parse_labels(labels).probability(nothing, nothing)) == 0.5
    assert float(parse_labels("length_biased:2").probability(nothing, nothing + 1)) == pytest.approx(1 / (1 + math.exp(-2)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fliped:0.1", "did you mean 'flipped'"),
        ("bt:2", "has no parameter"),
        ("flipped:0.7", r"flip probability in \[0, 0.5\]"),
        ("flipped:", "for example flipped:0.1"),
        ("shifted:0", "temperature > 0"),
        ("length_biased:nan", "reward per token"),
    ],
)
def test_bad_label_models_are_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_labels(text)


def test_temperature_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="use 'deterministic'"):
        parse_labels("bt", 0.0)


def test_a_collapsed_reference_is_named(tabular: ExactWorld, reference: torch.Tensor) -> None:
    collapsed = reference.clone()
    collapsed[1] = torch.full((40,), -40.0, dtype=torch.float64).index_fill(0, torch.tensor(3), 0.0).log_softmax(-1)
    with pytest.raises(DataError, match="prompt 1: two samples"):
        tabular.pairs(collapsed, 10, seed=0)


def test_large_populations_are_refused(world: ExactWorld) -> None:
    with pytest.raises(ConfigError, match=r"tabular"):
        world.exact_soft_pairs(world.sequence_logps(world.source_next_logps))


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_regret_labels_equal_bradley_terry_labels(tabular: ExactWorld, reference: torch.Tensor, beta: float) -> None:
    """sum_t A*(s_t, a_t) = r(y) - V*(x), V* = beta log Z, with and without a reference; so gaps of both models are equal."""
    rewards, layout = tabular.rewards, tabular.layout
    tables = (
        (tabular.source_next_logps, reference),
        (torch.zeros_like(tabular.source_next_logps), torch.zeros_like(reference)),
    )
    for next_logps, logps in tables:
        advantages = layout.soft_advantages(next_logps, rewards, beta)
        value = beta * log_partition(logps, rewards, beta)
        assert torch.allclose(layout.path_sums(advantages), rewards - value[:, None], atol=1e-12)
        # The optimal policy's next symbols are the reference's, tilted by A*.
        best = layout.next_logps(optimal_logps(logps, rewards, beta))
        assert torch.allclose(best, next_logps + advantages / beta, atol=1e-12)
