"""Losses whose rows interact: however a step is cut into micro-batches and ranks, loss and gradient are those of the whole."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from torch import Tensor

import losses
from losses.registry import BoundLoss
from losses.types import VOCABULARY, LossOutput
from prefopt import algorithms
from prefopt.communicator import Communicator, SingleProcess
from prefopt.coupled import coupled_objectives, merge
from prefopt.data.records import Example
from prefopt.models.causal_lm import CausalLMPolicy, FrozenReference
from prefopt.models.fingerprint import fingerprint
from prefopt.packing import PackedBatch
from prefopt.reference import ReferenceCache
from prefopt.streams import Budget, OfflineStream

SIZE = 29
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-10}


def build_policy(seed: int, dtype: torch.dtype) -> CausalLMPolicy:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=SIZE, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return CausalLMPolicy(model, tokenizer=None)


def pairs(count: int) -> list[Example]:
    generator = torch.Generator().manual_seed(5)

    def ids(longest: int) -> tuple[int, ...]:
        length = int(torch.randint(1, longest + 1, (), generator=generator))
        return tuple(torch.randint(0, SIZE, (length,), generator=generator).tolist())

    return [Example(f"row:{i}", ids(9), (ids(7), ids(7))) for i in range(count)]


def micro_batches(name: str, micro: int, dtype: torch.dtype) -> list[PackedBatch]:
    """One step of 8 pairs of ragged lengths; the reference has other weights, so that nothing is zero by luck."""
    setting = algorithms.get(name).setting()
    reference = build_policy(4, dtype)
    stream = OfflineStream(
        pairs(8), kind=setting.algorithm.stream, budget=Budget(batch_size=8, micro_batch_size=micro), needs=setting.loss.needs,
        reference=ReferenceCache(FrozenReference(reference, fingerprint(reference.model))), dtype=dtype,
    )  # fmt: skip
    (step,) = list(stream)
    assert len(step) == 8 // micro
    return step


def of_policy(loss: BoundLoss) -> frozenset[str]:
    return frozenset(name for name in loss.needs if VOCABULARY[name].source == "policy")


def gradient(policy: CausalLMPolicy) -> Tensor:
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def coupled_gradient(
    loss: BoundLoss, step: Sequence[PackedBatch], policy: CausalLMPolicy, communicator: Communicator
) -> tuple[Tensor, Tensor]:
    """(loss, gradient) as the trainer takes them from `coupled_objectives`; the gradient is this rank's part."""
    surrogates = coupled_objectives(
        loss.terms, lambda batch, names: batch.tensors(names - of_policy(loss)), policy, step, communicator, lambda *_: None
    )
    for index, batch in enumerate(step):
        torch.stack(surrogates.objectives(index, policy.evaluate(batch, of_policy(loss)))).sum().backward()
    return torch.stack(list(surrogates.values)).sum(), gradient(policy)


def plain_gradient(loss: BoundLoss, step: Sequence[PackedBatch], policy: CausalLMPolicy) -> tuple[Tensor, Tensor]:
    """(loss, gradient) of the mean over micro-batches of each one's own loss: right for a single one alone."""
    parts = []
    for batch in step:
        tensors = {**batch.tensors(loss.needs - of_policy(loss)), **policy.evaluate(batch, of_policy(loss))}
        parts.append(sum(output.mean() for output in loss(tensors).values()))
    total = torch.stack([torch.as_tensor(part) for part in parts]).mean()
    total.backward()
    return total.detach(), gradient(policy)


@losses.register("coupled_test_baseline", coupled=True)
def coupled_test_baseline_loss(policy_logps: Tensor, policy_mismatched_logps: Tensor, desirable: Tensor) -> LossOutput:
    """KTO's shape with a gradient through the baseline: tensors of N and of M rows both have coefficients."""
    sign = torch.where(desirable, 1.0, -1.0).to(policy_logps)
    loss = torch.sigmoid(-0.1 * sign * (policy_logps - policy_mismatched_logps.square().mean().sqrt()))
    return LossOutput(loss, torch.ones_like(loss))


NAMES = ("kto", "aot", "aot_unpaired", "coupled_test_baseline")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("micro", [8, 4, 2, 1])
def test_accumulation_changes_nothing(name: str, dtype: torch.dtype, micro: int) -> None:
    loss = losses.get(name).bind()
    whole = plain_gradient(loss, micro_batches(name, 8, dtype), build_policy(0, dtype))
    parts = coupled_gradient(loss, micro_batches(name, micro, dtype), build_policy(0, dtype), SingleProcess())
    for got, wanted in zip(parts, whole, strict=True):
        assert float((got - wanted).norm()) <= TOLERANCE[dtype] * max(1.0, float(wanted.norm()))


@pytest.mark.parametrize("name", NAMES)
def test_plain_accumulation_would_give_another_gradient(name: str) -> None:
    loss = losses.get(name).bind()
    whole, parts = (
        plain_gradient(loss, micro_batches(name, micro, torch.float64), build_policy(0, torch.float64)) for micro in (8, 2)
    )
    assert float((parts[1] - whole[1]).norm()) > 1e-3 * float(whole[1].norm())


def test_the_baseline_counts_its_own_rows() -> None:
    """KTO: twice as many completions as mismatched ones, and a baseline that is not cut off at 0."""
    step = micro_batches("kto", 2, torch.float64)
    assert [(batch.sizes["N"], batch.sizes["M"]) for batch in step] == [(4, 2)] * 4
    policy = build_policy(0, torch.float64)
    ratios = torch.cat(
        [
            policy.evaluate(batch, {"policy_mismatched_logps"})["policy_mismatched_logps"]
            - batch.tensors(["reference_mismatched_logps"])["reference_mismatched_logps"]
            for batch in step
        ]
    )
    assert float(ratios.detach().mean()) > 0


class Rank:
    """One of several ranks that are threads."""

    def __init__(self, rank: int, slots: list[Tensor | None], barrier: threading.Barrier) -> None:
        self.rank, self.world_size = rank, len(slots)
        self._slots, self._barrier = slots, barrier

    def gather(self, value: Tensor) -> list[Tensor]:
        self._slots[self.rank] = value
        self._barrier.wait(timeout=60)
        found = [slot for slot in self._slots if slot is not None]
        self._barrier.wait(timeout=60)
        return found

    def sum(self, value: Tensor) -> Tensor:
        raise AssertionError("not used")

    max = sum


@pytest.mark.parametrize("name", NAMES)
def test_ranks_add_up_to_the_whole(name: str) -> None:
    """Three pairs on one rank and five on the other, one a micro-batch: losses are equal, gradients add up."""
    loss, dtype = losses.get(name).bind(), torch.float64
    policies = [build_policy(0, dtype) for _ in range(3)]
    whole = plain_gradient(loss, micro_batches(name, 8, dtype), policies[2])
    single = micro_batches(name, 1, dtype)
    slots: list[Tensor | None] = [None, None]
    barrier = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        found = [
            pool.submit(coupled_gradient, loss, step, policies[rank], Rank(rank, slots, barrier))
            for rank, step in enumerate((single[:3], single[3:]))
        ]
        (first, one), (second, other) = (future.result() for future in found)
    torch.testing.assert_close(first, second, atol=0, rtol=0)
    torch.testing.assert_close(first, whole[0], atol=1e-10, rtol=0)
    torch.testing.assert_close(one + other, whole[1], atol=1e-10, rtol=0)


def test_merged_lists_are_padded() -> None:
    """K and T grow with zeros; ranks go on behind the valid ones."""
    ranks = merge("ranks", [torch.tensor([[1, 0]]), torch.tensor([[2, 0, 1, 3]])])
    assert ranks.tolist() == [[1, 0, 2, 3], [2, 0, 1, 3]]
    mask = merge("group_token_mask", [torch.ones(1, 2, 3), torch.ones(1, 1, 4)])
    assert mask.shape == (2, 2, 4)
    assert mask.sum((1, 2)).tolist() == [6, 4]
    assert merge("max_completion_length", [torch.tensor(5.0), torch.tensor(5.0)]) == 5
