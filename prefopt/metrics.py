"""Accumulates losses' metrics on the device and reads them once per log line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from losses.types import Max, Metric
from prefopt.communicator import Communicator


class Meter:
    """Weighted means and maxima since the last log line."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._maxima: dict[str, Tensor] = {}

    def add(self, name: str, metric: Metric) -> None:
        """Adds one micro-batch's metric; nothing is read from the device."""
        if isinstance(metric, Max):
            value = metric.values.detach().double().max()
            self._maxima[name] = torch.maximum(self._maxima[name], value) if name in self._maxima else value
            return
        values, weight = (t.detach().double() for t in metric)
        total, count = (values * weight).sum(), weight.sum()
        if name in self._sums:
            total, count = total + self._sums[name][0], count + self._sums[name][1]
        self._sums[name] = (total, count)

    def add_value(self, name: str, value: Tensor) -> None:
        """Adds one value of a step, to be averaged over steps."""
        self.add(name, (value.reshape(1), torch.ones(1, device=value.device)))

    def read(self, communicator: Communicator) -> dict[str, float]:
        """Reduced values by name, and a fresh start. A metric whose weight is zero is left out."""
        names = sorted(self._sums)
        found: dict[str, float] = {}
        if names:
            flat = communicator.sum(torch.stack([part for name in names for part in self._sums[name]])).tolist()
            found = {name: flat[2 * i] / flat[2 * i + 1] for i, name in enumerate(names) if flat[2 * i + 1] != 0}
        if self._maxima:
            names = sorted(self._maxima)
            found |= dict(zip(names, communicator.max(torch.stack([self._maxima[n] for n in names])).tolist(), strict=True))
        self._sums, self._maxima = {}, {}
        return found

    def state_dict(self) -> Any:
        return {"sums": {name: list(pair) for name, pair in self._sums.items()}, "maxima": dict(self._maxima)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sums = {name: (pair[0], pair[1]) for name, pair in state["sums"].items()}
        self._maxima = dict(state["maxima"])
