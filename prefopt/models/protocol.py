"""What the trainer knows of a policy and of a batch: nothing about language, packing or devices."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


class Batch(Protocol):
    """One micro-batch. Opaque to the loop but for these."""

    @property
    def ids(self) -> tuple[str, ...]:
        """Record ids, for error messages; none in a batch without rows, which is encoded only to keep ranks together."""

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each dimension letter of the vocabulary."""

    @property
    def tokens(self) -> int:
        """Tokens (or MDP steps) that a forward pass encodes."""

    def tensors(self, names: Collection[str]) -> dict[str, Tensor]:
        """Those of `names` that the batch itself provides: masks, labels, reference log-probs, advantages."""


@runtime_checkable
class Policy(Protocol):
    """A causal LM or a control policy."""

    def evaluate(self, batch: Any, needs: Collection[str], *, adapter: str | None = "policy") -> dict[str, Tensor]:
        """The named tensors whose source is "policy", with gradient.

        Args:
            batch: what the policy's streams yield.
            needs: names of the vocabulary.
            adapter: which adapter to use; None switches adapters off (the reference under LoRA).
        """

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trainable parameters as `{"params": [...], "lr_scale": float, "decay": bool}`."""

    def trainable_state(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold."""

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse; raises KeyError for missing or unexpected names."""

    def train(self, mode: bool = True) -> Any:
        """Training mode: dropout, if the policy has it switched on."""

    def save(self, folder: Path) -> None:
        """Writes the policy in its ecosystem's layout."""


def trainable_parameters(policy: Policy) -> list[nn.Parameter]:
    """Every trainable parameter once, in the order of its groups."""
    return [parameter for group in policy.parameter_groups() for parameter in group["params"]]
