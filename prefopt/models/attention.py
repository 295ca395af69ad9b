"""Attention for packed tokens, reached through transformers' own registry of attention functions.

One function is registered; a `Layout`, built once per batch, says who sees whom and how it is computed. For branches the
mask is: same group, key's branch is the prompt or the query's own branch, key not later.
H heads, D head size, S packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from prefopt.models.flex import build_flex_layout
from prefopt.models.group_layout import build_group_layout
from prefopt.packing import Group

IMPLEMENTATION = "prefopt_packed"


class Layout(Protocol):
    """How packed tokens see each other. Built once per batch; `attend` is called once per layer."""

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None,
        dropout: float,
        window: int | None,
    ) -> Tensor:
        """Attention of one layer.

        Args:
            module: the attention module; its `layer_idx` tells layers apart.
            query, key, value: [H, S, D]; key and value may have fewer heads, each shared by H / heads query heads.
            scale: of the scores; None is 1 / sqrt(D).
            dropout: probability of dropping a weight.
            window: keys further back than this are not seen; None sees all.

        Returns:
            [S, H, D].
        """


def build_layout(groups: Sequence[Group], device: torch.device | str = "cpu") -> Layout:
    """The layout of a packed batch: FlexAttention on a CUDA device, products by query block elsewhere."""
    if torch.device(device).type == "cuda":
        return build_flex_layout(groups, device)
    return build_group_layout(groups, device)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: [1, H, S, D] queries -> [1, S, H, D] outputs, as the layout says.

    Raises:
        ValueError: called without a layout, or by a model whose attention needs logit soft-capping.
    """
    if layout is None:
        raise ValueError(
            "packed attention was called without a layout: use prefopt's shared forward, or another implementation."
        )
    if softcap is not None:
        raise ValueError("this model soft-caps attention logits, which packed attention does not support yet.")
    output = layout.attend(module, query[0], key[0], value[0], scale=scaling, dropout=dropout, window=sliding_window)
    return output.unsqueeze(0), None


# No mask function goes with it: the layout travels as a keyword argument, and transformers then makes no [S, S] mask.
AttentionInterface.register(IMPLEMENTATION, packed_attention)
