"""What a training run needs before it runs: bytes, operations and hours from a model's shape; docs/scaling.md derives each."""

from __future__ import annotations

from prefopt.scaling.choice import Choice, cheapest
from prefopt.scaling.devices import DEVICES, Device
from prefopt.scaling.duration import Duration, duration
from prefopt.scaling.memory import Footprint, Precision, Setup, Strategy, footprint
from prefopt.scaling.shape import SHAPES, Shape, read_shape
from prefopt.scaling.workload import Workload, workload_of

__all__ = [
    "DEVICES",
    "SHAPES",
    "Choice",
    "Device",
    "Duration",
    "Footprint",
    "Precision",
    "Setup",
    "Shape",
    "Strategy",
    "Workload",
    "cheapest",
    "duration",
    "footprint",
    "read_shape",
    "workload_of",
]
