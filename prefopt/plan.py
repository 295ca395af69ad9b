"""What a study would do, before it does it: rows by role, cells, time, disk, and what it will be able to tell."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table

from prefopt.cell import run_cell
from prefopt.data.report import render
from prefopt.models.packed import PackedPolicy
from prefopt.options import Options, default_cache
from prefopt.report.schema import MINIMUM_SEEDS
from prefopt.report.statistics import smallest_detectable_difference
from prefopt.study import Entry, Study
from prefopt.tasks import Task, build_task, prepare_process
from prefopt.tuning import families

# Updates that a probe makes; the first warms up.
_PROBE_UPDATES = 3
# Floating-point operations of a forward and backward pass, for each parameter and token (Kaplan et al. 2020
# [kaplan2020scaling]).
_PASSES = 6


@dataclass(frozen=True)
class Cost:
    """What the cells of one setting are expected to take.

    Args:
        seconds: of one cell's training and measuring, on one worker.
        bytes: of one saved policy.
        source: how it was found.
    """

    seconds: float
    bytes: float
    source: str


def describe(
    study: Study,
    console: Console,
    cache: Path | None = None,
    *,
    probe: bool = False,
    save_policies: bool = False,
    workers: int = 1,
) -> None:
    """Prints what `compare` would do, without training a cell.

    Args:
        study: what would be run.
        console: for people.
        cache: of shared stages.
        probe: time a few updates of each setting, for which what all share is trained if it is not in the cache. Without, time
            is worked out from the model's size; that of the tasks' own small models depends on too much else.
        save_policies, workers: as `compare` would be told.
    """
    cache = cache or default_cache()
    settings, seeds = study.settings(), len(study.seeds)
    table = Table(title="cells", title_justify="left")
    for column in ("setting", "stream", "seeds", "options"):
        table.add_column(column)
    for entry, setting in zip(study.entries, settings, strict=True):
        options = ", ".join(
            f"{name} {value}" for name, value in {**setting.hyper, **entry.reward, **entry.optimization, **entry.budget}.items()
        )
        table.add_row(entry.label, setting.algorithm.data, ", ".join(map(str, study.seeds)), options)
    console.print(table)
    task = None
    if study.options.data.task == "text":
        prepare_process(study.options, 1)
        task = build_task(study.options, cache, console)
        console.print(render(task.training(study.seeds[0]).report))
    trials = dict.fromkeys((entry.label for entry in study.entries), 0)
    for members in families(study).values() if study.tuning.trials else ():
        trials[members[len(members) // 2].label] = study.tuning.trials * study.tuning.tuning_seeds
    cells, budget = {label: seeds + more for label, more in trials.items()}, study.options.budget
    console.print(
        f"{sum(cells.values())} cells on {' '.join(study.options.data.data)}"
        + (f", {sum(trials.values())} of them trials of tuning" if study.tuning.trials else "")
        + f". Batch {budget.batch_size}, {budget.epochs:g} epochs"
        + (f", at most {budget.max_steps} updates." if budget.max_steps else "."),
        highlight=False,
    )
    costs = {entry.label: cost(study, entry, task, cache, probe=probe) for entry in study.entries}
    known = {label: found for label, found in costs.items() if found is not None}
    if len(known) < len(costs):
        console.print("Expected time: not known of a task's own small model; --probe times a few updates.", highlight=False)
    else:
        hours = sum(found.seconds * cells[label] for label, found in known.items()) / 3600 / max(1, workers)
        disk = sum(found.bytes * seeds for found in known.values()) if save_policies else 0.0
        console.print(
            f"Expected: {_duration(hours)} with {workers} cells side by side ({next(iter(known.values())).source}; shared "
            f"stages not counted), {disk / 2**30:.2g} GiB of policies.", highlight=False, soft_wrap=True,
        )  # fmt: skip
    console.print(detectable_line(seeds), highlight=False, soft_wrap=True)


def detectable_line(seeds: int) -> str:
    """What so many seeds can tell, in standard deviations, which nobody knows before the run."""
    if seeds < MINIMUM_SEEDS:
        return f"Fewer than {MINIMUM_SEEDS} seeds: a smoke run, no ranking."
    found = smallest_detectable_difference(1.0, seeds)
    if found is None:
        return "What can be told apart: scipy is not installed (the extra `stats` has it)."
    return (
        f"Smallest detectable difference at {seeds} seeds: {found:.2g} standard deviations (over seeds, of a difference paired "
        "by seed), with probability 0.8; `prefopt power` says more."
    )


def cost(study: Study, entry: Entry, task: Task | None, cache: Path, *, probe: bool) -> Cost | None:
    """What a cell of this setting is expected to take: measured by a probe, or worked out where the task's model is known."""
    options = entry.options(study.options)
    if probe:
        return _probed(study, entry, options, cache)
    return None if task is None else _computed(options, task, study.seeds[0])


@dataclass(frozen=True)
class Probe:
    """What an update costs, measured over a few of them.

    Args:
        tokens: encoded with gradient and sampled.
        seconds: batches made and trained on.
        measuring: seconds of one evaluation, with all that a cell does once.
        bytes: of the policy.
    """

    tokens: float
    seconds: float
    measuring: float
    bytes: float


def probe(study: Study, entry: Entry, cache: Path) -> Probe:
    """Makes a few updates of a setting, and one evaluation, and throws them away.

    Raises:
        PrefoptError: as the cell would.
    """
    options = entry.options(study.options)
    short = replace(
        options, budget=replace(options.budget, max_steps=_PROBE_UPDATES), evaluation=replace(options.evaluation, checkpoints=1)
    )
    with TemporaryDirectory() as folder:
        begin = time.perf_counter()
        result = run_cell(
            build_task(short, cache),
            entry.setting(),
            short,
            study.seeds[0],
            label=entry.label,
            cache=cache,
            folder=Path(folder),
        )
        spent = time.perf_counter() - begin
    ledger, seconds = result.cell.ledger, result.timing.seconds_per_step
    tokens = (ledger.trained_tokens + ledger.generated_tokens) / _PROBE_UPDATES
    return Probe(tokens, seconds, max(0.0, spent - _PROBE_UPDATES * seconds), _size(result.policy))


def _probed(study: Study, entry: Entry, options: Options, cache: Path) -> Cost:
    """A few updates and one evaluation, extrapolated."""
    found = probe(study, entry, cache)
    rows = len(build_task(options, cache).training(study.seeds[0]).examples)
    seconds = updates_of(options, rows) * found.seconds + found.measuring * options.evaluation.checkpoints
    return Cost(seconds, found.bytes, f"{_PROBE_UPDATES} updates of each setting were made")


def _computed(options: Options, task: Task, seed: int) -> Cost:
    """Operations of training and measuring at the rate of this machine's matrix products."""
    model, _ = task.start()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    examples = task.training(seed).examples
    sample = [examples[i] for i in range(0, len(examples), max(1, len(examples) // 256))]
    tokens = sum(len(row.prompt_ids) + sum(map(len, row.completion_ids)) for row in sample) / len(sample)
    updates = updates_of(options, len(examples))
    seen = min(options.evaluation.eval_pairs or len(examples), len(examples)) * tokens
    measured = seen + 3 * options.evaluation.eval_prompts * (tokens / 2 + options.evaluation.eval_tokens)
    operations = parameters * (
        _PASSES * updates * options.budget.batch_size * tokens + _PASSES / 3 * measured * options.evaluation.checkpoints
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) if not options.model.lora else 0.05 * parameters
    return Cost(
        operations / _rate(next(model.parameters()).device), 4 * trained,
        f"{parameters / 1e6:.0f} million parameters, {tokens:.0f} tokens a row, at the rate of this machine's matrix products; "
        "on-policy settings take longer",
    )  # fmt: skip


def updates_of(options: Options, rows: int) -> int:
    """How many updates a run on so many rows makes."""
    full = math.ceil(rows * options.budget.epochs / options.budget.batch_size)
    return min(full, options.budget.max_steps) if options.budget.max_steps else full


def _rate(device: torch.device, size: int = 1024, seconds: float = 0.3) -> float:
    """Floating-point operations a second of matrix products."""
    one = torch.randn(size, size, device=device)
    one @ one
    done, begin = 0, time.perf_counter()
    while (spent := time.perf_counter() - begin) < seconds:
        float((one @ one)[0, 0])  # waits for a GPU
        done += 1
    return done * 2 * size**3 / spent


def _size(policy: PackedPolicy) -> float:
    return float(sum(value.numel() * value.element_size() for value in policy.trainable_state().values()))


def _duration(hours: float) -> str:
    return (
        f"{hours:.1f} hours"
        if hours >= 1
        else f"{hours * 60:.0f} minutes"
        if hours >= 1 / 30
        else f"{hours * 3600:.0f} seconds"
    )
