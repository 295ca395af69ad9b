"""FlexAttention's layout against one dense mask: values, gradients, blocks, sizes; how often it compiles."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from prefopt.models import flex
from prefopt.packing import Group

MODULE = torch.nn.Module()


def make_groups(shapes: Sequence[tuple[int, Sequence[int]]]) -> list[Group]:
    groups, start = [], 0
    for prompt, branches in shapes:
        starts = [prompt]
        for branch in branches:
            starts.append(starts[-1] + branch)
        groups.append(Group(start, tuple(starts)))
        start += starts[-1]
    return groups


SHAPES = st.lists(st.tuples(st.integers(1, 90), st.lists(st.integers(1, 70), min_size=1, max_size=3)), min_size=1, max_size=5)
WINDOWS = st.one_of(st.none(), st.integers(1, 130))


def dense_mask(groups: Sequence[Group], size: int, window: int | None) -> Tensor:
    """[size, size] by the definition: same group, key in the prompt or in the query's branch, not later, inside the window."""
    group, branch, position = torch.arange(size) + len(groups), torch.zeros(size).long(), torch.zeros(size).long()
    for number, item in enumerate(groups):
        bounds = [0, *item.starts]
        for k, (begin, end) in enumerate(pairwise(bounds)):
            rows = slice(item.start + begin, item.start + end)
            group[rows], branch[rows] = number, k
            position[rows] = torch.arange(end - begin) + (item.starts[0] if k else 0)
    order = torch.arange(size)
    mask = (group[:, None] == group) & ((branch == 0) | (branch[:, None] == branch)) & (order <= order[:, None])
    return mask if window is None else mask & (position[:, None] - position < window)


def tokens_of(groups: Sequence[Group]) -> int:
    return groups[-1].start + groups[-1].length


@settings(max_examples=25, deadline=None)
@given(SHAPES, WINDOWS)
def test_blocks_are_those_of_the_dense_mask(shapes: list[tuple[int, list[int]]], window: int | None) -> None:
    """Spans are the mask's definition; partial and full blocks, by query and by key, are torch's own."""
    groups = make_groups(shapes)
    size = flex.padded_size(tokens_of(groups))
    mask = dense_mask(groups, size, window)
    own = flex.build_block_mask(groups, size, window, torch.device("cpu"))
    order = torch.arange(size)
    assert own.mask_mod(order, order, order[:, None], order[None, :]).equal(mask)
    expected = torch_flex.create_block_mask(lambda b, h, q, k: mask[q, k], 1, 1, size, size, device="cpu")
    for name in ("kv", "full_kv", "q", "full_q"):
        count, index = getattr(own, f"{name}_num_blocks"), getattr(own, f"{name}_indices")
        assert count.dtype == index.dtype == torch.int32
        assert count.equal(getattr(expected, f"{name}_num_blocks"))
        assert index.equal(getattr(expected, f"{name}_indices"))


def test_long_groups_have_full_blocks() -> None:
    """A prompt of 512 and a second branch of 256: the branch sees the whole prompt, so those blocks need no mask."""
    groups = make_groups([(512, (256, 256))])
    _, full = flex.visited_blocks(flex.visible_spans(groups, 1024, None))
    assert full[6:, :4].all()
    assert not full[6:, 4:6].any()


@pytest.fixture
def backward_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses FlexAttention's backward on a CPU; its uncompiled form has one all the same."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda query, key, value: None)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def attend(layout: flex.FlexLayout, tensors: Sequence[Tensor], window: int | None) -> Tensor:
    query, key, value = tensors
    return layout.attend(MODULE, query, key, value, scale=None, dropout=0.0, window=window)


def attend_densely(groups: Sequence[Group], tensors: Sequence[Tensor], window: int | None) -> Tensor:
    query, key, value = tensors
    mask = dense_mask(groups, query.shape[1], window)
    key, value = (t.repeat_interleave(query.shape[0] // t.shape[0], dim=0) for t in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(0, 1)


@pytest.mark.usefixtures("backward_on_cpu")
@pytest.mark.parametrize(("heads", "shared", "width"), [(4, 4, 16), (4, 2, 24), (9, 3, 8)])
def test_values_and_gradients_equal_dense_attention(heads: int, shared: int, width: int) -> None:
    """Every head shared by none, two and three; a head size below the kernel's least one."""

    @settings(max_examples=6, deadline=None)
    @given(SHAPES, WINDOWS, st.integers(0, 100))
    def check(shapes: list[tuple[int, list[int]]], window: int | None, seed: int) -> None:
        groups = make_groups(shapes)
        tokens = tokens_of(groups)
        generator = torch.Generator().manual_seed(seed)
        inputs = [
            torch.randn(n, tokens, width, generator=generator, dtype=torch.float64, requires_grad=True)
            for n in (heads, shared, shared)
        ]
        direction = torch.randn(tokens, heads, width, generator=generator, dtype=torch.float64)
        outputs = [attend(flex.build_flex_layout(groups, "cpu"), inputs, window), attend_densely(groups, inputs, window)]
        results = [(out, *torch.autograd.grad((out * direction).sum(), inputs)) for out in outputs]
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)

    check()


def test_one_compilation_per_size() -> None:
    """Other groups and other windows in the same padded size run the same compiled function."""
    compilations = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        nonlocal compilations
        compilations += 1
        return graph.forward

    torch.compiler.reset()
    kernel = torch.compile(torch_flex.flex_attention, dynamic=False, fullgraph=True, backend=backend)
    for shapes, window in (
        ([(60, (50, 40)), (30, (20, 30))], None),
        ([(9, (8, 7, 6))] * 12, None),
        ([(200, (90, 90))], 64),
        ([(200, (90, 90))], 32),
    ):
        groups = make_groups(shapes)
        tokens = tokens_of(groups)
        layout = flex.FlexLayout(groups, tokens, flex.padded_size(tokens), torch.device("cpu"), kernel, {})
        inputs = [torch.randn(2, tokens, 16) for _ in range(3)]
        with torch.no_grad():
            got = attend(layout, inputs, window)
        expected = attend_densely(groups, inputs, window)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert compilations == 1
    torch.compiler.reset()


def test_masks_are_built_once_per_window_that_matters() -> None:
    layout = flex.build_flex_layout(make_groups([(60, (50, 40)), (100, (20, 30))]), "cpu")
    assert layout.mask(None) is layout.mask(150)
    assert layout.mask(None) is not layout.mask(149)
    assert layout.mask(149) is layout.mask(149)


def test_sizes_are_few() -> None:
    sizes = {flex.padded_size(tokens) for tokens in range(1, 8193)}
    assert sizes == {512, 1024, 2048, 4096, 8192}
    assert all(flex.padded_size(size) == size for size in sizes)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_autocast_brings_queries_and_values_to_one_type() -> None:
    """A float32 query (rotary embedding) beside a bf16 value, as autocast leaves them."""
    layout = flex.build_flex_layout(make_groups([(6, (5, 4))]), "cpu")
    query, value = torch.randn(2, 15, 16), torch.randn(2, 15, 16, dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert attend(layout, (query, query, value), None).dtype == torch.bfloat16


def test_dropout_is_refused() -> None:
    layout = flex.build_flex_layout(make_groups([(6, (5, 4))]), "cpu")
    query = torch.randn(2, 15, 16)
    with pytest.raises(ValueError, match="attention_dropout"):
        layout.attend(MODULE, query, query, query, scale=None, dropout=0.1, window=None)
