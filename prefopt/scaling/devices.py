"""GPUs by their makers' data sheets (dense bf16 products, bandwidths) and the memory that their drivers report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# GPUs of one machine; more than these talk over the network.
MACHINE = 8
# Of a GPU's memory, for what no formula counts: the context, kernels' workspaces, and holes between tensors.
RESERVED = 0.1
GIB = 2.0**30


@dataclass(frozen=True)
class Device:
    """One GPU.

    Args:
        memory: bytes.
        operations: a second, of dense bf16 products.
        bandwidth: bytes a second of its memory.
        link: bytes a second to the GPUs of its machine, one way.
        network: bytes a second to those of other machines, one way, a GPU's share.
    """

    memory: float
    operations: float
    bandwidth: float
    link: float
    network: float

    @property
    def usable(self) -> float:
        """Bytes that tensors may take."""
        return self.memory * (1 - RESERVED)

    def between(self, gpus: int) -> float:
        """Bytes a second of a ring over so many GPUs: its slowest link."""
        return self.link if gpus <= MACHINE else self.network


DEVICES: Mapping[str, Device] = {
    "a100": Device(79 * GIB, 312e12, 2.04e12, 300e9, 25e9),
    "h100": Device(79 * GIB, 989e12, 3.35e12, 450e9, 50e9),
    "h200": Device(139 * GIB, 989e12, 4.8e12, 450e9, 50e9),
    "b200": Device(178 * GIB, 2250e12, 7.7e12, 900e9, 50e9),
    "l40s": Device(44 * GIB, 362e12, 0.864e12, 32e9, 12.5e9),
    "rtx4090": Device(23 * GIB, 165e12, 1.01e12, 32e9, 12.5e9),
}
