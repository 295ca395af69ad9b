"""A run's checkpoints: what is in one, and how a run goes on from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from prefopt import checkpoint
from prefopt.communicator import gather_bytes
from prefopt.errors import ConfigError, SaveError
from prefopt.metrics import Meter
from prefopt.models.protocol import Policy
from prefopt.optimization import Logging
from prefopt.parallel.strategy import Strategy
from prefopt.prefetch import Feed


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Args:
        step: updates made.
        tokens: encoded with gradient, on all ranks.
        skipped: updates left out, because their loss or gradient was not finite.
        running: name -> [2] sum and count of running statistics that losses update.
    """

    step: int
    tokens: int
    skipped: int
    running: dict[str, Tensor]


@dataclass(frozen=True)
class Parts:
    """What of a run has a state of its own."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    feed: Feed
    meter: Meter


class Snapshots:
    """Writes and reads the checkpoints of one run; all ranks call its methods together. Used as a context, which ends when the
    last checkpoint is written.

    Args:
        folder: of the run; None where nothing is kept.
        parts: whose state is written, and given back in place.
        run: plain values that a checkpoint and the run that resumes from it must have in common, by what they are called.
        strategy: how the run is spread over processes.
        logging: how many checkpoints stay, and whether they are written while the run goes on.
        patient: a checkpoint that cannot be written is left out, with a message.
        say: is told of everything that users should know.

    Raises:
        ConfigError: checkpoints cannot be written in the background under this strategy.
    """

    def __init__(
        self,
        folder: Path | None,
        parts: Parts,
        run: Mapping[str, Any],
        strategy: Strategy,
        *,
        logging: Logging,
        patient: bool,
        say: Callable[[str], None],
    ) -> None:
        if logging.save_in_background and strategy.saves_together:
            raise ConfigError(f"save_in_background: under {strategy.name} all processes write together; leave it out.")
        self._folder, self._parts, self._run, self._strategy = folder, parts, dict(run), strategy
        self._logging, self._patient, self._say = logging, patient, say
        self._communicator = strategy.communicator
        self._writer = ThreadPoolExecutor(1, "checkpoint") if logging.save_in_background else None
        self._writing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.wait()
        except SaveError as error:
            if kind is None:
                raise
            self._say(error.what)  # beside the error that ends the run
        finally:
            if self._writer is not None:
                self._writer.shutdown()

    def save(self, progress: Progress) -> None:
        """Writes a checkpoint, or begins to.

        Raises:
            SaveError: it, or the one that was being written, could not be, and the run is not patient.
        """
        assert self._folder is not None
        self.wait()
        parts = self._parts
        parts.meter.collect(self._communicator)
        own_generators = checkpoint.to_bytes(checkpoint.generator_state())
        tree = {
            "policy": parts.policy.trainable_state(),
            "optimizer": checkpoint.optimizer_state(parts.optimizer),
            "generators": [checkpoint.from_bytes(found) for found in gather_bytes(self._communicator, own_generators)],
            "stream": parts.feed.state_dict(),
            "meter": parts.meter.state_dict(),
            "running": progress.running,
            "step": progress.step,
            "tokens": progress.tokens,
            "skipped": progress.skipped,
            "run": self._run,
        }
        place = (self._folder, progress.step)
        if self._writer is None or not self._strategy.leads:  # the others have nothing to write, and nothing to copy
            self._finish(lambda: self._strategy.save(*place, tree, self._logging.keep))
        else:  # a copy: the run goes on to change what the tree refers to
            self._writing = self._writer.submit(self._strategy.save, *place, checkpoint.copied(tree), self._logging.keep)

    def wait(self) -> None:
        """Returns when no checkpoint is being written.

        Raises:
            SaveError: it could not be, and the run is not patient.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self._finish(writing.result)

    def _finish(self, write: Callable[[], None]) -> None:
        try:
            write()
        except SaveError as error:
            if not self._patient:
                raise
            self._say(f"{error.what} Going on without this checkpoint.")

    def restore(self) -> Progress | None:
        """Brings everything into the state of the newest good checkpoint; None when there is none yet.

        Raises:
            ConfigError: it is of a run with other options, or the processes see different checkpoints.
            OutputError: no checkpoint verifies.
        """
        if self._folder is None:
            raise ConfigError("resume needs the run's output folder.")
        found = checkpoint.load_latest(self._folder, self._say, self._communicator)
        if found is None:
            self._say("nothing to resume: no checkpoint yet, starting from the first step.")
            return None
        step, tree = found
        if tree["run"] != self._run:
            differing = ", ".join(sorted(name for name in self._run if tree["run"].get(name) != self._run[name]))
            raise ConfigError(
                f"the checkpoint in {self._folder} was written by a run with another {differing}; resume with the same "
                "options, or name another folder."
            )
        self._load_weights(tree["policy"], tree["optimizer"])
        self._parts.feed.load_state_dict(tree["stream"])
        if self._strategy.leads:  # it is that of all ranks
            self._parts.meter.load_state_dict(tree["meter"])
        written, ranks = len(tree["generators"]), self._communicator.world_size
        checkpoint.load_generator_state(tree["generators"][self._communicator.rank % written])
        self._say(f"resumed after step {step}.")
        if written != ranks:
            self._say(
                f"the checkpoint was written by {_processes(written)}, this run has {_processes(ranks)}: the order of rows is "
                "the same, losses agree to rounding."
            )
        return Progress(tree["step"], tree["tokens"], tree["skipped"], tree["running"])

    def _load_weights(self, policy: Mapping[str, Tensor], optimizer: Any) -> None:
        """Takes this rank's part of a checkpoint's weights and optimizer state."""
        own, like = self._strategy.own, self._parts.policy.trainable_state()
        self._parts.policy.load_trainable_state(own(policy, like))
        parameters = [parameter for group in self._parts.optimizer.param_groups for parameter in group["params"]]
        places = [(index, name) for index, values in optimizer["state"].items() for name in values]
        # Whatever is of a parameter's shape is divided as the parameter is.
        like = {f"{index}/{name}": parameters[int(index)] for index, name in places}
        loaded = own({f"{index}/{name}": optimizer["state"][index][name] for index, name in places}, like)
        state: dict[str, dict[str, Tensor]] = {index: {} for index in optimizer["state"]}
        for index, name in places:
            state[index][name] = loaded[f"{index}/{name}"]
        checkpoint.load_optimizer_state(self._parts.optimizer, {**optimizer, "state": state})


def _processes(count: int) -> str:
    return f"{count} processes" if count > 1 else "1 process"
