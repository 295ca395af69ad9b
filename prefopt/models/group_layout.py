"""Attention over packed branches in plain matrix products: what a CPU trains with.

The queries of a batch are cut into units, and a unit sees exactly the keys that some of its queries may see: a block of
prompt tokens sees the prompt up to its own end; a block of a branch sees the prompt and its branch up to its own end. So no
work crosses groups or branches, and the upper triangle is skipped block by block. Groups of a few tokens share a unit
instead, padded, since a call costs more than their arithmetic. Key and value heads are never repeated: the query heads that
share one are rows of the same product. Scores are recomputed in backward (Dao 2022, FlashAttention, section 3.1), so memory
grows with tokens, not with their square.

H query heads, M key heads, R = H / M, D head size, S packed tokens; a unit has B groups, Q queries and K keys each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from prefopt.packing import Group

# Queries of one unit: its scores (9 heads x 64 x 300 keys = 0.7 MB in float32) stay in a core's cache.
BLOCK = 64
# Groups up to this length share units.
_SMALL_GROUP = 96
# Padded score positions (B * Q * K) that a shared unit may hold.
_SHARED_AREA = 2**15

# Packed positions: slices that follow each other in one group, or [B, L] for several groups (0 where padded).
Index = tuple[slice, ...] | Tensor


@dataclass(frozen=True)
class Unit:
    """Queries that are computed in one go, and the keys that they see.

    Args:
        queries: where they stand.
        keys: where the keys stand.
        real: [B, Q] bool, which queries are real; None when all are.
        hidden: [B, 1, Q, k] -inf where a query must not see one of the last k keys, else 0; all earlier keys are seen.
        query_positions, key_positions: [B, Q], [B, K] positions within prompt + branch, for sliding windows.
    """

    queries: Index
    keys: Index
    real: Tensor | None
    hidden: Tensor
    query_positions: Tensor
    key_positions: Tensor

    def weights(self, scores: Tensor, window: int | None) -> Tensor:
        """[B, M, R*Q, K] softmax over what may be seen; 0 in padded rows. Overwrites `scores`."""
        batch, heads, rows, keys = scores.shape
        queries = self.hidden.shape[2]
        view = scores.view(batch, heads * (rows // queries), queries, keys)
        view[..., keys - self.hidden.shape[3] :].add_(self.hidden)
        if window is not None and keys > window:
            distance = self.query_positions.unsqueeze(-1) - self.key_positions.unsqueeze(-2)
            view.masked_fill_((distance >= window).unsqueeze(1), -torch.inf)
        weights = scores.softmax(-1)
        if self.real is not None:
            weights.view_as(view).masked_fill_(~self.real[:, None, :, None], 0.0)
        return weights


@dataclass(frozen=True)
class GroupLayout:
    """The layout of a training batch on a CPU."""

    units: tuple[Unit, ...]

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
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        # A softmax in half precision loses what the rest of the model keeps; on a CPU float32 is also faster.
        wide = [tensor if tensor.dtype == torch.float64 else tensor.float() for tensor in (query, key, value)]
        output: Tensor = _GroupAttention.apply(*wide, self.units, scale, dropout, window)
        return output.to(query.dtype)


def build_group_layout(groups: Sequence[Group], device: torch.device | str = "cpu") -> GroupLayout:
    """Cuts the queries of a batch into units."""
    units: list[Unit] = []
    small = sorted((group for group in groups if group.length <= _SMALL_GROUP), key=lambda group: group.length)
    for begin, end in _shared_ranges([group.length for group in small]):
        units.append(_shared_unit(small[begin:end], device))
    for group in groups:
        if group.length > _SMALL_GROUP:
            units.extend(_block_unit(group, *block, device) for block in _blocks(group))
    return GroupLayout(tuple(units))


def _shared_ranges(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Cuts ascending lengths where the padded area would pass the limit."""
    begin = 0
    for end, length in enumerate(lengths):
        if end > begin and (end - begin + 1) * length**2 > _SHARED_AREA:
            yield begin, end
            begin = end
    if lengths:
        yield begin, len(lengths)


def _blocks(group: Group) -> Iterator[tuple[int, int, int]]:
    """(begin, first query, end) of each block: its branch begins at `begin`, 0 for the prompt. Relative to the group."""
    for begin, end in zip((0, *group.starts[:-1]), group.starts, strict=True):
        for first in range(begin, end, BLOCK):
            yield begin, first, min(first + BLOCK, end)


def _block_unit(group: Group, begin: int, first: int, end: int, device: torch.device | str) -> Unit:
    prompt = group.starts[0]
    ranges = [(0, end)] if begin <= prompt else [(0, prompt), (begin, end)]
    seen = torch.cat([torch.arange(*part) for part in ranges])
    queries = torch.arange(first, end)
    later = queries > queries.unsqueeze(1)  # the last keys are the block itself
    return Unit(
        _slices(group, [(first, end)]), _slices(group, ranges), None, _bias(later[None, None]).to(device),
        _positions(queries, begin, prompt).unsqueeze(0).to(device), _positions(seen, begin, prompt).unsqueeze(0).to(device),
    )  # fmt: skip


def _slices(group: Group, ranges: Sequence[tuple[int, int]]) -> tuple[slice, ...]:
    return tuple(slice(group.start + begin, group.start + end) for begin, end in ranges)


def _bias(hidden: Tensor) -> Tensor:
    return torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)


def _positions(offsets: Tensor, begin: int, prompt: int) -> Tensor:
    """Positions within prompt + branch of offsets within the group."""
    return torch.where(offsets >= begin, offsets - begin + min(begin, prompt), offsets)


def _shared_unit(groups: Sequence[Group], device: torch.device | str) -> Unit:
    length = max(group.length for group in groups)
    offsets = torch.arange(length)
    real = offsets < torch.tensor([group.length for group in groups]).unsqueeze(-1)  # [B, L]
    index = torch.where(real, torch.tensor([group.start for group in groups]).unsqueeze(-1) + offsets, 0)
    branch = torch.zeros(len(groups), length, dtype=torch.long)  # 0 = prompt, k = branch k
    position = offsets.expand(len(groups), length).clone()
    for row, group in enumerate(groups):
        for k, (begin, end) in enumerate(zip(group.starts[:-1], group.starts[1:], strict=True), start=1):
            branch[row, begin:end] = k
            position[row, begin:end] = torch.arange(group.starts[0], group.starts[0] + end - begin)
    same = (branch.unsqueeze(1) == 0) | (branch.unsqueeze(1) == branch.unsqueeze(2))  # [B, query, key]
    seen = same & (offsets.unsqueeze(0) <= offsets.unsqueeze(1)) & real.unsqueeze(1)
    seen |= ~real.unsqueeze(2)  # a padded query must see something, or its softmax is NaN; it is zeroed and never read
    query_position = position.masked_fill(~real, 0)  # so that nothing is too far from it
    padded = None if bool(real.all()) else real.to(device)
    index = index.to(device)
    bias = _bias(~seen.unsqueeze(1)).to(device)
    return Unit(index, index, padded, bias, query_position.to(device), position.to(device))


def _take(packed: Tensor, index: Index) -> Tensor:
    """[..., S, D] -> [B, ..., L, D]: the tokens of a unit."""
    if isinstance(index, Tensor):
        return packed[..., index, :].movedim(-3, 0)
    parts = [packed[..., part, :] for part in index]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, -2)).unsqueeze(0)


def _put(packed: Tensor, unit: Unit, values: Tensor) -> None:
    """[B, ..., Q, D] values of a unit's queries -> [..., S, D], in place. Every token is a query of exactly one unit."""
    if isinstance(unit.queries, Tensor):
        real = slice(None) if unit.real is None else unit.real.flatten()
        packed[..., unit.queries.flatten()[real], :] = values.movedim(0, -3).flatten(-3, -2)[..., real, :]
    else:
        packed[..., unit.queries[0], :] = values[0]


def _add(packed: Tensor, index: Index, values: Tensor) -> None:
    """Adds [B, ..., K, D] gradients of a unit's keys to [..., S, D], in place. Padded keys bring zeros."""
    if isinstance(index, Tensor):
        packed.index_add_(-2, index.flatten(), values.movedim(0, -3).flatten(-3, -2))
        return
    lengths = [part.stop - part.start for part in index]
    for part, value in zip(index, values[0].split(lengths, -2), strict=True):
        packed[..., part, :] += value


class _GroupAttention(Function):
    """[H, S, D] queries, [M, S, D] keys and values -> [S, H, D]."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        units: tuple[Unit, ...],
        scale: float,
        dropout: float,
        window: int | None,
    ) -> Tensor:
        heads, tokens, size = query.shape
        shared, repeats = key.shape[0], heads // key.shape[0]
        grouped = query.unflatten(0, (shared, repeats))
        output = query.new_empty(tokens, heads, size)
        kept: list[Tensor] = []
        for unit in units:
            weights = unit.weights(_scores(unit, grouped, key, scale), window)
            if dropout:
                kept.append(torch.rand_like(weights) >= dropout)
                weights.mul_(kept[-1]).div_(1 - dropout)
            result = torch.matmul(weights, _take(value, unit.keys))
            _put(_grouped(output, shared), unit, result.unflatten(2, (repeats, -1)))
        ctx.save_for_backward(query, key, value, output, *kept)
        ctx.units, ctx.scale, ctx.dropout, ctx.window = units, scale, dropout, window
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, *kept = ctx.saved_tensors
        heads, tokens, size = query.shape
        shared, repeats = key.shape[0], heads // key.shape[0]
        grouped = query.unflatten(0, (shared, repeats))
        gradient = _grouped(gradients[0], shared)
        # sum over keys of weight * d weight: one number per query, whatever the unit.
        means = _grouped((gradients[0] * output).sum(-1, keepdim=True), shared)
        d_query = query.new_empty(tokens, heads, size)
        d_key, d_value = torch.zeros_like(key), torch.zeros_like(value)
        for number, unit in enumerate(ctx.units):
            weights = unit.weights(_scores(unit, grouped, key, ctx.scale), ctx.window)
            above = _take(gradient, unit.queries).flatten(2, 3)
            d_weights = torch.matmul(above, _take(value, unit.keys).mT)
            if kept:
                scaled = kept[number] / (1 - ctx.dropout)
                d_weights.mul_(scaled)
                _add(d_value, unit.keys, torch.matmul((weights * scaled).mT, above))
            else:
                _add(d_value, unit.keys, torch.matmul(weights.mT, above))
            d_scores = d_weights.sub_(_take(means, unit.queries).flatten(2, 3)).mul_(weights).mul_(ctx.scale)
            d_unit = torch.matmul(d_scores, _take(key, unit.keys))
            _put(_grouped(d_query, shared), unit, d_unit.unflatten(2, (repeats, -1)))
            _add(d_key, unit.keys, torch.matmul(d_scores.mT, _take(grouped, unit.queries).flatten(2, 3)))
        return d_query.transpose(0, 1), d_key, d_value, None, None, None, None


def _grouped(values: Tensor, shared: int) -> Tensor:
    """[S, H, D] -> [M, R, S, D], a view."""
    return values.unflatten(1, (shared, -1)).permute(1, 2, 0, 3)


def _scores(unit: Unit, grouped: Tensor, key: Tensor, scale: float) -> Tensor:
    """[B, M, R*Q, K] scaled scores of [M, R, S, D] queries."""
    return torch.matmul(_take(grouped, unit.queries).flatten(2, 3) * scale, _take(key, unit.keys).mT)
