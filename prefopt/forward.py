"""The shared forward: packed batch -> per-row tensors, with the LM head taken on completion positions only, in chunks.

No [tokens, vocabulary] tensor exists in full. What backward needs of a chunk is kept while it fits a fixed budget, and
recomputed beyond it. The backward is written by hand: every quantity's derivative in the log-probs is known, so one pass over
a chunk gives the gradient of the states and of the head. C scored tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from prefopt.packing import PackedBatch, Sampling

# Logits that exist at one time: 2^24 float32 are 67 MB, 341 scored tokens of a 49,152-token vocabulary.
CHUNK_LOGITS = 2**24
# Log-probs that are kept for backward, 268 MB in float32; those beyond cost one more product with the head.
KEEP_LOGITS = 2**26


def token_quantities(
    hidden: Tensor,
    targets: Tensor,
    head: nn.Linear,
    *,
    names: Collection[str],
    sampling: Sampling,
    reference: tuple[Tensor, nn.Linear] | None = None,
    chunk_logits: int = CHUNK_LOGITS,
    keep_logits: int = KEEP_LOGITS,
) -> dict[str, Tensor]:
    """Per scored token quantities that need the vocabulary, chunk by chunk.

    Args:
        hidden: [C, D] states that predict the targets.
        targets: [C] token ids.
        head: states -> logits [C, V].
        names: any of `token_logps`, `entropies`, `token_kls` (needs `reference`), `policy_kls` (needs `reference`),
            `reference_token_logps` (needs `reference`), `token_log_sum_sq`.
        sampling: temperature and nucleus that the log-probs are taken under.
        reference: the reference's states and head, without gradient, for the full-vocabulary KLs: `token_kls` is
            KL(reference || policy) (Zeng 2024, TDPO), `policy_kls` is KL(policy || reference).
        chunk_logits: logits of one chunk.
        keep_logits: log-probs kept for backward.

    Returns:
        [C] float32 (float64 for float64 models) tensors by name.
    """
    names = tuple(names)
    chunk = max(1, chunk_logits // head.weight.shape[0])
    work = _Work(targets, names, sampling, reference, chunk, keep_logits // head.weight.shape[0])
    values: tuple[Tensor, ...] = _ChunkedHead.apply(hidden, head.weight, head.bias, work)
    return dict(zip(names, values, strict=True))


class _Work(NamedTuple):
    """What the chunks share besides the tensors that carry gradient. `chunk`, `keep`: in tokens."""

    targets: Tensor
    names: tuple[str, ...]
    sampling: Sampling
    reference: tuple[Tensor, nn.Linear] | None
    chunk: int
    keep: int

    def logps(self, states: Tensor, weight: Tensor, bias: Tensor | None, piece: slice) -> Tensor:
        """[c, V] log-probs of a chunk."""
        support = None if self.sampling.support is None else self.sampling.support[piece]
        return log_softmax(F.linear(states, weight, bias), self.sampling.temperature, support, self.targets[piece])

    def reference_logps(self, piece: slice) -> Tensor | None:
        """[c, V] log-probs of the reference, if there is one."""
        if self.reference is None:
            return None
        states, head = self.reference
        return self.logps(states[piece].to(head.weight.dtype), head.weight, head.bias, piece)


class _ChunkedHead(Function):
    """([C, D] states, [V, D] weight, [V] bias) -> a [C] tensor for each quantity."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, work: _Work) -> tuple[Tensor, ...]:
        # Products run in the type that autocast asks for; everything behind them in float32 or wider.
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        low = _low(hidden, weight, bias, dtype)
        needed = any(ctx.needs_input_grad)
        parts: list[tuple[Tensor, ...]] = []
        kept: list[Tensor] = []
        for begin in range(0, hidden.shape[0], work.chunk):
            piece = slice(begin, begin + work.chunk)
            logps = work.logps(low[0][piece], low[1], low[2], piece)
            other = work.reference_logps(piece)
            parts.append(tuple(_QUANTITIES[name].value(logps, work.targets[piece], other) for name in work.names))
            if needed and begin + work.chunk <= work.keep:
                kept.append(logps)
        ctx.save_for_backward(hidden, weight, bias, *kept)
        ctx.work, ctx.dtype = work, dtype
        values = tuple(torch.cat(column) for column in zip(*parts, strict=True))
        ctx.mark_non_differentiable(*(v for name, v in zip(work.names, values, strict=True) if name == "reference_token_logps"))
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *kept = ctx.saved_tensors
        work: _Work = ctx.work
        states, matrix, offset = _low(hidden, weight, bias, ctx.dtype)
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        d_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and ctx.needs_input_grad[2] else None
        for number, begin in enumerate(range(0, hidden.shape[0], work.chunk)):
            piece = slice(begin, begin + work.chunk)
            logps = kept[number] if number < len(kept) else work.logps(states[piece], matrix, offset, piece)
            d_logits = _d_logits(logps, work, piece, [gradient[piece] for gradient in gradients])
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            low = d_logits.to(ctx.dtype)
            if d_hidden is not None:
                d_hidden[piece] = low @ matrix
            if d_weight is not None and d_weight.dtype == ctx.dtype:
                d_weight.addmm_(low.mT, states[piece])
            elif d_weight is not None:
                d_weight += low.mT @ states[piece]
        return d_hidden, _cast(d_weight, weight), _cast(d_bias, bias), None


def _low(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _cast(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    return gradient if gradient is None or like is None else gradient.to(like.dtype)


def _d_logits(logps: Tensor, work: _Work, piece: slice, gradients: Sequence[Tensor]) -> Tensor:
    """[c, V] derivative in the logits, from G = the derivative in free log-probs: G - p * sum(G), by the softmax's rows.

    The target's own log-prob has a derivative in one place only, so it never becomes a [c, V] tensor.
    """
    probabilities = logps.exp()
    targets, other = work.targets[piece], work.reference_logps(piece)
    at_target = logps.new_zeros(logps.shape[0])
    dense: Tensor | None = None
    for name, gradient in zip(work.names, gradients, strict=True):
        derivative = _QUANTITIES[name].derivative
        if name == "token_logps":
            at_target = gradient.to(logps.dtype)
        elif derivative is not None:
            part = derivative(logps, probabilities, other).mul_(gradient.unsqueeze(-1))
            dense = part if dense is None else dense.add_(part)
    total = at_target if dense is None else at_target + dense.sum(-1)
    result = probabilities.mul_(-total.unsqueeze(-1))
    if dense is not None:
        result.add_(dense)
    result.scatter_add_(-1, targets.unsqueeze(-1), at_target.unsqueeze(-1))
    return result if work.sampling.temperature == 1.0 else result.div_(work.sampling.temperature)


def log_softmax(logits: Tensor, temperature: float, support: Tensor | None, targets: Tensor) -> Tensor:
    """[C, V] log-probs of the sampling distribution, in float32 or wider.

    Args:
        support: [C, ceil(V/8)] packed nucleus or None. A target outside it counts as inside: it was drawn, and only the
            rounding of another kernel can have put it out.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    if support is not None:
        inside = unpack_bits(support, logits.shape[-1])
        inside = inside.scatter(-1, targets.unsqueeze(-1), True)
        # A finite floor instead of -inf: 0 * -inf in an entropy or KL would be NaN. exp(-1e4) is 0.
        logits = logits.masked_fill(~inside, -1e4)
    return F.log_softmax(logits, dim=-1)


def pack_bits(inside: Tensor) -> Tensor:
    """[C, V] bool -> [C, ceil(V/8)] uint8."""
    return torch.from_numpy(np.packbits(inside.cpu().numpy(), axis=-1, bitorder="little"))


def unpack_bits(packed: Tensor, size: int) -> Tensor:
    """[C, ceil(V/8)] uint8 -> [C, V] bool, on the tensor's device."""
    shifts = torch.arange(8, device=packed.device, dtype=torch.uint8)
    bits = (packed.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(-2)[..., :size].bool()


class _Quantity(NamedTuple):
    """A number per scored token.

    Args:
        value: ([c, V] log-probs, [c] targets, [c, V] reference log-probs or None) -> [c].
        derivative: ([c, V] log-probs, probabilities, reference log-probs or None) -> [c, V], the derivative of the value in
            log-probs that are taken as free; a new tensor. None: it is sparse (the target's log-prob) or zero.
    """

    value: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    derivative: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None


def _target_logps(logps: Tensor, targets: Tensor, _: Tensor | None) -> Tensor:
    return logps.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _entropy(logps: Tensor, _: Tensor, __: Tensor | None) -> Tensor:
    return -(logps.exp() * logps).sum(-1)


def _d_entropy(logps: Tensor, probabilities: Tensor, _: Tensor | None) -> Tensor:
    return (logps + 1).mul_(probabilities).neg_()


def _log_sum_sq(logps: Tensor, _: Tensor, __: Tensor | None) -> Tensor:
    return (2 * logps).logsumexp(-1)


def _d_log_sum_sq(logps: Tensor, _: Tensor, __: Tensor | None) -> Tensor:
    return (2 * logps).softmax(-1).mul_(2)


def _reference_logps(_: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
    return _target_logps(_known(reference), targets, None)


def _forward_kl(logps: Tensor, _: Tensor, reference: Tensor | None) -> Tensor:
    return (_known(reference).exp() * (_known(reference) - logps)).sum(-1)


def _d_forward_kl(_: Tensor, __: Tensor, reference: Tensor | None) -> Tensor:
    return _known(reference).exp().neg_()


def _reverse_kl(logps: Tensor, _: Tensor, reference: Tensor | None) -> Tensor:
    return (logps.exp() * (logps - _known(reference))).sum(-1)


def _d_reverse_kl(logps: Tensor, probabilities: Tensor, reference: Tensor | None) -> Tensor:
    return (logps - _known(reference)).add_(1).mul_(probabilities)


def _known(reference: Tensor | None) -> Tensor:
    if reference is None:
        raise ValueError("this quantity needs the live reference: pass `reference`.")
    return reference


_QUANTITIES = {
    "token_logps": _Quantity(_target_logps, None),
    "entropies": _Quantity(_entropy, _d_entropy),
    "token_log_sum_sq": _Quantity(_log_sum_sq, _d_log_sum_sq),
    "token_kls": _Quantity(_forward_kl, _d_forward_kl),
    "policy_kls": _Quantity(_reverse_kl, _d_reverse_kl),
    "reference_token_logps": _Quantity(_reference_logps, None),
}


def scatter_all(batch: PackedBatch, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """[C] quantities -> [N, T] rows."""
    return {name: batch.scatter_tokens(value) for name, value in values.items()}
