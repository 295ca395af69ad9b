"""Packing: where tokens stand, parts of a budget, the way to another device."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.data.records import Example
from prefopt.packing import (
    Group,
    PackedBatch,
    Sampling,
    flat_roles,
    group_roles,
    mismatched_roles,
    pack,
    pair_roles,
    send_tensors,
    split_by_tokens,
)

IDS = st.lists(st.integers(0, 99), min_size=1, max_size=6).map(tuple)
EXAMPLES = st.lists(st.builds(Example, st.just("x"), IDS, st.lists(IDS, min_size=1, max_size=3).map(tuple)), min_size=1)


def test_two_groups_by_hand() -> None:
    """The picture in the module's docstring, with numbers."""
    examples = [Example("a", (10, 11, 12), ((13, 14), (15, 16, 17))), Example("b", (20, 21), ((22,), (23, 24)))]
    batch = pack(examples, roles=pair_roles, rows={"scores": [torch.tensor(float(i)) for i in range(4)]})
    assert batch.input_ids.tolist() == [10, 11, 12, 13, 14, 15, 16, 17, 20, 21, 22, 23, 24]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 2, 3]
    assert batch.groups == (Group(0, (3, 5, 8)), Group(8, (2, 3, 5)))
    assert batch.targets.tolist() == [13, 14, 15, 16, 17, 22, 23, 24]
    assert batch.predict.tolist() == [2, 3, 2, 5, 6, 9, 9, 11]
    assert batch.scatter.tolist() == [0, 1, 3, 4, 5, 6, 9, 10]
    assert batch.last.tolist() == [4, 7, 10, 12]
    assert batch.mask.tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch.roles["chosen_"].tolist() == [0, 2]
    assert batch.ids == ("a", "b")
    assert all(isinstance(bound, int) for group in batch.groups for bound in (group.start, *group.starts))


@settings(max_examples=50, deadline=None)
@given(EXAMPLES)
def test_every_token_stands_once_and_rows_can_be_read_back(examples: list[Example]) -> None:
    batch = pack(examples, roles=flat_roles)
    rows = [completion for example in examples for completion in example.completion_ids]
    table = batch.scatter_tokens(batch.targets.double()).long()
    lengths = batch.mask.sum(-1).long().tolist()
    assert [tuple(row[:length].tolist()) for row, length in zip(table, lengths, strict=True)] == rows
    assert batch.input_ids[batch.last].tolist() == [row[-1] for row in rows]
    assert batch.tokens == sum(example.tokens for example in examples)
    for example, group in zip(examples, batch.groups, strict=True):
        ids = batch.input_ids[group.start : group.start + group.length].tolist()
        positions = batch.position_ids[group.start : group.start + group.length].tolist()
        prompt = len(example.prompt_ids)
        assert tuple(ids[:prompt]) == example.prompt_ids
        for completion, begin, end in zip(example.completion_ids, group.starts[:-1], group.starts[1:], strict=True):
            assert tuple(ids[begin:end]) == completion
            assert positions[begin:end] == list(range(prompt, prompt + len(completion)))
    # What predicts a token is the one before it in prompt + own completion.
    assert batch.position_ids[batch.predict].tolist() == [
        len(example.prompt_ids) + i - 1
        for example in examples
        for completion in example.completion_ids
        for i in range(len(completion))
    ]


def test_lists_of_different_lengths_by_hand() -> None:
    """Two completions and three: what the shorter list lacks is 0 in every tensor, and has no gradient."""
    examples = [Example("a", (9,), ((1,), (2, 3))), Example("b", (9,), ((4, 5), (6,), (7, 8)))]
    scores = [torch.tensor(float(i)) for i in range(1, 6)]
    batch = pack(examples, roles=group_roles, rows={"scores": scores})
    assert {letter: batch.sizes[letter] for letter in "GKT"} == {"G": 2, "K": 3, "T": 2}
    logps = torch.tensor([[-1.0, 0.0], [-2.0, -3.0], [-4.0, -5.0], [-6.0, 0.0], [-7.0, -8.0]], requires_grad=True)
    names = {
        "group_mask",
        "group_token_mask",
        "group_lengths",
        "group_scores",
        "policy_group_logps",
        "policy_group_token_logps",
    }
    found = batch.tensors(names, {"policy_token_logps": logps})
    assert found.keys() == names
    assert found["group_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert found["group_token_mask"].tolist() == [[[1, 0], [1, 1], [0, 0]], [[1, 1], [1, 0], [1, 1]]]
    assert found["group_lengths"].tolist() == [[1, 2, 0], [2, 1, 2]]
    assert found["group_scores"].tolist() == [[1, 2, 0], [3, 4, 5]]
    assert found["policy_group_logps"].tolist() == [[-1, -5, 0], [-9, -6, -15]]
    assert found["policy_group_token_logps"].tolist() == [[[-1, 0], [-2, -3], [0, 0]], [[-4, -5], [-6, 0], [-7, -8]]]
    found["policy_group_logps"].sum().backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == [[1.0, 1.0]] * 5


def test_the_last_completion_of_each_prompt_is_the_mismatched_one() -> None:
    examples = [Example("a", (9,), ((1,), (2, 3))), Example("b", (9,), ((4, 5), (6,), (7, 8)))]
    batch = pack(examples, roles=mismatched_roles)
    assert (batch.roles[""].tolist(), batch.roles["mismatched_"].tolist()) == ([0, 2, 3], [1, 4])
    assert (batch.sizes["N"], batch.sizes["M"]) == (3, 2)
    found = batch.tensors({"mask", "mismatched_mask", "lengths"})
    assert found["mismatched_mask"].tolist() == [[1, 1], [1, 1]]
    assert found["lengths"].tolist() == [1, 2, 1]


def sized(tokens: int, name: object = "x") -> Example:
    return Example(str(name), (0,) * (tokens - 1), ((0,),))


def greedy(sizes: list[int], budget: int) -> list[list[int]]:
    parts: list[list[int]] = []
    for size in sizes:
        if parts and sum(parts[-1]) + size <= budget:
            parts[-1].append(size)
        else:
            parts.append([size])
    return parts


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(2, 40), max_size=12), st.integers(2, 60))
def test_parts_keep_order_and_budget_and_are_as_few_and_even_as_can_be(sizes: list[int], budget: int) -> None:
    examples = [sized(size, i) for i, size in enumerate(sizes)]
    parts = split_by_tokens(examples, budget)
    assert [example for part in parts for example in part] == examples
    loads = [sum(example.tokens for example in part) for part in parts]
    assert all(load <= budget or len(part) == 1 for load, part in zip(loads, parts, strict=True))
    # Filling greedily is optimal in the number of parts; its largest part need not be the smallest possible.
    assert len(parts) == len(greedy(sizes, budget))
    if max(loads, default=0) <= budget and loads:
        assert all(len(greedy(sizes, limit)) > len(parts) for limit in range(max(sizes), max(loads)))


def test_parts_are_even() -> None:
    """Nine examples of 30 within 130: filling greedily would make 120, 120 and 30."""
    assert [len(part) for part in split_by_tokens([sized(30)] * 9, 130)] == [3, 3, 3]
    assert [len(part) for part in split_by_tokens([sized(30)] * 8, 100)] == [3, 3, 2]
    assert [len(part) for part in split_by_tokens([sized(30), sized(200), sized(30)], 100)] == [1, 1, 1]


@pytest.mark.parametrize("support", [None, torch.tensor([[3, 1], [255, 0]], dtype=torch.uint8)])
def test_sending_keeps_values_types_and_shapes(support: torch.Tensor | None) -> None:
    """One buffer per type, whose views hold what was put in, at aligned addresses."""
    tensors = [torch.arange(5), torch.tensor([[True, False]]), torch.rand(3, 7), torch.tensor(2.5), torch.arange(6).view(2, 3)]
    tensors += [torch.rand(2, 4).t(), torch.empty(0)] + ([] if support is None else [support])
    for got, expected in zip(send_tensors(tensors, torch.device("cpu")), tensors, strict=True):
        assert got.equal(expected)
        assert got.dtype == expected.dtype
        assert got.data_ptr() % 64 == 0 or got.numel() == 0


def test_a_batch_on_its_device_is_itself_and_moves_whole() -> None:
    example = Example("a", (1, 2), ((3,), (4, 5)))
    sampling = Sampling(0.7, torch.zeros(3, 2, dtype=torch.uint8))
    batch = pack([example], roles=pair_roles, data={"margins": torch.tensor([0.5])}, sampling=sampling)
    assert batch.to("cpu") is batch
    moved = batch.to("meta")
    assert moved.sampling.temperature == 0.7
    assert moved.groups == batch.groups

    def leaves(packed: PackedBatch) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for field in dataclasses.fields(packed):
            value = getattr(packed, field.name)
            for name, item in {**value}.items() if isinstance(value, dict) else [("", value)]:
                if isinstance(item, torch.Tensor):
                    found[field.name + name] = item
        assert packed.sampling.support is not None
        return found | {"support": packed.sampling.support}

    there, here = leaves(moved), leaves(batch)
    assert there.keys() == here.keys()
    for name, value in there.items():
        assert value.device.type == "meta"
        assert (value.shape, value.dtype) == (here[name].shape, here[name].dtype)
