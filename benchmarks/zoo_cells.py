"""Cells of benchmarks.zoo: one loss with its numbers in one exact world, run many to a process and kept as JSON.

A finished cell is a file named by the content of what it ran, so a study goes on where it stopped, a changed number runs anew,
and quick and full studies share what they have in common.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import DynamicCache

from losses.registry import BoundLoss
from prefopt import algorithms
from prefopt.cell import run_cell
from prefopt.data.exact_world import ExactWorld, beta_at_kl, expected, kl, log_partition, optimal_logps, regret
from prefopt.errors import TrainingError
from prefopt.files import write_json
from prefopt.machine import end_with_parent
from prefopt.models.causal_lm import CausalLMPolicy, FrozenReference
from prefopt.optimization import Logging, Optimization
from prefopt.options import DataOptions, EvaluationOptions, Options
from prefopt.reference import ReferenceCache
from prefopt.stages import content_key
from prefopt.streams import Budget
from prefopt.tasks import Measured, prepare_process
from prefopt.tasks.exact import REGRET_BETA, ExactTask

# Lines of a log that is not a terminal: seconds between two.
_LINE_EVERY = 20.0


@dataclass(frozen=True)
class CellBudget:
    """What every cell spends alike.

    Args:
        pairs: labelled pairs drawn in the world.
        batch_size: pairs of one update.
        steps: updates.
        checkpoints: exact evaluations along the path, the last step included.
    """

    pairs: int = 8192
    batch_size: int = 64
    steps: int = 128
    checkpoints: int = 8


@dataclass(frozen=True)
class CellSpec:
    """Everything that a cell depends on besides the code."""

    loss: str
    hyper: Mapping[str, Any]
    learning_rate: float
    world: int
    seed: int
    labels: str
    budget: CellBudget

    @property
    def file(self) -> str:
        """Its name in a folder of cells; the hash tells apart what the readable part does not."""
        return f"{self.loss}-world{self.world}-{self.labels.replace(':', '')}-{content_key(asdict(self))}.json"

    @property
    def options(self) -> Options:
        budget = self.budget
        return Options(
            data=DataOptions(world=self.world, labels=self.labels, pairs=budget.pairs),
            # As many epochs as it takes: the steps decide.
            budget=Budget(budget.batch_size, epochs=1e6, max_steps=budget.steps, micro_batch_tokens=1 << 20),
            optimization=Optimization(learning_rate=self.learning_rate),
            logging=Logging(log_every=budget.steps),
            evaluation=EvaluationOptions(checkpoints=budget.checkpoints),
        )


@dataclass(frozen=True)
class CellResult:
    """What a cell left behind: `path` holds step, kl, reward and regret at the reference (step 0) and at each checkpoint."""

    spec: CellSpec
    path: Sequence[Mapping[str, float]] = ()
    seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class World:
    """What a world can give at most.

    Args:
        seed: which world.
        reference_reward: expected reward of the reference.
        beta: the price of a nat in regret.
        optimal_objective: E[r] - beta KL of the optimal policy at that price.
        optimal_reward: by target KL, the reward of the optimal policy there.
    """

    seed: int
    reference_reward: float
    beta: float
    optimal_objective: float
    optimal_reward: Mapping[float, float]


class LeanExactTask(ExactTask):
    """The exact world with the three measures that the zoo reads, at a sixth of the cost of all of them."""

    def evaluate(
        self, policy: CausalLMPolicy, reference: FrozenReference, cache: ReferenceCache, loss: BoundLoss | None, seed: int
    ) -> Measured:
        with policy.plain_attention() as model:
            logps = self.world.sequence_logps(next_logps_by_depth(self.world, model))
        return Measured(self.three_measures(logps))

    def three_measures(self, logps: Tensor) -> dict[str, float]:
        """kl (nats), reward and regret of a policy [G, C], averaged over prompts."""
        rewards, reference = self.world.rewards, self.reference_logps
        return {
            "kl": float(kl(logps, reference).mean()),
            "reward": float(expected(rewards, logps).mean()),
            "regret": float(regret(logps, reference, rewards, REGRET_BETA).mean()),
        }


@torch.no_grad()
def next_logps_by_depth(world: ExactWorld, model: torch.nn.Module) -> Tensor:
    """What `world.next_logps` gives [G, N, V], with each prefix encoded once: a level of the tree of prefixes at a time.

    Plain forwards encode every prefix again in each longer string: 5 times the time of this. Expects evaluation mode.
    """
    layout, symbols, limit = world.layout, world.config.symbols, world.config.max_completion_length
    table = torch.empty(len(world.prompts), layout.prefixes, symbols + 1, dtype=torch.float64)
    by_length: dict[int, list[int]] = {}
    for g, prompt in enumerate(world.prompt_ids):
        by_length.setdefault(len(prompt), []).append(g)
    for members in by_length.values():
        known = DynamicCache(config=model.config)
        ids = torch.tensor([world.prompt_ids[g] for g in members])
        for depth in range(limit):
            logits = model(input_ids=ids, past_key_values=known, use_cache=True).logits[:, -1].double()
            level = logits.log_softmax(-1).unflatten(0, (len(members), symbols**depth))
            table[members, layout.starts[depth] : layout.starts[depth + 1]] = level
            if depth < limit - 1:
                known.batch_repeat_interleave(symbols)
                ids = torch.arange(symbols).repeat(len(logits))[:, None]
    return table


@lru_cache(maxsize=8)
def _task(world: int, labels: str, pairs: int, cache: Path) -> LeanExactTask:
    """One for all cells of a process that share world and labels: pairs are drawn and tokenised once."""
    return LeanExactTask(Options(data=DataOptions(world=world, labels=labels, pairs=pairs)), cache)


def run_spec(spec: CellSpec, cache: Path) -> CellResult:
    """Runs one cell in this process; what goes wrong is part of the result."""
    begin = time.perf_counter()
    prepare_process(spec.options, 1)
    try:
        setting = algorithms.get(spec.loss).setting(**spec.hyper)
        task = _task(spec.world, spec.labels, spec.budget.pairs, cache)
        start = {"step": 0.0, **task.three_measures(task.reference_logps)}
        cell = run_cell(task, setting, spec.options, spec.seed, label=spec.loss, cache=cache).cell
    except Exception as error:
        where = traceback.format_exc().splitlines()[-3].strip()
        return CellResult(spec, error=f"{type(error).__name__}: {error} ({where})", seconds=time.perf_counter() - begin)
    return CellResult(spec, (start, *(dict(point) for point in cell.path)), time.perf_counter() - begin)


def describe_world(seed: int, targets: Sequence[float], cache: Path) -> World:
    """Trains the world's reference or takes it from the cache, and reads off what is possible at each target KL."""
    spec = DataOptions(world=seed)
    prepare_process(Options(data=spec), 1)
    task = _task(seed, spec.labels, spec.pairs, cache)
    reference, rewards = task.reference_logps, task.world.rewards
    best = {k: optimal_logps(reference, rewards, beta_at_kl(reference, rewards, k)) for k in targets}
    return World(
        seed,
        float(expected(rewards, reference).mean()),
        REGRET_BETA,
        float(REGRET_BETA * log_partition(reference, rewards, REGRET_BETA).mean()),
        {k: float(expected(rewards, policy).mean()) for k, policy in best.items()},
    )


class Runner:
    """Processes of one thread each that run many cells; torch is imported once in each, and worlds stay in memory.

    Args:
        cache: of shared starts and reference log-probs.
        workers: processes; 0 runs everything in this one.
        console: for progress.
    """

    def __init__(self, cache: Path, workers: int, console: Console) -> None:
        self._cache, self._workers, self._console = cache, workers, console
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Runner:
        if self._workers:
            self._pool = ProcessPoolExecutor(self._workers, mp_context=get_context("spawn"), initializer=end_with_parent)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def worlds(self, seeds: Sequence[int], targets: Sequence[float]) -> list[World]:
        """Every world described, its reference in the cache: before cells, so that no two processes train the same one."""
        found: dict[int, World] = {}
        self._map(
            describe_world,
            [(seed, tuple(targets), self._cache) for seed in seeds],
            "worlds",
            lambda w: found.update({w.seed: w}),
        )
        return [found[seed] for seed in seeds]

    def cells(
        self, specs: Sequence[CellSpec], folder: Path, title: str, seen: Callable[[CellResult], None] = lambda _: None
    ) -> dict[str, CellResult]:
        """Runs what `folder` does not hold yet; failures are returned and not kept, so the next call tries them again.

        Returns results by the name of their file.

        Args:
            specs: in the order in which they start; equal ones run once.
            folder: of finished cells.
            title: of the progress bar.
            seen: called with every result, those of earlier runs included.
        """
        results: dict[str, CellResult] = {}

        def keep(result: CellResult) -> None:
            if not result.error:
                write_json(folder / result.spec.file, asdict(result))
            else:
                self._console.print(
                    f"failed: {result.spec.loss} in world {result.spec.world}, {result.spec.labels}: {result.error}",
                    markup=False, highlight=False, soft_wrap=True,
                )  # fmt: skip
            results[result.spec.file] = result
            seen(result)

        waiting: dict[str, CellSpec] = {}
        for spec in specs:
            held = folder / spec.file
            if held.exists():
                stored = json.loads(held.read_text())
                results[spec.file] = CellResult(spec, tuple(stored["path"]), stored["seconds"])
                seen(results[spec.file])
            else:
                waiting.setdefault(spec.file, spec)
        if results:
            self._console.print(f"{title}: {len(results)} finished cells are kept, {len(waiting)} to run.", highlight=False)
        self._map(run_spec, [(spec, self._cache) for spec in waiting.values()], title, keep)
        return results

    def _map(
        self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], title: str, keep: Callable[[Any], None]
    ) -> None:
        with _Bar(self._console, title, len(calls)) as bar:
            if self._pool is None:
                for call in calls:
                    keep(function(*call))
                    bar.advance()
                return
            futures = [self._pool.submit(function, *call) for call in calls]
            for future in as_completed(futures):
                try:
                    result = future.result()
                except BrokenProcessPool as error:
                    raise TrainingError(
                        "a worker process ended without a message, perhaps for want of memory. Finished cells are kept: run "
                        "the same command again, with fewer --workers if need be."
                    ) from error
                keep(result)
                bar.advance()


class _Bar:
    """Progress with the time left: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, title: str, total: int) -> None:
        self._console, self._title, self._total = console, title, total
        self._done, self._begin, self._said = 0, time.perf_counter(), time.perf_counter()
        self._progress: Progress | None = None
        if console.is_terminal and total:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._progress = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console, transient=True)
            self._task = self._progress.add_task(title, total=total)

    def __enter__(self) -> _Bar:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def advance(self) -> None:
        self._done += 1
        now = time.perf_counter()
        if self._progress is not None:
            self._progress.advance(self._task)
        elif now - self._said > _LINE_EVERY or self._done == self._total:
            self._said = now
            spent = now - self._begin
            left = spent / self._done * (self._total - self._done)
            self._console.print(
                f"{self._title}: {self._done}/{self._total}, {spent / 60:.1f} min, about {left / 60:.1f} min left",
                highlight=False,
            )
