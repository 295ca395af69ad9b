"""Sampling completions from a causal LM, with the exact distribution that each token was drawn from.

Rows are decoded side by side, sorted by prompt length, and leave the batch when they end: one batch of 64 takes about a
quarter of the time of eight batches of 8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prefopt.forward import pack_bits
from prefopt.models.causal_lm import CausalLMPolicy


@dataclass(frozen=True)
class Decoding:
    """How tokens are drawn.

    Args:
        max_new_tokens: the limit of a completion's length.
        temperature: logits are divided by it; 0 takes the most likely token.
        top_p: the smallest set of most likely tokens with at least this probability is kept (Holtzman 2020).
        batch_size: rows decoded side by side.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    batch_size: int = 64


@dataclass(frozen=True)
class Sample:
    """One completion.

    Args:
        ids: its tokens; the last is EOS if `finished`.
        finished: it ended by itself; otherwise it was cut at the limit.
        support: [length, ceil(V/8)] uint8 nucleus of each token, None without top-p.
    """

    ids: tuple[int, ...]
    finished: bool
    support: Tensor | None


@torch.no_grad()
def generate(
    policy: CausalLMPolicy,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    generator: torch.Generator,
    *,
    eos_ids: Sequence[int],
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Sample]:
    """One completion for each prompt, in their order.

    Args:
        policy: with its adapter as it stands.
        prompts: token ids, each at least one.
        decoding: temperature, nucleus, limit.
        generator: of the draws, on the CPU; the same state gives the same samples.
        eos_ids: tokens that end a completion.
        on_progress: called with (done, total) prompts.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    samples: dict[int, Sample] = {}
    with policy.plain_attention() as model:
        for begin in range(0, len(order), decoding.batch_size):
            part = order[begin : begin + decoding.batch_size]
            drawn = _decode(policy, model, [prompts[i] for i in part], decoding, generator, torch.tensor(eos_ids))
            samples.update(zip(part, drawn, strict=True))
            if on_progress is not None:
                on_progress(len(samples), len(prompts))
    return [samples[i] for i in range(len(prompts))]


def _decode(
    policy: CausalLMPolicy,
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    generator: torch.Generator,
    eos: Tensor,
) -> list[Sample]:
    from transformers import DynamicCache

    count, width = len(prompts), max(len(ids) for ids in prompts)
    # Left padding, so that all rows append at the same column; the mask comes from lengths.
    lengths = torch.tensor([len(ids) for ids in prompts])
    attention = (torch.arange(width) >= (width - lengths).unsqueeze(-1)).long()
    tokens = torch.tensor([[0] * (width - len(ids)) + list(ids) for ids in prompts])
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=policy.base.config)
    alive = torch.arange(count)
    ids: list[list[int]] = [[] for _ in prompts]
    finished = [False] * count
    supports: list[list[Tensor]] = [[] for _ in prompts]
    for _ in range(decoding.max_new_tokens):
        with policy.autocast():
            logits = model(
                input_ids=tokens.to(policy.device),
                attention_mask=attention.to(policy.device),
                position_ids=positions.to(policy.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        drawn, support = draw(logits.float().cpu(), decoding, generator)
        for row, token in zip(alive.tolist(), drawn.tolist(), strict=True):
            ids[row].append(token)
        if support is not None:
            packed = pack_bits(support)
            for row, bits in zip(alive.tolist(), packed, strict=True):
                supports[row].append(bits)
        ended = torch.isin(drawn, eos)
        for row in alive[ended].tolist():
            finished[row] = True
        keep = (~ended).nonzero().squeeze(-1)
        if keep.numel() == 0:
            break
        if keep.numel() < alive.numel():
            cache.batch_select_indices(keep.to(policy.device))
        alive, tokens = alive[keep], drawn[keep].unsqueeze(-1)
        attention = torch.cat([attention[keep], torch.ones(keep.numel(), 1, dtype=torch.long)], dim=-1)
        positions = positions[keep, -1:] + 1
    return [Sample(tuple(i), f, torch.stack(s) if s else None) for i, f, s in zip(ids, finished, supports, strict=True)]


def draw(logits: Tensor, decoding: Decoding, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """[B] tokens drawn from [B, V] logits, and the [B, V] nucleus they were drawn from (None without top-p)."""
    if decoding.temperature == 0:
        return logits.argmax(-1), None
    probabilities = (logits / decoding.temperature).softmax(-1)
    support = None
    if decoding.top_p < 1:
        ranked, index = probabilities.sort(dim=-1, descending=True)
        # A token is kept while the mass before it is short of top_p: the set reaches top_p and is never empty.
        inside = ranked.cumsum(-1) - ranked < decoding.top_p
        support = torch.zeros_like(inside).scatter(-1, index, inside)
        probabilities = probabilities * support
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1), support
