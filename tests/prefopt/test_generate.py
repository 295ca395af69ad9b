"""Sampling against transformers' generate, and against the probabilities that the model gives to every completion."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from prefopt.data.exact_world import ExactWorld, WorldConfig
from prefopt.errors import ConfigError, TrainingError
from prefopt.forward import unpack_bits
from prefopt.generate import Decoding, Sample, _invert, _pick, draw, generate
from prefopt.models.causal_lm import CausalLMPolicy
from prefopt.models.lora import LoRA

VOCABULARY = 13

CONFIGS = {
    "llama": transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    ),
    "gpt2": transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=3
    ),
}


def build_model(config: transformers.PretrainedConfig, seed: int = 0, std: float = 0.3) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config))
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def ragged_prompts(count: int = 9) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = [1 + (5 * i) % 9 for i in range(count)]
    return [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def greedy(
    policy: CausalLMPolicy, prompts: list[list[int]], eos: list[int], limit: int = 12, batch_size: int = 4
) -> list[Sample]:
    return generate(policy, prompts, Decoding(limit, temperature=0, batch_size=batch_size), torch.Generator(), eos_ids=eos)


def theirs(
    model: transformers.PreTrainedModel, prompts: list[list[int]], eos: list[int], limit: int = 12
) -> list[tuple[int, ...]]:
    """Greedy completions by transformers' own generate on one left-padded batch, cut after the first EOS."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=limit, eos_token_id=eos, pad_token_id=eos[0])
    completions = []
    for row in out[:, width:].tolist():
        end = next((i for i, token in enumerate(row) if token in eos), len(row) - 1)
        completions.append(tuple(row[: end + 1]))
    return completions


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("eos", [[3], [3, 7]])
def test_greedy_equals_transformers_generate(name: str, eos: list[int]) -> None:
    """Ragged prompts, rows that end at different steps, several batches: token for token what transformers gives for one."""
    model, prompts = build_model(CONFIGS[name], seed=6), ragged_prompts()
    expected = theirs(copy.deepcopy(model), prompts, eos)
    got = greedy(CausalLMPolicy(model, tokenizer=None), prompts, eos)
    assert [sample.ids for sample in got] == expected
    assert [sample.finished for sample in got] == [ids[-1] in eos for ids in expected]
    assert {sample.finished for sample in got} == {True, False}, (
        "the prompts should make some rows end and some reach the limit"
    )
    assert len({len(ids) for ids in expected}) > 2


def test_greedy_with_trained_adapters_equals_the_merged_model() -> None:
    policy = CausalLMPolicy(build_model(CONFIGS["llama"], seed=3), tokenizer=None, lora=LoRA(r=4, alpha=8))
    plain = greedy(policy, ragged_prompts(), [3])
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    got = greedy(policy, ragged_prompts(), [3])
    with policy.plain_attention() as model:
        merged = copy.deepcopy(model).merge_and_unload()
    assert [sample.ids for sample in got] == theirs(merged, ragged_prompts(), [3])
    assert got != plain
    with policy.adapter(None):
        assert greedy(policy, ragged_prompts(), [3]) == plain


def test_the_attention_of_the_shared_forward_comes_back_after_an_error() -> None:
    policy = CausalLMPolicy(build_model(CONFIGS["llama"]), tokenizer=None)
    before = policy.base.config._attn_implementation
    with pytest.raises(IndexError):
        greedy(policy, [[VOCABULARY + 5]], [3])
    assert policy.base.config._attn_implementation == before


@pytest.fixture(scope="module")
def world() -> ExactWorld:
    """Four prompts of two lengths or more, 40 completions each: few enough to count every one."""
    return ExactWorld(WorldConfig.tabular())


@pytest.fixture(scope="module")
def world_policy(world: ExactWorld) -> CausalLMPolicy:
    return CausalLMPolicy(build_model(world.model_config(), seed=2, std=0.12), world.tokenizer)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """[..., V] the smallest set of most likely tokens with at least top_p of the mass, written as a loop."""
    flat = probabilities.reshape(-1, probabilities.shape[-1])
    inside = torch.zeros_like(flat, dtype=torch.bool)
    for row, values in enumerate(flat.tolist()):
        mass = 0.0
        for token in sorted(range(len(values)), key=lambda t: -values[t]):
            if mass >= top_p:
                break
            inside[row, token] = True
            mass += values[token]
    return inside.view(probabilities.shape)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.8), (1.4, 0.7)])
def test_completions_come_with_the_probability_that_the_model_gives_them(
    world: ExactWorld, world_policy: CausalLMPolicy, temperature: float, top_p: float
) -> None:
    """3,000 draws of each of 4 prompts against all 40 completions (chi-square): rows that end early leave the batch, and what
    the others draw still has the right distribution; completions outside the nucleus never come."""
    with world_policy.plain_attention() as model:
        steps = (world.next_logps(model) / temperature).softmax(-1)
    inside = nucleus(steps, top_p)
    steps = steps * inside
    expected = world.sequence_logps((steps / steps.sum(-1, keepdim=True)).log()).exp()
    draws = 3000
    prompts = [ids for ids in world.prompt_ids for _ in range(draws)]
    decoding = Decoding(world.config.max_completion_length, temperature, top_p, batch_size=4096)
    samples = generate(world_policy, prompts, decoding, torch.Generator().manual_seed(0), eos_ids=[world.layout.eos])
    counts = torch.zeros_like(expected)
    for position, sample in enumerate(samples):
        counts[position // draws, world.layout.index(sample.ids)] += 1
    assert counts[expected == 0].sum() == 0
    if top_p < 1:
        assert (expected == 0).any()
    for row, probabilities in zip(counts, expected, strict=True):
        common = probabilities * draws >= 5
        seen = torch.cat([row[common], row[~common].sum().reshape(1)])
        wanted = torch.cat([probabilities[common], probabilities[~common].sum().reshape(1)]) * draws
        kept = wanted > 0
        assert chisquare(seen[kept], wanted[kept] * (seen.sum() / wanted.sum())).pvalue > 1e-3


def test_every_token_lies_in_the_support_that_is_handed_on(world: ExactWorld, world_policy: CausalLMPolicy) -> None:
    decoding = Decoding(3, temperature=0.9, top_p=0.6)
    prompts = [ids for ids in world.prompt_ids for _ in range(20)]
    samples = generate(world_policy, prompts, decoding, torch.Generator().manual_seed(0), eos_ids=[world.layout.eos])
    for sample in samples:
        assert sample.support is not None
        support = unpack_bits(sample.support, world_policy.vocabulary)
        assert support.shape == (len(sample.ids), world_policy.vocabulary)
        assert support[torch.arange(len(sample.ids)), torch.tensor(sample.ids)].all()
    assert generate(world_policy, prompts[:1], Decoding(3), torch.Generator(), eos_ids=[0])[0].support is None


def test_the_same_generator_state_gives_the_same_samples(world: ExactWorld, world_policy: CausalLMPolicy) -> None:
    """Nothing but the generator decides: torch's global one does not."""
    prompts = [ids for ids in world.prompt_ids for _ in range(8)]

    def sample(seed: int, noise: int) -> list[tuple[int, ...]]:
        torch.manual_seed(noise)
        found = generate(world_policy, prompts, Decoding(3), torch.Generator().manual_seed(seed), eos_ids=[world.layout.eos])
        return [each.ids for each in found]

    assert sample(0, 1) == sample(0, 2)
    assert sample(0, 1) != sample(1, 1)


def test_samples_of_a_prompt_are_the_draws_of_repeated_prompts(world: ExactWorld, world_policy: CausalLMPolicy) -> None:
    """K samples a prompt come prompt by prompt, draw for draw those of the list with every prompt K times."""
    prompts, eos = [*world.prompt_ids, world.prompt_ids[0]], [world.layout.eos]
    decoding = Decoding(3, batch_size=24)
    grouped = generate(world_policy, prompts, decoding, torch.Generator().manual_seed(4), eos_ids=eos, samples_per_prompt=6)
    repeated = [ids for ids in prompts for _ in range(6)]
    assert grouped == generate(world_policy, repeated, decoding, torch.Generator().manual_seed(4), eos_ids=eos)
    assert len({sample.ids for sample in grouped[:6]}) > 1
    assert [sample.ids for sample in grouped[:6]] != [sample.ids for sample in grouped[-6:]]


def test_a_prompt_is_encoded_once_and_ended_rows_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that go through the model: three prompts once for their eight samples each, then fewer and fewer rows."""
    policy = CausalLMPolicy(build_model(CONFIGS["llama"], seed=6, std=0.1), tokenizer=None)
    sizes: list[int] = []
    encode = policy.encode

    def count(ids: Tensor, *rest: Any) -> Tensor:
        sizes.append(len(ids))
        return encode(ids, *rest)

    monkeypatch.setattr(policy, "encode", count)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
    samples = generate(policy, prompts, Decoding(40), torch.Generator().manual_seed(0), eos_ids=[3, 7], samples_per_prompt=8)
    assert sizes[0] == 9
    assert sizes[1] == 24 or sizes[1] < 24 * 0.85
    assert sizes[1:] == sorted(sizes[1:], reverse=True)
    # Rows that have ended are computed along only while few of them are left in.
    needed = [sum(len(sample.ids) > step for sample in samples) for step in range(1, len(sizes))]
    assert all(live <= size <= live / 0.85 for live, size in zip(needed, sizes[1:], strict=True))
    assert len(set(sizes[1:])) > 3


def test_unusable_requests_are_refused() -> None:
    policy = CausalLMPolicy(build_model(CONFIGS["llama"]), tokenizer=None)
    with pytest.raises(ConfigError, match="1 of 2 are empty"):
        generate(policy, [[1], []], Decoding(2), torch.Generator(), eos_ids=[3])
    with pytest.raises(ConfigError, match=r"at least 1 \(got 0\)"):
        generate(policy, [[1]], Decoding(2), torch.Generator(), eos_ids=[3], samples_per_prompt=0)
    for wrong in ({"max_new_tokens": 0}, {"batch_size": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}):
        with pytest.raises(ConfigError, match="must be at least 1, temperature not negative"):
            Decoding(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_policy_that_has_diverged_is_reported(value: float) -> None:
    policy = CausalLMPolicy(build_model(CONFIGS["llama"]), tokenizer=None)
    with torch.no_grad():
        policy.head.weight[5] = value
    with pytest.raises(TrainingError, match="new token 1 or shortly before are not finite"):
        generate(policy, [[1, 2]], Decoding(4), torch.Generator().manual_seed(0), eos_ids=[3])


def test_no_prompts_give_no_samples() -> None:
    policy = CausalLMPolicy(build_model(CONFIGS["llama"]), tokenizer=None)
    assert generate(policy, [], Decoding(4), torch.Generator(), eos_ids=[3]) == []


def test_progress_counts_prompts(world: ExactWorld, world_policy: CausalLMPolicy) -> None:
    told: list[tuple[int, int]] = []
    prompts = [world.prompt_ids[0]] * 5
    generate(
        world_policy,
        prompts,
        Decoding(2, batch_size=2),
        torch.Generator(),
        eos_ids=[3],
        on_progress=lambda done, of: told.append((done, of)),
    )
    assert told == [(2, 5), (4, 5), (5, 5)]


def uniforms(rows: int, generator: torch.Generator | None = None) -> torch.Tensor:
    return torch.rand(rows, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_a_rows_draws_do_not_depend_on_what_is_decoded_with_it(
    world_policy: CausalLMPolicy, world: ExactWorld, top_p: float
) -> None:
    """Rows that are decoded in other batches, or by other processes (`only`), are the same rows."""
    prompts = [*world.prompt_ids, *world.prompt_ids[:3]]

    def drawn(batch_size: int, only: list[int] | None = None) -> list[Sample]:
        generator = torch.Generator().manual_seed(5)
        return generate(
            world_policy, prompts, Decoding(4, top_p=top_p, batch_size=batch_size), generator, eos_ids=[world.layout.eos],
            samples_per_prompt=3, only=only,
        )  # fmt: skip

    whole = drawn(64)
    assert [sample.ids for sample in drawn(2)] == [sample.ids for sample in whole]
    odd = list(range(1, len(prompts), 2))
    assert [s.ids for s in drawn(64, odd)] == [whole[3 * place + k].ids for place in odd for k in range(3)]
    assert len({sample.ids for sample in whole}) > 2
    assert drawn(64, []) == []


@pytest.mark.parametrize(("top_p", "kept"), [(0.3, 1), (0.75, 2), (0.85, 3), (0.96, 4)])
def test_nucleus_of_four_tokens(top_p: float, kept: int) -> None:
    """Probabilities 0.5, 0.3, 0.15, 0.05 have cumulated mass 0.5, 0.8, 0.95, 1."""
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    _, support = draw(logits, Decoding(top_p=top_p), uniforms(1))
    assert support is not None
    assert support[0].tolist() == [token in [1, 3, 0, 2][:kept] for token in range(4)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    top_p=st.floats(0.01, 0.99),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    temperature=st.floats(0.2, 3.0),
)
def test_nucleus_is_the_smallest_set_and_never_empty(seed: int, top_p: float, scale: float, temperature: float) -> None:
    """It reaches top_p, without its least likely token it would not, nothing outside is drawn; also for ties and peaks."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(6, 17, generator=generator)
    decoding = Decoding(temperature=temperature, top_p=top_p)
    drawn, support = draw(logits, decoding, uniforms(6, generator))
    assert support is not None
    probabilities = (logits / temperature).double().softmax(-1)
    mass = (probabilities * support).sum(-1)
    least = torch.where(support, probabilities, math.inf).amin(-1)
    assert (support.sum(-1) >= 1).all()
    assert (mass >= top_p - 1e-5).all()
    assert (mass - least < top_p + 1e-5).all()
    assert support[torch.arange(6), drawn].all()
    outside = torch.where(support, 0.0, probabilities).amax(-1)
    assert (outside <= least + 1e-6).all()


@pytest.mark.parametrize("vocabulary", [5, 256, 257, 1000])
def test_draws_follow_the_distribution_over_all_blocks(vocabulary: int) -> None:
    """Chi-square of 100,000 draws: vocabularies shorter than, equal to and not divisible by a block; -inf is never drawn."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(vocabulary, generator=generator)
    logits[::7] = -math.inf
    counts = torch.zeros(vocabulary)
    for _ in range(10):
        drawn, _ = draw(logits.expand(10_000, -1), Decoding(), uniforms(10_000, generator))
        counts += torch.bincount(drawn, minlength=vocabulary)
    kept = logits > -math.inf
    assert counts[~kept].sum() == 0
    assert chisquare(counts[kept], logits.double().softmax(-1)[kept] * 100_000).pvalue > 1e-3


def test_rare_tokens_of_a_large_vocabulary_are_not_lost_in_rounding() -> None:
    """Behind a token of almost all mass, 50,000 rare ones of 2e-8 each: in float32 a sum near 1 moves in steps of 6e-8, and two
    of three of them could never be drawn. The middle of each token's interval draws that token."""
    weights = torch.full((50_001,), 2e-8)
    weights[0] = 1.0
    exact = weights.double()
    asked = torch.tensor([0, 1, 2, 3, 255, 256, 257, 30_000, 30_001, 30_002, 49_999, 50_000])
    middle = (exact.cumsum(0) - exact / 2)[asked] / exact.sum()
    assert _pick(weights.expand(len(asked), -1), middle.unsqueeze(-1)).tolist() == asked.tolist()


@pytest.mark.parametrize("uniform", [0.0, 0.25, 0.5, 1 - 2**-53, 1.0])
def test_no_uniform_number_points_at_an_index_without_mass(uniform: float) -> None:
    """Also 0, which would point at a leading zero, and 1, which rounding can reach."""
    mass = torch.tensor([[0.0, 1.0, 0.0, 2.0, 1.0, 0.0]], dtype=torch.float64)
    index, share = _invert(mass, torch.full((1, 1), uniform, dtype=torch.float64))
    assert index.item() == {0.0: 1, 0.25: 3, 0.5: 3}.get(uniform, 4)
    assert share.item() == pytest.approx({0.0: 0.0, 0.25: 0.0, 0.5: 0.5}.get(uniform, 1.0))


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_a_nucleus_wider_than_the_likely_tokens_is_found_too(scale: float) -> None:
    """Almost equal probabilities of 4,000 tokens need a full sort; peaked ones do not. Both against the loop."""
    logits = scale * torch.randn(3, 4_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, support = draw(logits, Decoding(top_p=0.9), uniforms(3))
    assert support is not None
    assert torch.equal(support, nucleus(logits.softmax(-1), 0.9))
    assert (int(support.sum(-1).max()) > 1024) == (scale < 1)
