"""Where the time of one training step goes: torch.profiler's operators in six groups, and what bounds each.

Operators are attributed by where they were called (a layer's matrices, its attention, the rest of the backbone, the LM head,
the optimizer), and an operator of the backward pass by the forward operator that it differentiates.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.flops import Work
from benchmarks.measuring import Table, synchronized_time
from prefopt.models.causal_lm import CausalLMPolicy

GROUPS = ("matmul body", "LM head", "attention", "elementwise", "optimizer", "other")

_MARK = "part:"
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul", "aten::_scaled_mm")
# They hand out another view of the same memory and move nothing.
_VIEWS = frozenset(
    f"aten::{name}"
    for name in (
        "t", "transpose", "as_strided", "view", "_unsafe_view", "reshape", "expand", "slice", "select", "unsqueeze", "squeeze",
        "detach", "alias", "empty", "empty_like", "empty_strided", "resolve_conj", "resolve_neg", "permute", "unflatten",
        "flatten", "chunk", "split",
    )
)  # fmt: skip
# Clipping reads each gradient for the norm and reads and writes it for the scale; AdamW reads four tensors and writes three.
_OPTIMIZER_PASSES = 10


@dataclass(frozen=True)
class StepProfile:
    """One profiled step.

    Args:
        seconds: of the step, the profiler's own cost included.
        by_group: seconds of each of `GROUPS`; "other" is what remains: Python, packing, waiting.
        elementwise_bytes: read and written by the elementwise operators, estimated from the shapes of their inputs.
        optimizer_bytes: read and written by clipping and AdamW.
        operators: torch.profiler's own table.
    """

    seconds: float
    by_group: dict[str, float]
    elementwise_bytes: float
    optimizer_bytes: float
    operators: str


class StepRecorder:
    """Profiles what runs inside `recording()`; the result is in `profile` afterwards."""

    def __init__(self, policy: CausalLMPolicy) -> None:
        self._policy = policy
        self._on_gpu = policy.device.type == "cuda"
        self.profile: StepProfile | None = None

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Marks the policy's parts, records one step, and takes the marks off again."""
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self._on_gpu else [])
        with contextlib.ExitStack() as stack:
            self._mark(stack)
            begin = synchronized_time(str(self._policy.device))
            with profile(activities=activities, record_shapes=True) as recorded:
                yield
                seconds = synchronized_time(str(self._policy.device)) - begin
        self.profile = self._summarize(recorded, seconds)

    def _mark(self, stack: contextlib.ExitStack) -> None:
        evaluate = self._policy.evaluate

        def marked(*arguments: Any, **keywords: Any) -> Any:
            with record_function(f"{_MARK}evaluate"):
                return evaluate(*arguments, **keywords)

        stack.enter_context(mock.patch.object(self._policy, "evaluate", marked))
        backbone = getattr(self._policy.base, self._policy.base.base_model_prefix)
        _mark_module(stack, backbone, "backbone")
        inside = ""
        for name, module in backbone.named_modules():
            if inside and name.startswith(inside):
                continue  # the factors of an adapted matrix
            if isinstance(module, nn.Linear) or hasattr(module, "base_layer"):
                _mark_module(stack, module, "matrix")
                inside = f"{name}."
            elif type(module).__name__.endswith("Attention"):
                _mark_module(stack, module, "attention")

    def _summarize(self, recorded: Any, seconds: float) -> StepProfile:
        events = [event for event in recorded.events() if event.device_type == torch.autograd.DeviceType.CPU]
        parts = _forward_parts(events)
        by_group = dict.fromkeys(GROUPS, 0.0)
        elementwise_bytes = 0.0
        size = torch.empty(0, dtype=self._policy.dtype).element_size()
        for event in events:
            group = _group(event, parts)
            by_group[group] += (event.self_device_time_total if self._on_gpu else event.self_cpu_time_total) / 1e6
            if group == "elementwise" and event.name not in _VIEWS and _moves_memory(event):
                numbers = [_numel(shape) for shape in event.input_shapes]
                elementwise_bytes += size * (sum(numbers) + max(numbers, default=0))
        by_group["other"] = max(0.0, seconds - sum(value for group, value in by_group.items() if group != "other"))
        trained = sum(p.numel() * p.element_size() for p in self._policy.parameters() if p.requires_grad)
        by_time = "self_device_time_total" if self._on_gpu else "self_cpu_time_total"
        operators = recorded.key_averages().table(sort_by=by_time, row_limit=30, max_name_column_width=60)
        return StepProfile(seconds, by_group, elementwise_bytes, _OPTIMIZER_PASSES * trained, operators)


def _mark_module(stack: contextlib.ExitStack, module: nn.Module, part: str) -> None:
    """Everything that runs in the module's forward, and what differentiates it, belongs to `part`."""
    running: list[Any] = []

    def enter(*_: Any) -> None:
        running.append(record_function(f"{_MARK}{part}"))
        running[-1].__enter__()

    def leave(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    stack.callback(module.register_forward_pre_hook(enter).remove)
    stack.callback(module.register_forward_hook(leave).remove)


def _ancestors(event: Any) -> Iterator[Any]:
    """The event, its caller, the caller's caller, …"""
    while event is not None:
        yield event
        event = event.cpu_parent


def _forward_parts(events: list[Any]) -> dict[tuple[int, int], str]:
    """(thread, sequence number) of operators of the forward pass -> part. The node that an operator makes has its number."""
    parts = {}
    for event in events:
        if event.sequence_nr < 0 or any(up.name.startswith("autograd::engine") for up in _ancestors(event)):
            continue
        part = next((up.name for up in _ancestors(event) if up.name.startswith(_MARK)), None)
        # An operator without a node shows the number that the next one gets, so the last one seen is right.
        parts[event.thread, event.sequence_nr] = part.removeprefix(_MARK) if part else ""
    return parts


def _part(event: Any, parts: dict[tuple[int, int], str]) -> str:
    for up in _ancestors(event):
        if up.name.startswith(_MARK):
            return up.name.removeprefix(_MARK)
        if up.name.startswith("Optimizer.") or up.name.startswith("aten::_foreach") or "AccumulateGrad" in up.name:
            return "optimizer"
        if up.name.startswith("autograd::engine::evaluate_function"):
            return parts.get((up.fwd_thread, up.sequence_nr), "")
    return ""


def _group(event: Any, parts: dict[tuple[int, int], str]) -> str:
    # The marks' own time is Python between operators.
    if event.name.startswith((_MARK, "Optimizer.", "ProfilerStep")):
        return "other"
    part = _part(event, parts)
    if part == "backbone":
        return "matmul body" if event.name.startswith(_PRODUCTS) else "elementwise"
    known = {"matrix": "matmul body", "attention": "attention", "evaluate": "LM head", "optimizer": "optimizer"}
    return known.get(part, "other")


def _moves_memory(event: Any) -> bool:
    """It computes itself: what it calls, if anything, only makes views."""
    return event.name.startswith("aten::") and all(child.name in _VIEWS for child in event.cpu_children)


def _numel(shape: Any) -> int:
    count = 1 if shape else 0
    for size in shape:
        count *= size if isinstance(size, int) else 0
    return count


def streaming_rate(device: str = "cpu", megabytes: int = 256) -> float:
    """GB/s at which a large tensor is read and written back: the median of five.

    In place, since a copy to another tensor makes a processor read its target too, which would have to be counted.
    """
    values = torch.ones(megabytes * 2**18, device=device)
    rates = []
    for _ in range(6):
        begin = synchronized_time(device)
        values.mul_(1.0)
        rates.append(2 * values.numel() * values.element_size() / (synchronized_time(device) - begin) / 1e9)
    return statistics.median(rates[1:])


def bounds(found: StepProfile, work: Work, matmul: float, streaming: float) -> Table:
    """A table of the groups: share of the step, what the group reaches of the machine's rate, and what therefore bounds it.

    Args:
        found: the profiled step.
        work: what the step needs.
        matmul: GFLOP/s of matrix products.
        streaming: GB/s that go through memory at best.
    """
    reached: dict[str, tuple[str, float, Callable[[float], str]]] = {}
    for group, operations in (("matmul body", work.body), ("LM head", work.head), ("attention", work.attention)):
        reached[group] = ("arithmetic", operations / 1e9 / matmul, lambda s: f"{s:.0%} of the matmul rate")
    for group, moved in (("elementwise", found.elementwise_bytes), ("optimizer", found.optimizer_bytes)):
        reached[group] = ("memory bandwidth", moved / 1e9 / streaming, lambda s: f"{s:.0%} of the streaming rate")
    table = Table(
        "One step by group of operators",
        forms={"seconds": ".3f"},
        note="Needed work only: what recomputation or padding adds lowers a share. Bytes of elementwise work are estimated "
        "from the inputs' shapes; what stays in the caches can exceed the streaming rate.",
    )
    for group, seconds in sorted(found.by_group.items(), key=lambda item: -item[1]):
        kind, least, words = reached.get(group, ("Python, packing, waiting", float("nan"), lambda _: "-"))
        share = least / seconds if seconds else float("nan")
        # Half of the rate: below it, calls, cache misses or extra work cost more than what the group needs.
        bound = kind if not share < 0.5 else f"not {kind}: overhead, recomputation or small pieces"
        table.add(
            group=group,
            seconds=seconds,
            share=f"{seconds / found.seconds:.1%}",
            reaches=words(share),
            least_seconds=least,
            bound_by=bound,
        )
    return table
