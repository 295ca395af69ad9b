"""The cache of reference log-probs: right values, asked for once, shared by everything that has the same content."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prefopt import reference as reference_module
from prefopt.data.records import Example
from prefopt.errors import ConfigError, OutputError
from prefopt.models.causal_lm import CausalLMPolicy, FrozenReference, build_policy
from prefopt.models.fingerprint import fingerprint
from prefopt.models.lora import LoRA
from prefopt.optimization import Optimization, build_optimizer
from prefopt.packing import PackedBatch, pack, pair_roles
from prefopt.reference import ReferenceCache, StartReference, completion_keys
from prefopt.shards import UNKNOWN, Index, Shard

VOCABULARY = 23


def build_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


class Counting(FrozenReference):
    """Notes which examples reach the model."""

    def __init__(self, policy: CausalLMPolicy, weights: str) -> None:
        super().__init__(policy, weights)
        self.asked: list[str] = []

    def token_logps(self, batch: PackedBatch) -> Tensor:
        self.asked.extend(batch.ids)
        return super().token_logps(batch)


def counting(seed: int = 0, dtype: torch.dtype = torch.float32) -> Counting:
    model = build_model(seed, dtype)
    return Counting(CausalLMPolicy(model, tokenizer=None), fingerprint(model))


def pairs(count: int, seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)

    def ids(longest: int) -> tuple[int, ...]:
        length = int(torch.randint(1, longest + 1, (), generator=generator))
        return tuple(torch.randint(0, VOCABULARY, (length,), generator=generator).tolist())

    return [Example(f"rows:{seed}.{i}", ids(20), (ids(9), ids(9))) for i in range(count)]


def by_hand(model: transformers.PreTrainedModel, examples: list[Example]) -> list[Tensor]:
    found = []
    for example in examples:
        for completion in example.completion_ids:
            with torch.no_grad():
                logps = model(input_ids=torch.tensor([[*example.prompt_ids, *completion]])).logits[0].log_softmax(-1)
            start = len(example.prompt_ids) - 1
            found.append(logps[start : start + len(completion)].gather(-1, torch.tensor(completion).unsqueeze(-1)).squeeze(-1))
    return found


def assert_close(got: list[Tensor], wanted: list[Tensor], atol: float) -> None:
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=0)


@pytest.mark.parametrize("budget", [1, 60, 100_000])
def test_values_do_not_depend_on_batching(budget: int) -> None:
    """Alone, a few together or all at once, in row order: what transformers gives for each row on its own."""
    examples = pairs(12)
    cache = ReferenceCache(counting(), micro_batch_tokens=budget)
    assert_close(cache.rows(examples), by_hand(build_model(), examples), 1e-5)
    assert cache.computed_tokens == sum(example.tokens for example in examples)


def test_what_is_known_does_not_reach_the_model() -> None:
    reference = counting()
    cache = ReferenceCache(reference)
    examples = pairs(8)
    first = cache.rows(examples[:5])
    assert sorted(reference.asked) == sorted(e.id for e in examples[:5])
    again = cache.rows(examples[4::-1])
    assert len(reference.asked) == 5
    for one, other in zip(again[:2], first[8:], strict=True):
        assert torch.equal(one, other)
    # Other ids, other pairing of the same completions: content decides, not the name of the row.
    renamed = Example("elsewhere:1", examples[0].prompt_ids, examples[0].completion_ids[::-1])
    assert torch.equal(cache.rows([renamed])[1], first[0])
    assert len(reference.asked) == 5
    # A row that stands twice among the missing is computed once.
    cache.rows([examples[6], examples[6], examples[1]])
    assert reference.asked[5:] == [examples[6].id]


def test_prompt_and_completion_are_kept_apart() -> None:
    """The same tokens split elsewhere, or digits that run together, are other entries."""
    cache = ReferenceCache(counting())
    one, other = Example("a", (1, 2), ((3,),)), Example("b", (1,), ((2, 3),))
    digits, more = Example("c", (1,), ((12,),)), Example("d", (1,), ((1, 2),))
    assert [len(row) for row in cache.rows([one, other, digits, more])] == [1, 2, 1, 2]


def test_entries_survive_on_disk(tmp_path: Path) -> None:
    examples = pairs(10)
    first = ReferenceCache(counting(), tmp_path)
    rows = first.rows(examples[:4]) + first.rows(examples[4:])
    reference = counting()
    second = ReferenceCache(reference, tmp_path)
    for one, other in zip(rows, second.rows(examples[:4]) + second.rows(examples[4:]), strict=True):
        assert torch.equal(one, other)
    second.rows(examples[:3])
    assert reference.asked == []
    assert second.computed_tokens == 0
    assert second.asked_tokens == first.asked_tokens == first.computed_tokens
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in shards(tmp_path)), "readable by those who share the cache"


def test_other_weights_or_dtype_are_other_entries(tmp_path: Path) -> None:
    examples = pairs(3)
    ReferenceCache(counting(), tmp_path).rows(examples)
    for seed, dtype in ((1, torch.float32), (0, torch.float64)):
        reference = counting(seed, dtype)
        got = ReferenceCache(reference, tmp_path).rows(examples)
        assert len(reference.asked) == 3
        assert_close(got, by_hand(build_model(seed, dtype), examples), 1e-5)
        assert got[0].dtype == dtype
    assert len(list(tmp_path.iterdir())) == 3
    one_weight = build_model()
    with torch.no_grad():
        one_weight.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-6
    assert fingerprint(one_weight) != fingerprint(build_model())


def test_trained_adapters_leave_reference_and_key_alone(tmp_path: Path) -> None:
    """The reference of a LoRA policy is the policy with adapters off: the same entries as a full model's reference."""
    examples = pairs(6)
    ReferenceCache(counting(), tmp_path).rows(examples)
    policy, reference = build_policy(build_model(), None, lora=LoRA(r=4, alpha=8))
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert reference.weights == fingerprint(build_model())
    told: list[tuple[int, int]] = []
    cache = ReferenceCache(reference, tmp_path, on_progress=lambda done, of: told.append((done, of)))
    assert_close(cache.rows(examples), by_hand(build_model(), examples), 1e-5)
    assert told == [], "all rows were already there under the same key"


def test_a_policy_that_trains_leaves_its_frozen_reference_alone() -> None:
    examples = pairs(4)
    policy, reference = build_policy(build_model(), None)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1)
    rows = ReferenceCache(reference).rows(examples)
    assert_close(rows, by_hand(build_model(), examples), 1e-5)
    assert not any(row.requires_grad for row in rows)


def test_writers_side_by_side_lose_nothing(tmp_path: Path) -> None:
    """Two threads with a cache each, overlapping rows in many small files; a third reader finds all, and no scratch file."""
    examples = pairs(30)
    caches = [ReferenceCache(counting(), tmp_path) for _ in range(2)]
    failures: list[BaseException] = []

    def work(cache: ReferenceCache, order: list[Example]) -> None:
        try:
            for i in range(0, len(order), 3):
                cache.rows(order[i : i + 3])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=given) for given in zip(caches, (examples[:20], examples[10:]), strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    reference = counting()
    for order in (examples[:20], examples[10:]):
        reader = ReferenceCache(reference, tmp_path)
        rows = [row for i in range(0, len(order), 3) for row in reader.rows(order[i : i + 3])]
        assert_close(rows, by_hand(build_model(), order), 1e-5)
    assert reference.asked == []
    assert not list(tmp_path.rglob(".tmp-*"))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def replace_by_noise(path: Path) -> None:
    path.write_bytes(b"noise")


def take_from_another_reference(path: Path) -> None:
    other = path.parent.parent / "other"
    ReferenceCache(counting(seed=1), other).rows(pairs(10))
    os.replace(shards(other)[0], path)


def take_from_another_reference_with_its_name(path: Path) -> None:
    other = path.parent.parent / "other"
    ReferenceCache(counting(seed=1), other).rows(pairs(10))
    os.replace(shards(other)[0], path.with_name(shards(other)[0].name))
    path.unlink()


@pytest.mark.parametrize(
    "harm", [flip, cut, replace_by_noise, take_from_another_reference, take_from_another_reference_with_its_name]
)
def test_a_bad_shard_is_set_aside_and_its_rows_are_computed_again(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    """safetensors loads a file with a flipped byte silently; a wrong reference would be trained against without a word."""
    good, bad = pairs(4, seed=1), pairs(10)
    ReferenceCache(counting(), tmp_path).rows(good)
    (kept,) = shards(tmp_path)
    ReferenceCache(counting(), tmp_path).rows(bad)
    (path,) = set(shards(tmp_path)) - {kept}
    harm(path)
    reference = counting()
    with pytest.warns(UserWarning, match="damaged part of the cache of reference log-probs"):
        cache = ReferenceCache(reference, tmp_path)
    assert_close(cache.rows(good) + cache.rows(bad), by_hand(build_model(), good + bad), 1e-5)
    assert sorted(reference.asked) == sorted(example.id for example in bad)
    assert len(list(path.parent.glob("*.damaged"))) == 1
    again = counting()
    for rows in (good, bad):
        ReferenceCache(again, tmp_path).rows(rows)
    assert again.asked == []


@given(st.permutations(range(12)), st.integers(0, 12), st.integers(0, 11))
@settings(max_examples=20, deadline=None)
def test_what_others_left_in_the_cache_does_not_change_a_bit(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], others: int, begin: int
) -> None:
    """Rows that stand in overlapping passes have other last bits in each; a run reads those of its own pass."""
    examples = pairs(12)
    wanted = ReferenceCache(counting(), micro_batch_tokens=60)
    wanted.prepare(examples)
    folder = tmp_path_factory.mktemp("cache")
    ReferenceCache(counting(), folder, micro_batch_tokens=60).prepare(examples, order[:others])
    ReferenceCache(counting(), folder, micro_batch_tokens=60).rows(examples[begin : begin + 1])
    cache = ReferenceCache(counting(), folder, micro_batch_tokens=60)
    cache.prepare(examples, order)
    for one, other in zip(cache.rows(examples), wanted.rows(examples), strict=True):
        assert torch.equal(one, other)


class Breaking(Counting):
    """Fails after some calls."""

    calls = 3

    def token_logps(self, batch: PackedBatch) -> Tensor:
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return super().token_logps(batch)


def test_an_interrupted_pass_keeps_what_it_has(tmp_path: Path) -> None:
    examples = pairs(12)
    model = build_model()
    broken = Breaking(CausalLMPolicy(model, tokenizer=None), fingerprint(model))
    with pytest.raises(KeyboardInterrupt):
        ReferenceCache(broken, tmp_path, micro_batch_tokens=60).prepare(examples)
    assert 3 <= len(broken.asked) < 12
    reference = counting()
    ReferenceCache(reference, tmp_path, micro_batch_tokens=60).prepare(examples)
    assert sorted(broken.asked + reference.asked) == sorted(example.id for example in examples)


@pytest.mark.parametrize("what", ["STORE_VALUES", "STORE_SECONDS"])
def test_a_pass_stores_as_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """A killed process has lost little, and a long pass holds little: here every part of two examples or so is stored."""
    monkeypatch.setattr(reference_module, what, 0)
    examples = pairs(12)
    found: list[int] = []
    cache = ReferenceCache(
        counting(), tmp_path, micro_batch_tokens=60, on_progress=lambda done, total: found.append(len(shards(tmp_path)))
    )
    cache.prepare(examples)
    assert found == list(range(len(found)))
    assert len(found) > 4
    assert_close(cache.rows(examples), by_hand(build_model(), examples), 1e-5)


def test_small_calls_wait_for_a_shard(tmp_path: Path) -> None:
    """With store=False nothing is written for each call, values are the same, and `store` writes all at once."""
    examples = pairs(9)
    reference = counting()
    cache = ReferenceCache(reference, tmp_path)
    rows = [row for i in range(0, 9, 3) for row in cache.rows(examples[i : i + 3], store=False)]
    assert_close(rows, by_hand(build_model(), examples), 1e-5)
    assert shards(tmp_path) == []
    cache.rows(examples[2:5], store=False)
    assert len(reference.asked) == 9
    cache.store()
    cache.store()
    assert len(shards(tmp_path)) == 1
    for one, other in zip(rows, cache.rows(examples), strict=True):
        assert torch.equal(one, other)


def test_longest_rows_are_computed_first_in_parts_of_similar_length() -> None:
    examples = pairs(20)
    reference = counting()
    ReferenceCache(reference, micro_batch_tokens=80).prepare(examples)
    tokens = {example.id: example.tokens for example in examples}
    lengths = [tokens[name] for name in reference.asked]
    assert lengths == sorted(lengths, reverse=True)


class Lazy(Sequence[Example]):
    """Makes its rows when they are read, and notes which."""

    def __init__(self, examples: list[Example]) -> None:
        self.examples = examples
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        self.read.append(index)
        return copy.copy(self.examples[index])


def test_a_pass_over_chosen_indices_reads_nothing_else() -> None:
    examples = pairs(30)
    lazy, reference = Lazy(examples), counting()
    cache = ReferenceCache(reference)
    cache.prepare(lazy, [7, 3, 21, 3])
    assert set(lazy.read) == {3, 7, 21}
    assert sorted(reference.asked) == sorted(examples[i].id for i in (3, 7, 21))
    assert cache.asked_tokens == sum(examples[i].tokens for i in (3, 7, 21))


def test_passes_side_by_side_share_the_work(tmp_path: Path) -> None:
    """Two caches, as in two processes, start the same long pass at once: every row is computed by one of them, neither
    does all, and both have all."""
    examples = pairs(200)
    references = [counting(), counting()]
    told: list[tuple[int, int]] = []
    caches = [
        ReferenceCache(reference, tmp_path, micro_batch_tokens=40, on_progress=lambda *now: told.append(now))
        for reference in references
    ]
    barrier = threading.Barrier(2)

    def work(cache: ReferenceCache) -> None:
        barrier.wait()
        cache.prepare(examples)

    threads = [threading.Thread(target=work, args=(cache,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(references[0].asked + references[1].asked) == sorted(example.id for example in examples)
    assert all(0 < len(reference.asked) < 200 for reference in references)
    assert told.count((200, 200)) == 2, "both bars come to their end, though neither computed all"
    for one, other in zip(caches[0].rows(examples), caches[1].rows(examples), strict=True):
        assert torch.equal(one, other)
    assert caches[0].asked_tokens == caches[1].asked_tokens == sum(example.tokens for example in examples)


def test_rows_that_others_stored_meanwhile_are_not_computed_again(tmp_path: Path) -> None:
    examples = pairs(6)
    reference = counting()
    cache = ReferenceCache(reference, tmp_path)
    ReferenceCache(counting(), tmp_path).rows(examples)
    assert_close(cache.rows(examples), by_hand(build_model(), examples), 1e-5)
    assert reference.asked == []
    assert cache.asked_tokens == sum(example.tokens for example in examples)


def test_a_folder_that_cannot_be_written_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="PREFOPT_CACHE"):
        ReferenceCache(counting(), tmp_path / "file").rows(pairs(2))


IDS = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@given(IDS, IDS, IDS, IDS)
def test_keys_are_equal_only_for_equal_ids(
    prompt: tuple[int, ...], ids: tuple[int, ...], other_prompt: tuple[int, ...], other_ids: tuple[int, ...]
) -> None:
    keys = completion_keys(Example("a", prompt, (ids, other_ids)))
    assert (keys[0] == keys[1]) == (ids == other_ids)
    same = (prompt, ids) == (other_prompt, other_ids)
    assert (completion_keys(Example("b", other_prompt, (other_ids,)))[0] == keys[0]) == same


@given(st.lists(st.binary(min_size=1, max_size=2), min_size=1, unique_by=lambda ends: ends.ljust(2, b"\0")), st.integers(1, 5))
def test_the_index_finds_every_row_and_no_other(ends: list[bytes], size: int) -> None:
    """Keys that end in zero bytes, which numpy's byte strings do not show, included; shards come in any number."""
    keys = [end.ljust(2, b"\0").rjust(32, b"\7") for end in ends]
    index = Index()
    for begin in range(0, len(keys), size):
        own = keys[begin : begin + size]
        lengths = np.arange(len(own)) + 1
        values = torch.cat([torch.full((n,), float(begin + i)) for i, n in enumerate(lengths.tolist())])
        index.add([Shard(np.frombuffer(b"".join(own), dtype=np.uint8).reshape(-1, 32), lengths, values)])
    for i, place in enumerate(index.find(keys).tolist()):
        assert index.values(place).tolist() == [float(i)] * (i % size + 1)
    others = [key[:-1] + bytes([key[-1] ^ 1]) for key in keys]
    assert [place == UNKNOWN for place in index.find(others).tolist()] == [key not in keys for key in others]


def test_a_start_reference_is_the_policy_before_its_first_update() -> None:
    """The same entries under the same key as a frozen copy's; afterwards only what is known, never a changed weight's."""
    examples = pairs(6)
    policy = CausalLMPolicy(build_model(), tokenizer=None)
    reference = StartReference(policy)
    cache = ReferenceCache(reference)
    wanted = cache.rows(examples[:4])
    assert_close(wanted, by_hand(build_model(), examples[:4]), 1e-5)
    assert reference.weights == build_policy(build_model(), None)[1].weights
    policy.evaluate(pack(examples, roles=pair_roles), ["policy_chosen_logps"])["policy_chosen_logps"].sum().backward()
    cache.rows(examples[4:5])
    build_optimizer(policy, Optimization()).step()
    for one, other in zip(cache.rows(examples[:4]), wanted, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ConfigError, match="before the policy's first update"):
        cache.rows(examples[5:])
    with pytest.raises(ConfigError, match="before the policy's first update"):
        reference.hidden(pack(examples, roles=pair_roles))
    with pytest.raises(ConfigError, match="full fine-tuning"):
        StartReference(CausalLMPolicy(build_model(), tokenizer=None, lora=LoRA(r=2)))


def test_fingerprints_follow_content_alone() -> None:
    """Neither threads nor strides matter; one bit in the second 4 MB piece of a weight does."""
    config = transformers.LlamaConfig(
        vocab_size=50_000, hidden_size=24, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    found = fingerprint(model)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert fingerprint(model) == found
    finally:
        torch.set_num_threads(threads)
    weight = model.lm_head.weight
    weight.data = weight.data.t().contiguous().t()
    assert fingerprint(model) == found
    with torch.no_grad():
        weight[-1, -1] += 1e-3
    assert fingerprint(model) != found


WRITER = """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import test_reference as t
    cache = t.ReferenceCache(t.counting(), Path({folder!r}))
    for example in t.pairs(40)[::{step}]:
        cache.rows([example])
"""


@pytest.mark.slow
def test_two_processes_write_the_same_cache(tmp_path: Path) -> None:
    codes = [
        textwrap.dedent(WRITER).format(tests=str(Path(__file__).parent), folder=str(tmp_path), step=step) for step in (1, -1)
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=environment) for code in codes]
    assert [process.wait() for process in processes] == [0, 0]
    reference = counting()
    cache = ReferenceCache(reference, tmp_path)
    assert_close([row for example in pairs(40) for row in cache.rows([example])], by_hand(build_model(), pairs(40)), 1e-5)
    assert reference.asked == []
