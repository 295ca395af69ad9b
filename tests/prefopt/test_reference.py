"""The cache of reference log-probs: right values, asked for once, shared by everything that has the same content."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from prefopt.data.records import Example
from prefopt.models.causal_lm import CausalLMPolicy, FrozenReference, LoRA, build_policy, fingerprint
from prefopt.packing import PackedBatch
from prefopt.reference import ReferenceCache

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
    for one, other in zip(rows, second.rows(examples), strict=True):
        assert torch.equal(one, other)
    second.rows(examples[:3])
    assert reference.asked == []
    assert second.computed_tokens == 0
    assert second.asked_tokens == first.asked_tokens == first.computed_tokens


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
    ReferenceCache(counting(), tmp_path).rows(examples[:3])
    policy, reference = build_policy(build_model(), None, lora=LoRA(r=4, alpha=8))
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert reference.weights == fingerprint(build_model())
    told: list[tuple[int, int]] = []
    cache = ReferenceCache(reference, tmp_path, on_progress=lambda done, of: told.append((done, of)))
    assert_close(cache.rows(examples), by_hand(build_model(), examples), 1e-5)
    assert told[-1] == (3, 3), "three rows were already there under the same key"


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
    assert_close(ReferenceCache(reference, tmp_path).rows(examples), by_hand(build_model(), examples), 1e-5)
    assert reference.asked == []
    assert not list(tmp_path.rglob(".tmp-*"))


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
    assert_close(ReferenceCache(reference, tmp_path).rows(pairs(40)), by_hand(build_model(), pairs(40)), 1e-5)
    assert reference.asked == []
