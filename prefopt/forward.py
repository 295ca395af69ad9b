"""The shared forward: packed batch -> per-row tensors, with the LM head taken on completion positions only, in chunks.

No [tokens, vocabulary] tensor exists in full: a chunk's logits are recomputed in backward. C scored tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from prefopt.packing import PackedBatch, Sampling

# Logits that exist at one time: 2^25 float32 are 134 MB, 682 scored tokens of a 49,152-token vocabulary.
CHUNK_LOGITS = 2**25
# Below this size (4 MB) keeping the logits for backward is cheaper than computing them twice.
KEEP_LOGITS = 2**20

Head = Callable[[Tensor], Tensor]


def token_quantities(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    *,
    names: Collection[str],
    sampling: Sampling,
    vocabulary: int,
    reference: tuple[Tensor, Head] | None = None,
    chunk_logits: int = CHUNK_LOGITS,
) -> dict[str, Tensor]:
    """Per scored token quantities that need the vocabulary, chunk by chunk.

    Args:
        hidden: [C, D] states that predict the targets.
        targets: [C] token ids.
        head: states -> logits [C, V].
        names: any of `token_logps`, `entropies`, `token_kls` (needs `reference`), `policy_kls` (needs `reference`),
            `reference_token_logps` (needs `reference`), `token_log_sum_sq`.
        sampling: temperature and nucleus that the log-probs are taken under.
        vocabulary: V, which sets how many tokens make a chunk.
        reference: the reference's states and head, without gradient, for the full-vocabulary KLs: `token_kls` is
            KL(reference || policy) (Zeng 2024, TDPO), `policy_kls` is KL(policy || reference).

    Returns:
        [C] float32 (float64 for float64 models) tensors by name.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in names}

    def chunk(states: Tensor, ids: Tensor, support: Tensor | None, other: Tensor | None) -> tuple[Tensor, ...]:
        logps = log_softmax(head(states), sampling.temperature, support, ids)
        other_logps = None
        if other is not None and reference is not None:
            with torch.no_grad():
                other_logps = log_softmax(reference[1](other), sampling.temperature, support, ids)
        return tuple(_QUANTITIES[name](logps, ids, other_logps) for name in names)

    chunk_tokens = max(1, chunk_logits // vocabulary)
    recompute = torch.is_grad_enabled() and hidden.shape[0] * vocabulary > min(KEEP_LOGITS, chunk_logits)
    for begin in range(0, hidden.shape[0], chunk_tokens):
        piece = slice(begin, begin + chunk_tokens)
        support = None if sampling.support is None else sampling.support[piece]
        other = None if reference is None else reference[0][piece]
        if recompute:
            values = checkpoint(
                chunk, hidden[piece], targets[piece], support, other, use_reentrant=False, preserve_rng_state=False
            )
        else:
            values = chunk(hidden[piece], targets[piece], support, other)
        for name, value in zip(names, values, strict=True):
            parts[name].append(value)
    return {name: torch.cat(values) for name, values in parts.items()}


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


def _target_logps(logps: Tensor, targets: Tensor, _: Tensor | None) -> Tensor:
    return logps.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _entropy(logps: Tensor, _: Tensor, __: Tensor | None) -> Tensor:
    return -(logps.exp() * logps).sum(-1)


def _log_sum_sq(logps: Tensor, _: Tensor, __: Tensor | None) -> Tensor:
    return (2 * logps).logsumexp(-1)


def _reference_logps(_: Tensor, targets: Tensor, reference: Tensor | None) -> Tensor:
    assert reference is not None
    return _target_logps(reference, targets, None)


def _forward_kl(logps: Tensor, _: Tensor, reference: Tensor | None) -> Tensor:
    assert reference is not None
    return (reference.exp() * (reference - logps)).sum(-1)


def _reverse_kl(logps: Tensor, _: Tensor, reference: Tensor | None) -> Tensor:
    assert reference is not None
    return (logps.exp() * (logps - reference)).sum(-1)


_QUANTITIES: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "token_logps": _target_logps,
    "entropies": _entropy,
    "token_log_sum_sq": _log_sum_sq,
    "token_kls": _forward_kl,
    "policy_kls": _reverse_kl,
    "reference_token_logps": _reference_logps,
}


def scatter_all(batch: PackedBatch, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """[C] quantities -> [N, T] rows."""
    return {name: batch.scatter_tokens(value) for name, value in values.items()}
