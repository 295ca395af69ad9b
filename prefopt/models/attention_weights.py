"""Attention weights of the last layer, for the few rows that credit assignment reads.

An attention function gives outputs, not weights. So the last layer's queries and keys are kept on their way (`Watched`), and
the rows that are asked for are computed from them once more: completions against their own prompt and themselves, in blocks.
No other layer is touched, and no [S, S] matrix exists.

N completions, T longest completion, S packed tokens, H heads, M key heads, D head size; a chunk has n completions and reads R
rows of each over K keys, the completion's own first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from prefopt.models.attention import Layout, build_layout
from prefopt.packing import PackedBatch

SCORE_ATTENTION, STEP_ATTENTION = "score_attention", "step_attention"
ATTENTION = (SCORE_ATTENTION, STEP_ATTENTION)
"""Row quantities [N, T], means over heads: how much the last token, which a reward head reads, attends to each token of its
completion, itself included; and how much the steps that draw later tokens attend to it, on average over those steps."""

# Padded keys (n * K) of a chunk: as many as a usual micro-batch has tokens.
_KEYS = 2**13
# Rows of each completion that are computed at a time.
_ROWS = 64


@dataclass
class Watched:
    """A layout that keeps what the latest layer attended with: after a forward pass, the last layer.

    Args:
        layout: does the work.
    """

    layout: Layout
    layer: _Layer | None = field(default=None, init=False)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None,
        dropout: float,
        window: int | None,
    ) -> Tensor:
        """See `Layout.attend`."""
        self.layer = _Layer(query.detach(), key.detach(), query.shape[-1] ** -0.5 if scale is None else scale, window)
        return self.layout.attend(module, query, key, value, scale=scale, dropout=dropout, window=window)


@dataclass(frozen=True)
class _Layer:
    """Queries [H, S, D] and keys [M, S, D] after rotary embedding, and how they meet."""

    query: Tensor
    key: Tensor
    scale: float
    window: int | None


def encode_watched(
    encode: Callable[[Tensor, Tensor, Layout], Tensor], batch: PackedBatch, quantities: Collection[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """[S, hidden] last hidden states, and the asked quantities of `ATTENTION` of the same pass.

    Args:
        encode: `CausalLMPolicy.encode`.
        batch: on the model's device.
        quantities: which of them.
    """
    watched = Watched(build_layout(batch.groups, batch.input_ids.device))
    hidden = encode(batch.input_ids, batch.position_ids, watched)
    if watched.layer is None:
        raise ValueError("no layer of this model attends through the layout, so there are no attention weights to read.")
    return hidden, {name: _weights(watched.layer, batch, steps=name == STEP_ATTENTION) for name in quantities}


@torch.no_grad()
def _weights(layer: _Layer, batch: PackedBatch, *, steps: bool) -> Tensor:
    """[N, T], 0 where the mask is 0."""
    rows = _Rows.of(batch)
    found = torch.zeros_like(batch.mask)
    for part in rows.chunks():
        chunk = rows.take(part, found.device)
        longest = int(rows.length[part].max())
        if steps:
            found[part, :longest] = _step_mean(layer, chunk, longest).to(found.dtype)
        else:
            weights, _ = _attend(layer, chunk, chunk.length[:, None] - 1, longest)
            found[part, :longest] = weights[:, 0].to(found.dtype)
    return found


def _step_mean(layer: _Layer, chunk: _Rows, longest: int) -> Tensor:
    """[n, T] mean over the steps that see a token. The step that draws a token is read at the token before it, so the last
    token has no row and is seen by none, and the step that draws the first token sees no completion."""
    total = _wide(layer.query.new_zeros(len(chunk.length), longest))
    count = torch.zeros_like(total)
    for first in range(0, longest - 1, _ROWS):
        rows = torch.arange(first, min(first + _ROWS, longest - 1), device=total.device)
        real = rows < chunk.length[:, None] - 1  # [n, R]
        weights, seen = _attend(layer, chunk, torch.where(real, rows, 0), longest)
        total += (weights * real.unsqueeze(-1)).sum(1)
        count += (seen & real.unsqueeze(-1)).sum(1)
    return total / count.clamp(min=1)


def _attend(layer: _Layer, chunk: _Rows, rows: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """[n, R, T] weights of the completion's own tokens, mean over heads, and which of them are seen.

    Args:
        layer: the last one.
        chunk: n completions.
        rows: [n, R] which tokens of the completion ask.
        longest: T.
    """
    own = torch.arange(longest, device=rows.device)
    before = torch.arange(int(chunk.prompt.max()), device=rows.device)
    prompt, begin = chunk.prompt[:, None], chunk.begin[:, None]
    real = torch.cat([own < chunk.length[:, None], before < prompt], -1)  # [n, K]
    keys = torch.where(real, torch.cat([begin + own, chunk.start[:, None] + before], -1), 0)
    position = torch.cat([prompt + own, before.expand(len(prompt), -1)], -1)
    distance = (prompt + rows).unsqueeze(-1) - position.unsqueeze(1)  # [n, R, K]
    seen = real.unsqueeze(1) & (distance >= 0)
    if layer.window is not None:
        seen &= distance < layer.window
    query = _wide(layer.query[:, begin + rows]).unflatten(0, (layer.key.shape[0], -1))  # [M, H/M, n, R, D]
    scores = torch.einsum("mhnrd,mnkd->nmhrk", query, _wide(layer.key[:, keys])) * layer.scale
    weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).mean((1, 2))
    return weights[..., :longest], seen[..., :longest]


def _wide(values: Tensor) -> Tensor:
    """At least float32: a softmax in half precision loses what the rest of the model keeps."""
    return values if values.dtype == torch.float64 else values.float()


@dataclass(frozen=True)
class _Rows:
    """Where completions stand: packed position of the prompt and of the first own token, and the lengths of both. [N] each."""

    start: Tensor
    prompt: Tensor
    begin: Tensor
    length: Tensor

    @classmethod
    def of(cls, batch: PackedBatch) -> _Rows:
        found = [
            (group.start, group.starts[0], group.start + begin, end - begin)
            for group in batch.groups
            for begin, end in pairwise(group.starts)
        ]
        return cls(*torch.tensor(found).unbind(-1))

    def take(self, part: slice, device: torch.device) -> _Rows:
        return _Rows(*(values[part].to(device) for values in (self.start, self.prompt, self.begin, self.length)))

    def chunks(self) -> Iterator[slice]:
        """Consecutive completions whose padded keys stay under the limit."""
        begin = prompt = length = 0
        for end, (own_prompt, own_length) in enumerate(zip(self.prompt.tolist(), self.length.tolist(), strict=True)):
            prompt, length = max(prompt, own_prompt), max(length, own_length)
            if end > begin and (end + 1 - begin) * (prompt + length) > _KEYS:
                yield slice(begin, end)
                begin, prompt, length = end, own_prompt, own_length
        yield slice(begin, len(self.length))
