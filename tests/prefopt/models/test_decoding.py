"""Decoding with shelves of keys against a plain forward pass over the whole text of each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from prefopt.errors import ConfigError
from prefopt.models import decoding, shelves
from prefopt.models.attention import Layout
from prefopt.models.causal_lm import CausalLMPolicy
from prefopt.models.decoding import Decoder
from prefopt.models.lora import LoRA
from prefopt.models.shelves import build_shelves
from prefopt.packing import Group

VOCABULARY = 29
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "llama": transformers.LlamaConfig(**SMALL, num_key_value_heads=2),
    "qwen2": transformers.Qwen2Config(**SMALL, num_key_value_heads=1),
    "gpt2": transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=2, n_positions=64),
    "mistral": transformers.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=5),
}


def build_policy(name: str, lora: LoRA | None = None) -> CausalLMPolicy:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).double().eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return CausalLMPolicy(model, tokenizer=None, lora=lora)


POLICIES = {name: build_policy(name) for name in CONFIGS}


def plain_logits(policy: CausalLMPolicy, ids: Sequence[int]) -> Tensor:
    """[len(ids), V] by transformers' own attention and mask, on one row without padding."""
    with policy.plain_attention() as model, torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    return logits


def random_prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def largest_error(
    policy: CausalLMPolicy,
    prompts: list[list[int]],
    counts: list[int],
    *,
    steps: int = 8,
    stays: Sequence[Sequence[bool]] = (),
    static: bool = False,
) -> float:
    """Feeds random tokens, compares the logits of every step with those of the whole text; rows leave as `stays` says."""
    rows = [prompt for prompt, count in zip(prompts, counts, strict=True) for _ in range(count)]
    fed = random_prompts([steps] * len(rows), seed=1)
    wanted = [plain_logits(policy, row + tokens)[len(row) - 1 :] for row, tokens in zip(rows, fed, strict=True)]
    decoder = Decoder(policy, prompts, counts, steps + 1, static=static)
    alive = list(range(len(rows)))
    logits = decoder.prefill()
    worst = 0.0
    for step in range(steps + 1):
        assert logits.shape == (len(alive), VOCABULARY)
        worst = max(worst, *(float((logits[i] - wanted[row][step]).abs().max()) for i, row in enumerate(alive)))
        if step == steps:
            break
        if step < len(stays):
            stay = [stays[step][row % len(stays[step])] for row in alive]
            if any(stay) and not all(stay):
                decoder.keep(torch.tensor(stay))
                alive = [row for row, kept in zip(alive, stay, strict=True) if kept]
        logits = decoder.step(torch.tensor([fed[row][step] for row in alive]))
    return worst


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_step_gives_the_logits_of_the_whole_text(name: str, static: bool) -> None:
    """Ragged prompts, one of a single token, unequal numbers of samples, prompts and rows longer than the sliding window."""
    prompts = random_prompts([1, 3, 4, 9, 12])
    assert largest_error(POLICIES[name], prompts, [2, 1, 3, 1, 2], static=static) < 1e-10


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_that_leave_do_not_change_the_others(name: str) -> None:
    stays = [[True] * 9, [True, False, True, True, False, True, True, False, True], [False, True, True], [True, True, False]]
    prompts = random_prompts([1, 3, 4, 9, 12])
    assert largest_error(POLICIES[name], prompts, [2, 1, 3, 1, 2], stays=stays) < 1e-10


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(CONFIGS)),
    groups=st.lists(st.tuples(st.integers(1, 14), st.integers(1, 3)), min_size=1, max_size=5),
    stays=st.lists(st.lists(st.booleans(), min_size=1, max_size=7), max_size=4),
    part=st.sampled_from([4, 20, 4096]),
)
def test_any_lengths_counts_and_departures(
    name: str, groups: list[tuple[int, int]], stays: list[list[bool]], part: int
) -> None:
    """Small parts make many shelves and several passes of prefill."""
    groups = sorted(groups)
    with patch.dict(shelves.PREFILL_TOKENS, {"cpu": part}):
        error = largest_error(
            POLICIES[name], random_prompts([length for length, _ in groups]), [k for _, k in groups], steps=5, stays=stays
        )
    assert error < 1e-10


def test_adapters_decode_as_they_score() -> None:
    policy = build_policy("llama", LoRA(r=4, alpha=8))
    prompts = random_prompts([2, 5])
    before = plain_logits(policy, prompts[1])
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert (plain_logits(policy, prompts[1]) - before).abs().max() > 1e-3
    assert largest_error(policy, prompts, [1, 2]) < 1e-10


def test_shelves_are_almost_full_and_hold_every_prompt_once() -> None:
    lengths = sorted(int(x) for x in torch.randint(1, 400, (64,), generator=torch.Generator().manual_seed(0)))
    prompts = random_prompts(lengths)
    built = build_shelves(prompts, [1] * 64, torch.device("cpu"))
    assert [ids for shelf in built for ids in shelf.prompts] == prompts
    padded = sum(shelf.width * len(shelf.prompts) for shelf in built)
    assert padded < 1.3 * sum(lengths)
    assert len(built) < 12


def test_models_without_a_layer_number_are_refused() -> None:
    policy = build_policy("llama")
    for module in policy.modules():
        if hasattr(module, "layer_idx"):
            del module.layer_idx
    with pytest.raises(ConfigError, match="no layer_idx"):
        Decoder(policy, [[1]], [1], 2).prefill()


def test_models_whose_attention_modules_share_a_layer_are_refused() -> None:
    policy = build_policy("llama")
    for module in policy.modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = 0
    with pytest.raises(ConfigError, match="two attention calls say that they are layer 0"):
        Decoder(policy, [[1]], [1], 2).prefill()


def test_models_with_recurrent_or_convolutional_layers_are_refused() -> None:
    """LFM2 mixes short convolutions with attention: the state of the former would be lost between steps."""
    config = transformers.Lfm2Config(
        **{**SMALL, "num_key_value_heads": 2},
        layer_types=["conv", "full_attention"],
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    policy = CausalLMPolicy(transformers.AutoModelForCausalLM.from_config(config).eval(), tokenizer=None)
    with pytest.raises(ConfigError, match="has 2 layers, of which 1 use the packed attention"):
        Decoder(policy, [[1, 2, 3]], [1], 2).prefill()


def test_prompts_are_encoded_in_parts_of_bounded_size() -> None:
    """Whole shelves, each prompt once; a prompt longer than a part has one of its own."""
    policy = POLICIES["llama"]
    prompts = random_prompts([3, 4, 5, 6, 25])
    sizes: list[int] = []
    encode = policy.encode

    def count(ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        sizes.append(len(ids))
        return encode(ids, positions, layout)

    with patch.dict(shelves.PREFILL_TOKENS, {"cpu": 12}), patch.object(policy, "encode", count), torch.no_grad():
        Decoder(policy, prompts, [1, 2, 1, 4, 1], 4).prefill()
    assert sum(sizes) == 43
    assert [size for size in sizes if size > 12] == [25]


class Fused:
    """SDPA prompt by prompt, which also takes mixed precision, as a GPU's layouts do."""

    def __init__(self, groups: Sequence[Group], device: torch.device) -> None:
        self.parts = [slice(group.start, group.start + group.length) for group in groups]

    def attend(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, **_: Any
    ) -> Tensor:
        assert query.dtype == key.dtype == value.dtype
        found = [
            F.scaled_dot_product_attention(
                query[None, :, p], key[None, :, p], value[None, :, p], is_causal=True, scale=scale, enable_gqa=True
            )
            for p in self.parts
        ]
        return torch.cat(found, dim=2)[0].transpose(0, 1)


@pytest.mark.parametrize("static", [False, True])
def test_mixed_precision_decodes_up_to_rounding(static: bool) -> None:
    """As on a GPU: float32 weights under bf16 autocast, where queries and keys come out wider than values."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.2)
    policy = CausalLMPolicy(model, tokenizer=None)
    prompts = random_prompts([1, 3, 9])
    exact = largest_error(policy, prompts, [2, 1, 3], static=static)
    assert exact < 1e-4
    mixed = patch.object(policy, "autocast", lambda: torch.autocast("cpu", torch.bfloat16))
    with mixed, patch.object(decoding, "build_layout", Fused):
        rounded = largest_error(policy, prompts, [2, 1, 3], static=static)
    spread = float(plain_logits(policy, prompts[2]).std())
    assert exact < rounded < 0.1 * spread
