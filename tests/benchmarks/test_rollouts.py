"""The comparison of sampling on a tiny model: equal numbers of tokens, turns in both orders, ratios of the same round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import rollouts
from benchmarks.rollouts import Turns, Workload, compare, own_sampler, pad_left, peer_sampler, table_of
from benchmarks.workloads import random_llama
from prefopt.models.causal_lm import CausalLMPolicy

PROMPTS = [(1, 2, 3), (4,), (5, 6, 7, 8), (9, 1)]


@pytest.fixture(scope="module")
def policy() -> CausalLMPolicy:
    return CausalLMPolicy(random_llama(16, 24, 1, 2, 1, 40), None)


@pytest.mark.parametrize("samples", [1, 3])
def test_both_sides_make_every_token(policy: CausalLMPolicy, samples: int) -> None:
    """EOS (id 2 in this configuration) is drawn often from 40 tokens in 60 draws, and ends nothing."""
    assert policy.base.config.eos_token_id == 2
    workload = Workload("small", PROMPTS, samples, 60)
    assert own_sampler(policy, workload, rows=8)() == 4 * samples * 60
    assert peer_sampler(policy, workload, batch=3)() == 4 * samples * 60


def test_the_peer_sees_left_padded_prompts() -> None:
    ids, mask = pad_left([(7, 8), (9,)])
    assert ids.tolist() == [[7, 8], [0, 9]]
    assert mask.tolist() == [[1, 1], [0, 1]]


def test_sides_take_turns_in_both_orders() -> None:
    """A warm-up of both, then two rounds, each side first in one of them."""
    called: list[str] = []

    def side(name: str) -> Any:
        return lambda: called.append(name) or 6

    turns = compare(side("own"), side("peer"), Workload("w", [(1,)], 2, 3), rounds=2, device="cpu", calibration=0.0)
    assert len(called) == 6
    assert {tuple(called[2:4]), tuple(called[4:6])} == {("own", "peer"), ("peer", "own")}
    assert len(turns.own) == len(turns.peer) == len(turns.matmul) == len(turns.disturbed) == 2


def test_another_number_of_tokens_ends_the_comparison() -> None:
    with pytest.raises(SystemExit, match="made 5 tokens instead of 6"):
        compare(lambda: 6, lambda: 5, Workload("w", [(1,)], 2, 3), rounds=1, device="cpu", calibration=0.0)


def test_disturbed_rounds_are_dropped_and_counted() -> None:
    """Ratios of kept rounds: 4/2 and 9/3; the disturbed one would have been 100."""
    turns = Turns(own=[2.0, 1.0, 3.0], peer=[4.0, 100.0, 9.0], matmul=[1.0, 1.0, 1.0], disturbed=[False, True, False])
    (row,) = table_of([(Workload("w", [(1,)], 1, 12), "64 rows", "batch 8", turns)]).rows
    assert (row["rounds"], row["dropped"]) == (2, 1)
    assert (row["ratio"].low, row["ratio"].median, row["ratio"].high) == (2.0, 2.5, 3.0)
    assert row["tokens_per_s"].high == 6.0
    assert row["peer_tokens_per_s"].low == pytest.approx(12 / 9)


def test_both_workloads_are_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(rollouts.SHAPES, "small", (16, 24, 1, 2, 1, 40, True))
    threads = torch.get_num_threads()
    rollouts.main([
        "--shape", "small", "--device", "cpu", "--prompts", "4", "--samples", "2", "--new-tokens", "3", "--rounds", "1",
        "--calibration", "0.01", "--json", str(tmp_path / "r.json"),
    ])  # fmt: skip
    assert torch.get_num_threads() == threads
    written = json.loads((tmp_path / "r.json").read_text())
    rows = written["tables"][0]["rows"]
    assert [(row["workload"], row["transformers"]) for row in rows] == [
        ("4 distinct prompts", "8 rows"),
        ("2 prompts, 2 samples of each", "8 rows"),
        ("2 prompts, 2 samples of each", "16 rows"),
    ]
    assert [row["new_tokens"] for row in rows] == [12, 12, 12]
    assert all(len(rounds["own"]) == 1 for rounds in written["rounds"].values())
