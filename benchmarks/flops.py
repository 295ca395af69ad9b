"""The floating-point operations that a training step needs: counted from the model's shape and the batch's real layout.

Counted is what the mathematics asks for: every packed token once (the prompt once for all its completions) through every
layer, attention between tokens that see each other, the LM head on states that predict a scored token, each once. Not counted
is what an implementation adds: padding, masked scores, recomputed logits, a reference that is cached. A multiplication and an
addition are two operations; norms, activations, softmax and the optimizer are not matrix products and are left out, as is usual
in model-FLOP utilisation (Chowdhery et al. 2022, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from prefopt.errors import ConfigError
from prefopt.packing import Group, PackedBatch

_FAMILY = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Shape:
    """A decoder with grouped-query attention and a gated MLP.

    Args:
        hidden, intermediate, vocabulary: widths of the residual stream, of the MLP, and of the logits.
        heads, kv_heads, head_size: of attention.
        windows: for each layer, how many of the latest tokens are seen; None sees all.
    """

    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_size: int
    windows: tuple[int | None, ...]

    @classmethod
    def of(cls, config: Any) -> Shape:
        """The shape of a transformers configuration.

        Raises:
            ConfigError: a family whose layers are built otherwise.
        """
        if config.model_type not in _FAMILY:
            raise ConfigError(
                f"FLOPs are counted for models built like {', '.join(_FAMILY)}; got {config.model_type!r}. Name another model."
            )
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
        window = getattr(config, "sliding_window", None)
        return cls(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            vocabulary=config.vocab_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
        )

    @property
    def layers(self) -> int:
        return len(self.windows)

    @property
    def inputs(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of the matrices that read the residual stream for attention: queries, keys, values."""
        return ((self.hidden, self.heads * self.head_size), *[(self.hidden, self.kv_heads * self.head_size)] * 2)

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of every matrix of one layer."""
        mlp = ((self.hidden, self.intermediate), (self.hidden, self.intermediate), (self.intermediate, self.hidden))
        return (*self.inputs, (self.heads * self.head_size, self.hidden), *mlp)


@dataclass(frozen=True)
class Work:
    """What one step needs, in operations unless said otherwise; `a + b` is the work of both.

    Args:
        prompt_tokens, completion_tokens: packed tokens.
        states: distinct states that go through the LM head.
        visible: (query, key) pairs that see each other, of one head, summed over layers.
        body_forward, body_backward: the matrices of all layers.
        attention_forward, attention_backward: scores and weighted values.
        head_forward, head_backward: the LM head.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    states: int = 0
    visible: int = 0
    body_forward: int = 0
    body_backward: int = 0
    attention_forward: int = 0
    attention_backward: int = 0
    head_forward: int = 0
    head_backward: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def body(self) -> int:
        return self.body_forward + self.body_backward

    @property
    def attention(self) -> int:
        return self.attention_forward + self.attention_backward

    @property
    def head(self) -> int:
        return self.head_forward + self.head_backward

    @property
    def forward(self) -> int:
        return self.body_forward + self.attention_forward + self.head_forward

    @property
    def backward(self) -> int:
        return self.body_backward + self.attention_backward + self.head_backward

    @property
    def total(self) -> int:
        return self.forward + self.backward


def needed(shape: Shape, batches: Sequence[PackedBatch], *, lora: int = 0) -> Work:
    """The work of one update.

    Backward passes take a product for the gradient of the input and one for that of the weight, each as large as the forward
    product. Under LoRA a frozen matrix has only the first, its two factors have both, and nothing flows into the embeddings:
    the matrices that read them need no gradient of their input.

    Args:
        shape: of the model.
        batches: all micro-batches of the update.
        lora: rank of adapters on every matrix of the layers; 0 trains all weights.
    """
    return sum((_needed(shape, batch, lora) for batch in batches), Work())


def _needed(shape: Shape, batch: PackedBatch, lora: int) -> Work:
    tokens = batch.tokens
    prompts = sum(group.starts[0] for group in batch.groups)
    states = batch.predict.unique().numel()
    visible = sum(count * sum(visible_pairs(g, window) for g in batch.groups) for window, count in _count(shape.windows))
    weights = shape.layers * sum(a * b for a, b in shape.matrices)
    entrance = sum(a * b for a, b in shape.inputs)  # of the first layer
    factors = shape.layers * sum(lora * (a + b) for a, b in shape.matrices)
    adapted = weights - entrance + 2 * factors - sum(lora * a for a, _ in shape.inputs)
    # Each visible pair costs a product of head_size for its score and one for its value, in every head.
    attention = 2 * 2 * shape.heads * shape.head_size * visible
    head = 2 * shape.hidden * shape.vocabulary * states
    return Work(
        prompt_tokens=prompts,
        completion_tokens=tokens - prompts,
        states=states,
        visible=visible,
        body_forward=2 * (weights + factors) * tokens,
        body_backward=2 * (adapted if lora else 2 * weights) * tokens,
        attention_forward=attention,
        attention_backward=2 * attention,
        head_forward=head,
        head_backward=head if lora else 2 * head,
    )


def _count(windows: Sequence[int | None]) -> list[tuple[int | None, int]]:
    return [(window, windows.count(window)) for window in dict.fromkeys(windows)]


def visible_pairs(group: Group, window: int | None = None) -> int:
    """(query, key) pairs of a prompt and its branches: a token sees the prompt, and its own branch up to itself."""
    prompt = group.starts[0]
    branches = [end - begin for begin, end in zip(group.starts[:-1], group.starts[1:], strict=True)]
    seen = _seen(prompt, window)
    return seen + sum(_seen(prompt + length, window) - seen for length in branches)


def _seen(length: int, window: int | None) -> int:
    """Pairs of a causal sequence in which each token sees itself and at most `window` - 1 tokens before it."""
    if window is None or length <= window:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window
