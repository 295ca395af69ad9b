"""Offline streams: the right rows in the right order, read when their step comes, with reference log-probs in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from prefopt.data.records import Example, Labels
from prefopt.errors import ConfigError, DataError
from prefopt.models.causal_lm import CausalLMPolicy, FrozenReference
from prefopt.models.fingerprint import fingerprint
from prefopt.packing import PackedBatch
from prefopt.reference import ReferenceCache
from prefopt.streams import Budget, OfflineStream, epoch_order

VOCABULARY = 23
MODES = ("ahead", "in-loop")


class Counting(FrozenReference):
    """Notes which examples reach the model."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        super().__init__(CausalLMPolicy(model, tokenizer=None), fingerprint(model))
        self.asked: list[str] = []

    def token_logps(self, batch: PackedBatch) -> Tensor:
        self.asked.extend(batch.ids)
        return super().token_logps(batch)


class Lazy(Sequence[Example]):
    """Makes its rows when they are read, one at a time, and notes which."""

    def __init__(self, count: int, k: int = 2) -> None:
        self.count, self.k = count, k
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.count:
            raise IndexError(index)
        self.read.append(index)
        generator = torch.Generator().manual_seed(index)
        lengths = torch.randint(1, 6, (self.k + 1,), generator=generator).tolist()
        ids = [tuple(torch.randint(0, VOCABULARY, (n,), generator=generator).tolist()) for n in lengths]
        return Example(f"row:{index}", ids[0], tuple(ids[1:]), Labels(ranks=tuple(range(self.k))))


def flat(steps: Sequence[list[PackedBatch]]) -> list[PackedBatch]:
    return [batch for step in steps for batch in step]


def names(count: int) -> list[str]:
    return sorted(f"row:{i}" for i in range(count))


@pytest.mark.fault(3)
def test_every_epoch_holds_every_row_once_and_steps_are_full() -> None:
    """10 rows, 25 asked for: 7 steps of 4 run over the end of epochs without a gap."""
    stream = OfflineStream(Lazy(10), kind="pairs", budget=Budget(batch_size=4, epochs=2.5, seed=3))
    ids = [name for step in stream for batch in step for name in batch.ids]
    assert len(ids) == 28 == 4 * stream.total_steps
    assert sorted(ids[:10]) == sorted(ids[10:20]) == names(10)
    assert ids[:10] == [f"row:{i}" for i in epoch_order(10, seed=3, epoch=0)]
    assert ids[:10] != ids[10:20]


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    assert epoch_order(50, 1, 0) == epoch_order(50, 1, 0)
    assert len({tuple(epoch_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_rows_are_read_when_their_step_comes() -> None:
    lazy = Lazy(1000)
    stream = OfflineStream(lazy, kind="pairs", budget=Budget(batch_size=4))
    steps = iter(stream)
    assert lazy.read == []
    next(steps)
    assert lazy.read == epoch_order(1000, 0, 0)[:4]


def test_only_rows_that_the_run_will_see_are_computed_ahead() -> None:
    lazy, reference = Lazy(1000), Counting()
    budget = Budget(batch_size=4, max_steps=3)
    stream = OfflineStream(lazy, kind="pairs", budget=budget, reference=ReferenceCache(reference))
    ahead = sorted(reference.asked)
    assert set(lazy.read) == set(epoch_order(1000, 0, 0)[:12])
    assert sorted(name for step in stream for batch in step for name in batch.ids) == ahead
    assert len(reference.asked) == 12


def test_in_the_loop_a_step_computes_its_own_rows_alone(tmp_path: Path) -> None:
    reference = Counting()
    cache = ReferenceCache(reference, tmp_path)
    budget = Budget(batch_size=4, epochs=2, reference_pass="in-loop")
    stream = OfflineStream(Lazy(12), kind="pairs", budget=budget, reference=cache)
    assert reference.asked == []
    for number, step in enumerate(stream, start=1):
        ids = [name for batch in step for name in batch.ids]
        if number <= 3:
            assert sorted(reference.asked[-4:]) == sorted(ids)
        assert len(reference.asked) == min(4 * number, 12)
        assert not list(tmp_path.rglob("*.safetensors")), "a file a step would be thousands of them"
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    again = Counting()
    same = list(OfflineStream(Lazy(12), kind="pairs", budget=budget, reference=ReferenceCache(again, tmp_path)))
    assert len(same) == 6
    assert again.asked == []


def test_a_run_that_stops_early_stores_what_it_computed(tmp_path: Path) -> None:
    budget = Budget(batch_size=4, reference_pass="in-loop")
    steps = iter(OfflineStream(Lazy(12), kind="pairs", budget=budget, reference=ReferenceCache(Counting(), tmp_path)))
    first = [name for batch in next(steps) for name in batch.ids]
    steps.close()  # type: ignore[attr-defined]
    again = Counting()
    list(OfflineStream(Lazy(12), kind="pairs", budget=budget, reference=ReferenceCache(again, tmp_path)))
    assert sorted(again.asked + first) == names(12)


@pytest.mark.parametrize("kind", ["pairs", "completions", "groups", "labelled"])
def test_both_ways_give_the_same_batches_at_the_same_cost(kind: str) -> None:
    """Values, rows and the ledger's tokens: when they are computed is nobody's business."""
    found = []
    for mode in MODES:
        cache = ReferenceCache(Counting(), micro_batch_tokens=30)
        budget = Budget(batch_size=4, micro_batch_size=2, max_steps=4, reference_pass=mode)
        needs = KTO if kind == "labelled" else frozenset[str]()
        stream = OfflineStream(Lazy(10), kind=kind, budget=budget, needs=needs, reference=cache)
        found.append((list(stream), cache.asked_tokens, cache.computed_tokens))
    (ahead, *costs), (in_loop, *other_costs) = found
    assert costs == other_costs
    for one, other in zip(flat(ahead), flat(in_loop), strict=True):
        assert one.ids == other.ids
        assert torch.equal(one.input_ids, other.input_ids)
        torch.testing.assert_close(one.rows["reference_token_logps"], other.rows["reference_token_logps"], atol=1e-5, rtol=0)
        assert bool((one.rows["reference_token_logps"][one.mask.bool()] < 0).all())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("done", [1, 4])
@pytest.mark.fault(3)
def test_a_resumed_stream_goes_on_exactly_and_costs_what_the_whole_costs(mode: Any, done: int) -> None:
    """Step 4 lies in the second epoch."""
    budget = Budget(batch_size=4, epochs=2, reference_pass=mode)

    def build() -> tuple[OfflineStream, ReferenceCache]:
        cache = ReferenceCache(Counting())
        return OfflineStream(Lazy(10), kind="pairs", budget=budget, reference=cache), cache

    whole, cache = build()
    steps = list(whole)
    first, _ = build()
    reached = iter(first)
    for _ in range(done):
        next(reached)
    second, own = build()
    second.load_state_dict(first.state_dict())
    rest = list(second)
    assert [b.ids for b in flat(rest)] == [b.ids for b in flat(steps[done:])]
    for one, other in zip(flat(rest), flat(steps[done:]), strict=True):
        assert torch.equal(one.rows["reference_token_logps"], other.rows["reference_token_logps"])
    assert own.asked_tokens == cache.asked_tokens == sum(example.tokens for example in Lazy(10))


def test_completions_are_the_best_of_each_row() -> None:
    rows = list(Lazy(6, k=3))
    stream = OfflineStream(rows, kind="completions", budget=Budget(batch_size=6))
    ((batch,),) = list(stream)
    by_id = {example.id: example for example in rows}
    wanted = [by_id[name].prompt_ids + by_id[name].completion_ids[0] for name in batch.ids]
    assert batch.input_ids.tolist() == [token for ids in wanted for token in ids]
    assert "ranks" not in batch.data


def one_step(rows: Sequence[Example], kind: str, **options: Any) -> tuple[PackedBatch, list[Example]]:
    """All rows in one batch, and the rows in the batch's order."""
    ((batch,),) = list(OfflineStream(rows, kind=kind, budget=Budget(batch_size=len(rows), micro_batch_tokens=10**6), **options))
    by_id = {row.id: row for row in rows}
    return batch, [by_id[name] for name in batch.ids]


def completions_of(batch: PackedBatch) -> list[tuple[int, ...]]:
    """Row by row."""
    table = batch.scatter_tokens(batch.targets.double()).long()
    return [tuple(row[:n].tolist()) for row, n in zip(table, batch.mask.sum(-1).long().tolist(), strict=True)]


@pytest.mark.parametrize("ranks", [(0, 1), (1, 0), None])
def test_pairs_as_labelled_rows(ranks: tuple[int, int] | None) -> None:
    """The prompt stands once, both completions are rows in the order of the pair losses, and the better one is desirable."""
    rows = [replace(row, labels=Labels(ranks=ranks)) for row in Lazy(6)]
    batch, ordered = one_step(rows, "labelled")
    as_pairs, _ = one_step(rows, "pairs")
    assert (batch.ids, batch.input_ids.tolist()) == (as_pairs.ids, as_pairs.input_ids.tolist())
    assert completions_of(batch) == [completion for row in ordered for completion in row.completion_ids]
    assert batch.data["desirable"].tolist() == [ranks != (1, 0), ranks == (1, 0)] * 6
    assert batch.sizes["N"] == 12


def test_labelled_rows_of_their_own_and_of_lists() -> None:
    """A single completion has its label; of five the two or three better ones are desirable (rank < K/2)."""
    single = [replace(row, labels=Labels(desirable=bool(i % 3))) for i, row in enumerate(Lazy(5, k=1))]
    batch, ordered = one_step(single, "labelled")
    assert batch.data["desirable"].tolist() == [row.labels.desirable for row in ordered]
    lists = [replace(row, labels=Labels(ranks=(4, 0, 2, 1, 3))) for row in Lazy(3, k=5)]
    assert one_step(lists, "labelled")[0].data["desirable"].tolist() == [False, True, True, True, False] * 3
    with pytest.raises(DataError, match=r"row:\d: expected a label for its single completion"):
        one_step([replace(row, labels=Labels()) for row in single], "labelled")
    with pytest.raises(DataError, match=r"row:\d: expected at least two completions in an order, got 5 without one"):
        one_step([replace(row, labels=Labels()) for row in lists], "labelled")


def test_lists_of_different_lengths_in_one_batch() -> None:
    """Ranks of missing completions go on behind the valid ones; a pair without ranks is a list of two, best first."""
    rows = [*list(Lazy(2, k=4))[:1], replace(Lazy(2)[1], labels=Labels())]
    batch, ordered = one_step(rows, "groups")
    first = [row.id for row in ordered].index("row:0")
    found = batch.tensors({"group_mask", "ranks", "group_lengths"})
    assert found["group_mask"][first].tolist() == [1, 1, 1, 1]
    assert found["group_mask"][1 - first].tolist() == [1, 1, 0, 0]
    assert found["ranks"].tolist() == [[0, 1, 2, 3]] * 2
    assert found["group_lengths"][1 - first].tolist() == [*map(len, rows[1].completion_ids), 0, 0]
    with pytest.raises(DataError, match="got 1 without one; add ranks"):
        one_step(list(Lazy(2, k=1)), "groups")


def test_lists_bring_the_utility_of_their_prompt() -> None:
    """All rows or none; the tensor follows the step's order."""
    rows = [replace(row, labels=replace(row.labels, utility_id=index % 2)) for index, row in enumerate(Lazy(3, k=4))]
    batch, ordered = one_step(rows, "groups")
    assert batch.data["utility_ids"].tolist() == [row.labels.utility_id for row in ordered]
    assert "utility_ids" not in one_step(list(Lazy(3, k=4)), "groups")[0].data
    with pytest.raises(DataError, match="row:1 has no utility_id, but other rows have one"):
        one_step([rows[0], Lazy(2, k=4)[1]], "groups")


KTO = frozenset({"policy_mismatched_logps", "desirable"})


def test_mismatched_completions_are_those_of_the_next_other_prompt() -> None:
    """Rows 0 to 5, of which 2 and 3 share a prompt: 2 passes over 3, the last row starts again at the first, and rows take
    turns in which completion they get."""
    rows = list(Lazy(6))
    rows[3] = replace(rows[3], prompt_ids=rows[2].prompt_ids)
    batch, ordered = one_step(rows, "labelled", needs=KTO)
    partner = {0: 1, 1: 2, 2: 4, 3: 4, 4: 5, 5: 0}
    numbers = [rows.index(row) for row in ordered]
    wanted = [rows[partner[i]].completion_ids[i % 2] for i in numbers]
    every = completions_of(batch)
    assert [every[i] for i in batch.roles["mismatched_"].tolist()] == wanted
    assert [every[i] for i in batch.roles[""].tolist()] == [completion for row in ordered for completion in row.completion_ids]
    assert batch.data["desirable"].tolist() == [True, False] * 6
    assert (batch.sizes["N"], batch.sizes["M"]) == (12, 6)
    assert one_step(rows, "labelled")[0].sizes.keys() == {"N", "T"}


def test_mismatched_completions_of_single_rows() -> None:
    rows = [replace(row, labels=Labels(desirable=bool(i % 2))) for i, row in enumerate(Lazy(4, k=1))]
    batch, ordered = one_step(rows, "labelled", needs=KTO)
    every = completions_of(batch)
    wanted = [rows[(rows.index(row) + 1) % 4].completion_ids[0] for row in ordered]
    assert [every[i] for i in batch.roles["mismatched_"].tolist()] == wanted
    assert batch.data["desirable"].tolist() == [row.labels.desirable for row in ordered]


def test_a_mismatched_completion_costs_one_row_more_and_one_reference_pass() -> None:
    """Of 1000 rows a step of 4 reads 8; later epochs ask the reference nothing new."""
    lazy = Lazy(1000)
    next(iter(OfflineStream(lazy, kind="labelled", budget=Budget(batch_size=4), needs=KTO)))
    assert len(lazy.read) == 8
    reference = Counting()
    budget = Budget(batch_size=4, epochs=3)
    stream = OfflineStream(Lazy(8), kind="labelled", budget=budget, needs=KTO, reference=ReferenceCache(reference))
    assert len(reference.asked) == 8
    for step in stream:
        for batch in step:
            found = batch.tensors({"reference_mismatched_logps"})["reference_mismatched_logps"]
            torch.testing.assert_close(found, reference.token_logps(batch)[batch.roles["mismatched_"]].sum(-1))
    assert len(reference.asked) == 8 + 3 * 8


def test_one_prompt_has_no_mismatched_completions() -> None:
    rows = [replace(row, prompt_ids=(1, 2)) for row in Lazy(4)]
    with pytest.raises(DataError, match="all 4 rows have the same prompt"):
        one_step(rows, "labelled", needs=KTO)


def test_micro_batches_split_a_step_without_changing_it() -> None:
    whole = list(OfflineStream(Lazy(12), kind="pairs", budget=Budget(batch_size=6)))
    for budget in (Budget(batch_size=6, micro_batch_size=4), Budget(batch_size=6, micro_batch_tokens=25)):
        split = list(OfflineStream(Lazy(12), kind="pairs", budget=budget))
        assert all(len(step) > 1 for step in split)
        for one, parts in zip(whole, split, strict=True):
            assert one[0].ids == tuple(name for part in parts for name in part.ids)
            assert torch.equal(one[0].input_ids, torch.cat([part.input_ids for part in parts]))


def test_labels_are_of_all_rows_or_of_none() -> None:
    rows = list(Lazy(4))
    some = [replace(rows[0], labels=replace(rows[0].labels, margin=0.5)), *rows[1:]]
    with pytest.raises(DataError, match="has no margin, but other rows have one"):
        list(OfflineStream(some, kind="pairs", budget=Budget(batch_size=4)))
    every = [replace(row, labels=replace(row.labels, margin=float(i))) for i, row in enumerate(rows)]
    ((batch,),) = list(OfflineStream(every, kind="pairs", budget=Budget(batch_size=4)))
    assert batch.data["margins"].tolist() == [float(name.removeprefix("row:")) for name in batch.ids]


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(DataError, match="the data set is empty"):
        OfflineStream(Lazy(0), kind="pairs", budget=Budget())


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"micro_batch_tokens": 0},
        {"epochs": 0.0},
        {"max_steps": -1},
        {"micro_batch_size": -1},
        {"reference_pass": "later"},
    ],
)
def test_budgets_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Budget(**wrong)


@pytest.mark.parametrize(
    ("budget", "steps"),
    [
        (Budget(batch_size=4), 3),
        (Budget(batch_size=4, epochs=0.5), 2),
        (Budget(batch_size=4, epochs=0.01), 1),
        (Budget(batch_size=4, max_steps=2), 2),
        (Budget(batch_size=4, max_steps=99), 3),
    ],
)
def test_steps_follow_from_epochs_and_their_limit(budget: Budget, steps: int) -> None:
    """Of 10 rows."""
    assert budget.steps(10) == steps
