"""Operations, bytes on links and hours of a run. Symbols as in memory.py; R rows, B rows of an update, U utilisation."""

from __future__ import annotations

from dataclasses import dataclass

from prefopt.scaling.devices import Device
from prefopt.scaling.memory import WIDE, Setup
from prefopt.scaling.shape import Shape
from prefopt.scaling.workload import Workload

# Of a GPU's products, what training reaches; measure yours: benchmarks/limits.py prints it for a machine.
UTILISATION = 0.4
# Of a GPU's memory bandwidth, what decoding reaches.
_STREAMING = 0.6


@dataclass(frozen=True)
class Duration:
    """Seconds of a whole run.

    Args:
        training: of the updates' products, all GPUs at work.
        communication: of the updates' transfers, which overlap with products.
        reference: of the reference's log-probs, made once a row.
        sampling: of decoding and scoring the completions.
        idle: share of the GPUs' time that is lost because an update's rows do not divide among them.
    """

    training: float
    communication: float
    reference: float
    sampling: float
    idle: float

    @property
    def total(self) -> float:
        """Products and transfers overlap; the longer one counts. Every GPU waits for the one with most rows."""
        return (max(self.training / (1 - self.idle), self.communication)) + self.reference + self.sampling


def forward_operations(shape: Shape, workload: Workload) -> float:
    """Of one row: 2 for each linear weight and token, 4 L Q for each pair of tokens that see each other, and 2 V D for each
    scored token. A prompt of p tokens and k completions of c have p^2 / 2 + k (c p + c^2 / 2) such pairs."""
    prompt, completion = workload.prompt, workload.length - workload.prompt
    pairs = prompt**2 / 2 + workload.completions * (completion * prompt + completion**2 / 2)
    return (
        2 * shape.linear * workload.tokens
        + 4 * shape.layers * shape.heads * shape.head_size * pairs
        + 2 * shape.vocabulary * shape.hidden * workload.scored
    )


def training_operations(shape: Shape, setup: Setup, workload: Workload) -> float:
    """Of one row: three forward passes (6 N a token: backward is two), two under LoRA, whose frozen weights need no gradient;
    one more with checkpointing. Adapters' own products, r (rows + columns) a matrix, are left out."""
    passes = (2 if setup.lora else 3) + (1 if setup.checkpointing else 0)
    return passes * forward_operations(shape, workload)


def communication_bytes(shape: Shape, setup: Setup, workload: Workload) -> float:
    """Of one update, in and out of one GPU. A ring passes on (G - 1) / G of what it gathers or scatters.

    ddp: one all-reduce of the gradients, 2 x 4 T. fsdp2, for every micro-batch: the weights are gathered for forward and for
    backward, 2 x 4 P, and the gradients scattered, 4 T.
    """
    ring = (setup.gpus - 1) / setup.gpus
    trained = WIDE * shape.trained(setup.lora)
    if setup.strategy == "ddp":
        return ring * 2 * trained
    return ring * micro_batches(setup, workload) * (2 * WIDE * shape.parameters + trained)


def micro_batches(setup: Setup, workload: Workload) -> int:
    """Of one update on the GPU that has most: whole rows, at least one."""
    rows = max(1, setup.micro_batch_tokens // workload.tokens)
    return -(-workload.largest_batch(setup.gpus) // rows)


def decoding_seconds(shape: Shape, setup: Setup, workload: Workload, device: Device) -> float:
    """Of one row's completions: bound by reading memory. Each step reads all weights, 4 P bytes in float32, for all rows of a
    micro-batch, and each completion's keys and values, 2 n L K a token before it."""
    prompt, completion = workload.prompt, workload.length - workload.prompt
    side_by_side = max(1, setup.micro_batch_tokens // workload.tokens)
    weights = WIDE * shape.parameters / side_by_side
    seen = (
        workload.completions * (prompt + completion / 2) * 2 * setup.precision * shape.layers * shape.kv_heads * shape.head_size
    )
    return completion * (weights + seen) / (device.bandwidth * _STREAMING)


def duration(shape: Shape, setup: Setup, workload: Workload, device: Device, utilisation: float = UTILISATION) -> Duration:
    """Of the whole run; see `Duration`."""
    rate = setup.gpus * device.operations * utilisation
    rows = workload.rows
    forward = forward_operations(shape, workload)
    # Sampled completions are scored by the reward model, and read once by the policy that drew them.
    scoring = rows * 2 * forward / rate if workload.sampled else 0.0
    decoding = rows / setup.gpus * decoding_seconds(shape, setup, workload, device) if workload.sampled else 0.0
    moved = communication_bytes(shape, setup, workload) if setup.gpus > 1 else 0.0
    return Duration(
        training=rows * training_operations(shape, setup, workload) / rate,
        communication=workload.updates() * moved / device.between(setup.gpus),
        reference=rows * forward / rate if workload.reference else 0.0,
        sampling=scoring + decoding,
        idle=1 - workload.batch / (setup.gpus * workload.largest_batch(setup.gpus)),
    )
