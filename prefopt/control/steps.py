"""The table of steps that offline data consists of. M steps of E episodes, O numbers of an observation, A of an action."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from prefopt.errors import DataError


@dataclass(frozen=True)
class Steps:
    """Steps in the order in which they were taken, episode after episode.

    Args:
        observations: [M, O] float32, what the policy sees before the action.
        actions: [M, A] float32; [M] int64 where actions are numbered.
        rewards: [M] float32, of the action.
        advantages: [M] float32, what the labeller holds of the action: A*(s, a) <= 0, exact or a proxy; its negative is the
            step's regret.
        ends: [E] int64, the step behind each episode's last.

    Raises:
        DataError: sizes that contradict each other, an empty episode, or a number that is not finite.
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    advantages: Tensor
    ends: Tensor

    def __post_init__(self) -> None:
        count = len(self.observations)
        if self.observations.dim() != 2 or self.actions.dim() not in (1, 2) or self.ends.dim() != 1 or not len(self.ends):
            raise DataError(
                "steps: expected observations [M, O], actions [M, A] or [M] and episode ends [E], got "
                f"{list(self.observations.shape)}, {list(self.actions.shape)}, {list(self.ends.shape)}."
            )
        for name in ("actions", "rewards", "advantages"):
            found = len(getattr(self, name))
            if found != count:
                raise DataError(f"steps: {count} observations, but {found} {name}; each step has one of each.")
        if int(self.ends[-1]) != count or bool((self.lengths < 1).any()):
            raise DataError(f"steps: episode ends must rise from at least 1 to the number of steps, {count}.")
        for name in ("observations", "actions", "rewards", "advantages"):
            wrong = ~torch.isfinite(getattr(self, name)).view(count, -1).all(-1)
            if wrong.any():
                raise DataError(f"steps: {name} of step {int(wrong.nonzero()[0])} are not finite.")

    def __len__(self) -> int:
        return len(self.observations)

    @cached_property
    def lengths(self) -> Tensor:
        """[E] steps of each episode."""
        return self.ends.diff(prepend=self.ends.new_zeros(1))

    @property
    def starts(self) -> Tensor:
        """[E] the first step of each episode."""
        return self.ends - self.lengths


def joined(parts: Sequence[Steps]) -> Steps:
    """The steps of several tables as one, in order."""
    offsets = [0]
    for part in parts:
        offsets.append(offsets[-1] + len(part))
    columns = {f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Steps) if f.name != "ends"}
    return Steps(**columns, ends=torch.cat([part.ends + offset for part, offset in zip(parts, offsets, strict=False)]))


def steps_key(steps: Steps) -> str:
    """Content address: sha256 over every column, 16 hex digits."""
    digest = hashlib.sha256()
    for column in fields(Steps):
        value = getattr(steps, column.name)
        digest.update(f"{column.name}{tuple(value.shape)}{value.dtype}".encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
