"""Rollouts shared out between processes: each samples and scores those of its prompts, and every one gets all results.

What follows them (whitening, controllers, the order of minibatches) is then the same code on the same numbers everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from prefopt.communicator import Communicator
from prefopt.generate import Sample

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """Which of G groups (prompts) of K rows each this rank takes: every world_size-th.

    Args:
        communicator: of the ranks.
        groups: G.
        per_group: K.
    """

    communicator: Communicator
    groups: int
    per_group: int = 1

    @property
    def own_groups(self) -> list[int]:
        """Places of this rank's groups."""
        return self._groups_of(self.communicator.rank)

    def own(self, rows: Sequence[T]) -> list[T]:
        """This rank's among G*K rows."""
        return [rows[i] for i in self._rows_of(self.communicator.rank)]

    def join(self, own: Tensor) -> Tensor:
        """[own rows, ...] of each rank -> [G*K, ...] on every rank. Where the other sizes differ, zeros are put behind."""
        if self.communicator.world_size == 1:
            return own
        parts = self.communicator.gather(own)
        sizes = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
        joined = own.new_zeros(self.groups * self.per_group, *sizes)
        for rank, part in enumerate(parts):
            missing = [size - held for size, held in zip(sizes, part.shape[1:], strict=True)]
            joined[self._rows_of(rank)] = F.pad(part, [width for size in reversed(missing) for width in (0, size)])
        return joined

    def join_samples(self, own: Sequence[Sample]) -> list[Sample]:
        """The samples of all ranks."""
        if self.communicator.world_size == 1:
            return list(own)
        lengths = self.join(torch.tensor([len(sample.ids) for sample in own], dtype=torch.long)).tolist()
        finished = self.join(torch.tensor([sample.finished for sample in own], dtype=torch.bool)).tolist()
        ids = self.join(_padded([torch.tensor(sample.ids) for sample in own], torch.zeros(0, 0, dtype=torch.long))).tolist()
        nuclei = [sample.support for sample in own if sample.support is not None]
        support = self.join(_padded(nuclei, torch.zeros(len(own), 0, 0, dtype=torch.uint8)))
        return [
            Sample(tuple(row[:length]), done, support[i, :length] if support.numel() else None)
            for i, (row, length, done) in enumerate(zip(ids, lengths, finished, strict=True))
        ]

    def _groups_of(self, rank: int) -> list[int]:
        return list(range(rank, self.groups, self.communicator.world_size))

    def _rows_of(self, rank: int) -> list[int]:
        return [group * self.per_group + k for group in self._groups_of(rank) for k in range(self.per_group)]


def _padded(rows: Sequence[Tensor], nothing: Tensor) -> Tensor:
    """[length, ...] rows as [rows, longest, ...]; `nothing` where there are none."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True) if rows else nothing
