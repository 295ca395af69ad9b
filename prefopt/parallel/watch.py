"""Processes that watch one another: when one is dead or stuck, all end within a time limit and say which one it was, and where.

Collectives alone do not: on a GPU they wait for a dead peer as for a slow one. So every process has a thread that tells the
others of its life through the store at which they met, and looks for theirs.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

import torch.distributed as dist

from prefopt.errors import DistributedError

# Longer than the interpreter is ever held up, shorter than an hour of a cluster.
_MOST_SILENCE = 60.0
# Beats that a process may leave out, once an exchange with it has failed, before it counts as dead.
_MISSED = 3
_STANDARD_ERROR = 2


@dataclass(frozen=True)
class _Record:
    """What a process says of itself.

    Args:
        beat: counts up while it lives.
        step: that it is in; 0 before the first.
        exchanges: that it has entered.
        waits: it is in one now.
        end: how it ended; None while it runs, "" when all was well.
    """

    beat: int = 0
    step: int = 0
    exchanges: int = 0
    waits: bool = False
    end: str | None = None


class Watch:
    """This process's life as the others see it, and theirs.

    Args:
        address: host and port of the store at which the processes met.
        rank, world_size: of this process.
        timeout: seconds after which a process that keeps the others waiting counts as stuck. One that gives no sign of life
            counts as dead after a minute, if that is less.
        key: of this start: a launcher that starts all processes again keeps the store.
    """

    def __init__(self, address: tuple[str, int], rank: int, world_size: int, timeout: float, key: str = "") -> None:
        self._rank, self._others = rank, [other for other in range(world_size) if other != rank]
        self._timeout, self._silence = timeout, min(timeout, _MOST_SILENCE)
        self._interval = min(2.0, timeout / 10)
        self._key = f"prefopt/{key}"
        # A connection for each thread: one that waits must not hold up the other.
        self._store, self._mine = (
            dist.TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout))
            for _ in range(2)
        )
        self._record = _Record()
        self._since = time.monotonic()  # the exchange that it is in
        self._known = {other: (_Record(), time.monotonic()) for other in self._others}
        self._lost: str | None = None  # what became of the store
        self._stop = threading.Event()
        self._blocks = 0
        self._say()
        threading.Thread(target=self._run, name="prefopt watch", daemon=True).start()

    def at_step(self, step: int) -> None:
        """This process is in that step."""
        self._record = replace(self._record, step=step)

    @contextlib.contextmanager
    def exchange(self) -> Iterator[None]:
        """Spans an exchange with all others, in which this process waits for them."""
        self._since = time.monotonic()
        self._record = replace(self._record, exchanges=self._record.exchanges + 1, waits=True)
        try:
            yield
        finally:
            self._record = replace(self._record, waits=False)

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """A block that rank 0 runs before the others, however long it takes.

        Raises:
            DistributedError: rank 0 has ended instead.
        """
        self._blocks += 1
        done = f"{self._key}/first/{self._blocks}"
        while self._rank and not self._mine.check([done]):
            if cause := self._ended() or self._silent(self._silence):
                raise DistributedError(cause)
            time.sleep(self._interval / 4)
        yield
        if not self._rank:
            self._mine.set(done, "")

    def leave(self, end: str) -> None:
        """The last sign of life: how this process ended, "" when all is well."""
        self._stop.set()
        self._record = replace(self._record, end=end, beat=self._record.beat + 1)
        with contextlib.suppress(RuntimeError):  # the store may be gone
            self._tell(self._mine)

    def finish(self) -> None:
        """Leaves when all is well; rank 0 after the others, because the store may be its own."""
        while not self._rank and any(record.end is None for record, _ in self._known.values()):
            if self._silent(self._silence):
                break
            time.sleep(self._interval / 20)
        self.leave("")

    def explain(self, error: BaseException) -> str | None:
        """What made an exchange fail; None where no other process is at fault.

        Waits for some beats: a process that has just died looks alive.
        """
        if not isinstance(error, RuntimeError) or not _of_an_exchange(error):
            return None
        deadline = time.monotonic() + (_MISSED + 2) * self._interval
        while time.monotonic() < deadline:
            if cause := self._ended() or self._silent(_MISSED * self._interval):
                return cause
            time.sleep(self._interval / 4)
        behind = self._behind()
        return f"{behind or 'an exchange between the processes failed, though all of them are heard of'} ({_line(error)})"

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self._say()
            now = time.monotonic()
            waited = now - self._since if self._record.waits else 0.0
            cause = self._ended() or self._silent(self._silence)
            if cause is None and waited > self._timeout:
                cause = self._behind() or f"all processes have waited for one another for {waited:.0f} s"
            if cause is not None:
                # The main thread may be in a collective that never returns. If it was about to say so itself, it had time.
                if not self._stop.wait((_MISSED + 3) * self._interval):
                    self._record = replace(self._record, end=cause)
                    with contextlib.suppress(RuntimeError):
                        self._tell(self._store)
                    os.write(_STANDARD_ERROR, f"error: rank {self._rank} ends: {cause}\n".encode())
                    os._exit(DistributedError.exit_code)
                return

    def _say(self) -> None:
        self._record = replace(self._record, beat=self._record.beat + 1)
        try:
            self._tell(self._store)
            for other in self._others:
                key = f"{self._key}/{other}"
                if self._store.check([key]):
                    found = _Record(**json.loads(self._store.get(key)))
                    if found != self._known[other][0]:
                        self._known[other] = (found, time.monotonic())
        except RuntimeError as error:
            self._lost = f"the store at which the processes met (rank 0's or the launcher's) is gone ({_line(error)})"

    def _tell(self, store: dist.TCPStore) -> None:
        store.set(f"{self._key}/{self._rank}", json.dumps(asdict(self._record)))

    def _ended(self) -> str | None:
        ends = {rank: record.end for rank, (record, _) in self._known.items() if record.end}
        return "; ".join(f"rank {rank} ended: {end}" for rank, end in ends.items()) or None

    def _silent(self, limit: float) -> str | None:
        """Says which processes have given no sign of life for longer than `limit` seconds."""
        if self._lost is not None:
            return self._lost
        now = time.monotonic()
        silent = {
            rank: (now - heard, record.step)
            for rank, (record, heard) in self._known.items()
            if record.end is None and now - heard > limit
        }
        told = [
            f"rank {rank} has not been heard of for {silence:.1f} s, last seen {_place(step)}"
            for rank, (silence, step) in silent.items()
        ]
        return "; ".join(told) or None

    def _behind(self) -> str | None:
        """Says which processes keep this one waiting: alive, and not yet in its exchange."""
        late = {
            rank: record
            for rank, (record, _) in self._known.items()
            if record.end is None and record.exchanges < self._record.exchanges
        }
        told = [f"rank {rank} is alive but does not go on, since {_place(record.step)}" for rank, record in late.items()]
        return "; ".join(told) or None


def _place(step: int) -> str:
    return f"at step {step}" if step else "before the first step"


def _of_an_exchange(error: RuntimeError) -> bool:
    """torch reports a lost peer by types of its own, by gloo's plain errors, or by NCCL's."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL"))


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]
