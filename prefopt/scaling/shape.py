"""The sizes of a model, counted on torch's meta device: no weights, no network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from losses.suggestions import suggest_option
from prefopt.errors import ConfigError
from prefopt.models.loading import PACKAGED, read_config

# Shapes of well-known sizes, so that a plan needs no file: those of Llama 3's configurations (Grattafiori et al. 2024).
_LLAMA: Mapping[str, Any] = {"vocab_size": 128_256, "num_key_value_heads": 8, "tie_word_embeddings": False}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama-1b": {
        **_LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        **_LLAMA, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
    },
    "llama-70b": {
        **_LLAMA, "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A decoder. Parameters are counts; those that are tied count once.

    Args:
        name: for people.
        hidden, intermediate, vocabulary: widths of the residual stream, of the MLP, and of the logits.
        layers: how many.
        heads, kv_heads, head_size: of attention.
        parameters: of the whole model.
        layer: of its largest layer.
        linear: of all linear layers but the LM head.
        sides: rows plus columns of these layers, summed: adapters of rank r have r times as many parameters.
    """

    name: str
    hidden: int
    intermediate: int
    vocabulary: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    parameters: int
    layer: int
    linear: int
    sides: int

    @property
    def outside(self) -> int:
        """Parameters outside the layers: embeddings, LM head, last norm."""
        return self.parameters - self.layers * self.layer

    def trained(self, lora: int) -> int:
        """Parameters that move: those of adapters of this rank on every linear layer, or all for rank 0."""
        return lora * self.sides if lora else self.parameters

    @classmethod
    def of(cls, config: Any, name: str = "") -> Shape:
        """Of a configuration of transformers, by building its model without weights.

        Raises:
            ConfigError: it describes no decoder of equal layers.
        """
        text = config.get_text_config()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not layers or not getattr(text, "intermediate_size", None):
            raise ConfigError(
                f"{type(model).__name__} has no layers of attention and MLP that can be counted; name a decoder such as Llama, "
                f"Qwen or Mistral, or one of {', '.join(SHAPES)}."
            )
        head = model.get_output_embeddings()
        matrices = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
        heads = text.num_attention_heads
        return cls(
            name=name or text.model_type,
            hidden=text.hidden_size,
            intermediate=text.intermediate_size,
            vocabulary=text.vocab_size,
            layers=len(layers),
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_size=getattr(text, "head_dim", None) or text.hidden_size // heads,
            parameters=_count(model),
            layer=max(map(_count, layers)),
            linear=sum(m.weight.numel() for m in matrices),
            sides=sum(m.in_features + m.out_features for m in matrices),
        )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def read_shape(name: str) -> Shape:
    """The shape of a model: a name of `SHAPES`, a config.json, or anything that `load_model` takes.

    Raises:
        ConfigError: none of them.
    """
    if name in SHAPES:
        return Shape.of(LlamaConfig(**SHAPES[name]), name)
    try:
        config = read_config(name)
    except ConfigError as error:
        raise ConfigError(
            f"--model: {error} Name a folder with config.json, that file, a GGUF file, {PACKAGED}, or a shape: "
            f"{', '.join(SHAPES)}{suggest_option(name, list(SHAPES))}."
        ) from error
    return Shape.of(config, name)
