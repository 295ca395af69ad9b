"""What policies on packed batches have in common, whatever a token stands for: named tensors from rows, state, references."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from losses.types import VOCABULARY
from prefopt.errors import ConfigError
from prefopt.packing import PackedBatch


class PackedPolicy(nn.Module, ABC):
    """The policy protocol, given `rows`. Subclasses set the attributes.

    Attributes:
        device, dtype: of the weights.
        dropout: whether training mode switches it on; off, policy and reference agree at step 0.
        lora: adapters that policy and reference share their weights by; None where each has its own.
        reference: what `evaluate` takes full KLs against (TDPO); None where nothing asks for them.
    """

    device: torch.device
    dtype: torch.dtype
    dropout: bool
    lora: Any
    reference: Any

    @abstractmethod
    def rows(self, batch: PackedBatch, quantities: Collection[str], *, reference: Any = None) -> dict[str, Tensor]:
        """Row tensors by quantity: [N, T] `token_logps`, `entropies`, `values`, ...; [N] `rewards`.

        Args:
            batch: on any device.
            quantities: which of them.
            reference: the live reference for KLs over all actions or tokens.
        """

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """See `Policy.parameter_groups`."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """See `Policy.save`."""

    @contextlib.contextmanager
    def adapter(self, name: str | None) -> Iterator[None]:
        """Puts one adapter in force: "policy" is the one that acts, None is none."""
        if name != "policy":
            raise ConfigError(f"this policy has no adapter {name!r}; it has 'policy', and its reference is a model of its own.")
        yield

    def train(self, mode: bool = True) -> PackedPolicy:
        """Dropout stays off unless it was asked for: a noisy log-ratio at step 0 is not zero."""
        return super().train(mode and self.dropout)

    def evaluate(self, batch: PackedBatch, needs: Collection[str], *, adapter: str | None = "policy") -> dict[str, Tensor]:
        """See `Policy.evaluate`.

        Raises:
            ConfigError: KLs to a reference that this policy does not have.
        """
        quantities = sorted({quantity_of(name) for name in needs})
        live = "token_kls" in quantities
        if live and self.reference is None:
            raise ConfigError(
                "the loss needs KLs over all tokens or actions, and this policy has no reference to take them against: build "
                "both by build_policy (control: build_control), or set policy.reference."
            )
        with self.adapter(adapter):
            rows = self.rows(batch, quantities, reference=self.reference if live else None)
        if "token_logps" in rows:
            rows["policy_token_logps"] = rows.pop("token_logps")
        return batch.to(self.device).tensors(needs, rows)

    def trainable_state(self) -> dict[str, Tensor]:
        """Trainable tensors by name; tied weights appear once."""
        return {name: parameter.detach() for name, parameter in self.named_parameters() if parameter.requires_grad}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Copies `state` into the trainable parameters.

        Raises:
            KeyError: names are missing or unexpected: another model, or other adapters.
        """
        own = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        if own.keys() != state.keys():
            raise KeyError(
                f"checkpoint does not fit: missing {sorted(own.keys() - state.keys())[:3]}, "
                f"unexpected {sorted(state.keys() - own.keys())[:3]}."
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])


class Reference:
    """The reference: a model of its own, or a LoRA policy with its adapters off. Never carries gradient.

    Args:
        policy: the frozen model, or the policy whose adapters are switched off for every call.
        weights: content address of everything its log-probs follow from but the token ids; keys their cache.
    """

    def __init__(self, policy: PackedPolicy, weights: str) -> None:
        self._policy = policy
        self._adapter = "policy" if policy.lora is None else None
        self.weights = weights
        self.device, self.dtype = policy.device, policy.dtype

    @property
    def policy(self) -> PackedPolicy:
        """The frozen model, or the policy whose adapters are switched off."""
        return self._policy

    @contextlib.contextmanager
    def frozen(self) -> Iterator[Any]:
        """The model as the reference: adapters and dropout off, without gradient."""
        training = self._policy.training
        self._policy.eval()
        try:
            with self._policy.adapter(self._adapter), torch.no_grad():
                yield self._policy
        finally:
            self._policy.train(training)

    def rows(self, batch: PackedBatch, quantities: Collection[str]) -> dict[str, Tensor]:
        """As `PackedPolicy.rows`."""
        with self.frozen() as model:
            return dict(model.rows(batch, quantities))

    def token_logps(self, batch: PackedBatch) -> Tensor:
        """[N, T] log-probs under the batch's sampling distribution."""
        return self.rows(batch, ["token_logps"])["token_logps"]


def head_names(needs: Collection[str]) -> tuple[str, ...]:
    """The heads that a loss's tensors call for."""
    quantities = {quantity_of(name) for name in needs if VOCABULARY[name].source == "policy"}
    return tuple(head for head, quantity in (("reward", "rewards"), ("value", "values")) if quantity in quantities)


def quantity_of(name: str) -> str:
    """Which row quantity a policy tensor of the vocabulary follows from."""
    if name.endswith("logps"):
        return "token_logps"
    for quantity in ("token_kls", "token_log_sum_sq", "rewards"):
        if name.endswith(quantity):
            return quantity
    return name
