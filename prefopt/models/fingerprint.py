"""The content address of a model: what the cache of reference log-probs and the shared stages are keyed by."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


def fingerprint(model: Any) -> str:
    """sha256 over the names, shapes, dtypes and bytes of a model's weights and its configuration, 16 hex digits.

    A weight enters as the digests of its 4 MB pieces, which are hashed side by side; tied weights are hashed once.
    """
    digest = hashlib.sha256()
    config = {k: v for k, v in model.config.to_dict().items() if not k.startswith(("_", "transformers_version"))}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    weights = sorted(model.state_dict().items())
    storages = {name: (value.data_ptr(), value.shape, value.stride(), value.dtype) for name, value in weights}
    own = {storages[name]: value for name, value in weights}
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        pieces = {key: pool.map(_digest, _bytes(value).split(4 << 20)) for key, value in own.items()}
        hashed = {key: b"".join(found) for key, found in pieces.items()}
    for name, value in weights:
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(hashed[storages[name]])
    return digest.hexdigest()[:16]


def _bytes(value: Tensor) -> Tensor:
    return value.detach().contiguous().view(-1).view(torch.uint8)


def _digest(piece: Tensor) -> bytes:
    return hashlib.sha256(piece.cpu().numpy().data).digest()
