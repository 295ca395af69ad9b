"""The cheapest setup that fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prefopt.scaling.devices import Device
from prefopt.scaling.duration import UTILISATION, Duration, duration
from prefopt.scaling.memory import Footprint, Setup, Strategy, footprint
from prefopt.scaling.shape import Shape
from prefopt.scaling.workload import Workload

# Packed tokens of a micro-batch that are tried where none are named.
_TOKENS = (32_768, 16_384, 8192, 4096, 2048)
# Of adapters that are proposed where all weights do not fit.
RANK = 16


@dataclass(frozen=True)
class Choice:
    """A setup with what it needs."""

    setup: Setup
    footprint: Footprint
    duration: Duration
    fits: bool


def setups(
    gpus: int, most: int, *, strategy: Strategy | None, tokens: int | None, checkpointing: bool, lora: int
) -> Iterator[Setup]:
    """Every setup that agrees with what is named; `None` and False leave a choice.

    Args:
        gpus: how many.
        most: packed tokens that one GPU has of an update; a larger micro-batch is no other setup.
        strategy, tokens, checkpointing, lora: what is named.
    """
    sizes = [size for size in _TOKENS if size < 2 * most] or [_TOKENS[-1]]
    spread: tuple[Strategy, ...] = ("ddp", "fsdp2") if gpus > 1 else ("single",)
    for kind in (strategy,) if strategy else spread:
        for again in (True,) if checkpointing else (False, True):
            for size in (tokens,) if tokens else sizes:
                yield Setup(kind, gpus, size, again, lora)


def weigh(shape: Shape, setup: Setup, workload: Workload, device: Device, utilisation: float = UTILISATION) -> Choice:
    """A setup with its bytes and hours."""
    need = footprint(shape, setup, workload)
    return Choice(setup, need, duration(shape, setup, workload, device, utilisation), need.total <= device.usable)


def cheapest(
    shape: Shape,
    workload: Workload,
    device: Device,
    gpus: int,
    *,
    strategy: Strategy | None = None,
    tokens: int | None = None,
    checkpointing: bool = False,
    lora: int = 0,
    utilisation: float = UTILISATION,
) -> Choice:
    """The setup that fits and takes least time; of equals the one with fewest operations, and then the one that leaves most
    memory. Where none fits, the smallest.

    Raises:
        ConfigError: `single` on several GPUs.
    """
    most = workload.largest_batch(gpus) * workload.tokens
    found = [
        weigh(shape, setup, workload, device, utilisation)
        for setup in setups(gpus, most, strategy=strategy, tokens=tokens, checkpointing=checkpointing, lora=lora)
    ]
    fitting = [choice for choice in found if choice.fits]
    if not fitting:
        return min(found, key=lambda choice: choice.footprint.total)
    return min(fitting, key=lambda choice: (choice.duration.total, choice.duration.training, choice.footprint.total))


def fewest(shape: Shape, workload: Workload, device: Device, lora: int, most: int = 1024) -> int | None:
    """GPUs, doubled from one, on which the run fits with these adapters, spread as it has to be; None up to `most`."""
    gpus = 1
    while gpus <= most:
        if cheapest(shape, workload, device, gpus, lora=lora).fits:
            return gpus
        gpus *= 2
    return None
