"""Is the memory that `prefopt plan` predicts what training takes? Real updates, each setting in a process of its own.

On a CPU the peak is the process's resident memory less that of a process that trained a model of a few kilobytes; torch's
blocks are mapped one by one (MALLOC_MMAP_THRESHOLD_), so that what is freed is gone. On a GPU it is torch's own peak of
allocated bytes. `python -m benchmarks.memory` takes some minutes on a CPU; `--device cuda` takes larger shapes.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.measuring import Table, peak_memory_of, print_machine, write_json
from prefopt import algorithms
from prefopt.data.records import Example
from prefopt.machine import memory_mb
from prefopt.models.causal_lm import build_policy
from prefopt.models.lora import LoRA
from prefopt.scaling import SHAPES, Precision, Setup, Shape, Workload, footprint
from prefopt.streams import Budget, OfflineStream
from prefopt.trainer import fit

# The loss reads no reference, so nothing but training is measured; the frozen copy is held all the same.
ALGORITHM = "simpo"
# The second update is the first with the optimizer's states from its beginning.
UPDATES = 3
MIB = 2**20
_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
CPU_SHAPES: dict[str, dict[str, Any]] = {
    "deep": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 12, "vocab_size": 8192, **_HEADS},
    "wide": {"hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 3, "vocab_size": 8192, **_HEADS},
    "large vocabulary": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "vocab_size": 49_152, **_HEADS},
}
GPU_SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": dict(SHAPES["llama-1b"]),
    "deep": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 32, "vocab_size": 32_768, **_HEADS},
    "wide": {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 4, "vocab_size": 32_768, **_HEADS},
}
# (adapters' rank, checkpointing, micro-batches of an update)
CASES = ((0, False, 1), (0, True, 2), (8, False, 1))


def train(config: dict[str, Any], setup: Setup, workload: Workload, device: str) -> float:
    """Makes updates as a run would, and returns the resident megabytes of the process before."""
    _run(dict(CPU_SHAPES["deep"], hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=64), setup,
         replace(workload, length=8, batch=1, rows=UPDATES), device)  # fmt: skip
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = memory_mb()
    _run(config, setup, workload, device)
    return before


def _run(config: dict[str, Any], setup: Setup, workload: Workload, device: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**config)).to(device)
    lora = LoRA(r=setup.lora, alpha=2 * setup.lora) if setup.lora else None
    policy, _ = build_policy(model, None, lora=lora, checkpointing=setup.checkpointing)
    loss = algorithms.get(ALGORITHM).setting().loss
    budget = Budget(batch_size=workload.batch, micro_batch_tokens=setup.micro_batch_tokens)
    fit(policy, loss, OfflineStream(_examples(config["vocab_size"], workload), kind="pairs", budget=budget, needs=loss.needs))


def _examples(vocabulary: int, workload: Workload) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    sizes = (workload.prompt, *[workload.length - workload.prompt] * workload.completions)
    drawn = [
        [tuple(torch.randint(0, vocabulary, (size,), generator=generator).tolist()) for size in sizes]
        for _ in range(workload.rows)
    ]
    return [Example(f"row:{number}", prompt, tuple(rest)) for number, (prompt, *rest) in enumerate(drawn)]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="where to write every number")
    arguments = parser.parse_args(argv)
    on_cpu = arguments.device == "cpu"
    if on_cpu:
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    precision = Precision.FLOAT32 if on_cpu else Precision.AUTOCAST
    length, batch = (256, 4) if on_cpu else (1024, 8)
    workload = Workload(ALGORITHM, UPDATES * batch, batch, length)
    table = Table(
        f"peak memory of {UPDATES} updates of {batch} pairs of {workload.tokens} tokens, MiB",
        forms={"predicted": ".0f", "measured": ".0f", "ratio": ".3f"}, note="ratio: measured over predicted",
    )  # fmt: skip
    print_machine()
    for name, config in (CPU_SHAPES if on_cpu else GPU_SHAPES).items():
        shape = Shape.of(LlamaConfig(**config), name)
        for lora, again, parts in CASES:
            setup = Setup("single", 1, batch * workload.tokens // parts, again, lora, precision)
            peak = peak_memory_of(train, config, setup, workload, arguments.device)
            measured = float("nan") if peak.error else peak.mb - peak.value if on_cpu else peak.device_mb
            predicted = footprint(shape, setup, workload).total / MIB
            table.add(
                shape=name, millions=shape.parameters / 1e6, lora=lora or None, checkpointing="yes" if again else "no",
                micro_batches=parts, predicted=predicted, measured=measured, ratio=measured / predicted,
                error=peak.error or None,
            )  # fmt: skip
    table.print()
    write_json(arguments.json, "memory", [table], settings={**vars(arguments), "json": None})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
