"""Cells of benchmarks.mdp: policies trained on one draw of pairs, and the best policy on the same. S states, A actions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.mdp_exact import LENGTH, kl
from losses.cpl import cpl_loss
from prefopt import algorithms
from prefopt.cell import run_cell
from prefopt.control.policies import ControlPolicy
from prefopt.control.segments import Preferences
from prefopt.errors import DataError
from prefopt.optimization import Logging, Optimization
from prefopt.options import GRIDWORLD, ControlOptions, DataOptions, EvaluationOptions, Options
from prefopt.streams import Budget
from prefopt.tasks import prepare_process
from prefopt.tasks.gridworld import GridworldTask

# Pairs of an update at least, and as a share of the data: what the order of the pairs adds to the end of training must stay far
# below what their draw does.
_BATCH, _SHARE = 256, 1 / 64
_GRADIENT = 1e-7
# Optima here give every action more than 1e-4; where no finite policy is best, L-BFGS goes on to where the gradient fades.
_NEVER = 1e-8


@dataclass(frozen=True)
class Method:
    """An algorithm with hyper-parameters; `label` names it in tables."""

    algorithm: str
    hyper: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return " ".join((self.algorithm, *(f"{name} {value:g}" for name, value in self.hyper.items())))


@dataclass(frozen=True)
class Draw:
    """One draw of labelled pairs, and what is trained on it."""

    preferences: Preferences
    pairs: int
    seed: int
    methods: tuple[Method, ...]
    updates: int

    @property
    def options(self) -> Options:
        """As `prefopt compare --data control:gridworld` takes them."""
        return Options(
            data=DataOptions(data=(f"control:{GRIDWORLD}",), pairs=self.pairs),
            control=ControlOptions(segment_length=LENGTH, preferences=self.preferences),
            budget=Budget(batch_size=max(_BATCH, int(_SHARE * self.pairs)), epochs=1e9, max_steps=self.updates),
            optimization=Optimization(learning_rate=0.1, schedule="cosine"),
            logging=Logging(log_every=self.updates),
            evaluation=EvaluationOptions(checkpoints=1, eval_pairs=64),
        )


@dataclass(frozen=True)
class Outcome:
    """A trained policy.

    Args:
        method: its label.
        metrics: of `GridworldTask.own_metrics`, exact.
        logps: [S, A].
        to_sample: of CPL, KL(policy || the best policy on the same pairs), what is left of the optimisation; None where there
            is no best policy, and of other methods.
        seconds: of the cell.
    """

    method: str
    preferences: Preferences
    pairs: int
    seed: int
    metrics: Mapping[str, float]
    logps: Tensor
    to_sample: float | None
    seconds: float


def run_draw(draw: Draw, cache: Path) -> list[Outcome]:
    """Trains every method on the draw, in this process."""
    prepare_process(draw.options, 1)
    return train_all(GridworldTask(draw.options, cache), draw, cache)


def train_all(task: GridworldTask, draw: Draw, cache: Path) -> list[Outcome]:
    """One outcome of each method: the cells of `prefopt compare`."""
    outcomes = []
    for method in draw.methods:
        setting = algorithms.get(method.algorithm).setting(**method.hyper)
        result = run_cell(task, setting, draw.options, draw.seed, label=method.label, cache=cache)
        assert isinstance(result.policy, ControlPolicy)
        logps = task.logps(result.policy)
        best = sample_optimum(task, draw.seed, method.hyper) if method.algorithm == "cpl" else None
        outcomes.append(
            Outcome(
                method.label, draw.preferences, draw.pairs, draw.seed,
                {metric.key: result.cell.final[metric.key] for metric in task.own_metrics}, logps,
                None if best is None else kl(logps, best), result.timing.seconds,
            )
        )  # fmt: skip
    return outcomes


def sample_optimum(task: GridworldTask, seed: int, hyper: Mapping[str, Any]) -> Tensor | None:
    """The table [S, A] at which CPL's loss on all of a seed's pairs is stationary, by L-BFGS and without the trainer.

    None where the loss falls on and on towards a policy that never takes some action: one that few pairs never prefer.

    Raises:
        DataError: it did not settle.
    """
    pairs, steps, mdp = task.pairs(seed), task.offline(seed).steps, task.mdp
    taken = steps.observations.argmax(-1) * mdp.actions + steps.actions
    chosen, rejected = (taken[side[:, None] + torch.arange(LENGTH)] for side in (pairs.chosen, pairs.rejected))
    mask = torch.ones(len(pairs), LENGTH, dtype=torch.float64)
    logits = torch.zeros_like(mdp.rewards).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=2000, tolerance_grad=_GRADIENT, tolerance_change=0.0, history_size=50, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logps = logits.log_softmax(-1).flatten()
        loss = cpl_loss(logps[chosen], logps[rejected], mask, mask, **hyper).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    closure()
    logps = logits.detach().log_softmax(-1)
    if float(logps.min()) < math.log(_NEVER):
        return None
    assert logits.grad is not None
    left = float(logits.grad.abs().max())
    if not left <= _GRADIENT:
        raise DataError(f"sample_optimum: a derivative of {left:.1e} is left, expected at most {_GRADIENT:.0e}: iterate more.")
    return logps


def by_method(outcomes: Sequence[Outcome], method: str, preferences: Preferences, pairs: int) -> list[Outcome]:
    """One of each seed."""
    return [o for o in outcomes if (o.method, o.preferences, o.pairs) == (method, preferences, pairs)]
