"""The meter: weighted means over micro-batches, maxima, state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from losses.types import Max
from prefopt import metrics
from prefopt.communicator import SingleProcess
from prefopt.metrics import Meter


def test_means_are_weighted_over_micro_batches() -> None:
    """(1*1 + 2*1 + 10*2) / 4 = 5.75, not the mean of the two micro-batches' means (1.5 and 10)."""
    meter = Meter()
    meter.add("x", (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])))
    meter.add("x", (torch.tensor([[10.0, 99.0]]), torch.tensor([[2.0, 0.0]])))
    assert meter.read(SingleProcess()) == {"x": 5.75}


def test_maxima_and_values_of_a_step() -> None:
    meter = Meter()
    meter.add("ratio/max", Max(torch.tensor([1.0, 3.0])))
    meter.add("ratio/max", Max(torch.tensor([[2.0], [-1.0]])))
    meter.add_value("loss", torch.tensor(1.0))
    meter.add_value("loss", torch.tensor(2.0))
    assert meter.read(SingleProcess()) == {"ratio/max": 3.0, "loss": 1.5}


def test_a_metric_without_weight_is_left_out_and_reading_starts_afresh() -> None:
    meter = Meter()
    meter.add("empty", (torch.ones(3), torch.zeros(3)))
    meter.add("full", (torch.ones(3), torch.ones(3)))
    assert meter.read(SingleProcess()) == {"full": 1.0}
    assert meter.read(SingleProcess()) == {}


def test_many_small_values_keep_their_precision() -> None:
    """100,000 float32 additions of 0.1 in float64: float32 sums would be off in the fourth digit."""
    meter = Meter()
    for _ in range(1000):
        meter.add("x", (torch.full((100,), 0.1), torch.ones(100)))
    assert meter.read(SingleProcess())["x"] == pytest.approx(float(torch.tensor(0.1)), rel=1e-12)


def test_metrics_carry_no_gradient() -> None:
    values = torch.ones(2, requires_grad=True)
    meter = Meter()
    meter.add("x", (values * 2, torch.ones(2)))
    meter.add("y", Max(values * 3))
    state = meter.state_dict()
    assert not any(t.requires_grad for pair in state["sums"].values() for t in pair)
    assert not any(t.requires_grad for t in state["maxima"].values())


def test_state_goes_on_where_it_was() -> None:
    meter, other = Meter(), Meter()
    meter.add("x", (torch.tensor([1.0]), torch.tensor([1.0])))
    meter.add("m", Max(torch.tensor([7.0])))
    other.load_state_dict(meter.state_dict())
    for each in (meter, other):
        each.add("x", (torch.tensor([4.0]), torch.tensor([2.0])))
        each.add("m", Max(torch.tensor([5.0])))
    assert meter.read(SingleProcess()) == other.read(SingleProcess()) == {"x": 3.0, "m": 7.0}


class OtherRank(SingleProcess):
    """A second rank whose sums are 6 over a weight of 3, and whose maximum is 4."""

    world_size = 2

    def sum(self, value: Tensor) -> Tensor:
        return value + torch.tensor([6.0, 3.0], dtype=value.dtype)

    def max(self, value: Tensor) -> Tensor:
        return value.clamp(min=4.0)


def test_ranks_are_reduced_by_sums_not_by_means() -> None:
    """Means 1 (weight 1) and 2 (weight 3) make 7/4."""
    meter = Meter()
    meter.add("x", (torch.ones(1), torch.ones(1)))
    meter.add("m", Max(torch.ones(1)))
    assert meter.read(OtherRank()) == {"x": 1.75, "m": 4.0}


def test_what_is_held_is_summed_before_it_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory does not grow with the steps between two lines; sums, maxima and state are those of everything added."""
    monkeypatch.setattr(metrics, "_MOST_HELD", 5)
    meter = Meter()
    for value in range(1, 21):
        meter.add("x", (torch.full((2,), float(value)), torch.ones(2)))
        meter.add("m", Max(torch.tensor(float(-value))))
        assert meter._count <= 5
    assert meter.read(SingleProcess()) == {"x": 10.5, "m": -1.0}
