"""LoRA adapters (Hu 2021) through peft, with the product of a layer and its adapter as one function.

peft adds an adapter in four further passes over the layer's output, forward and backward. Here the adapter is accumulated
into the output by the matrix product itself, and only the [N, r] projection is kept for backward. Parameters, names, saved
files and switching on and off are peft's own.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from prefopt.errors import ConfigError
from prefopt.models.products import linear


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters on every linear layer of the backbone (Hu 2021)."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0


FIRST = "default"
"""peft's name of an adapter that is saved in the folder itself; further ones lie in folders of their names."""


def add_lora(model: Any, lora: LoRA, more: Sequence[str] = ()) -> Any:
    """The model with adapters in its layers, as peft's model: one named `FIRST`, which is in force, and one for each of `more`.

    Raises:
        ConfigError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError("LoRA needs the 'peft' extra: pip install -e '.[peft]'; or train all weights (no --lora).") from error
    # peft asks for a property that transformers has renamed; nothing is wrong, and nobody can act on the warning.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config)
    for name in more:
        adapted.add_adapter(name, config)
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:  # peft freezes all adapters but the one in force
            parameter.requires_grad_(True)
    fuse_adapters(adapted)
    return adapted


def adapted_layers(model: nn.Module) -> list[Any]:
    """peft's layers, in which adapters are switched."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@contextlib.contextmanager
def switched(layers: Sequence[Any], name: str | None) -> Iterator[None]:
    """The adapter `name` alone in force in peft's `layers`, or none.

    peft's own switches set requires_grad too: a backward pass after the block would leave out what was switched off by then.
    """
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._disable_adapters = name is None
        if name is not None:
            layer._active_adapter = [name]
    try:
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


def fuse_adapters(model: nn.Module) -> None:
    """Gives peft's plain linear layers the forward of this module; all others stay as they are."""
    from peft.tuners.lora import Linear

    module: Any
    for module in model.modules():
        if type(module) is Linear and type(module.get_base_layer()) is nn.Linear:
            module.__class__ = _fused_class()


@functools.cache
def _fused_class() -> type:
    """A class made on first use: peft is optional, and slow to import."""
    from peft.tuners.lora import Linear

    class FusedLinear(Linear):
        """peft's layer: the same state, another forward where the adapter is a single plain one."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            name = _fusible(self, x) if not args and not kwargs else None
            if name is None:
                found: Tensor = super().forward(x, *args, **kwargs)
                return found
            base, first, second = self.get_base_layer(), self.lora_A[name].weight, self.lora_B[name].weight
            product: Tensor = _AdaptedProduct.apply(x, base.weight, base.bias, first, second, self.scaling[name])
            return product

    return FusedLinear


def _fusible(layer: Any, x: Tensor) -> str | None:
    """The name of the one active, plain adapter; None when peft's own forward has to run."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    name: str = layer.active_adapters[0]
    if name not in layer.lora_A or name in layer.lora_variant or layer.lora_B[name].bias is not None:
        return None
    dropout, base = layer.lora_dropout[name], layer.get_base_layer()
    if not (isinstance(dropout, nn.Identity) or not dropout.training) or base.weight.requires_grad:
        return None
    same = x.dtype == base.weight.dtype == layer.lora_A[name].weight.dtype
    return name if same or torch.is_autocast_enabled(x.device.type) else None


class _AdaptedProduct(Function):
    """x W' + b + s (x A') B' for x [..., I], frozen W [O, I] and b [O], trained A [r, I] and B [O, r]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, first: Tensor, second: Tensor, scale: float
    ) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        rows, base, low_a, low_b = (tensor.to(dtype) for tensor in (x.flatten(0, -2), weight, first, second))
        with torch.autocast(kind, enabled=False):
            output = linear(rows, base, None if bias is None else bias.to(dtype))
            projected = rows @ low_a.mT
            output.addmm_(projected, low_b.mT, alpha=scale)
        ctx.save_for_backward(rows, projected, weight, first, second)
        ctx.scale, ctx.shape, ctx.dtype = scale, x.shape, x.dtype
        return output.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, projected, weight, first, second = ctx.saved_tensors
        above = gradients[0].flatten(0, -2).to(rows.dtype)
        inner = (above @ second.to(rows.dtype)).mul_(ctx.scale)  # [N, r]
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = (above @ weight.to(rows.dtype)).addmm_(inner, first.to(rows.dtype)).view(ctx.shape).to(ctx.dtype)
        d_first = (inner.mT @ rows).to(first.dtype)
        d_second = (projected.mT @ above).mul_(ctx.scale).mT.to(second.dtype)
        return d_x, None, None, d_first, d_second, None
