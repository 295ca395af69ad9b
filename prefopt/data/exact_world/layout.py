"""The order of prefixes and completions, and sums along the tree that they form.

Shapes: G prompts, C completions, T token limit, S symbols, V = S + 1 (the last id is EOS), N prefixes of 0 to T-1 symbols.
Prefixes stand by length, then alphabetically. Completion i < N is prefix i followed by EOS; the other S^T are the
strings of T symbols that the limit cuts before an EOS, alphabetically. So C = N + S^T.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from prefopt.errors import DataError


class Layout:
    """All completions over `symbols` symbols with at most `limit` tokens, EOS included."""

    def __init__(self, symbols: int, limit: int) -> None:
        self.symbols = symbols
        self.limit = limit
        self.eos = symbols
        # starts[l] is the index of the first string of length l; strings of length `limit` follow the prefixes.
        self.starts = tuple(sum(symbols**shorter for shorter in range(length)) for length in range(limit + 2))
        self.prefixes = self.starts[limit]
        self.completions = self.starts[limit + 1]

    @cached_property
    def ids(self) -> Tensor:
        """Token ids [C, T], EOS where the completion is terminated, padded with EOS: use `mask`."""
        rows = torch.full((self.completions, self.limit), self.eos)
        for length in range(1, self.limit + 1):
            block = slice(self.starts[length], self.starts[length + 1])
            number = torch.arange(self.symbols**length)
            for position in range(length):
                rows[block, position] = number // self.symbols ** (length - 1 - position) % self.symbols
        return rows

    @cached_property
    def symbol_counts(self) -> Tensor:
        """Symbols of each completion, EOS not counted [C]."""
        return (self.ids != self.eos).sum(-1)

    @cached_property
    def terminated(self) -> Tensor:
        """Whether a completion ends by EOS rather than at the limit [C] bool."""
        return torch.arange(self.completions) < self.prefixes

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of each completion, EOS included [C]; what `mask.sum(-1)` is for every loss."""
        return self.symbol_counts + self.terminated.long()

    @cached_property
    def mask(self) -> Tensor:
        """1 on the tokens of each completion, EOS included [C, T] float64."""
        return (torch.arange(self.limit) < self.lengths[:, None]).double()

    @cached_property
    def prefix_of_token(self) -> Tensor:
        """Index of the prefix that each token follows [C, T]; 0 where the mask is 0."""
        parents = torch.zeros(self.completions, self.limit, dtype=torch.long)
        value = torch.zeros(self.completions, dtype=torch.long)
        for position in range(self.limit):
            parents[:, position] = torch.where(self.mask[:, position] > 0, self.starts[position] + value, 0)
            value = value * self.symbols + self.ids[:, position].clamp(max=self.symbols - 1)
        return parents

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """Each completion as text: one letter a symbol, no mark for EOS."""
        return tuple(self.text(row[:count]) for row, count in zip(self.ids.tolist(), self.symbol_counts.tolist(), strict=True))

    def text(self, symbols: Sequence[int]) -> str:
        """Letters for symbol ids."""
        return "".join(chr(ord("a") + symbol) for symbol in symbols)

    def index(self, ids: Sequence[int]) -> int:
        """The completion that these token ids are: EOS-terminated, or as many symbols as the limit allows.

        Raises:
            DataError: anything else, for example an id outside the vocabulary or a string that is not finished.
        """
        terminated = bool(ids) and ids[-1] == self.eos
        body = list(ids[:-1] if terminated else ids)
        expected = self.limit if not terminated else min(len(body), self.limit - 1)
        if len(body) != expected or any(not 0 <= symbol < self.symbols for symbol in body):
            raise DataError(
                f"{list(ids)} is not a completion of this world: expected at most {self.limit - 1} symbols of "
                f"0..{self.symbols - 1} followed by EOS ({self.eos}), or exactly {self.limit} symbols. Sample with a limit of "
                f"{self.limit} tokens."
            )
        value = 0
        for symbol in body:
            value = value * self.symbols + symbol
        return self.starts[len(body)] + value

    def path_sums(self, table: Tensor) -> Tensor:
        """Adds a table's entries along every completion: [G, N, V] -> [G, C]. Differentiable.

        Next-symbol log-probs give log-probs of completions; advantages give the advantage of a completion.
        """
        level = table.new_zeros(table.shape[0], 1)
        finished = []
        for length in range(self.limit):
            here = table[:, self.starts[length] : self.starts[length + 1]]
            finished.append(level + here[:, :, self.eos])
            level = (level[:, :, None] + here[:, :, : self.symbols]).flatten(1)
        return torch.cat([*finished, level], dim=1)

    def path_values(self, table: Tensor) -> Tensor:
        """A table's entry at each token of every completion: [G, N, V] -> [G, C, T], 0 where the mask is 0."""
        return table[:, self.prefix_of_token, self.ids] * self.mask.to(table.dtype)

    def soft_advantages(self, reference_next_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
        """A*(s, a) of the KL-regularised problem by backward induction: [G, N, V] and [G, C] -> [G, N, V].

        V*(s) = beta log sum_a ref(a|s) exp(Q*(s, a) / beta), Q* = the reward where a ends the completion, V* of the next
        prefix otherwise, A* = Q* - V*  (Ziebart 2010 [ziebart2010maxent]; the regret of Hejna et al. 2023
        [hejna2023cpl], section 2). A reference table of zeros is the
        counting measure: the entropy-regularised problem that CPL assumes.
        """
        values = rewards[:, self.prefixes :]
        advantages = torch.empty_like(reference_next_logps)
        for length in reversed(range(self.limit)):
            block = slice(self.starts[length], self.starts[length + 1])
            going_on = values.unflatten(1, (-1, self.symbols))
            q = torch.cat([going_on, rewards[:, block, None]], dim=-1)
            values = beta * torch.logsumexp(reference_next_logps[:, block] + q / beta, dim=-1)
            advantages[:, block] = q - values[..., None]
        return advantages

    def next_logps(self, logps: Tensor) -> Tensor:
        """Next-symbol log-probs of a distribution over completions: [G, C] -> [G, N, V]; the inverse of `path_sums`.

        log p(a|s) is a soft advantage: that of the log-probs as rewards, under the counting measure, at beta 1.
        """
        return self.soft_advantages(logps.new_zeros(logps.shape[0], self.prefixes, self.symbols + 1), logps, 1.0)
