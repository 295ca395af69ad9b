"""Attention for packed tokens with FlexAttention: the layout of a training batch on a GPU.

A query sees two spans of packed positions: a span of its group's prompt, and its own branch up to itself. Three integers
per token say so for every window, so one compiled kernel serves all batches, layers and windows of a size, and the blocks
that the kernel visits follow from the spans on the CPU without a [S, S] mask and without waiting for the device.
S packed tokens, padded to L; H heads, D head size; a block is 128 tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from prefopt.packing import Group, send_tensors

BLOCK = 128
# Sizes are powers of two from here on: five compilations for a budget of 8192 tokens. Only queries, keys and values are
# padded, and padded blocks see themselves alone, so a coarse size costs a copy and no matrix product.
SMALLEST = 512
# Matrix products of the compiled kernel need at least this head size; zeros change no score.
_SMALLEST_HEAD = 16
# A compilation for every size, with and without gradient, for policy and reference model. torch's own limit of 8 for a
# function is meant to catch accidents.
_MOST_COMPILED = 64

Spans = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]


def padded_size(tokens: int) -> int:
    """The size that a packed sequence is padded to: the next power of two, at least `SMALLEST`."""
    return max(SMALLEST, 1 << (tokens - 1).bit_length())


def visible_spans(groups: Sequence[Group], size: int, window: int | None) -> Spans:
    """Which keys each query sees: [prompt_begin, prompt_end) and [own_begin, query], as three [size] arrays.

    The first branch continues its prompt, so the two are one span there. A padded query sees itself.

    Args:
        groups: from position 0 on, without a gap.
        size: L.
        window: keys this many positions back or more are not seen; None sees all.
    """
    segments = []  # length, start of the prompt, end of the prompt, start of its own span, first position there
    for group in groups:
        prompt = group.starts[0]
        segments.append((group.starts[min(1, len(group.starts) - 1)], group.start, group.start, group.start, 0))
        for begin, end in zip(group.starts[1:-1], group.starts[2:], strict=True):
            segments.append((end - begin, group.start, group.start + prompt, group.start + begin, prompt))
    table = np.array(segments, dtype=np.int32)
    begin, end, own, first = np.repeat(table[:, 1:], table[:, 0], axis=0).T
    query = np.arange(size, dtype=np.int32)
    real = query[: len(own)]
    if window is not None:
        back = real - own + first - (window - 1)  # the first position inside the window
        begin = np.minimum(np.maximum(begin, begin + back), end)
        own = np.maximum(own, real - (window - 1))
    prompt_begin, prompt_end, own_begin = np.zeros_like(query), np.zeros_like(query), query.copy()
    prompt_begin[: len(own)], prompt_end[: len(own)], own_begin[: len(own)] = begin, end, own
    return prompt_begin, prompt_end, own_begin


def visited_blocks(spans: Spans) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """[L/128, L/128] which blocks (query, key) are seen in part, and which by every query in every key."""
    prompt_begin, prompt_end, own_begin = spans
    size = len(own_begin)
    query = np.arange(size)
    count = size // BLOCK
    seen, whole = np.zeros((2, count, count + 1), dtype=np.int64)
    for begin, end in ((prompt_begin, prompt_end), (own_begin, query + 1)):
        some = end > begin
        seen += _cover(query[some], begin[some] // BLOCK, (end[some] - 1) // BLOCK + 1, count)
        first, last = -(-begin // BLOCK), end // BLOCK
        some = last > first
        whole += _cover(query[some], first[some], last[some], count)
    full = whole.cumsum(-1)[:, :-1] == BLOCK
    return (seen.cumsum(-1)[:, :-1] > 0) & ~full, full


def _cover(query: NDArray[Any], first: NDArray[Any], last: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Running differences of how many queries of a block cover each key block, when one covers [first, last)."""
    row = query // BLOCK * (count + 1)
    size = count * (count + 1)
    return (np.bincount(row + first, minlength=size) - np.bincount(row + last, minlength=size)).reshape(count, count + 1)


def build_block_mask(groups: Sequence[Group], size: int, window: int | None, device: torch.device) -> BlockMask:
    """The block mask of a packed batch, sent to the device in one transfer that nothing waits for."""
    spans = visible_spans(groups, size, window)
    partial, full = visited_blocks(spans)
    tables = [part for dense in (partial, full, partial.T, full.T) for part in _ordered(dense)]
    sent = send_tensors([torch.from_numpy(np.ascontiguousarray(array)) for array in (*spans, *tables)], device)
    prompt_begin, prompt_end, own_begin = sent[:3]
    counts, indices = [t[None, None] for t in sent[3::2]], [t[None, None] for t in sent[4::2]]

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_prompt = (prompt_begin[query] <= key) & (key < prompt_end[query])
        return in_prompt | ((own_begin[query] <= key) & (key <= query))

    return BlockMask(
        seq_lengths=(size, size),
        kv_num_blocks=counts[0],
        kv_indices=indices[0],
        full_kv_num_blocks=counts[1],
        full_kv_indices=indices[1],
        q_num_blocks=counts[2],
        q_indices=indices[2],
        full_q_num_blocks=counts[3],
        full_q_indices=indices[3],
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=visible,
    )


def _ordered(dense: NDArray[np.bool_]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """[rows, columns] -> how many columns of each row are set, and the columns of each row, the set ones first."""
    return dense.sum(-1, dtype=np.int32), np.argsort(~dense, axis=-1, kind="stable").astype(np.int32)


@dataclass(frozen=True)
class FlexLayout:
    """Attention over all groups at once, blocks that nobody sees left out.

    Args:
        groups: of the packed batch.
        tokens: S.
        size: L.
        device: of the batch.
        kernel: flex_attention, compiled or not.
        masks: the block mask of each window asked for so far; a model's layers share few windows.
    """

    groups: Sequence[Group]
    tokens: int
    size: int
    device: torch.device
    kernel: Callable[..., Any]
    masks: dict[int | None, BlockMask]

    def mask(self, window: int | None) -> BlockMask:
        """The block mask for a window, built when first asked for."""
        # No window cuts a group that is shorter.
        window = None if window is None or window >= max(group.length for group in self.groups) else window
        if window not in self.masks:
            self.masks[window] = build_block_mask(self.groups, self.size, window, self.device)
        return self.masks[window]

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
        """See `Layout.attend`.

        Raises:
            ValueError: attention dropout, or double precision on a GPU, which the kernel does not have.
        """
        if dropout:
            raise ValueError(f"attention dropout is {dropout}; FlexAttention has none: set the model's attention_dropout to 0.")
        if query.dtype == torch.float64 and query.device.type == "cuda":
            raise ValueError("FlexAttention has no float64 on a GPU: load the model in float32 or bfloat16, or use the CPU.")
        heads, tokens, width = query.shape
        scale = width**-0.5 if scale is None else scale
        columns = max(0, _SMALLEST_HEAD - width)
        dtype = _attention_dtype(query)
        q, k, v = (F.pad(t.to(dtype), (0, columns, 0, self.size - tokens)).unsqueeze(0) for t in (query, key, value))
        out = self.kernel(q, k, v, block_mask=self.mask(window), scale=scale, enable_gqa=heads != key.shape[0])
        return out[0, :, :tokens, :width].transpose(0, 1)


def _attention_dtype(query: Tensor) -> torch.dtype:
    """Under autocast rotary embeddings leave float32 queries beside bf16 values; flex_attention wants one type."""
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def build_flex_layout(groups: Sequence[Group], device: torch.device | str) -> FlexLayout:
    """The layout of a packed batch; compiled on a GPU, where the first batch of each size takes seconds."""
    device = torch.device(device)
    tokens = sum(group.length for group in groups)
    if device.type == "cuda":
        return FlexLayout(groups, tokens, padded_size(tokens), device, compiled_kernel(), {})
    return FlexLayout(groups, tokens, padded_size(tokens), device, flex_attention, {})


@functools.cache
def compiled_kernel() -> Callable[..., Tensor]:
    """flex_attention, compiled once per process and size.

    `fullgraph`: without it a function compiled too often is run uncompiled, silently, with the whole score matrix in memory.
    """
    # Absent from torch's type stubs as an assignable name.
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _MOST_COMPILED)
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)
