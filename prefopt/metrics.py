"""Accumulates losses' metrics on the device and reads them once per log line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from losses.types import Max, Metric
from prefopt.communicator import Communicator

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
        self._fold()
        names = sorted(self._sums)
        found: dict[str, float] = {}
        if names:
            flat = communicator.sum(_stack([part for name in names for part in self._sums[name]])).tolist()
            found = {name: flat[2 * i] / flat[2 * i + 1] for i, name in enumerate(names) if flat[2 * i + 1] != 0}
        if self._maxima:
            names = sorted(self._maxima)
            found |= dict(zip(names, communicator.max(_stack([self._maxima[n] for n in names])).tolist(), strict=True))
        self._sums, self._maxima = {}, {}
        return found

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
