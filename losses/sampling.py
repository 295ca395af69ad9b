"""Random tensors for any loss, drawn from the vocabulary's shapes and kinds: what the laws, demonstrations and tests feed it.

Shapes: P pairs, N sequences, T tokens, G prompts, K completions, M mismatched prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import assert_never

import torch
from torch import Tensor

from losses.registry import BoundLoss
from losses.types import VOCABULARY, Kind

SIZES: Mapping[str, int] = {"P": 6, "N": 7, "M": 5, "G": 4, "K": 3, "T": 6}
"""Default sizes; all row counts differ, so a loss that mixes them up fails."""

_SIDES = {"chosen": "chosen_mask", "rejected": "rejected_mask", "mismatched": "mismatched_mask", "group": "group_token_mask"}


def sample_tensors(
    loss: BoundLoss,
    generator: torch.Generator,
    *,
    sizes: Mapping[str, int] = SIZES,
    optional: bool = True,
    ragged: bool = True,
    dtype: torch.dtype = torch.float64,
    extreme: float | None = None,
) -> dict[str, Tensor]:
    """Valid values for every tensor that `loss` names.

    Token log-probs of policy, reference and sampling policy lie near one another; sums and lengths follow from token
    log-probs and masks; where the vocabulary promises no zeros, masked positions hold garbage.

    Args:
        loss: a bound loss; its needs, and with `optional` its optional tensors, are drawn.
        generator: the source of randomness (CPU).
        sizes: size by letter; letters not named keep their default.
        optional: draw optional data too.
        ragged: draw completions of different lengths; otherwise all are as long as the tensors and nothing is masked.
        dtype: of all tensors except booleans and indices.
        extreme: draw policy, reference and old log-probs of tokens from {0, -1, -extreme} independently, and reals from
            {0, -extreme, extreme}.
    """
    wanted = sorted(loss.needs | (loss.optional if optional else frozenset()))
    draw = _Draw(generator, {**SIZES, **sizes}, ragged, dtype, extreme)
    return {name: draw(name) for name in wanted}


def mask_of(name: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The mask among `tensors` that says which positions of tensor `name` count; None if there is none."""
    spec = VOCABULARY[name]
    if "T" in spec.shape:
        return tensors.get(_mask_name(name))
    return tensors.get("group_mask") if spec.shape == ("G", "K") else None


def draw_garbage(kind: Kind, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """What may stand in masked positions (float64): zeros for log-probs, masks and lengths, anything finite otherwise."""
    if kind in ("logps", "token_logps", "mask", "lengths", "boolean", "index", "probability"):
        return torch.zeros(tuple(shape), dtype=torch.float64)
    noise = 5 * torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    return noise.abs() if kind == "nonnegative" else noise


def _mask_name(name: str) -> str:
    return next((mask for side, mask in _SIDES.items() if side in name.split("_")), "mask")


class _Draw:
    """Draws tensors one by one and remembers those that others follow from."""

    def __init__(
        self, generator: torch.Generator, sizes: Mapping[str, int], ragged: bool, dtype: torch.dtype, extreme: float | None
    ) -> None:
        self.generator = generator
        self.sizes = sizes
        self.ragged = ragged
        self.dtype = dtype
        self.extreme = extreme
        self.made: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        if name not in self.made:
            self.made[name] = self._draw(name)
        return self.made[name]

    def _draw(self, name: str) -> Tensor:
        spec = VOCABULARY[name]
        shape = [self.sizes[letter] for letter in spec.shape]
        match spec.kind:
            case "mask":
                return self._mask(name, shape)
            case "token_logps":
                return self._token_logps(name, shape)
            case "logps":
                return self._sum(name)
            case "lengths":
                if not shape:
                    return torch.tensor(self.sizes["T"], dtype=self.dtype)
                return self(_mask_name(name)).sum(-1)
            case "probability":
                return self._choose(shape, [0.0, 0.5, 1.0]) if self.extreme else self._uniform(shape)
            case "boolean":
                # Both labels occur.
                return (
                    (self._uniform(shape) < 0.5)
                    .index_fill_(0, torch.tensor([0]), True)
                    .index_fill_(0, torch.tensor([1]), False)
                )
            case "index":
                return self._index(name, shape)
            case "real" | "nonnegative":
                return self._real(name, shape)
            case _:
                assert_never(spec.kind)

    def _uniform(self, shape: Sequence[int]) -> Tensor:
        return torch.rand(tuple(shape), generator=self.generator, dtype=torch.float64).to(self.dtype)

    def _choose(self, shape: Sequence[int], values: Sequence[float]) -> Tensor:
        picks = torch.randint(len(values), tuple(shape), generator=self.generator)
        return torch.tensor(values, dtype=self.dtype)[picks]

    def _mask(self, name: str, shape: Sequence[int]) -> Tensor:
        """Rows of ones from the left, at least one (two valid completions in a group); the first row is full."""
        if not self.ragged:
            return torch.ones(tuple(shape), dtype=self.dtype)
        least = 2 if name == "group_mask" else 1
        lengths = torch.randint(least, shape[-1] + 1, tuple(shape[:-1]), generator=self.generator)
        lengths.view(-1)[0] = shape[-1]
        mask = (torch.arange(shape[-1]) < lengths[..., None]).to(self.dtype)
        return mask * self("group_mask")[..., None] if name == "group_token_mask" else mask

    def _token_logps(self, name: str, shape: Sequence[int]) -> Tensor:
        mask = self(_mask_name(name))
        if self.extreme:
            return self._choose(shape, [0.0, -1.0, -self.extreme]) * mask
        if name.endswith("log_sum_sq"):
            return (-0.05 - 2 * self._uniform(shape)) * mask
        # One base a side keeps the three models near one another, so ratios and margins are not saturated.
        base = f"base of {_mask_name(name)}"
        if base not in self.made:
            self.made[base] = -0.7 - 2 * self._uniform(shape)
        return (self.made[base] + 0.6 * (self._uniform(shape) - 0.5)) * mask

    def _sum(self, name: str) -> Tensor:
        token_name = name.removesuffix("logps") + "token_logps"
        shape = (*VOCABULARY[name].shape, "T")
        if token_name not in self.made:
            self.made[token_name] = self._token_logps(token_name, [self.sizes[letter] for letter in shape])
        return self.made[token_name].sum(-1)

    def _index(self, name: str, shape: Sequence[int]) -> Tensor:
        if name == "ranks":
            # Valid completions stand first and hold the ranks 0, 1, …; the others come after them.
            keys = self._uniform(shape) + 2 * (1 - self("group_mask"))
            return keys.argsort(-1).argsort(-1)
        return torch.arange(shape[0]) // 2 % 2 if name == "utility_ids" else torch.arange(shape[0]) // 2

    def _real(self, name: str, shape: Sequence[int]) -> Tensor:
        if self.extreme:
            values = self._choose(shape, [0.0, -self.extreme, self.extreme])
        else:
            values = torch.randn(tuple(shape), generator=self.generator, dtype=torch.float64).to(self.dtype)
        if VOCABULARY[name].kind == "nonnegative":
            values = values.abs()
        if "T" in VOCABULARY[name].shape:
            garbage = draw_garbage(VOCABULARY[name].kind, shape, self.generator).to(self.dtype)
            values = torch.where(self(_mask_name(name)).bool(), values, garbage)
        elif VOCABULARY[name].shape == ("G", "K"):
            garbage = draw_garbage(VOCABULARY[name].kind, shape, self.generator).to(self.dtype)
            values = torch.where(self("group_mask").bool(), values, garbage)
        return values
