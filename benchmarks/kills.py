"""kill -9 at random moments: does anything of a run get lost?

    python -m benchmarks.kills --kills 200            over training, saving, rollouts and evaluation of four algorithms
    python -m benchmarks.kills --kills 0 --saves 50   a process that does nothing but save, killed 50 times

A run of the exact world with a table for a policy is killed again and again, each time at a random moment of a phase that is
drawn, and started again with `resume`, until it ends; every second run writes its checkpoints in the background. Then its
metrics (timings left out), its last checkpoint and its evaluation must equal those of a run that nobody disturbed, bit for
bit. After every kill, what has a checkpoint's name must be
whole. All processes are forks of one that has imported everything. The exit status is 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

from benchmarks.measuring import Table, write_json
from prefopt import algorithms, checkpoint
from prefopt.cell import run_cell
from prefopt.errors import OutputError
from prefopt.optimization import Logging, Optimization
from prefopt.options import DataOptions, EvaluationOptions, ModelOptions, Options, RewardOptions
from prefopt.prefetch import Feed
from prefopt.runlog import read_lines
from prefopt.streams import Budget
from prefopt.tasks.exact import TABULAR, ExactTask

HEADLINE = ("dpo", "ipo", "cpl", "ppo")
TRAINING, SAVING, ROLLOUT, EVALUATION = PHASES = ("training", "saving", "rollout", "evaluation")
# Rollouts for more than one buffer, and evaluations on the way.
_HYPER: dict[str, dict[str, Any]] = {"ppo": {"rollout_size": 32, "ppo_epochs": 2}}
_OPTIONS = Options(
    data=DataOptions(pairs=256), model=ModelOptions(model=TABULAR), reward=RewardOptions(reward="true"),
    budget=Budget(batch_size=16, micro_batch_size=8, max_steps=24, epochs=99), optimization=Optimization(learning_rate=1e-2),
    logging=Logging(log_every=1, save_every=2), evaluation=EvaluationOptions(checkpoints=4),
)  # fmt: skip
# How many times a phase may come in a life before the kill; a run has a dozen saves.
_LATEST = 4
_FINAL = "final.json"


class World(ExactTask):
    """The exact world whose reference is its source, so that nothing has to be trained for it."""

    hydra_base = None  # type: ignore[assignment]

    @property
    def reference_next_logps(self) -> torch.Tensor:  # type: ignore[override]
        return self.world.source_next_logps


class Marks:
    """What a child is doing, in memory that its parent sees: the phase, and how often each has begun."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 4096)
        self.clear()

    def clear(self) -> None:
        self._shared[: len(PHASES) + 1] = bytes(len(PHASES) + 1)

    @property
    def phase(self) -> str:
        return PHASES[self._shared[0]]

    def begun(self, phase: str) -> int:
        return self._shared[1 + PHASES.index(phase)]

    def enter(self, phase: str) -> None:
        place = PHASES.index(phase)
        self._shared[0] = place
        self._shared[1 + place] = min(255, self._shared[1 + place] + 1)

    def around(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which marks that it runs; afterwards the run is training."""

        def marked(*arguments: Any, **keywords: Any) -> Any:
            self.enter(phase)
            try:
                return function(*arguments, **keywords)
            finally:
                self.enter(TRAINING)

        return marked


@dataclass
class Tally:
    """What happened.

    Args:
        kills: by phase.
        resumed: lives that began at a checkpoint.
        compared: runs that came to their end and were compared.
        failures: what was not as it should be.
    """

    kills: Counter[str] = field(default_factory=Counter)
    resumed: int = 0
    compared: int = 0
    failures: list[str] = field(default_factory=list)


def fork(work: Callable[[], None]) -> int:
    """A child that does the work and ends with 0, or 1 after an error; its number."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def end(child: int) -> int:
    """Waits for a child; its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def live(task: World, name: str, folder: Path, cache: Path, marks: Marks, *, background: bool = False) -> None:
    """One life of a run: from the newest checkpoint to the end, if nobody kills it."""
    options = replace(_OPTIONS, logging=replace(_OPTIONS.logging, save_in_background=background))
    checkpoint.save = marks.around(SAVING, checkpoint.save)  # type: ignore[assignment]
    World.evaluate = marks.around(EVALUATION, World.evaluate)  # type: ignore[method-assign]
    setting = algorithms.get(name).setting(**_HYPER.get(name, {}))
    if setting.algorithm.on_policy:
        Feed.next = marks.around(ROLLOUT, Feed.next)  # type: ignore[method-assign]
    random.seed(0)  # a fork begins with a seed of its own, and checkpoints hold the generator's state
    marks.enter(TRAINING)
    result = run_cell(task, setting, options, 0, label=name, cache=cache, folder=folder, resume=True)
    (folder / _FINAL).write_text(json.dumps([dict(result.cell.final), [dict(line) for line in result.cell.path]]))


def kill_runs(name: str, kills: int, folder: Path, seed: int = 0) -> Tally:
    """Kills runs of an algorithm so many times, and lets every run come to its end.

    Args:
        name: of the algorithm.
        kills: over all of its runs.
        folder: for runs and cache.
        seed: of the moments.

    Raises:
        RuntimeError: a run that nobody killed failed.
    """
    draw, tally, marks, cache = random.Random(seed), Tally(), Marks(), folder / "cache"
    task = World(_OPTIONS, cache)
    task.training(0)
    whole, begin = folder / "whole", time.monotonic()
    if code := end(fork(lambda: live(task, name, whole, cache, marks))):
        raise RuntimeError(f"{name}: the undisturbed run ended with exit code {code}.")
    phases = [phase for phase in PHASES if marks.begun(phase)]
    # As long as a step with all that belongs to it.
    longest = (time.monotonic() - begin) / (_OPTIONS.budget.max_steps or 1)
    left = kills
    while left:
        cut, ended = folder / f"cut-{tally.compared}", False
        while not ended:
            wanted = (draw.choice(phases), draw.randint(1, _LATEST)) if left else None
            ended = _life(task, name, cut, cache, marks, tally, wanted, draw.uniform(0, longest))
            left -= not ended
        _compare(whole, cut, tally)
    return tally


def _life(
    task: World, name: str, folder: Path, cache: Path, marks: Marks, tally: Tally, wanted: tuple[str, int] | None, delay: float
) -> bool:
    """One life of a run, killed so many seconds after a phase has begun for the n-th time; True when it came to its end."""
    marks.clear()
    tally.resumed += bool(checkpoint.list_checkpoints(folder))
    child = fork(lambda: live(task, name, folder, cache, marks, background=tally.compared % 2 == 1))
    gone = 0
    while wanted is not None and marks.begun(wanted[0]) < wanted[1] and not gone:
        gone, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.0002)
    if wanted is None or gone:
        code = os.waitstatus_to_exitcode(status) if gone else end(child)
        if code:
            raise RuntimeError(f"{name} in {folder} failed with exit code {code}.")
        return True
    time.sleep(delay)
    phase = marks.phase
    os.kill(child, signal.SIGKILL)
    if end(child) == 0:  # it was faster
        return True
    tally.kills[phase] += 1
    tally.failures += _damaged(folder)
    return False


def _damaged(folder: Path) -> list[str]:
    """Checkpoints that can be seen and cannot be read."""
    found = []
    for path in checkpoint.list_checkpoints(folder):
        try:
            checkpoint.load(path)
        except OutputError as error:
            found.append(str(error))
    return found


def _compare(whole: Path, cut: Path, tally: Tally) -> None:
    """Notes what a run that was killed has otherwise than the one that was not."""
    tally.compared += 1
    if read_lines(whole) != read_lines(cut):
        tally.failures.append(f"the metrics of {cut} differ.")
    if (whole / _FINAL).read_text() != (cut / _FINAL).read_text():
        tally.failures.append(f"the evaluation of {cut} differs.")
    last, other = (checkpoint.load(checkpoint.list_checkpoints(folder)[-1])[1] for folder in (whole, cut))
    if place := difference(last, other):
        tally.failures.append(f"the last checkpoint of {cut} differs at {place}.")


def difference(one: Any, other: Any, place: str = "") -> str | None:
    """Where two trees of tensors and plain values are not the same, bit for bit; None where they are."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return next((found for key in one if (found := difference(one[key], other[key], f"{place}/{key}"))), None)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return next(
            (found for i, pair in enumerate(zip(one, other, strict=True)) if (found := difference(*pair, f"{place}/{i}"))), None
        )
    else:
        same = type(one) is type(other) and repr(one) == repr(other)  # repr tells floats apart to the last bit, and knows NaN
    return None if same else place or "/"


def kill_saves(kills: int, folder: Path, seed: int = 0) -> Tally:
    """Kills a process that saves one checkpoint after the other, and reads the newest after each kill."""
    draw, tally, marks = random.Random(seed), Tally(), Marks()
    begin = time.monotonic()
    checkpoint.save(folder, 0, _tree(0))
    longest = time.monotonic() - begin

    def work() -> None:
        first = int(checkpoint.list_checkpoints(folder)[-1].name.rpartition("-")[2]) + 1
        save = marks.around(SAVING, checkpoint.save)
        for step in count(first):
            save(folder, step, _tree(step))

    for _ in range(kills):
        marks.clear()
        child, asked = fork(work), draw.randint(1, _LATEST)
        while marks.begun(SAVING) < asked:
            if os.waitpid(child, os.WNOHANG)[0]:
                raise RuntimeError("the process that saves has failed.")
            time.sleep(0.0002)
        time.sleep(draw.uniform(0, longest))
        phase = marks.phase
        os.kill(child, signal.SIGKILL)
        end(child)
        tally.kills[phase] += 1
        tally.failures += _damaged(folder)
        found = checkpoint.load_latest(folder, tally.failures.append)
        tally.resumed += 1
        if found is None or difference(found[1], _tree(found[0])):
            tally.failures.append("the newest checkpoint is not what was saved.")
        if stale := [path.name for path in folder.iterdir() if not path.name.startswith("checkpoint-")]:
            tally.failures.append(f"left behind: {', '.join(stale)}.")
    return tally


def _tree(step: int) -> Any:
    """A megabyte that says which step it is of."""
    return {"step": step, "weights": torch.full((256, 1024), float(step)), "names": [str(step)] * 1000}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs both parts; 1 where anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="of runs")
    parser.add_argument("--saves", type=int, default=0, help="kills of a process that only saves")
    parser.add_argument("--algorithms", nargs="+", default=HEADLINE)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)  # the threads of a pool do not outlive a fork
    table, failures = Table("kill -9, by what was killed"), []
    with tempfile.TemporaryDirectory(prefix="prefopt-kills-") as scratch:
        each, rest = divmod(asked.kills, len(asked.algorithms))
        shares = [each + (index < rest) for index in range(len(asked.algorithms))]
        parts = [(name, share, partial(kill_runs, name)) for name, share in zip(asked.algorithms, shares, strict=True)]
        for title, kills, run in [("saves alone", asked.saves, kill_saves), *parts]:
            if kills:
                tally = run(kills, Path(scratch) / title, asked.seed)
                by_phase = {phase: tally.kills[phase] for phase in PHASES}
                table.add(
                    what=title, kills=kills, **by_phase, resumed=tally.resumed, runs_compared=tally.compared,
                    differences=len(tally.failures),
                )  # fmt: skip
                failures += tally.failures
    table.print()
    for failure in failures:
        print(failure)
    write_json(asked.json, "kills", [table], failures=failures)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
