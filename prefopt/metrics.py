"""Accumulates losses' metrics on the device and reads them once per log line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from losses.types import Max, Metric
from prefopt.communicator import Communicator, gather_plain

# Values are summed up when this many are held: a step then costs no kernel, and memory stays below 2 MB.
_MOST_HELD = 2**17


class Meter:
    """Weighted means and maxima since the last log line."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._maxima: dict[str, Tensor] = {}
        self._held: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._held_maxima: dict[str, list[Tensor]] = {}
        self._count = 0

    def add(self, name: str, metric: Metric) -> None:
        """Adds one micro-batch's metric; nothing is computed now or read from the device."""
        if isinstance(metric, Max):
            values = metric.values.detach().reshape(-1)
            self._held_maxima.setdefault(name, []).append(values)
        else:
            values, weight = (t.detach().reshape(-1) for t in metric)
            self._held.setdefault(name, []).append((values, weight))
        self._count += values.numel()
        if self._count > _MOST_HELD:
            self._fold()

    def add_value(self, name: str, value: Tensor) -> None:
        """Adds one value of a step, to be averaged over steps."""
        self.add(name, (value, torch.ones_like(value)))

    def read(self, communicator: Communicator) -> dict[str, float]:
        """Reduced values by name, and a fresh start. A metric whose weight is zero is left out."""
        sums, maxima = self._reduced(communicator)
        self._sums, self._maxima = {}, {}
        found: dict[str, float] = {}
        if sums:
            flat = torch.stack([part for pair in sums.values() for part in pair]).tolist()
            found = {name: flat[2 * i] / flat[2 * i + 1] for i, name in enumerate(sums) if flat[2 * i + 1] != 0}
        if maxima:
            found |= dict(zip(maxima, torch.stack([*maxima.values()]).tolist(), strict=True))
        return found

    def collect(self, communicator: Communicator) -> None:
        """Moves what all ranks hold to rank 0, so that its state is that of the run."""
        if communicator.world_size > 1:
            sums, maxima = self._reduced(communicator)
            self._sums, self._maxima = (sums, maxima) if communicator.rank == 0 else ({}, {})

    def _reduced(self, communicator: Communicator) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
        """Sums and maxima over ranks, on every rank. A rank without rows may not know a name."""
        self._fold()
        told = gather_plain(communicator, [sorted(self._sums), sorted(self._maxima)])
        sum_names, maximum_names = (sorted({name for own in told for name in own[kind]}) for kind in range(2))
        nothing = torch.zeros((), dtype=torch.float64)
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        if sum_names:
            own = [part for name in sum_names for part in self._sums.get(name, (nothing, nothing))]
            flat = communicator.sum(_stack(own)).unbind()
            sums = {name: (flat[2 * i], flat[2 * i + 1]) for i, name in enumerate(sum_names)}
        maxima: dict[str, Tensor] = {}
        if maximum_names:
            least = torch.full((), -torch.inf, dtype=torch.float64)
            flat = communicator.max(_stack([self._maxima.get(name, least) for name in maximum_names])).unbind()
            maxima = dict(zip(maximum_names, flat, strict=True))
        return sums, maxima

    def state_dict(self) -> Any:
        self._fold()
        return {"sums": {name: list(pair) for name, pair in self._sums.items()}, "maxima": dict(self._maxima)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sums = {name: (pair[0], pair[1]) for name, pair in state["sums"].items()}
        self._maxima = dict(state["maxima"])
        self._held, self._held_maxima, self._count = {}, {}, 0

    def _fold(self) -> None:
        """Adds what is held to the sums, in double precision."""
        for name, pairs in self._held.items():
            values = torch.cat([values for values, _ in pairs]).double()
            weight = torch.cat([weight for _, weight in pairs]).double()
            total, count = (values * weight).sum(), weight.sum()
            if name in self._sums:
                # After a resume the sums lie on the CPU.
                total, count = total + self._sums[name][0].to(total.device), count + self._sums[name][1].to(count.device)
            self._sums[name] = (total, count)
        for name, maxima in self._held_maxima.items():
            value = torch.cat(maxima).double().max()
            self._maxima[name] = torch.maximum(self._maxima[name].to(value.device), value) if name in self._maxima else value
        self._held, self._held_maxima, self._count = {}, {}, 0


def _stack(values: list[Tensor]) -> Tensor:
    """Scalars in one tensor, on the accelerator if any lies there: streams report from the CPU, losses from the GPU."""
    device = next((value.device for value in values if value.device.type != "cpu"), values[0].device)
    return torch.stack([value.to(device) for value in values])
