"""Bytes of a training run on one GPU: what it holds all the time, and what an update adds at its peak.

The formulas follow this project's forward pass on layers built as Llama's (norm, attention, norm, gated MLP); docs/scaling.md
derives them. S packed tokens of a micro-batch, C of them scored, D hidden, I MLP width, Q = heads x head size, K = key-value
heads x head size, L layers, V vocabulary, P parameters, T trained parameters, G GPUs. Weights, gradients and states are float32
(4 bytes); n is the width of what products are made in.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, get_args

from prefopt.errors import ConfigError
from prefopt.forward import CHUNK_LOGITS, KEEP_LOGITS
from prefopt.scaling.shape import Shape
from prefopt.scaling.workload import Workload

Strategy = Literal["single", "ddp", "fsdp2"]
WIDE = 4


class Precision(IntEnum):
    """Bytes of a number in products: bf16 under autocast, as on a GPU, or float32, as on a CPU."""

    AUTOCAST = 2
    FLOAT32 = 4


@dataclass(frozen=True)
class Setup:
    """How a run is made and laid over GPUs.

    Args:
        strategy: single; ddp: whole copies that share gradients; fsdp2: the policy in equal parts, gathered layer by layer.
        gpus: G.
        micro_batch_tokens: S, on each GPU.
        checkpointing: layers keep their inputs only, and are computed again in backward.
        lora: rank of adapters on every linear layer; 0 trains all weights.
        precision: of products.

    Raises:
        ConfigError: sizes below their least, or `single` on several GPUs.
    """

    strategy: Strategy = "single"
    gpus: int = 1
    micro_batch_tokens: int = 8192
    checkpointing: bool = False
    lora: int = 0
    precision: Precision = Precision.AUTOCAST

    def __post_init__(self) -> None:
        if self.strategy not in get_args(Strategy):
            raise ConfigError(f"strategy is {self.strategy!r}; expected {', '.join(get_args(Strategy))}.")
        if self.gpus < 1 or self.micro_batch_tokens < 1 or self.lora < 0:
            raise ConfigError(f"gpus and micro_batch_tokens must be at least 1, and lora not negative; got {self}.")
        if self.strategy == "single" and self.gpus > 1:
            raise ConfigError(f"strategy single is of one GPU, and {self.gpus} are asked for: ddp or fsdp2 spread over them.")


@dataclass(frozen=True)
class Footprint:
    """Bytes on one GPU, by part.

    Args:
        weights: 4 P; fsdp2: / G. Scalar heads add 4 D each.
        casts: 2 bytes of every linear weight outside the LM head, which autocast keeps through forward; none in float32, under
            LoRA, whose layers cast in passing, and under fsdp2, which counts them in `gathered`.
        gathered: fsdp2 alone: 4 + n (4 in float32) bytes of the parameters outside the layers and of two layers, and the
            gradient, 4 bytes, of the larger of the two until it is scattered.
        gradients: 4 T; fsdp2: / G.
        optimizer: AdamW's two states, 8 T; fsdp2: / G.
        reference: 4 P of a frozen copy where all weights are trained, whole on every GPU. Every policy is built with it, and it
            stays though its log-probs are cached. Under LoRA it is the policy with adapters off, so 0.
        reward_model: 4 P where completions are sampled, whole on every GPU.
        whole: fsdp2 alone: 4 bytes of every weight of the policy, which each GPU gathers to sample and to evaluate, and at the
            end; not at the same time as an update.
        activations: see `activation_bytes`.
        head: see `head_bytes`.
        cache: of keys and values of one sampled micro-batch, 2 n L K bytes a token; it does not meet the activations.
        accumulated: an update has several micro-batches, so gradients stand beside activations; in one they take turns.
    """

    weights: float
    casts: float
    gathered: float
    gradients: float
    optimizer: float
    reference: float
    reward_model: float
    whole: float
    activations: float
    head: float
    cache: float
    accumulated: bool

    @property
    def held(self) -> float:
        """All the time, from the first update on."""
        return self.weights + self.optimizer + self.reference + self.reward_model

    @property
    def total(self) -> float:
        """At the peak: what is held, and the larger of an update and of sampling or evaluation."""
        passing = self.casts + self.activations + self.head
        update = self.gradients + passing if self.accumulated else max(self.gradients, passing)
        return self.held + max(self.gathered + update, self.whole + self.cache)


def footprint(shape: Shape, setup: Setup, workload: Workload) -> Footprint:
    """See `Footprint`."""
    parts = setup.gpus if setup.strategy == "fsdp2" else 1
    trained = shape.trained(setup.lora) + workload.heads * shape.hidden
    # Under LoRA the base carries the adapters besides.
    weights = shape.parameters + workload.heads * shape.hidden + (trained if setup.lora else 0)
    copy = float(WIDE * shape.parameters)
    row = workload.tokens
    tokens = min(max(setup.micro_batch_tokens, row), workload.largest_batch(setup.gpus) * row)
    scored = tokens * workload.scored // row
    narrow = setup.precision < WIDE
    return Footprint(
        weights=WIDE * weights / parts,
        casts=float(setup.precision * shape.linear if narrow and not setup.lora and parts == 1 else 0),
        gathered=_gathered(shape, setup) if parts > 1 else 0.0,
        gradients=WIDE * trained / parts,
        optimizer=2 * WIDE * trained / parts,
        reference=0.0 if setup.lora else copy,
        reward_model=copy if workload.sampled else 0.0,
        whole=float(WIDE * weights) if parts > 1 else 0.0,
        activations=float(activation_bytes(shape, setup, tokens)),
        head=float(head_bytes(shape, scored) + head_workspace(shape, setup, scored)),
        cache=float(2 * setup.precision * shape.layers * shape.kv_heads * shape.head_size * tokens if workload.sampled else 0),
        accumulated=workload.largest_batch(setup.gpus) * row > tokens,
    )


def _gathered(shape: Shape, setup: Setup) -> float:
    width = WIDE + (setup.precision if setup.precision < WIDE else 0)
    gradient = WIDE * max(shape.outside, shape.layer) if not setup.lora else 0
    return float(width * (shape.outside + 2 * shape.layer) + gradient)


def activation_bytes(shape: Shape, setup: Setup, tokens: int) -> int:
    """What the layers keep for backward.

    In float32 a layer keeps 6 S D (the input of each norm, the same normed, and scaled, as the products read it), 2 S (the
    scales of the norms), 2 S (Q + K) (rotated queries and keys, values, the output of attention) and 4 S I (gate, its
    activation, up, and their product), 4 bytes each; the last norm adds 2 S D + S, and rotary angles 2 S head sizes.

    Under autocast the norms stay float32, so 4 S D + 2 S of 4 bytes; every product keeps a bf16 copy of its input of its own,
    5 S D of them; attention keeps what it reads and gives, the output once more for the product after it, and 4 bytes a
    head and token for the softmax's sums: n S (3 Q + 2 K) + 4 S heads; the MLP n 4 S I.

    Under LoRA frozen norms do not need what they normed: 2 S D less a layer (4 bytes each), S D less after the last, and
    the first layer's first norm keeps nothing (S D + S less). Every adapted layer keeps its r inner numbers a token: n S r.

    With checkpointing a layer keeps 4 S D, its input; the layer that is computed again has all of the above at that time.

    Args:
        shape: of the model.
        setup: precision, adapters, checkpointing.
        tokens: S.

    Returns:
        Bytes.
    """
    query, shared = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    narrow, adapted = setup.precision < WIDE, setup.lora > 0
    hidden, wide = tokens * shape.hidden, WIDE
    normed = 2 * hidden + tokens - (hidden if adapted else 0)  # a norm's input, scale and, where it learns, result
    norms = 2 * wide * normed
    if narrow:
        inputs = setup.precision * 5 * hidden
        attention = setup.precision * tokens * (3 * query + 2 * shared) + 4 * tokens * shape.heads
    else:
        inputs = wide * 2 * hidden
        attention = wide * tokens * 2 * (query + shared)
    inner = setup.precision * tokens * setup.lora * 7
    layer = norms + inputs + attention + setup.precision * 4 * tokens * shape.intermediate + inner
    angles = 2 * wide * tokens * shape.head_size
    last = wide * normed + angles
    if setup.checkpointing:
        return shape.layers * wide * hidden + layer + last
    return shape.layers * layer + last - (wide * (hidden + tokens) if adapted else 0)


def head_bytes(shape: Shape, scored: int) -> int:
    """What the LM head keeps for backward: 4 C D of states, and 4 bytes of each of the log-probs of whole chunks (of
    `CHUNK_LOGITS`) that fit into `KEEP_LOGITS`.

    Args:
        shape: of the model.
        scored: C.

    Returns:
        Bytes.
    """
    chunk = max(1, CHUNK_LOGITS // shape.vocabulary)
    most = KEEP_LOGITS // shape.vocabulary
    # A chunk is kept where its end, were it full, is within the limit.
    kept = min(scored, most // chunk * chunk)
    return WIDE * (scored * shape.hidden + kept * shape.vocabulary)


def head_workspace(shape: Shape, setup: Setup, scored: int) -> int:
    """What the LM head's backward needs at one time besides: float32 log-probs or probabilities and their gradient of a chunk,
    8 bytes a logit; in bf16 2 more, and the head's weight cast, 2 V D; where it is trained its gradient, 4 V D, before that
    becomes part of the gradients, and in bf16 each chunk's share of it, 2 V D.

    Args:
        shape: of the model.
        setup: precision and adapters.
        scored: C.

    Returns:
        Bytes.
    """
    chunk = min(scored, max(1, CHUNK_LOGITS // shape.vocabulary)) * shape.vocabulary
    narrow, matrix = setup.precision < WIDE, shape.vocabulary * shape.hidden
    cast = setup.precision * (chunk + matrix) if narrow else 0
    gradient = 0 if setup.lora else (WIDE + (setup.precision if narrow else 0)) * matrix
    return 2 * WIDE * chunk + cast + gradient
