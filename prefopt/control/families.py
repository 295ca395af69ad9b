"""Distributions over actions as functions of a network's output. C steps, A numbers of an action or numbered actions.

A family is stateless: the output [C, outputs] holds all its parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

# Between exp(-5) and exp(1): narrower, one action of the data outweighs all others; wider than the box of actions says nothing.
LOG_STD_RANGE = (-5.0, 1.0)


class Family(Protocol):
    """A distribution over actions."""

    @property
    def discrete(self) -> bool:
        """Actions are numbers, not vectors."""

    def outputs(self, action_size: int) -> int:
        """Numbers that the network puts out for a step."""

    def logps(self, output: Tensor, actions: Tensor) -> Tensor:
        """[C] log-probs (densities) of [C, A] or [C] actions."""

    def best(self, output: Tensor) -> Tensor:
        """[C, A] or [C] the likeliest action."""

    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """[C, A] or [C] a random action."""

    def entropies(self, output: Tensor) -> Tensor:
        """[C] entropy of the action, nats."""

    def kls(self, output: Tensor, other: Tensor) -> Tensor:
        """[C] KL(output || other), nats."""


class Categorical:
    """Softmax over numbered actions."""

    discrete = True

    def outputs(self, action_size: int) -> int:
        return action_size

    def logps(self, output: Tensor, actions: Tensor) -> Tensor:
        return output.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)

    def best(self, output: Tensor) -> Tensor:
        return output.argmax(-1)

    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.multinomial(output.softmax(-1), 1, generator=generator).squeeze(-1)

    def entropies(self, output: Tensor) -> Tensor:
        logps = output.log_softmax(-1)
        return -(logps.exp() * logps).sum(-1)

    def kls(self, output: Tensor, other: Tensor) -> Tensor:
        logps = output.log_softmax(-1)
        return (logps.exp() * (logps - other.log_softmax(-1))).sum(-1)


class Gaussian:
    """Independent normal actions around a mean in [-1, 1], with a standard deviation that depends on the state or is fixed.

    Args:
        std: the fixed standard deviation; None lets the network say it.
    """

    discrete = False

    def __init__(self, std: float | None = None) -> None:
        self._std = std

    def outputs(self, action_size: int) -> int:
        return action_size if self._std is not None else 2 * action_size

    def logps(self, output: Tensor, actions: Tensor) -> Tensor:
        mean, log_std = self._parameters(output)
        return -(0.5 * ((actions - mean) * torch.exp(-log_std)).square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)

    def best(self, output: Tensor) -> Tensor:
        return self._parameters(output)[0]

    def sample(self, output: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mean, log_std = self._parameters(output)
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        return mean + noise * log_std.exp()

    def entropies(self, output: Tensor) -> Tensor:
        return (self._parameters(output)[1] + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def kls(self, output: Tensor, other: Tensor) -> Tensor:
        (mean, log_std), (other_mean, other_log_std) = self._parameters(output), self._parameters(other)
        variance = torch.exp(2 * (log_std - other_log_std))
        distance = ((mean - other_mean) * torch.exp(-other_log_std)).square()
        return (0.5 * (variance + distance - 1) + other_log_std - log_std).sum(-1)

    def _parameters(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log of the standard deviation, [C, A] each."""
        if self._std is not None:
            return torch.tanh(output), torch.full_like(output, math.log(self._std))
        mean, raw = output.chunk(2, dim=-1)
        low, high = LOG_STD_RANGE
        return torch.tanh(mean), low + (high - low) * torch.sigmoid(raw)


class MeanSquared(Gaussian):
    """log pi = -||a - mean||^2: a normal of variance 1/2 without its constant (Hejna et al. 2023, appendix [hejna2023cpl])."""

    def __init__(self) -> None:
        super().__init__(math.sqrt(0.5))

    def logps(self, output: Tensor, actions: Tensor) -> Tensor:
        return -F.mse_loss(torch.tanh(output), actions, reduction="none").sum(-1)


FAMILIES: Mapping[str, Family] = {
    "categorical": Categorical(),
    "gaussian": Gaussian(),
    "unit_gaussian": Gaussian(1.0),
    "mean_squared": MeanSquared(),
}
