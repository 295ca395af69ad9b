"""Groups of (prompt, K completions) -> one packed batch in which every real token stands exactly once.

N rows (completions), T longest completion, S packed tokens, C scored (completion) tokens.

    packed:    [ prompt 0 | completion 0a | completion 0b | prompt 1 | completion 1a | ... ]     no padding
    positions: [ 0 1 2    | 3 4           | 3 4 5         | 0 1      | 2 ...         ]           branches restart

A completion sees its prompt and itself. The state that predicts a completion's first token is the prompt's last token,
which all branches of the group share.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from prefopt.data.records import Example


@dataclass(frozen=True)
class Group:
    """Where one prompt and its branches stand in the packed sequence: branch k is [starts[k], starts[k+1])."""

    start: int
    starts: tuple[int, ...]  # K+1 offsets relative to `start`; starts[0] is the prompt's length

    @property
    def length(self) -> int:
        return self.starts[-1]


@dataclass(frozen=True)
class Sampling:
    """The distribution that rollouts were drawn from, so that log-probs can be taken under it.

    Args:
        temperature: logits are divided by it.
        support: [C, ceil(V/8)] uint8, the packed nucleus of each scored token (bit v set when token v could be drawn);
            None when nothing was cut off.
    """

    temperature: float = 1.0
    support: Tensor | None = None


@dataclass(frozen=True)
class PackedBatch:
    """A packed batch and what is known about its rows.

    Args:
        input_ids: [S] packed token ids.
        position_ids: [S] position of each token within prompt + own branch.
        groups: layout for the attention function.
        predict: [C] packed position whose hidden state predicts the scored token.
        targets: [C] the scored token's id.
        scatter: [C] index of the scored token in a flattened [N, T] tensor.
        last: [N] packed position of each row's last token (where a reward head reads).
        mask: [N, T] 1 on scored tokens. Made from lengths, the only source of masks.
        roles: which rows are which: "chosen_" [P], "rejected_" [P], "" [N], "group_" [G, K].
        rows: tensors per row, [N, T] or [N], by row name (`reference_token_logps`, `old_token_logps`, `scores`).
        data: tensors under their vocabulary name (`soft_labels`, `advantages`, `max_completion_length`).
        ids: record id of each group, for error messages.
        sampling: set for rollouts.
    """

    input_ids: Tensor
    position_ids: Tensor
    groups: tuple[Group, ...]
    predict: Tensor
    targets: Tensor
    scatter: Tensor
    last: Tensor
    mask: Tensor
    roles: Mapping[str, Tensor]
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    data: Mapping[str, Tensor] = field(default_factory=dict)
    ids: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)

    @property
    def tokens(self) -> int:
        """Packed tokens: what the forward pass encodes."""
        return self.input_ids.numel()

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each dimension letter of the vocabulary in this batch."""
        found = {"N": self.mask.shape[0], "T": self.mask.shape[1]}
        if "chosen_" in self.roles:
            found["P"] = self.roles["chosen_"].shape[0]
        if "group_" in self.roles:
            found["G"], found["K"] = self.roles["group_"].shape
        return found

    def scatter_tokens(self, values: Tensor) -> Tensor:
        """[C] values of scored tokens -> [N, T], 0 where the mask is 0. Carries gradient."""
        flat = values.new_zeros(self.mask.numel())
        return flat.index_put((self.scatter,), values).view(self.mask.shape)

    def tensors(self, names: Collection[str], rows: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The tensors among `names` that this batch can provide, with `rows` (a model's outputs) taken into account.

        Names that it cannot provide are left out; the caller knows which of them are optional.
        """
        makers = self._makers({**self.rows, **(rows or {})})
        found = {name: self.data[name] for name in names if name in self.data}
        found.update({name: makers[name]() for name in names if name in makers and name not in found})
        return found

    def _makers(self, rows: Mapping[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
        """How each vocabulary name follows from row tensors: the one place where rows become named tensors."""
        makers: dict[str, Callable[[], Tensor]] = {}
        for infix, index in self.roles.items():
            mask = self.mask[index]
            makers["group_token_mask" if infix == "group_" else f"{infix}mask"] = partial(_same, mask)
            makers[f"{infix}lengths"] = partial(torch.sum, mask, -1)
            for key, values in rows.items():
                model = key.removesuffix("token_logps")
                if model != key:
                    makers[f"{model}{infix}token_logps"] = partial(_select, values, index)
                    makers[f"{model}{infix}logps"] = partial(_select_sum, values, index)
                else:
                    makers[f"{infix}{key}"] = partial(_select, values, index)
        return makers

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on another device."""
        move = partial(torch.Tensor.to, device=device, non_blocking=True)
        support = self.sampling.support
        return replace(
            self,
            input_ids=move(self.input_ids),
            position_ids=move(self.position_ids),
            predict=move(self.predict),
            targets=move(self.targets),
            scatter=move(self.scatter),
            last=move(self.last),
            mask=move(self.mask),
            roles={name: move(index) for name, index in self.roles.items()},
            rows={name: move(values) for name, values in self.rows.items()},
            data={name: move(values) for name, values in self.data.items()},
            sampling=replace(self.sampling, support=None if support is None else move(support)),
        )


def _same(values: Tensor) -> Tensor:
    return values


def _select(values: Tensor, index: Tensor) -> Tensor:
    return values[index]


def _select_sum(values: Tensor, index: Tensor) -> Tensor:
    return values[index].sum(-1)


def pack(
    examples: Sequence[Example],
    *,
    roles: Callable[[Sequence[Example]], Mapping[str, Tensor]],
    rows: Mapping[str, Sequence[Tensor]] | None = None,
    data: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    sampling: Sampling | None = None,
) -> PackedBatch:
    """Packs examples, rows in order: all completions of example 0, then of example 1, ...

    Args:
        examples: prompts and completions as token ids.
        roles: which rows are chosen, rejected, ...; see `pair_roles`, `flat_roles`, `group_roles`.
        rows: for each row name, N tensors: [length] per-token values, or [] values of the whole row.
        data: further tensors under their vocabulary name.
        dtype: of masks and padded row tensors.
        sampling: the distribution that rollouts were drawn from.
    """
    ids: list[int] = []
    positions: list[int] = []
    predict: list[int] = []
    last: list[int] = []
    lengths: list[int] = []
    groups: list[Group] = []
    for example in examples:
        start, prompt = len(ids), len(example.prompt_ids)
        ids.extend(example.prompt_ids)
        positions.extend(range(prompt))
        starts = [prompt]
        for completion in example.completion_ids:
            own = len(ids)
            ids.extend(completion)
            positions.extend(range(prompt, prompt + len(completion)))
            predict.append(start + prompt - 1)
            predict.extend(range(own, own + len(completion) - 1))
            last.append(own + len(completion) - 1)
            lengths.append(len(completion))
            starts.append(starts[-1] + len(completion))
        groups.append(Group(start, tuple(starts)))
    width = max(lengths)
    column = torch.arange(width)
    valid = column < torch.tensor(lengths).unsqueeze(-1)
    scatter = valid.flatten().nonzero().squeeze(-1)
    packed = torch.tensor(ids)
    follows = torch.tensor([p for example in examples for completion in example.completion_ids for p in completion])
    return PackedBatch(
        input_ids=packed,
        position_ids=torch.tensor(positions),
        groups=tuple(groups),
        predict=torch.tensor(predict),
        targets=follows,
        scatter=scatter,
        last=torch.tensor(last),
        mask=valid.to(dtype),
        roles=roles(examples),
        rows={name: _pad(values, width, dtype) for name, values in (rows or {}).items()},
        data=data or {},
        ids=tuple(example.id for example in examples),
        sampling=sampling or Sampling(),
    )


def _pad(values: Sequence[Tensor], width: int, dtype: torch.dtype) -> Tensor:
    if values[0].dim() == 0:
        return torch.stack(list(values)).to(dtype)
    padded = torch.zeros(len(values), width, dtype=dtype)
    for row, value in enumerate(values):
        padded[row, : value.shape[0]] = value
    return padded


def pair_roles(examples: Sequence[Example]) -> Mapping[str, Tensor]:
    """Rows 2i and 2i+1 are the chosen and rejected completion of pair i."""
    chosen = 2 * torch.arange(len(examples))
    return {"chosen_": chosen, "rejected_": chosen + 1}


def chosen_roles(examples: Sequence[Example]) -> Mapping[str, Tensor]:
    """One completion a prompt, to be imitated: SFT."""
    return {"chosen_": torch.arange(len(examples))}


def flat_roles(examples: Sequence[Example]) -> Mapping[str, Tensor]:
    """Every completion is a row of its own: rollouts and unpaired examples."""
    return {"": torch.arange(sum(len(example.completion_ids) for example in examples))}


def group_roles(examples: Sequence[Example]) -> Mapping[str, Tensor]:
    """[G, K] rows; every prompt must have the same K (lists of different lengths are padded by their stream)."""
    counts = {len(example.completion_ids) for example in examples}
    if len(counts) != 1:
        raise ValueError(f"group_roles: every prompt needs the same number of completions, got {sorted(counts)}.")
    return {"group_": torch.arange(len(examples) * counts.pop()).view(len(examples), -1)}


def split_by_tokens(examples: Iterable[Example], budget: int) -> list[list[Example]]:
    """Consecutive examples in parts of at most `budget` packed tokens; a single larger example is a part of its own."""
    parts: list[list[Example]] = []
    used = 0
    for example in examples:
        if not parts or used + example.tokens > budget:
            parts.append([])
            used = 0
        parts[-1].append(example)
        used += example.tokens
    return parts
