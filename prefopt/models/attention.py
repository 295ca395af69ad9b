"""Attention for packed tokens, reached through transformers' own registry of attention functions.

One function is registered; a `Layout`, built once per batch, says who sees whom and how it is computed. For branches the
mask is: same group, key's branch is the prompt or the query's own branch, key not later. On a CPU it is SDPA with a dense
mask over one group only; groups of similar length are computed side by side. No work crosses groups.
H heads, D head size, S packed tokens, B groups of a bucket, L their padded length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from prefopt.packing import Group

IMPLEMENTATION = "prefopt_packed"


class Layout(Protocol):
    """How packed tokens see each other. Built once per batch; `attend` is called once per layer."""

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
        """Attention of one layer.

        Args:
            module: the attention module; its `layer_idx` tells layers apart.
            query, key, value: [H, S, D]; key and value may have fewer heads, each shared by H / heads query heads.
            scale: of the scores; None is 1 / sqrt(D).
            dropout: probability of dropping a weight.
            window: keys further back than this are not seen; None sees all.

        Returns:
            [S, H, D].
        """


# A bucket may hold this many times the real attention area: beyond it, padding costs more than another call saves.
_MAX_PADDED_AREA = 1.6
# Groups shorter than this always share a call: its overhead is larger than their arithmetic.
_SMALL_GROUP = 48


@dataclass(frozen=True)
class Bucket:
    """Groups computed in one SDPA call.

    Args:
        index: [B, L] packed position of each token; 0 where padded.
        valid: [B*L] positions of the real tokens in the flattened bucket.
        source: packed positions of the real tokens, in the order of `valid`.
        mask: [B, 1, L, L] True where the query (dim 2) may see the key (dim 3).
        distance: [B, 1, L, L] position(query) - position(key), for sliding windows.
    """

    index: Tensor
    valid: Tensor
    source: Tensor
    mask: Tensor
    distance: Tensor

    def visible(self, window: int | None) -> Tensor:
        """The mask, restricted to the last `window` positions."""
        return self.mask if window is None or self.index.shape[1] <= window else self.mask & (self.distance < window)


def build_buckets(groups: Sequence[Group], device: torch.device | str = "cpu") -> tuple[Bucket, ...]:
    """Sorts groups by length and puts those of similar length side by side."""
    buckets: list[list[Group]] = []
    area = 0
    for group in sorted(groups, key=lambda g: -g.length):
        longest = buckets[-1][0].length if buckets else 0
        padded = longest**2 * (len(buckets[-1]) + 1) if buckets else 0
        if buckets and (longest <= _SMALL_GROUP or padded <= _MAX_PADDED_AREA * (area + group.length**2)):
            buckets[-1].append(group)
            area += group.length**2
        else:
            buckets.append([group])
            area = group.length**2
    return tuple(_build_bucket(bucket, device) for bucket in buckets)


def _build_bucket(groups: Sequence[Group], device: torch.device | str) -> Bucket:
    length = groups[0].length
    offsets = torch.arange(length)
    lengths = torch.tensor([group.length for group in groups]).unsqueeze(-1)  # [B, 1]
    real = offsets < lengths  # [B, L]
    starts = torch.tensor([group.start for group in groups]).unsqueeze(-1)
    index = torch.where(real, starts + offsets, 0)
    branch = torch.zeros(len(groups), length, dtype=torch.long)  # 0 = prompt, k = branch k
    position = offsets.expand(len(groups), length).clone()
    for row, group in enumerate(groups):
        for k, (begin, end) in enumerate(zip(group.starts[:-1], group.starts[1:], strict=True), start=1):
            branch[row, begin:end] = k
            position[row, begin:end] = torch.arange(group.starts[0], group.starts[0] + end - begin)
    same = (branch.unsqueeze(1) == 0) | (branch.unsqueeze(1) == branch.unsqueeze(2))  # [B, query, key]
    earlier = offsets.unsqueeze(0) <= offsets.unsqueeze(1)
    mask = same & earlier & real.unsqueeze(1)
    mask[..., 0] |= ~real  # a padded query must see something, or its softmax is NaN; its output is never read
    valid = real.flatten().nonzero().squeeze(-1)
    distance = position.unsqueeze(2) - position.unsqueeze(1)
    parts = (index, valid, index.flatten()[valid], mask.unsqueeze(1), distance.unsqueeze(1))
    return Bucket(*(part.to(device) for part in parts))


@dataclass(frozen=True)
class GroupLayout:
    """Attention group by group with SDPA: the layout of a training batch on a CPU."""

    buckets: tuple[Bucket, ...]

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
        repeats = query.shape[0] // key.shape[0]
        if repeats > 1:
            key, value = (t.repeat_interleave(repeats, dim=0) for t in (key, value))
        output = torch.empty_like(query) if len(self.buckets) == 1 else torch.zeros_like(query)
        for bucket in self.buckets:
            rows, length = bucket.index.shape
            q, k, v = (t[:, bucket.index.flatten()].unflatten(1, (rows, length)).transpose(0, 1) for t in (query, key, value))
            mask = bucket.visible(window)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)  # [B, H, L, D]
            flat = out.transpose(0, 1).flatten(1, 2)[:, bucket.valid]
            output = output.index_copy(1, bucket.source, flat)
        return output.transpose(0, 1)


def build_layout(groups: Sequence[Group], device: torch.device | str = "cpu") -> Layout:
    """The layout of a packed batch."""
    return GroupLayout(build_buckets(groups, device))


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: [1, H, S, D] queries -> [1, S, H, D] outputs, as the layout says.

    Raises:
        ValueError: called without a layout, or by a model whose attention needs logit soft-capping.
    """
    if layout is None:
        raise ValueError(
            "packed attention was called without a layout: use prefopt's shared forward, or another implementation."
        )
    if softcap is not None:
        raise ValueError("this model soft-caps attention logits, which packed attention does not support yet.")
    output = layout.attend(module, query[0], key[0], value[0], scale=scaling, dropout=dropout, window=sliding_window)
    return output.unsqueeze(0), None


AttentionInterface.register(IMPLEMENTATION, packed_attention)
# The layout travels as a keyword argument; transformers must not build a [S, S] mask for it.
AttentionMaskInterface.register(IMPLEMENTATION, lambda *args, **kwargs: None)
