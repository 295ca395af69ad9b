"""Keys and values of prompts, padded side by side: every step of decoding reads them, and only rows that are left hold seats.

G prompts of a shelf, K samples of a prompt, P padded prompt length, h key-value heads, m query heads to each, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Prompts are encoded in parts of about this many tokens: matrices are large enough, activations still small.
PREFILL_TOKENS = {"cpu": 4096, "gpu": 32768}
# A shelf may hold this many times its real prompt tokens: every step reads the padding, every shelf adds calls.
_MAX_PADDING = 1.2


def part_tokens(device: torch.device) -> int:
    """Of one pass of prefill."""
    return PREFILL_TOKENS["cpu" if device.type == "cpu" else "gpu"]


class Shelf:
    """Prompts of similar length, with their keys and values side by side.

    Args:
        prompts: G token sequences.
        counts: samples of each prompt; none is zero.
        device: of the buffers.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], counts: Sequence[int], device: torch.device) -> None:
        self.prompts = prompts
        self.lengths = torch.tensor([len(ids) for ids in prompts], device=device)  # [G]
        self.width = max(len(ids) for ids in prompts)
        self.padded = min(len(ids) for ids in prompts) < self.width
        self.keys: dict[int, Tensor] = {}  # layer -> [G, h, P, D]
        self.values: dict[int, Tensor] = {}
        self._seat(list(counts))

    def _seat(self, counts: list[int]) -> None:
        """Rows stand prompt by prompt. Where prompts have unequal counts, rows are lent seats in a [G, K] grid."""
        self.counts, self.most = counts, max(counts)
        device = self.lengths.device
        self.owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(device)  # [rows] prompt
        self.seats: Tensor | None = None  # [rows] of G * K
        self.sitters: Tensor | None = None  # [G * K] row of each seat; any row where nobody sits
        if min(counts) < self.most:
            seats = [prompt * self.most + k for prompt, count in enumerate(counts) for k in range(count)]
            sitters = torch.zeros(len(counts) * self.most, dtype=torch.long)
            sitters[seats] = torch.arange(len(seats))
            self.seats, self.sitters = torch.tensor(seats, device=device), sitters.to(device)

    @property
    def rows(self) -> int:
        return sum(self.counts)

    def by_prompt(self, rows: Tensor) -> Tensor:
        """[rows, h, m, X] -> [G, h, K * m, X]."""
        if self.most == 1:
            return rows
        grid = (rows if self.sitters is None else rows[self.sitters]).unflatten(0, (-1, self.most))
        return grid.transpose(1, 2).flatten(2, 3)

    def by_row(self, grid: Tensor) -> Tensor:
        """[G, h, K * m, X] -> [rows, h, m, X]."""
        if self.most == 1:
            return grid
        rows = grid.unflatten(2, (self.most, -1)).transpose(1, 2).flatten(0, 1)
        return rows if self.seats is None else rows[self.seats]

    def keep(self, stay: Tensor) -> None:
        """Drops rows, and the prompts that are left without any. `stay` is [rows] bool on the CPU."""
        counts = torch.zeros(len(self.counts), dtype=torch.long).index_add(0, self.owner.cpu(), stay.long())
        kept = counts.nonzero().squeeze(-1)
        if kept.numel() < len(self.counts):
            index = kept.to(self.lengths.device)
            self.lengths = self.lengths[index]
            # A shelf gets no narrower: its longest prompts may be gone, but a new width would copy more than it saves.
            self.padded = int(self.lengths.min()) < self.width
            for buffers in (self.keys, self.values):
                for layer, tensor in buffers.items():
                    buffers[layer] = tensor[index]
        self._seat(counts[kept].tolist())


def build_shelves(prompts: Sequence[Sequence[int]], counts: Sequence[int], device: torch.device) -> list[Shelf]:
    """Consecutive prompts share a shelf while it stays almost full; they should come sorted by length."""
    limit = part_tokens(device)
    shelves: list[Shelf] = []
    begin = real = longest = 0
    for end, ids in enumerate(prompts):
        real, longest = real + len(ids), max(longest, len(ids))
        padded = longest * (end + 1 - begin)
        # On a GPU a step is bound by its launches: one shelf, whatever its padding, up to the size of a part.
        full = padded > limit if device.type != "cpu" else padded > min(limit, _MAX_PADDING * real + 256)
        if full and end > begin:
            shelves.append(Shelf(prompts[begin:end], counts[begin:end], device))
            begin, real, longest = end, len(ids), len(ids)
    return [*shelves, Shelf(prompts[begin:], counts[begin:], device)]
