"""Sampling against transformers' generate, and against the probabilities that the model gives to every completion."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from prefopt.data.exact_world import ExactWorld, WorldConfig
from prefopt.forward import unpack_bits
from prefopt.generate import Decoding, Sample, draw, generate
from prefopt.models.causal_lm import CausalLMPolicy, LoRA

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


@pytest.mark.parametrize(("top_p", "kept"), [(0.3, 1), (0.75, 2), (0.85, 3), (0.96, 4)])
def test_nucleus_of_four_tokens(top_p: float, kept: int) -> None:
    """Probabilities 0.5, 0.3, 0.15, 0.05 have cumulated mass 0.5, 0.8, 0.95, 1."""
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    _, support = draw(logits, Decoding(top_p=top_p), torch.Generator())
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
    drawn, support = draw(logits, decoding, generator)
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
