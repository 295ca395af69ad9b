"""What the strategies of several processes have in common."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from prefopt.errors import ConfigError
from prefopt.models.protocol import Policy
from prefopt.parallel.group import Group
from prefopt.parallel.strategy import Strategy
from prefopt.parallel.watch import Watch


class Processes(Strategy):
    """Several processes, each with a watch on the others."""

    def __init__(self, watch: Watch) -> None:
        super().__init__(Group(watch))
        self._watch = watch

    def prepare(self, policy: Policy) -> None:
        """See `Strategy.prepare`. Rank 0 draws as a single process does; the dropout of the others must be another one."""
        super().prepare(policy)
        if not self.leads:
            torch.manual_seed(torch.initial_seed() + self.communicator.rank)

    def at_step(self, step: int) -> None:
        """See `Strategy.at_step`."""
        self._watch.at_step(step)

    def first(self) -> AbstractContextManager[None]:
        """See `Strategy.first`; the others wait as long as rank 0 is heard of."""
        return self._watch.first()


def as_module(policy: Any) -> nn.Module:
    """The policy, which torch.distributed has to know as a module.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(policy, nn.Module):
        raise ConfigError(f"a {type(policy).__name__} is no torch module, so it trains in one process only: strategy single.")
    return policy
