"""Cells of benchmarks.rlhf: one setting with one model on one seed of the exact world, and what it is measured against."""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.rlhf_config import RlhfSpec, RlhfStudy
from benchmarks.zoo_cells import LeanExactTask
from losses.registry import BoundLoss
from prefopt import algorithms
from prefopt.best_of_n import best_of_n, kl_bound, kl_of_ranks
from prefopt.cell import run_cell
from prefopt.data.exact_world import (
    ExactWorld,
    WorldConfig,
    best_of_n_logps,
    expected,
    kl,
    objective,
    optimal_logps,
)
from prefopt.data.exact_world.fixed_points import best_completion, k3_in_loss
from prefopt.engines import OwnEngine
from prefopt.files import write_json
from prefopt.generate import Decoding
from prefopt.machine import end_with_parent
from prefopt.models.causal_lm import CausalLMPolicy, FrozenReference
from prefopt.models.tabular import TabularPolicy, build_tabular
from prefopt.options import Options, RewardOptions
from prefopt.reference import ReferenceCache
from prefopt.rewards import Scorer
from prefopt.tasks import Measured, prepare_process


@dataclass(frozen=True)
class RlhfResult:
    """What a cell left behind.

    Args:
        path: share of the gap closed, kl and reward by step, from the reference on.
        point_share: the share at its point of rest.
        to_point: KL(policy || point of rest) at the end; None where it is infinite, because the point excludes completions.
        start_to_point: the same of the reference.
        proxy: with a learned reward, its mean over samples of the final policy less that of the reference.
        true: the exact hidden reward, likewise.
        seconds: of the cell.
        error: what went wrong.
    """

    spec: RlhfSpec
    path: Sequence[Mapping[str, float]] = ()
    point_share: float | None = None
    to_point: float | None = None
    start_to_point: float | None = None
    proxy: float | None = None
    true: float | None = None
    seconds: float = 0.0
    error: str = ""

    @property
    def share(self) -> float:
        """Of the gap between the reference's objective and the optimum's, closed at the end."""
        return self.path[-1]["share"] if self.path else math.nan


class RlhfTask(LeanExactTask):
    """The exact world with the measures of the zoo, for tables too; `small` takes the world of 40 completions."""

    def __init__(self, options: Options, cache: Path, *, small: bool) -> None:
        super().__init__(options, cache)
        if small:
            self.world = ExactWorld(WorldConfig.tabular(options.data.world))
            self.max_new_tokens, self.eos_ids = self.world.config.max_completion_length, (self.world.layout.eos,)

    def evaluate(
        self, policy: CausalLMPolicy, reference: FrozenReference, cache: ReferenceCache, loss: BoundLoss | None, seed: int
    ) -> Measured:
        if isinstance(policy, TabularPolicy):
            return Measured(self.three_measures(self.policy_logps(policy)))
        return super().evaluate(policy, reference, cache, loss, seed)


@lru_cache(maxsize=8)
def _task(options: Options, cache: Path, small: bool) -> RlhfTask:
    return RlhfTask(options, cache, small=small)


def share_closed(logps: Tensor, reference: Tensor, rewards: Tensor, beta: float) -> float:
    """(J - J(reference)) / (J(optimum) - J(reference)) with J = E[r] - beta KL averaged over prompts; all [G, C]."""
    start = float(objective(reference, reference, rewards, beta).mean())
    best = float(objective(optimal_logps(reference, rewards, beta), reference, rewards, beta).mean())
    return (float(objective(logps, reference, rewards, beta).mean()) - start) / (best - start)


def point_of_rest(task: RlhfTask, spec: RlhfSpec) -> Tensor:
    """[G, C] log-probs of the policy at which the setting's expected gradient vanishes."""
    rewards = task.world.rewards
    if spec.setting.point == "optimum":
        return optimal_logps(task.reference_logps, rewards, spec.beta)
    if spec.setting.point == "best_completion":
        return best_completion(rewards)
    return k3_in_loss(
        task.world.layout, task.reference_next_logps, rewards, spec.beta, samples=spec.setting.hyper["samples_per_prompt"],
        scale="group" if spec.setting.point == "k3_group" else "none",
    )  # fmt: skip


def run_spec(spec: RlhfSpec, cache: Path, proxy_samples: int = 4096) -> RlhfResult:
    """Runs one cell in this process; what goes wrong is part of the result."""
    begin = time.perf_counter()
    prepare_process(spec.options, 1)
    try:
        found = _run(spec, cache, proxy_samples)
    except Exception as error:
        where = traceback.format_exc().splitlines()[-3].strip()
        return RlhfResult(spec, error=f"{type(error).__name__}: {error} ({where})", seconds=time.perf_counter() - begin)
    return replace(found, seconds=time.perf_counter() - begin)


def _run(spec: RlhfSpec, cache: Path, proxy_samples: int) -> RlhfResult:
    # Tasks differ by world, model and reward; the budget of a cell is no part of them.
    kept = Options(
        data=spec.options.data, model=spec.options.model, reward=spec.options.reward, supervised=spec.options.supervised
    )
    task = _task(kept, cache, spec.small)
    reference, rewards = task.reference_logps, task.world.rewards
    setting = algorithms.get(spec.setting.algorithm).setting(**spec.hyper)
    cell = run_cell(task, setting, spec.options, spec.seed, label=spec.label, cache=cache)
    start = task.three_measures(reference)
    path = [{"step": 0.0, **start}, *({**point} for point in cell.cell.path)]
    best = float(objective(optimal_logps(reference, rewards, spec.beta), reference, rewards, spec.beta).mean())
    gap = best - start["reward"]
    for line in path:
        line["share"] = (line["reward"] - spec.beta * line["kl"] - start["reward"]) / gap
    logps, point = task.policy_logps(cell.policy), point_of_rest(task, spec)
    found = RlhfResult(
        spec, path, share_closed(point, reference, rewards, spec.beta), _finite(kl(logps, point).mean()),
        _finite(kl(reference, point).mean()),
    )  # fmt: skip
    if spec.reward != "model":
        return found
    scorer = task.scorer(spec.seed).scorer
    proxies = [mean_proxy(task, table, scorer, proxy_samples) for table in (logps, reference)]
    return replace(found, proxy=proxies[0] - proxies[1], true=path[-1]["reward"] - start["reward"])


def _finite(value: Tensor) -> float | None:
    return float(value) if bool(value.isfinite()) else None


def mean_proxy(task: RlhfTask, logps: Tensor, scorer: Scorer, samples: int) -> float:
    """Mean score of samples from [G, C], as many of each prompt."""
    world = task.world
    drawn = torch.multinomial(logps.exp(), samples // len(logps), replacement=True, generator=torch.Generator().manual_seed(0))
    prompts = [prompt for prompt in world.prompts for _ in range(drawn.shape[1])]
    return float(scorer(prompts, [world.layout.texts[c] for c in drawn.flatten().tolist()]).double().mean())


@dataclass(frozen=True)
class BestOfNRow:
    """Best of n from the reference.

    Args:
        sampled: KL as the mean of log(best of n / reference) over the kept samples, and its standard error.
        ranks: KL from the ranks of all draws, see `kl_of_ranks`.
        exact: by enumeration.
        bound: log n - (n-1)/n.
        reward: exact, and the share of the gap closed.
    """

    n: int
    sampled: float
    error: float
    ranks: float
    exact: float
    bound: float
    reward: float
    share: float


def run_best_of_n(study: RlhfStudy, cache: Path) -> list[BestOfNRow]:
    """Draws from the table of the reference: the largest n serves the smaller ones."""
    spec = study.spec(next(iter(study.settings)), next(iter(study.models)), 0)
    task = _task(Options(data=spec.options.data, reward=RewardOptions(reward="true")), cache, study.small)
    world, reference = task.world, task.reference_logps
    engine = OwnEngine(task.eos_ids)
    engine.sync(build_tabular(world, task.reference_next_logps)[0])
    each = study.best_of_n["choices"] // len(world.prompts)
    prompts = [prompt for prompt in world.prompt_ids for _ in range(each)]
    texts = [prompt for prompt in world.prompts for _ in range(each)]
    largest = max(study.best_of_n["n"])
    drawn = best_of_n(
        engine, task.scorer(0).scorer, world.tokenizer, prompts, texts, largest,
        decoding=Decoding(task.max_new_tokens), seed=study.world,
    )  # fmt: skip
    scores = drawn.scores.view(len(world.prompts), -1)
    rows = []
    for n in study.best_of_n["n"]:
        exact = best_of_n_logps(reference, world.rewards, n)
        kept = torch.tensor([world.layout.index(sample.ids) for sample in drawn.first(n).chosen]).view(-1, each)
        ratios = (exact - reference).gather(1, kept)
        # Prompts are not sampled: what varies is what was drawn within each.
        error = float((ratios.var(-1) / each).mean().sqrt()) / math.sqrt(len(ratios))
        rows.append(
            BestOfNRow(
                n,
                float(ratios.mean()),
                error,
                float(kl_of_ranks(scores, n).mean()),
                float(kl(exact, reference).mean()),
                kl_bound(n),
                float(expected(world.rewards, exact).mean()),
                share_closed(exact, reference, world.rewards, study.beta),
            )
        )
    return rows


def run_cells(
    specs: Sequence[RlhfSpec], folder: Path, cache: Path, workers: int, seen: Callable[[RlhfResult], None]
) -> list[RlhfResult]:
    """Runs what `folder` does not hold yet, in processes side by side, and keeps it there; failures are not kept."""
    results: dict[str, RlhfResult] = {}

    def keep(result: RlhfResult) -> None:
        if not result.error:
            write_json(folder / result.spec.file, {key: value for key, value in vars(result).items() if key != "spec"})
        results[result.spec.file] = result
        seen(result)

    waiting = []
    for spec in specs:
        held = folder / spec.file
        if held.exists():
            results[spec.file] = RlhfResult(spec, **json.loads(held.read_text()))
        else:
            waiting.append(spec)
    if workers == 0:
        for spec in waiting:
            keep(run_spec(spec, cache))
    elif waiting:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
            for future in as_completed([pool.submit(run_spec, spec, cache) for spec in waiting]):
                keep(future.result())
    return [results[spec.file] for spec in specs]
