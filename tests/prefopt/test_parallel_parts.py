"""What processes agree on before they train: who takes which rows, what the launcher has started, and whose numbers count."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from losses.types import Max
from prefopt import checkpoint
from prefopt.communicator import Communicator, SingleProcess, gather_plain
from prefopt.data.records import Example
from prefopt.errors import ConfigError
from prefopt.generate import Sample
from prefopt.metrics import Meter
from prefopt.options import ParallelOptions
from prefopt.packing import PackedBatch, group_roles, pack, pair_roles
from prefopt.parallel.choice import find_place
from prefopt.parallel.split import build_parts, deal, own_parts
from prefopt.parallel.strategy import Strategy
from prefopt.rollouts.share import Share
from prefopt.stopping import listening
from prefopt.streams import Budget

T = TypeVar("T")


class Thread:
    """A rank that is a thread."""

    def __init__(self, rank: int, world_size: int, barrier: threading.Barrier, board: list[Tensor]) -> None:
        self.rank, self.world_size, self._barrier, self._board = rank, world_size, barrier, board

    def gather(self, value: Tensor) -> list[Tensor]:
        self._board[self.rank] = value
        self._barrier.wait(30)
        found = list(self._board)
        self._barrier.wait(30)
        return found

    def sum(self, value: Tensor) -> Tensor:
        return torch.stack(self.gather(value)).sum(0)

    def max(self, value: Tensor) -> Tensor:
        return torch.stack(self.gather(value)).amax(0)


def on_ranks(world_size: int, action: Callable[[Communicator], T]) -> list[T]:
    """What `action` gives on each of so many ranks."""
    barrier, board = threading.Barrier(world_size), [torch.empty(0)] * world_size
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(lambda rank: action(Thread(rank, world_size, barrier, board)), range(world_size)))


sizes_of_rows = st.lists(st.integers(1, 90), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(sizes=sizes_of_rows, ranks=st.integers(1, 5), tokens=st.integers(20, 120))
def test_every_row_is_dealt_once_within_the_limit_and_evenly(sizes: list[int], ranks: int, tokens: int) -> None:
    dealt = deal(sizes, ranks, tokens=tokens)
    assert sorted(itertools.chain.from_iterable(itertools.chain.from_iterable(dealt))) == list(range(len(sizes)))
    assert len(dealt) == ranks
    assert len({len(parts) for parts in dealt}) == 1, "as many passes on every rank"
    for part in itertools.chain.from_iterable(dealt):
        assert part == sorted(part)
        assert sum(sizes[i] for i in part) <= tokens or len(part) == 1
    loads = [sum(sizes[i] for part in parts for i in part) for parts in dealt]
    assert max(loads) - min(loads) <= 2 * max(sizes) * max(1, math.log2(len(dealt[0]) + 1))
    assert deal(sizes, ranks, tokens=tokens) == dealt


@settings(max_examples=100, deadline=None)
@given(sizes=sizes_of_rows, ranks=st.integers(1, 5), rows=st.integers(1, 6))
def test_a_limit_in_rows_is_kept(sizes: list[int], ranks: int, rows: int) -> None:
    dealt = deal(sizes, ranks, tokens=1, rows=rows)
    assert len(dealt[0]) == math.ceil(len(sizes) / (ranks * rows))
    assert all(len(part) <= rows for parts in dealt for part in parts)
    assert sorted(i for parts in dealt for part in parts for i in part) == list(range(len(sizes)))


def test_dealing_by_hand() -> None:
    """Rows of 9, 8, 7, 6 tokens: {9, 6} and {8, 7}; at most 9 tokens a pass: 9 and 8 side by side, then 7 and 6."""
    assert deal([9, 8, 7, 6], 2, tokens=100) == [[[0, 3]], [[1, 2]]]
    assert deal([9, 8, 7, 6], 2, tokens=9) == [[[0], [2]], [[1], [3]]]
    assert deal([5], 3, tokens=9) == [[[0]], [[]], [[]]], "ranks without rows"


def examples(count: int) -> list[Example]:
    return [Example(f"row:{i}", (1,) * (i + 1), ((2, 3), (4,))) for i in range(count)]


def test_a_rank_without_rows_encodes_the_shortest_and_counts_none() -> None:
    rows = examples(2)

    def batches(communicator: Communicator) -> list[PackedBatch]:
        def build(part: Sequence[Example]) -> PackedBatch:
            return pack(part, roles=pair_roles, data={"soft_labels": torch.ones(len(part)), "reward_shift": torch.tensor(3.0)})

        return build_parts(own_parts(rows, Budget(), communicator), rows, build)

    (first,), (second,), (third,) = on_ranks(3, batches)
    assert {first.ids, second.ids} == {("row:0",), ("row:1",)}
    assert third.ids == ()
    assert third.tokens == rows[0].tokens
    found = third.tensors(
        ["chosen_mask", "soft_labels", "reward_shift", "policy_chosen_logps"], {"policy_token_logps": third.mask}
    )
    assert {name: list(value.shape) for name, value in found.items()} == {
        "chosen_mask": [0, 2], "soft_labels": [0], "reward_shift": [], "policy_chosen_logps": [0],
    }  # fmt: skip
    assert third.sizes["P"] == 0


def test_one_process_splits_as_ever() -> None:
    rows, budget = examples(9), Budget(micro_batch_tokens=20)
    assert own_parts(rows, budget, SingleProcess()) == budget.split(rows)


def test_groups_without_rows_keep_their_width() -> None:
    batch = pack(examples(1), roles=group_roles, data={"ranks": torch.tensor([[0, 1]])}).without_rows()
    assert {name: list(value.shape) for name, value in batch.tensors(["group_mask", "ranks"]).items()} == {
        "group_mask": [0, 2], "ranks": [0, 2],
    }  # fmt: skip


TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1234"}


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    ("strategy", "environment", "said"),
    [
        ("single", TORCHRUN, "WORLD_SIZE is 2.*Add --strategy ddp or --strategy fsdp2, or start prefopt without"),
        ("ddp", {}, "RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not in the environment: torchrun"),
        ("fsdp2", {"WORLD_SIZE": "1", "RANK": "0"}, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not in"),
        ("ddp", {**TORCHRUN, "ACCELERATE_USE_DEEPSPEED": "true"}, "configured for DEEPSPEED, which prefopt does not use"),
        ("ddp", {**TORCHRUN, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "FSDP version 2, but strategy is 'ddp'"),
        ("fsdp2", {**TORCHRUN, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP version 1"),
        ("ddp", {**TORCHRUN, "ACCELERATE_MIXED_PRECISION": "fp16"}, "configured for fp16"),
    ],
)
def test_what_was_started_must_be_what_was_asked(strategy: Any, environment: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        find_place(ParallelOptions(strategy), environment)


def test_places() -> None:
    assert find_place(ParallelOptions(), {}) is None
    assert find_place(ParallelOptions(), {"WORLD_SIZE": "1"}) is None
    place = find_place(ParallelOptions("fsdp2"), {**TORCHRUN, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"})
    assert place is not None
    assert (place.rank, place.world_size, place.address) == (1, 2, ("here", 1234))


@pytest.mark.parametrize("values", [{"strategy": "zero3"}, {"rank_timeout": 0.0}, {"rank_timeout": -1.0}])
def test_options_out_of_range(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        ParallelOptions(**values)


def test_commands_of_one_process_are_refused_under_a_launcher(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = cli("compare", "dpo")
    assert done.code == 2
    assert "prefopt compare is one process" in done.err
    done = cli("train", "dpo", "--output-dir", "nowhere")
    assert done.code == 2
    assert "WORLD_SIZE is 2" in done.err


def test_ranks_that_differ_are_told_so() -> None:
    def agree(communicator: Communicator) -> str:
        with pytest.raises(ConfigError) as caught:
            Strategy(communicator).agree({"seed": communicator.rank, "model": "m"}, "the options of the run")
        return str(caught.value)

    for said in on_ranks(2, agree):
        assert "the options of the run must be the same in all 2 processes, but rank 1 differs from rank 0 in seed" in said
    Strategy().agree({"seed": 3}, "the options")


def test_what_rank_0_does_is_known_to_all() -> None:
    calls = []

    def lead(communicator: Communicator) -> Any:
        return Strategy(communicator).lead(lambda: calls.append(communicator.rank) or [1, "a"])  # type: ignore[func-returns-value]

    assert on_ranks(3, lead) == [[1, "a"]] * 3
    assert calls == [0]
    assert (
        on_ranks(2, lambda communicator: gather_plain(communicator, {"rank": communicator.rank}))
        == [[{"rank": 0}, {"rank": 1}]] * 2
    )


def test_metrics_of_a_rank_that_has_none() -> None:
    """Rank 1 has no rows and knows no names; what rank 0 reports is the mean all the same, and one maximum over both."""

    def read(communicator: Communicator) -> dict[str, float]:
        meter = Meter()
        if communicator.rank == 0:
            meter.add("x", (torch.tensor([1.0, 3.0]), torch.ones(2)))
            meter.add("m", Max(torch.tensor([-2.0])))
        meter.add_value("loss", torch.tensor(4.0))
        return meter.read(communicator)

    assert on_ranks(2, read) == [{"x": 2.0, "loss": 4.0, "m": -2.0}] * 2


def test_a_checkpoint_holds_the_metrics_of_all_ranks() -> None:
    def collect(communicator: Communicator) -> tuple[Any, dict[str, float]]:
        meter = Meter()
        meter.add("x", (torch.tensor([float(communicator.rank)]), torch.ones(1)))
        meter.collect(communicator)
        return meter.state_dict(), meter.read(communicator)

    (state, read), (other, _) = on_ranks(2, collect)
    assert read == {"x": 0.5}
    assert [float(part) for part in state["sums"]["x"]] == [1.0, 2.0]
    assert other == {"sums": {}, "maxima": {}}


@pytest.mark.parametrize(("ranks", "groups", "per_group"), [(2, 5, 3), (3, 2, 2), (2, 4, 1), (4, 1, 2)])
def test_shared_rows_come_back_in_their_order(ranks: int, groups: int, per_group: int) -> None:
    """Also where a rank has none, and where widths differ."""
    rows = [torch.arange(i + 1.0) for i in range(groups * per_group)]
    supports = [torch.full((i + 1, 2), i, dtype=torch.uint8) for i in range(groups * per_group)]
    samples = [Sample(tuple(range(i + 1)), i % 2 == 0, supports[i]) for i in range(groups * per_group)]

    def join(communicator: Communicator) -> tuple[Tensor, list[Sample]]:
        share = Share(communicator, groups, per_group)
        own = share.own(rows)
        padded = torch.nn.utils.rnn.pad_sequence(own, batch_first=True) if own else torch.zeros(0, 0)
        return share.join(padded), share.join_samples(share.own(samples))

    for joined, found in on_ranks(ranks, join):
        assert torch.equal(joined, torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))
        assert [(sample.ids, sample.finished) for sample in found] == [(sample.ids, sample.finished) for sample in samples]
        assert all(torch.equal(one.support, other.support) for one, other in zip(found, samples, strict=True))  # type: ignore[arg-type]


def test_trees_travel_as_bytes() -> None:
    tree = {"a": [torch.arange(3), {"b": torch.tensor(2.5, dtype=torch.float64)}], "c": None, "d": [1, "x", True]}
    found = checkpoint.from_bytes(checkpoint.to_bytes(tree))
    assert torch.equal(found["a"][0], tree["a"][0])  # type: ignore[index]
    assert float(found["a"][1]["b"]) == 2.5
    assert (found["c"], found["d"]) == (None, [1, "x", True])
    state = checkpoint.generator_state()
    before = torch.rand(3)
    checkpoint.load_generator_state(checkpoint.from_bytes(checkpoint.to_bytes(state)))
    assert torch.equal(torch.rand(3), before)


def test_a_launchers_echo_of_a_signal_is_no_second_signal() -> None:
    """A terminal signals the launcher and its processes, and the launcher passes it on; without an echo the second ends all."""
    with listening(True, echo=5.0) as request:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert request.number == signal.SIGUSR1


def two_checkpoints(folder: Path) -> list[Path]:
    """After steps 1 and 2, each with parts of a [4] tensor in two files."""

    def parts(staged: Path) -> None:
        for index in range(2):
            save_file({f"part {index}": torch.arange(2.0) + index}, staged / f"shard-{index}.safetensors")

    return [checkpoint.save(folder, step, {"step": step}, write_shards=parts) for step in (1, 2)]


@pytest.mark.fault(6, 7)
@pytest.mark.parametrize("part", [0, 1])
def test_ranks_verify_shares_of_a_checkpoint_and_fall_back_together(part: int, tmp_path: Path) -> None:
    """Whoever finds the damage, all of them take the checkpoint before it and name the file."""
    _, newest = two_checkpoints(tmp_path)
    said: list[list[str]] = [[], []]

    def load(communicator: Communicator) -> int:
        found = checkpoint.load_latest(tmp_path, said[communicator.rank].append, communicator)
        assert found is not None
        return found[0]

    assert on_ranks(2, load) == [2, 2]
    assert said == [[], []]
    (newest / f"shard-{part}.safetensors").write_bytes(b"spoilt")
    assert on_ranks(2, load) == [1, 1]
    assert all(f"shard-{part}.safetensors is damaged" in lines[0] for lines in said)


def test_ranks_that_see_different_checkpoints_are_told(tmp_path: Path) -> None:
    """As on nodes whose folders are their own: nobody resumes from another step than the others."""
    for rank in range(2):
        two_checkpoints(tmp_path / str(rank))
    shutil.rmtree(tmp_path / "1" / "checkpoint-2")

    def load(communicator: Communicator) -> str:
        with pytest.raises(ConfigError) as caught:
            checkpoint.load_latest(tmp_path / str(communicator.rank), pytest.fail, communicator)
        return str(caught.value)

    told = on_ranks(2, load)
    assert all("(the newest, by rank: checkpoint-2, checkpoint-1)" in message for message in told)
