"""Steps a second of contrastive preference learning here against the same algorithm written plainly, turn by turn.

    python -m benchmarks.control_speed --json runs/control_speed.json

Here is `fit` with everything that it does (stream, packing, policy, loss, checks, AdamW, log line); the other side is
benchmarks/plain_cpl.py. Both start every turn from the same weights and see the same pairs in the same order. Sizes are those
of the CPL paper's runs on states: 96 pairs of 64 steps, dropout 0.25 (0 is measured too), layers of 256 (--hidden 512 512 is
what the authors' configurations say); observations and actions are random numbers of Meta-World's sizes, 39 and 4. Freed memory
is kept, as `prefopt compare` keeps it, so neither side pays for page faults. The exit status is 1 when the sides differ in loss
or gradient without dropout, or when other processes disturbed every round.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn

import losses
from benchmarks import plain_cpl
from benchmarks.measuring import Busy, Spread, Table, print_machine, write_json
from losses.registry import BoundLoss
from prefopt.control.policies import Actor, ActorConfig, ControlPolicy
from prefopt.control.segments import Comparisons, Labelling, compare_segments
from prefopt.control.steps import Steps
from prefopt.data.exact_world.labels import LabelModel
from prefopt.machine import keep_freed_memory
from prefopt.optimization import Logging, Optimization
from prefopt.streams import Budget, OfflineStream, epoch_order
from prefopt.trainer import fit

TOLERANCE = 1e-4
"""Of losses and gradients, relative to their size: both sides sum the same float32 numbers in another order."""

SIDES = ("plain", "prefopt")

_OBSERVATION, _ACTION, _EPISODE = 39, 4, 500
_ALPHA, _BIAS, _LEARNING_RATE = 0.1, 0.5, 1e-4
_FORMS = {"milliseconds": ".1f", "steps_per_second": ".2f", "plain_over_prefopt": ".2f"}


@dataclass(frozen=True)
class Setting:
    """What both sides train.

    Args:
        dropout: after each hidden layer.
        threads: of torch.
        pairs: of an update.
        length: steps of a segment.
        hidden: widths of the network.
        updates: of a turn.
    """

    dropout: float = 0.0
    threads: int = 1
    pairs: int = 96
    length: int = 64
    hidden: tuple[int, ...] = (256, 256)
    updates: int = 10

    @property
    def title(self) -> str:
        """As tables say it."""
        return f"dropout {self.dropout:g}, {self.threads} thread{'s' if self.threads > 1 else ''}"

    @cached_property
    def table(self) -> Steps:
        """Steps enough for a turn. They are random numbers: what they are changes no timing."""
        generator = torch.Generator().manual_seed(0)
        segments_of_episode = _EPISODE - self.length + 1
        episodes = math.ceil(2 * self.pairs * self.updates / segments_of_episode)
        count = episodes * _EPISODE
        return Steps(
            torch.randn(count, _OBSERVATION, generator=generator),
            2 * torch.rand(count, _ACTION, generator=generator) - 1,
            torch.randn(count, generator=generator),
            torch.zeros(count),
            _EPISODE * torch.arange(1, episodes + 1),
        )

    @cached_property
    def comparisons(self) -> Comparisons:
        """As many pairs as a turn sees, each of two segments of its own."""
        labelling = Labelling("return", LabelModel("deterministic", 0.0))
        return compare_segments(self.table, labelling, pairs=self.pairs * self.updates, length=self.length, seed=0)


@dataclass(frozen=True)
class Turn:
    """One side's updates from the common start.

    Args:
        seconds: of all of them, with the construction of stream and optimizer.
        disturbed: other processes used more of the machine than a timing may lose.
        loss: mean over the updates.
    """

    seconds: float
    disturbed: bool
    loss: float


class Contest:
    """Both sides of a setting, their data ready."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        table, pairs = setting.table, setting.comparisons
        torch.manual_seed(0)
        self._start = Actor(ActorConfig("mean_squared", _OBSERVATION, _ACTION, setting.hidden, setting.dropout))
        self._stacked = plain_cpl.stack_pairs(table.observations, table.actions, pairs.chosen, pairs.rejected, pairs.length)

    def play(self, rounds: int) -> dict[str, list[Turn]]:
        """The turns by side: one of each in a round, the first of which warms up and is left out."""
        threads = torch.get_num_threads()
        torch.set_num_threads(self.setting.threads)
        turns: dict[str, list[Turn]] = {side: [] for side in SIDES}
        try:
            for number in range(rounds + 1):
                # Each side goes first in every other round.
                for side in SIDES if number % 2 else reversed(SIDES):
                    turns[side].append(self.turn(side))
        finally:
            torch.set_num_threads(threads)
        return {side: own[1:] for side, own in turns.items()}

    def turn(self, side: str) -> Turn:
        """One side's updates, timed."""
        torch.manual_seed(1)
        run = partial(self._plain, self.plain_network()) if side == "plain" else partial(self._prefopt, self.policy())
        with Busy() as busy:
            loss = run()
        return Turn(busy.seconds, busy.disturbed, loss)

    def gradients(self) -> dict[str, tuple[float, list[Tensor]]]:
        """Loss and gradients of the first update by side."""
        network, policy = self.plain_network().eval(), self.policy()
        observations, actions = self._stacked.batch(self._batches()[0])
        loss = plain_cpl.cpl_objective(network, observations, actions, alpha=_ALPHA, bias=_BIAS)
        loss.backward()
        total, bound = 0.0, _loss()
        for batch in next(iter(self._stream())):
            given = batch.tensors(bound.needs)
            (output,) = bound({**given, **policy.evaluate(batch, bound.needs - given.keys())}).values()
            objective = (output.loss * output.weight).sum() / self.setting.pairs
            objective.backward()
            total += float(objective.detach())
        return {"plain": (float(loss.detach()), _gradients(network)), "prefopt": (total, _gradients(policy.actor))}

    def policy(self) -> ControlPolicy:
        """Ours, at the common start."""
        return ControlPolicy(copy.deepcopy(self._start), self.setting.table)

    def plain_network(self) -> nn.Sequential:
        """The plain side's, at the common start."""
        network = plain_cpl.build_network(_OBSERVATION, _ACTION, self.setting.hidden, self.setting.dropout)
        for own, given in zip(network.parameters(), self._start.parameters(), strict=True):
            own.data.copy_(given)
        return network

    def _plain(self, network: nn.Module) -> float:
        values = plain_cpl.train(
            network, self._stacked, self._batches(), learning_rate=_LEARNING_RATE, alpha=_ALPHA, bias=_BIAS
        )
        return statistics.fmean(values)

    def _prefopt(self, policy: ControlPolicy) -> float:
        optimization = Optimization(learning_rate=_LEARNING_RATE, schedule="constant", warmup=0.0, clip_norm=0.0)
        result = fit(policy, _loss(), self._stream(), optimization, logging=Logging(log_every=self.setting.updates))
        return float(result.lines[-1]["loss"])

    def _batches(self) -> list[list[int]]:
        order, size = epoch_order(len(self.setting.comparisons), 0, 0), self.setting.pairs
        return [order[begin : begin + size] for begin in range(0, len(order), size)]

    def _stream(self) -> OfflineStream:
        return OfflineStream(self.setting.comparisons, kind="pairs", budget=Budget(batch_size=self.setting.pairs))


def _loss() -> BoundLoss:
    return losses.get("cpl").bind(alpha=_ALPHA, bias=_BIAS)


def _gradients(network: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]


def disagreement(found: dict[str, tuple[float, list[Tensor]]]) -> tuple[float, float]:
    """Difference of the sides' losses, and the norm of that of their gradients (the largest of all weights'), as shares."""
    (loss, gradients), (other_loss, others) = (found[side] for side in SIDES)
    norms = [float((a - b).norm() / a.norm()) for a, b in zip(gradients, others, strict=True)]
    return abs(loss - other_loss) / abs(loss), max(norms)


def measure(setting: Setting, rounds: int, table: Table) -> list[str]:
    """Plays a setting and adds its rows; what went wrong."""
    contest = Contest(setting)
    failures = []
    if setting.dropout == 0:
        loss, gradient = disagreement(contest.gradients())
        print(f"{setting.title}: losses differ by {loss:.1e}, gradients by {gradient:.1e} (limit {TOLERANCE:.0e})", flush=True)
        # Written so that a NaN fails.
        if not (loss <= TOLERANCE and gradient <= TOLERANCE):
            failures.append(f"{setting.title}: the first update's losses differ by {loss:.1e}, gradients by {gradient:.1e}")
    turns = contest.play(rounds)
    if setting.dropout == 0:
        apart = max(abs(a.loss / b.loss - 1) for a, b in zip(*turns.values(), strict=True))
        if not apart <= TOLERANCE:
            failures.append(f"{setting.title}: the turns' losses differ by {apart:.1e}")
    quiet = [i for i in range(rounds) if not any(turns[side][i].disturbed for side in SIDES)]
    if not quiet:
        failures.append(f"{setting.title}: other processes disturbed every round; run it again on a quiet machine")
    kept = quiet or range(rounds)
    seconds = {side: [turns[side][i].seconds / setting.updates for i in kept] for side in SIDES}
    ratios = [plain / ours for plain, ours in zip(*seconds.values(), strict=True)]
    for side in SIDES:
        table.add(
            setting=setting.title,
            side=side,
            milliseconds=Spread.of([1e3 * value for value in seconds[side]]),
            steps_per_second=Spread.of([1 / value for value in seconds[side]]),
            plain_over_prefopt=Spread.of(ratios) if side == "prefopt" else None,
            rounds=f"{len(quiet)} of {rounds} quiet",
        )
    return failures


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.0, 0.25])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--pairs", type=int, default=96, help="of an update")
    parser.add_argument("--length", type=int, default=64, help="steps of a segment")
    parser.add_argument("--hidden", nargs="+", type=int, default=[256, 256], help="widths of the network")
    parser.add_argument("--updates", type=int, default=10, help="of a turn")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side that count; one warm-up comes on top")
    parser.add_argument("--json", type=Path, help="where to write every number")
    arguments = parser.parse_args(argv)
    if min(arguments.rounds, arguments.updates, arguments.pairs, arguments.length, *arguments.threads, *arguments.hidden) < 1:
        parser.error("all counts and sizes must be at least 1.")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Measures every setting; the exit status."""
    arguments = parse(argv)
    keep_freed_memory()
    print_machine()
    settings = [
        Setting(dropout, threads, arguments.pairs, arguments.length, tuple(arguments.hidden), arguments.updates)
        for dropout in arguments.dropout
        for threads in arguments.threads
    ]
    table = Table(
        f"CPL: {arguments.pairs} pairs of {arguments.length} steps, layers {arguments.hidden}",
        forms=_FORMS,
        note=f"median (lowest to highest) over quiet rounds of {arguments.updates} updates a side",
    )
    failures = [failure for setting in settings for failure in measure(setting, arguments.rounds, table)]
    table.print()
    write_json(arguments.json, "control_speed", [table], settings=[asdict(setting) for setting in settings], failures=failures)
    for failure in failures:
        print(f"FAILED: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
