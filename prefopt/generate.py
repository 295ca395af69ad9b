"""Sampling completions from a causal LM, with the exact distribution that each token was drawn from.

Equal prompts are encoded once and their samples decoded side by side (`prefopt.models.decoding`); rows leave the batch when
they end. B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from prefopt.errors import ConfigError, TrainingError
from prefopt.forward import pack_bits
from prefopt.models.causal_lm import CausalLMPolicy
from prefopt.models.decoding import Decoder
from prefopt.models.products import few_rows

# Ended rows are computed along until the live ones are fewer than this share: moving the others' keys costs about a step.
_LIVE_SHARE = 0.85
# On a GPU the host looks only this often whether all rows have ended: looking waits for the device (so does top-p, whose
# nuclei are kept on the host).
_STEPS_PER_LOOK = 16
# The nucleus is looked for among this many most likely tokens first; sorting a whole vocabulary takes eight times as long.
_LIKELY = 1024
# Weights are summed in blocks of this many tokens, and the drawn block is searched: one pass over the vocabulary.
_BLOCK = 256


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

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.batch_size < 1 or self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                "decoding: max_new_tokens and batch_size must be at least 1, temperature not negative and top_p in (0, 1]; got "
                f"{self.max_new_tokens}, {self.batch_size}, {self.temperature}, {self.top_p}."
            )


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
    samples_per_prompt: int = 1,
    only: Sequence[int] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Sample]:
    """Completions of each prompt: all samples of the first, then those of the second, ...

    Args:
        policy: with its adapter as it stands.
        prompts: token ids, each at least one. Prompts that are equal share their encoding, like samples of one prompt.
        decoding: temperature, nucleus, limit.
        generator: of the draws, on the CPU. A row's draws depend on its place among all rows alone: not on the device, nor on
            which rows are decoded together or on other processes.
        eos_ids: tokens that end a completion.
        samples_per_prompt: K, drawn independently.
        only: places of the prompts that are sampled here, where other processes sample the rest; None is all.
        on_progress: called with (done, total) samples.

    Raises:
        ConfigError: a prompt is empty, K is below 1, or the model's layers are not all standard attention.
        TrainingError: the logits are not finite.
    """
    if samples_per_prompt < 1 or not all(len(ids) for ids in prompts):
        raise ConfigError(
            f"generate: samples_per_prompt must be at least 1 (got {samples_per_prompt}) and every prompt must hold a token "
            f"({sum(not len(ids) for ids in prompts)} of {len(prompts)} are empty)."
        )
    rows = [tuple(ids) for ids in prompts for _ in range(samples_per_prompt)]
    uniforms = None if decoding.temperature == 0 else _uniforms(len(rows), decoding.max_new_tokens, generator)
    if only is not None:
        own = [place * samples_per_prompt + k for place in only for k in range(samples_per_prompt)]
        rows, uniforms = [rows[i] for i in own], None if uniforms is None else uniforms[own]
    samples: dict[int, Sample] = {}
    # A table keeps no keys and values, so it says how many rows it takes at once.
    for part in _waves(rows, getattr(policy, "rows_at_once", decoding.batch_size)):
        with few_rows(policy.base):
            draws = None if uniforms is None else uniforms[part].to(policy.device)
            drawn = _decode(policy, [rows[i] for i in part], decoding, draws, eos_ids)
        samples.update(zip(part, drawn, strict=True))
        if on_progress is not None:
            on_progress(len(samples), len(rows))
    return [samples[i] for i in range(len(rows))]


def _waves(rows: Sequence[tuple[int, ...]], size: int) -> Iterator[list[int]]:
    """Indices of the rows that are decoded side by side: sorted by prompt length, equal prompts together where they fit."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), rows[i]))
    wave: list[int] = []
    for _, group in groupby(order, key=lambda i: rows[i]):
        members = list(group)
        if wave and len(wave) + len(members) > size:
            yield wave
            wave = []
        while len(members) > size:
            yield members[:size]
            members = members[size:]
        wave += members
    if wave:
        yield wave


def _uniforms(rows: int, limit: int, generator: torch.Generator) -> Tensor:
    """[rows, limit] numbers in [0, 1), one for each token that could be drawn."""
    return torch.rand(rows, limit, dtype=torch.float64, generator=generator)


def _decode(
    policy: CausalLMPolicy,
    rows: Sequence[tuple[int, ...]],
    decoding: Decoding,
    uniforms: Tensor | None,
    eos_ids: Sequence[int],
) -> list[Sample]:
    grouped = [(ids, len(list(group))) for ids, group in groupby(rows)]
    limit = decoding.max_new_tokens
    # A policy that is no transformer brings a decoder of its own.
    build = getattr(policy, "decoder", None) or partial(Decoder, policy)
    decoder = build([ids for ids, _ in grouped], [count for _, count in grouped], limit)
    eos = torch.tensor(list(eos_ids), dtype=torch.long, device=policy.device)
    alive = torch.arange(len(rows), device=policy.device)
    tokens = torch.zeros(len(rows), limit, dtype=torch.long, device=policy.device)
    ended = torch.zeros(len(rows), dtype=torch.bool, device=policy.device)
    supports: list[list[Tensor]] = [[] for _ in rows]
    logits = decoder.prefill()
    for step in range(limit):
        drawn, support = draw(logits, decoding, None if uniforms is None else uniforms[alive, step])
        tokens[alive, step] = drawn
        if support is not None:
            for row, bits in zip(alive.tolist(), pack_bits(support), strict=True):
                supports[row].append(bits)
        ended[alive] |= torch.isin(drawn, eos)
        if not decoder.static or (step + 1) % _STEPS_PER_LOOK == 0 or step + 1 == limit:
            _check_finite(logits, step)
            live = ~ended[alive].cpu()
            share = float(live.float().mean())
            if share == 0 or step + 1 == limit:
                break
            if share < _LIVE_SHARE and not decoder.static:
                decoder.keep(live)
                alive, drawn = alive[live], drawn[live]
        logits = decoder.step(drawn)
    return _cut(tokens[:, : step + 1].cpu(), torch.isin(tokens, eos)[:, : step + 1].cpu(), supports)


def _check_finite(logits: Tensor, step: int) -> None:
    if not bool(torch.isfinite(logits.amax(-1)).all()):
        raise TrainingError(
            f"sampling: the policy's logits at new token {step + 1} or shortly before are not finite. Its weights "
            "have diverged (lower the learning rate) or overflow their precision (load the model in float32 or bfloat16)."
        )


def _cut(tokens: Tensor, ends: Tensor, supports: Sequence[Sequence[Tensor]]) -> list[Sample]:
    """Rows up to their first EOS: what was computed along after it is dropped."""
    finished = ends.any(-1)
    lengths = torch.where(finished, ends.int().argmax(-1) + 1, tokens.shape[1]).tolist()
    return [
        Sample(tuple(row[:length]), done, torch.stack(list(bits[:length])) if bits else None)
        for row, length, done, bits in zip(tokens.tolist(), lengths, finished.tolist(), supports, strict=True)
    ]


def draw(logits: Tensor, decoding: Decoding, uniform: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """[B] tokens drawn from [B, V] logits, and the [B, V] nucleus they were drawn from (None without top-p).

    Args:
        uniform: [B] float64 numbers in [0, 1), which decide; None at temperature 0, where nothing is left to chance.
    """
    if uniform is None:
        return logits.argmax(-1), None
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if decoding.temperature != 1:
        logits = logits / decoding.temperature
    weights = (logits - logits.amax(-1, keepdim=True)).exp_()
    support = None
    if decoding.top_p < 1:
        support = _nucleus(weights, decoding.top_p)
        weights = weights * support
    return _pick(weights, uniform.unsqueeze(-1)), support


def _nucleus(weights: Tensor, top_p: float) -> Tensor:
    """[B, V] bool: a token is kept while the mass before it is short of top_p, so the set reaches top_p and is never empty."""
    goal = top_p * weights.sum(-1, keepdim=True)
    ranked, index = weights.topk(min(_LIKELY, weights.shape[-1]), dim=-1)
    if bool((ranked.sum(-1, keepdim=True) < goal).any()):
        ranked, index = weights.sort(dim=-1, descending=True)
    inside = ranked.cumsum(-1) - ranked < goal
    return torch.zeros_like(weights, dtype=torch.bool).scatter(-1, index, inside)


def _pick(weights: Tensor, uniform: Tensor) -> Tensor:
    """[B] indices drawn in proportion to [B, V] weights, none of weight zero: the inverse of the distribution function.

    A row's `uniform` [B, 1] number picks the block where the cumulated block sums pass it, and the token within the block. All
    sums are float64: in float32 the rare tokens of a large vocabulary would be lost in rounding.
    """
    blocks = F.pad(weights, (0, -weights.shape[-1] % _BLOCK)).unflatten(-1, (-1, _BLOCK))
    block, share = _invert(blocks.sum(-1, dtype=torch.float64), uniform)
    inner = blocks.gather(1, block.unsqueeze(-1).expand(-1, 1, _BLOCK)).squeeze(1).double()
    within, _ = _invert(inner, share)
    return (block * _BLOCK + within).squeeze(-1)


def _invert(mass: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 1] the first index where the cumulated [B, X] mass passes `uniform` [B, 1] of its total, and how far into it."""
    upper = mass.cumsum(-1)
    total = upper[:, -1:]
    # Strictly below the total: rounding must not point behind the last index that has mass.
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    # Where the mass is not a number no index passes; that is reported by the caller of the model.
    index = torch.searchsorted(upper, target, right=True).clamp(max=mass.shape[-1] - 1)
    here = mass.gather(-1, index)
    return index, ((target - upper.gather(-1, index) + here) / here).clamp(0, 1)
