"""Attention in query blocks against plain dense attention under the mask of the definition, values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.models import group_layout
from prefopt.models.group_layout import build_group_layout
from prefopt.packing import Group

# (prompt length, completion lengths) of each group: prompts and completions of one token, 1 to 8 completions, groups on both
# sides of the length up to which they share a unit, and prompts longer than a block.
GROUPS = st.lists(
    st.tuples(st.sampled_from([1, 2, 7, 30, 60, 150]), st.lists(st.sampled_from([1, 3, 20, 140]), min_size=1, max_size=8)),
    min_size=1,
    max_size=4,
)


def layout_of(shapes: list[tuple[int, list[int]]]) -> list[Group]:
    groups, start = [], 0
    for prompt, completions in shapes:
        starts = [prompt]
        for length in completions:
            starts.append(starts[-1] + length)
        groups.append(Group(start, tuple(starts)))
        start += starts[-1]
    return groups


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: list[Group], window: int | None
) -> torch.Tensor:
    """The definition: same group, prompt or own branch, not later, not further back than the window. [S, H, D]."""
    tokens = query.shape[1]
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for group in groups:
        prompt = list(range(group.starts[0]))
        for begin, end in zip((0, *group.starts[:-1]), group.starts, strict=True):
            row = prompt[:begin] + list(range(begin, end))  # what a branch sees, in order: index = position
            for at in range(begin, end):
                position = row.index(at)
                first = 0 if window is None else max(0, position - window + 1)
                for other in row[first : position + 1]:
                    seen[group.start + at, group.start + other] = True
    repeats = query.shape[0] // key.shape[0]
    key, value = (tensor.repeat_interleave(repeats, 0) for tensor in (key, value))
    scores = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(0, 1)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(GROUPS, st.sampled_from([(1, 1), (2, 1), (2, 3)]), st.sampled_from([None, 5, 64]), st.integers(0, 2**16))
def test_blocks_equal_dense_attention(
    shapes: list[tuple[int, list[int]]], heads: tuple[int, int], window: int | None, seed: int
) -> None:
    groups = layout_of(shapes)
    tokens = sum(group.length for group in groups)
    generator = torch.Generator().manual_seed(seed)
    shared, repeats = heads

    def random(count: int) -> torch.Tensor:
        return torch.randn(tokens, count, 4, generator=generator, dtype=torch.float64).transpose(0, 1).requires_grad_()

    query, key, value = random(shared * repeats), random(shared), random(shared)
    above = torch.randn(tokens, shared * repeats, 4, generator=generator, dtype=torch.float64)
    layout = build_group_layout(groups)
    got = layout.attend(torch.nn.Identity(), query, key, value, scale=None, dropout=0.0, window=window)
    expected = dense_attention(query, key, value, groups, window)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
    inputs = (query, key, value)
    torch.testing.assert_close(
        torch.autograd.grad(got, inputs, above), torch.autograd.grad(expected, inputs, above), atol=1e-11, rtol=1e-11
    )


def test_small_groups_share_units_and_long_ones_are_cut_into_blocks() -> None:
    """64 groups of a few tokens need a handful of calls; no unit of a long group sees what only others may see."""
    assert len(build_group_layout(layout_of([(3, [5, 6])] * 64)).units) <= 4
    layout = build_group_layout(layout_of([(300, [100, 40])]))
    area = sum(unit.query_positions.shape[1] * unit.key_positions.shape[1] for unit in layout.units)
    assert area <= 300 * 301 // 2 + 100 * 400 + 40 * 340 + 3 * group_layout.BLOCK**2


@pytest.mark.slow
def test_dropout_has_its_gradient() -> None:
    """With the same draws the backward is the derivative of the forward, and the mean over draws is the plain output."""
    layout = build_group_layout(layout_of([(3, [2, 4]), (60, [5])]))
    query, key, value = (
        torch.randn(count, 74, 4, generator=torch.Generator().manual_seed(count), dtype=torch.float64).requires_grad_()
        for count in (2, 1, 1)
    )

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return layout.attend(torch.nn.Identity(), query, key, value, scale=None, dropout=0.3, window=None)

    assert torch.autograd.gradcheck(attend, (query, key, value))
    with torch.no_grad():
        draws = [layout.attend(None, query, key, value, scale=None, dropout=0.3, window=None) for _ in range(4000)]  # type: ignore[arg-type]
        plain = layout.attend(torch.nn.Identity(), query, key, value, scale=None, dropout=0.0, window=None)
    spread = torch.stack(draws).std(0) / len(draws) ** 0.5
    assert ((torch.stack(draws).mean(0) - plain).abs() <= 6 * spread + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    """The result is the float32 result of the rounded inputs, rounded once."""
    groups = layout_of([(50, [10, 20])])
    query, key, value = (torch.randn(count, 80, 8).to(dtype) for count in (2, 1, 1))
    got = build_group_layout(groups).attend(torch.nn.Identity(), query, key, value, scale=None, dropout=0.0, window=None)
    expected = dense_attention(query.double(), key.double(), value.double(), groups, None)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected.to(dtype).double(), atol=1e-2, rtol=1e-2)
