"""What the benchmarks of prefopt's own steps share: models, rows, and `fit` measured step by step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.flops import Shape, Work, needed
from benchmarks.measuring import Busy, matmul_rate, synchronized_time
from losses.registry import BoundLoss
from prefopt.data.records import Example, Labels
from prefopt.data.sources import load
from prefopt.errors import DataError
from prefopt.machine import keep_freed_memory
from prefopt.metrics import Metric
from prefopt.models.causal_lm import CausalLMPolicy, FrozenReference
from prefopt.optimization import Optimization
from prefopt.packing import PackedBatch
from prefopt.reference import ReferenceCache, StartReference
from prefopt.streams import Budget, OfflineStream
from prefopt.tokenize import tokenize
from prefopt.trainer import fit

# Of the published models: hidden, intermediate, layers, heads, key-value heads, vocabulary, tied embeddings.
SHAPES: Mapping[str, tuple[int, int, int, int, int, int, bool]] = {
    "135m": (576, 1536, 30, 9, 3, 49_152, True),  # SmolLM2-135M (Allal et al. 2025)
    "1b": (2048, 8192, 16, 32, 8, 128_256, True),  # Llama 3.2 1B (Grattafiori et al. 2024)
    "8b": (4096, 14_336, 32, 32, 8, 128_256, False),  # Llama 3.1 8B
}

_FIRST_STEP = 1  # its anchor, allocations and compilation happen once in a run


def random_llama(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int, tied: bool = True,
    *, device: str = "cpu", dtype: torch.dtype = torch.float32,
) -> Any:  # fmt: skip
    """A Llama with random weights, made on its device: its speed is that of a trained one."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=tied, max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def random_rows(
    count: int, prompt: tuple[int, int], completion: tuple[int, int], *, vocabulary: int, completions: int = 2, seed: int = 0
) -> list[Example]:
    """Rows of random tokens.

    Args:
        count: how many prompts.
        prompt, completion: shortest and longest length, drawn uniformly.
        vocabulary: ids are drawn below it.
        completions: of each prompt, best first.
        seed: of lengths and tokens.
    """
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return tuple(torch.randint(0, vocabulary, (length,), generator=generator).tolist())

    labels = Labels(ranks=tuple(range(completions)))
    return [
        Example(f"random:{i}", ids(*prompt), tuple(ids(*completion) for _ in range(completions)), labels) for i in range(count)
    ]


def harmless_rows(source: str, tokenizer: Any, count: int, *, max_length: int) -> list[Example]:
    """The first `count` training pairs of HH harmless as tokens.

    Args:
        source: a folder or file of HH, the folder that holds `harmless-base`, or a hub id.
        tokenizer: of the model.
        count: how many pairs.
        max_length: prompt plus completion; completions are cut to half of it.

    Raises:
        DataError: the source has fewer pairs.
    """
    inside = Path(source) / "harmless-base"
    # Some rows are left out (equal answers), so a few more are read.
    loaded = load((str(inside) if inside.is_dir() else source,), limit=2 * count + 8)
    records = [record for record in loaded.records if not record.official_test]
    examples = tokenize(records, tokenizer, max_length=max_length, max_completion_length=max_length // 2).examples
    pairs = [example for example in examples if example.labels.ranks == (0, 1)]
    if len(pairs) < count:
        raise DataError(f"{source}: {count} pairs are needed, {len(pairs)} were found; ask for fewer steps or pairs.")
    return pairs[:count]


@dataclass(frozen=True)
class Step:
    """One measured update.

    Args:
        seconds: from asking the stream for the batch until the update is made; packing, logging and waiting for the device
            are inside.
        rate: GFLOP/s of matrix products, measured right before; NaN when not asked for.
        busy: share of the machine that other processes used meanwhile.
        work: what the update needs.
    """

    seconds: float
    rate: float
    busy: Busy
    work: Work


Around = Callable[[int], contextlib.AbstractContextManager[Any]]


class MeasuredStream:
    """Hands a stream's steps to `fit` and measures what `fit` does with each: the trainer runs as it is, not a copy of it.

    It waits for the device around every step, so a GPU's next batch is not made ahead: training itself is a little faster.

    Args:
        inner: the stream.
        policy: for its shape and device.
        calibration: seconds of matrix products before each step; 0 makes none.
        around: called with the step's index; the step runs inside the context that it returns.
    """

    def __init__(
        self, inner: OfflineStream, policy: CausalLMPolicy, *, calibration: float = 0.0, around: Around | None = None
    ) -> None:
        self._inner, self._calibration, self._around = inner, calibration, around
        self._device = str(policy.device)
        self._shape = Shape.of(policy.base.config)
        self._lora = 0 if policy.lora is None else policy.lora.r
        self.steps: list[Step] = []

    @property
    def total_steps(self) -> int:
        return self._inner.total_steps

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        source = iter(self._inner)
        for index in range(self.total_steps):
            rate = matmul_rate(self._calibration, device=self._device) if self._calibration else float("nan")
            around = self._around(index) if self._around else contextlib.nullcontext()
            with Busy() as busy, around:
                begin = synchronized_time(self._device)
                batches = next(source)
                yield batches
                seconds = synchronized_time(self._device) - begin
            self.steps.append(Step(seconds, rate, busy, needed(self._shape, batches, lora=self._lora)))

    def metrics(self) -> Mapping[str, Metric]:
        return self._inner.metrics()

    def after_update(self, metrics: Mapping[str, Sequence[Metric]]) -> None:
        self._inner.after_update(metrics)

    def state_dict(self) -> Any:
        return self._inner.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self._inner.load_state_dict(state)


def start_reference(policy: CausalLMPolicy) -> FrozenReference:
    """The policy as its own reference, without a copy of the weights; log-probs stay in memory, so the name is free."""
    return StartReference(policy) if policy.lora is None else FrozenReference(policy, "start")


def measure_steps(
    policy: CausalLMPolicy,
    loss: BoundLoss,
    examples: Sequence[Example],
    *,
    batch_size: int,
    kind: str = "pairs",
    micro_batch_tokens: int = 8192,
    calibration: float = 0.0,
    around: Around | None = None,
) -> list[Step]:
    """Trains on `examples` once and returns the measured steps without the first, which is a warm-up.

    Args:
        policy: at its start, which is the reference: its log-probs are computed and cached before the first update.
        loss: with its hyper-parameters.
        examples: a multiple of `batch_size`, at least two steps.
        batch_size: prompts of an update.
        kind: of the stream that the loss calls for, as `OfflineStream` takes it.
        micro_batch_tokens: packed tokens of one forward pass.
        calibration: see `MeasuredStream`.
        around: see `MeasuredStream`; index 0 is the first step after the warm-up.
    """
    keep_freed_memory()  # as `prefopt train` does
    budget = Budget(batch_size, micro_batch_tokens=micro_batch_tokens)
    cache = ReferenceCache(start_reference(policy), micro_batch_tokens=micro_batch_tokens)
    stream = OfflineStream(examples, kind=kind, budget=budget, needs=loss.needs, reference=cache, dtype=policy.dtype)

    def after_warmup(index: int) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if around is None or index < _FIRST_STEP else around(index - _FIRST_STEP)

    measured = MeasuredStream(stream, policy, calibration=calibration, around=after_warmup)
    # The learning rate has no influence on speed; a small one keeps random models finite.
    fit(policy, loss, measured, Optimization(learning_rate=1e-6))
    return measured.steps[_FIRST_STEP:]


def exact_rows(count: int, prompt: int, completion: int, *, vocabulary: int, completions: int = 2) -> list[Example]:
    """Random rows that all have the same lengths."""
    return random_rows(count, (prompt, prompt), (completion, completion), vocabulary=vocabulary, completions=completions)
