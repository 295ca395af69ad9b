"""Products of few rows with a large weight, as decoding makes them, on a CPU.

For up to 64 rows the BLAS of a CPU computes W X' faster than X W': 1.2 to 3 times on 2 threads, and never slower
(`python -m benchmarks.rollouts` shows what it is worth). The numbers are the same up to the order of summation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEW_ROWS = 64


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `F.linear`: [..., I] x [O, I] -> [..., O]; few rows on a CPU are computed transposed, without gradient."""
    if x.device.type != "cpu" or x.numel() > FEW_ROWS * x.shape[-1] or torch.is_grad_enabled() or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    rows = x.flatten(0, -2).mT
    product = weight @ rows if bias is None else torch.addmm(bias.unsqueeze(-1), weight, rows)
    return product.mT.unflatten(0, x.shape[:-1])


@contextlib.contextmanager
def few_rows(model: nn.Module) -> Iterator[None]:
    """The model's linear layers use `linear` while this lasts."""
    layers: list[Any] = [module for module in model.modules() if type(module) is nn.Linear and "forward" not in vars(module)]
    for layer in layers:
        layer.forward = partial(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)
