"""Multilayer perceptrons whose forward and backward on a CPU go a block of rows at a time. C rows, H a layer's width.

Layer by layer over all rows, as autograd goes, every ReLU, dropout and derivative reads and writes megabytes of memory; in
blocks that stay in the cache they cost little beside the matrix products. Dropout takes 16 random bits a number, where
`nn.Dropout` spends more time on random numbers than its layer on arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

# 1024 rows of 256 float32 numbers are 1 MB, about a core's second-level cache; measured flat from 256 to 2048.
BLOCK_ROWS = 1024
_LEVELS = 2**16


class Perceptron(nn.Sequential):
    """Linear, ReLU and dropout for each hidden width, then linear; orthogonal weights, zero biases.

    A `Sequential` of torch's own layers, and run as one on a GPU, or where its input carries gradient.

    Args:
        inputs, hidden, outputs: widths; without hidden ones it is linear.
        dropout: after each hidden layer, in training; on a CPU rounded to a multiple of 2^-16.
        gain: of the last layer's weights.
    """

    def __init__(self, inputs: int, hidden: Sequence[int], outputs: int, *, dropout: float = 0.0, gain: float = 1.0) -> None:
        layers: list[nn.Module] = []
        width = inputs
        for following in hidden:
            layers += [_orthogonal(nn.Linear(width, following), 2**0.5), nn.ReLU()]
            if dropout:
                layers.append(nn.Dropout(dropout))
            width = following
        super().__init__(*layers, _orthogonal(nn.Linear(width, outputs), gain))
        self.dropout = dropout

    def forward(self, rows: Tensor) -> Tensor:
        """[C, inputs] -> [C, outputs]."""
        output: Tensor
        if rows.device.type != "cpu" or rows.requires_grad:
            output = super().forward(rows)
            return output
        linear = [layer for layer in self if isinstance(layer, nn.Linear)]
        dropped = round(self.dropout * _LEVELS) if self.training else 0
        parameters = [*(layer.weight for layer in linear), *(layer.bias for layer in linear)]
        output = _Blocked.apply(rows, dropped, *parameters)
        return output


class _Blocked(Function):
    """Hidden layers are kept as ReLU and mask leave them; dropout's factor 1/(1-p) is in the weights behind."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, dropped: int, *parameters: Tensor) -> Tensor:
        depth = len(parameters) // 2
        biases = parameters[depth:]
        factor = _LEVELS / (_LEVELS - dropped)
        weights = [w if i == 0 or not dropped else w * factor for i, w in enumerate(parameters[:depth])]
        layers = [inputs, *(inputs.new_empty(len(inputs), len(w)) for w in weights)]
        for begin in range(0, len(inputs), BLOCK_ROWS):
            blocks = [layer[begin : begin + BLOCK_ROWS] for layer in layers]
            for i in range(depth):
                torch.addmm(biases[i], blocks[i], weights[i].t(), out=blocks[i + 1])
                if i + 1 < depth:
                    blocks[i + 1].relu_()
                    if dropped:
                        blocks[i + 1].mul_(_kept(blocks[i + 1], dropped))
        ctx.save_for_backward(*layers[:-1], *weights)
        ctx.factor = factor
        return layers[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        depth = len(ctx.saved_tensors) // 2
        layers, weights = ctx.saved_tensors[:depth], ctx.saved_tensors[depth:]
        # Transposed, since the product that gives a wide first layer's gradient is faster that way round.
        d_weights = [w.new_zeros(w.shape[1], w.shape[0]) for w in weights]
        d_biases = [w.new_zeros(len(w)) for w in weights]
        for begin in range(0, len(gradient), BLOCK_ROWS):
            piece = gradient[begin : begin + BLOCK_ROWS]
            for i in reversed(range(depth)):
                below = layers[i][begin : begin + BLOCK_ROWS]
                d_weights[i].addmm_(below.t(), piece)
                d_biases[i] += piece.sum(0)
                if i:  # positive where ReLU and dropout let it through
                    piece = piece @ weights[i]
                    piece = torch.ops.aten.threshold_backward.grad_input(piece, below, 0.0, grad_input=piece)
        for d_weight in d_weights[1:]:
            d_weight *= ctx.factor
        return (None, None, *(d.t().contiguous() for d in d_weights), *d_biases)


def _kept(like: Tensor, dropped: int) -> Tensor:
    """1 with probability 1 - dropped/2^16, else 0; from torch's global generator."""
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[: like.numel()].view(like.shape)
    return torch.ge(bits, dropped - _LEVELS // 2, out=torch.empty_like(like))


def _orthogonal(layer: nn.Linear, gain: float) -> nn.Linear:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer
