"""Starts the strategy that was asked for, and refuses when what the launcher has started is something else."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from prefopt.errors import ConfigError, DistributedError
from prefopt.options import ParallelOptions
from prefopt.parallel.processes import Processes
from prefopt.parallel.strategy import Strategy
from prefopt.parallel.watch import Watch

_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_COMMAND = "torchrun --nproc-per-node N -m prefopt train ..."


@dataclass(frozen=True)
class Place:
    """Where the launcher has put this process."""

    rank: int
    world_size: int
    local_rank: int
    address: tuple[str, int]
    attempt: str


def find_place(options: ParallelOptions, environment: Mapping[str, str]) -> Place | None:
    """This process among those of the launcher; None for a single one.

    Args:
        environment: as torchrun and accelerate set it.

    Raises:
        ConfigError: it is not what `options` ask for.
    """
    started = int(environment.get("WORLD_SIZE", "1"))
    if options.strategy == "single":
        if started > 1:
            raise ConfigError(
                f"WORLD_SIZE is {started}: a launcher has started {started} processes, but strategy is 'single', so each of "
                "them would train the whole run in the same folder. Add --strategy ddp or --strategy fsdp2, or start "
                "prefopt without the launcher."
            )
        return None
    missing = [name for name in _LAUNCHED if name not in environment]
    if missing:
        raise ConfigError(
            f"strategy {options.strategy!r} needs the processes that a launcher starts, and {', '.join(missing)} is not in the "
            f"environment: {_COMMAND} --strategy {options.strategy}, or leave --strategy out for one process."
        )
    _check_accelerate(options.strategy, environment)
    return Place(
        int(environment["RANK"]), started, int(environment["LOCAL_RANK"]),
        (environment["MASTER_ADDR"], int(environment["MASTER_PORT"])), environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )  # fmt: skip


def _check_accelerate(strategy: str, environment: Mapping[str, str]) -> None:
    """What `accelerate launch` was configured for must be what is done, and nothing of it must be passed over in silence."""
    asked = {name for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM") if environment.get(f"ACCELERATE_USE_{name}") == "true"}
    if asked - {"FSDP"}:
        raise ConfigError(f"accelerate is configured for {', '.join(sorted(asked))}, which prefopt does not use: {_COMMAND}")
    if "FSDP" in asked and (strategy != "fsdp2" or environment.get("FSDP_VERSION") == "1"):
        raise ConfigError(
            f"accelerate is configured for FSDP version {environment.get('FSDP_VERSION', '1 or 2')}, but strategy is "
            f"{strategy!r}: ask for one of them, fsdp_version 2 with --strategy fsdp2, or no FSDP with --strategy ddp."
        )
    if (kind := environment.get("ACCELERATE_MIXED_PRECISION", "no")) not in ("no", "bf16"):
        raise ConfigError(f"accelerate is configured for {kind}; prefopt computes in bf16 on a GPU: leave it out.")


@contextlib.contextmanager
def open_strategy(options: ParallelOptions) -> Iterator[Strategy]:
    """The strategy, for as long as the block lasts; an error in one of the processes ends the others.

    Raises:
        ConfigError: the launcher has started something else than was asked for, or there are fewer GPUs than processes.
        DistributedError: another process died, is stuck or ended by an error; the message names it.
    """
    place = find_place(options, os.environ)
    if place is None:
        yield Strategy()
        return
    watch = _meet(place, options.rank_timeout)
    try:
        strategy = _kind(options.strategy)(watch)
        strategy.agree({"strategy": options.strategy, "torch": torch.__version__}, "the strategy and the version of torch")
        yield strategy
    except BaseException as error:
        cause = watch.explain(error)
        watch.leave(cause or str(error) or type(error).__name__)
        if cause is None:
            raise
        raise DistributedError(f"rank {place.rank} ends: {cause}") from error
    watch.finish()
    dist.destroy_process_group()


def _kind(name: str) -> type[Processes]:
    """The class of that name, imported when it is asked for: torch.distributed takes a second."""
    if name == "ddp":
        from prefopt.parallel.ddp import DDP

        return DDP
    from prefopt.parallel.fsdp2 import FSDP2

    return FSDP2


def _meet(place: Place, timeout: float) -> Watch:
    backend = "gloo"
    if torch.cuda.is_available():
        if place.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {place.local_rank} has no GPU of its own, this machine has {torch.cuda.device_count()}: start "
                "at most as many processes on it."
            )
        torch.cuda.set_device(place.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        watch = Watch(place.address, place.rank, place.world_size, timeout, place.attempt)
    except RuntimeError as error:
        raise DistributedError(
            f"rank {place.rank}: the {place.world_size} processes did not find one another at {place.address[0]}:"
            f"{place.address[1]} within {timeout:.0f} s: {str(error).partition(chr(10))[0]}"
        ) from error
    if (found := dist.get_world_size()) != place.world_size:
        raise ConfigError(f"WORLD_SIZE is {place.world_size}, but {found} processes met: start all of them with one launcher.")
    return watch
