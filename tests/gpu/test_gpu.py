"""What only a GPU can show: the compiled kernel's numbers, how often it compiles, and that nothing waits for the device."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from prefopt import algorithms
from prefopt.cell import run_cell
from prefopt.data.records import Example
from prefopt.errors import TrainingError
from prefopt.models import flex
from prefopt.models.causal_lm import CausalLMPolicy, FrozenReference
from prefopt.models.fingerprint import fingerprint
from prefopt.optimization import Logging, Optimization
from prefopt.options import ControlOptions, DataOptions, EvaluationOptions, ModelOptions, Options
from prefopt.packing import Group, PackedBatch, Sampling, pack, pair_roles
from prefopt.reference import ReferenceCache
from prefopt.streams import Budget, OfflineStream
from prefopt.tasks import build_task
from prefopt.trainer import fit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

VOCABULARY = 97


def pairs(count: int, longest: int = 60, seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)

    def ids() -> tuple[int, ...]:
        length = int(torch.randint(2, longest + 1, (), generator=generator))
        return tuple(torch.randint(0, VOCABULARY, (length,), generator=generator).tolist())

    return [Example(f"pairs.jsonl:{i + 1}", ids(), (ids(), ids())) for i in range(count)]


def tiny_policy(device: str, dtype: torch.dtype = torch.float32) -> CausalLMPolicy:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=96, intermediate_size=96, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2,
    )  # fmt: skip
    return CausalLMPolicy(transformers.AutoModelForCausalLM.from_config(config).to(device, dtype), tokenizer=None)


def gradients(policy: CausalLMPolicy) -> Tensor:
    return torch.cat([p.grad.flatten().cpu().double() for p in policy.parameters() if p.grad is not None])


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("heads", "shared", "width"), [(4, 4, 64), (9, 3, 64), (2, 1, 12)])
def test_the_compiled_kernel_equals_dense_attention(window: int | None, heads: int, shared: int, width: int) -> None:
    """Values and gradients in float32 against the uncompiled computation in float64, to the precision of its products."""
    groups = [Group(0, (200, 300, 420)), Group(420, (30, 90, 95)), Group(515, (7, 9))]
    tokens = 524
    layout = flex.build_flex_layout(groups, "cuda")
    prompt_begin, prompt_end, own_begin = (torch.from_numpy(span) for span in flex.visible_spans(groups, tokens, window))
    key = torch.arange(tokens)
    mask = ((prompt_begin[:, None] <= key) & (key < prompt_end[:, None])) | (
        (own_begin[:, None] <= key) & (key <= key[:, None])
    )
    torch.manual_seed(0)
    plain = [torch.randn(n, tokens, width, dtype=torch.float64, requires_grad=True) for n in (heads, shared, shared)]
    sent = [tensor.detach().float().cuda().requires_grad_() for tensor in plain]
    query, keys, values = plain
    keys, values = (tensor.repeat_interleave(heads // shared, dim=0) for tensor in (keys, values))
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask.cpu()).transpose(0, 1)
    got = layout.attend(torch.nn.Module(), *sent, scale=None, dropout=0.0, window=window)
    direction = torch.randn_like(expected)
    wanted = [expected, *torch.autograd.grad((expected * direction).sum(), plain)]
    found = [got, *torch.autograd.grad((got * direction.float().cuda()).sum(), sent)]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.cpu().double(), other, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_shared_forward_agrees_with_the_cpu(dtype: torch.dtype) -> None:
    """Log-probs and gradients of one batch; bf16 products (by autocast, or as the model's type) bound the difference."""
    batch = pack(pairs(6), roles=pair_roles)
    needs = {"policy_chosen_token_logps", "policy_rejected_token_logps"}
    results = []
    for policy in (tiny_policy("cpu"), tiny_policy("cuda", dtype)):
        tensors = policy.evaluate(batch, needs)
        torch.stack([tensors[name].sum() for name in sorted(needs)]).sum().backward()
        results.append(([tensors[name].detach().cpu().double() for name in sorted(needs)], gradients(policy)))
    (expected, wanted), (got, found) = results
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=5e-2, rtol=0)
    assert (found - wanted).norm() <= 5e-2 * wanted.norm()


def test_compilation_stops_after_warm_up() -> None:
    """Batches of other groups in the same padded sizes compile nothing new."""
    policy = tiny_policy("cuda")

    def run(seed: int) -> None:
        for count in (2, 12):
            batch = pack(pairs(count, longest=40, seed=seed), roles=pair_roles)
            policy.rows(batch, ["token_logps"])["token_logps"].sum().backward()

    run(0)
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in range(1, 6):
            run(seed)


def test_a_batch_is_sent_whole() -> None:
    sampling = Sampling(0.7, torch.randint(0, 255, (40, 13), dtype=torch.uint8))
    batch = pack(pairs(3), roles=pair_roles, data={"margins": torch.tensor([0.5, 1.0, 2.0])}, sampling=sampling)
    there = batch.to("cuda")
    assert there.to("cuda") is there
    back = there.to("cpu")
    for name in ("input_ids", "position_ids", "predict", "targets", "scatter", "last", "mask"):
        assert getattr(there, name).is_cuda
        assert getattr(back, name).equal(getattr(batch, name))
    assert back.data["margins"].equal(batch.data["margins"])
    assert back.sampling.support is not None
    assert back.sampling.support.equal(sampling.support)


class Watched(OfflineStream):
    """From the third step on, anything that waits for the device raises; a bad step can be put in."""

    prefetchable = True
    bad_step = 0

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        for number, step in enumerate(super().__iter__(), start=1):
            # The first steps compile, allocate the optimizer's state and compare the first loss.
            torch.cuda.set_sync_debug_mode("error" if 3 <= number < self.total_steps else "default")
            if number == self.bad_step:
                for batch in step:
                    for values in batch.rows.values():
                        values.mul_(math.nan)
            yield step


def watched_run(policy: CausalLMPolicy, steps: int, bad_step: int = 0, log_every: int = 0) -> Any:
    reference = tiny_policy("cuda")
    budget = Budget(batch_size=8, micro_batch_size=4, max_steps=steps, epochs=100)
    known = ReferenceCache(FrozenReference(reference, fingerprint(reference.model)))
    stream = Watched(pairs(24), kind="pairs", budget=budget, reference=known)
    stream.bad_step = bad_step
    optimization = Optimization(learning_rate=1e-3, schedule="constant", warmup=0)
    try:
        return fit(policy, algorithms.get("dpo").setting().loss, stream, optimization, logging=Logging(log_every=log_every))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_waits_for_the_device_between_log_lines() -> None:
    """Steps 3 to 11 of 12 under torch's synchronisation alarm; the loss still falls."""
    result = watched_run(tiny_policy("cuda"), steps=12)
    assert result.lines[-1]["loss"] < math.log(2)


def test_a_bad_step_moves_nothing_and_is_named_later() -> None:
    policy = tiny_policy("cuda")
    with pytest.raises(TrainingError, match="step 4: the loss is not finite"):
        watched_run(policy, steps=8, bad_step=4)
    expected = tiny_policy("cuda")
    watched_run(expected, steps=3)
    assert_close(policy.trainable_state().values(), expected.trainable_state().values())


def assert_close(got: Collection[Tensor], expected: Collection[Tensor]) -> None:
    """Atomic additions in backward are not in one order; three steps of 1e-3 are far larger than that."""
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_groups_of_every_size_are_padded_to_few() -> None:
    """The kernel runs at a size far above the batch's and just below it."""
    for prompt, branches in ((500, (6, 5)), (500, (7, 6))):
        starts: Sequence[int] = (prompt, prompt + branches[0], prompt + sum(branches))
        layout = flex.build_flex_layout([Group(0, tuple(starts))], "cuda")
        out = layout.attend(
            torch.nn.Module(), *(torch.randn(2, starts[-1], 32, device="cuda") for _ in range(3)), scale=None, dropout=0.0,
            window=None,
        )  # fmt: skip
        assert out.shape == (starts[-1], 2, 32)
        assert out.isfinite().all()


def test_control_trains_on_a_gpu_as_on_a_cpu(tmp_path: Path) -> None:
    """A table in float64, one draw of pairs: the policies agree."""
    found = []
    for device in ("cpu", "cuda"):
        options = Options(
            data=DataOptions(("control:gridworld",), pairs=64), model=ModelOptions(device=device), control=ControlOptions(4),
            budget=Budget(batch_size=16, max_steps=8), optimization=Optimization(learning_rate=0.05),
            evaluation=EvaluationOptions(checkpoints=1, eval_pairs=16),
        )  # fmt: skip
        task = build_task(options, tmp_path)
        result = run_cell(task, algorithms.get("dpo").setting(), options, 0, label="dpo", cache=tmp_path / device)
        assert next(iter(result.policy.parameters())).device.type == device  # type: ignore[attr-defined]
        found.append(result.cell.final)
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6, nan_ok=True)
