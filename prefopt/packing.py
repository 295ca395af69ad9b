"""Groups of (prompt, K completions) -> one packed batch in which every real token stands exactly once.

N rows (completions), T longest completion, S packed tokens, C scored (completion) tokens.

    packed:    [ prompt 0 | completion 0a | completion 0b | prompt 1 | completion 1a | ... ]     no padding
    positions: [ 0 1 2    | 3 4           | 3 4 5         | 0 1      | 2 ...         ]           branches restart

A completion sees its prompt and itself. The state that predicts a completion's first token is the prompt's last token,
which all branches of the group share.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, chain, groupby, pairwise

import numpy as np
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
        roles: which rows are which: "chosen_" [P], "rejected_" [P], "" [N], "mismatched_" [M], "group_" [G, K]; -1 where a
            list has no such completion.
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
        found = {"T": self.mask.shape[1]}
        for infix, index in self.roles.items():
            found.update(zip(_LETTERS[infix], index.shape, strict=True))
        return found

    def without_rows(self) -> PackedBatch:
        """The same tokens to encode, but nothing that a loss sees: every tensor has no rows."""
        roles = {name: index[:0] for name, index in self.roles.items()}
        data = {name: value[:0] if value.dim() else value for name, value in self.data.items()}
        return replace(self, roles=roles, data=data, ids=())

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
            select = partial(_select_valid if infix == "group_" else _select, index=index)
            makers["group_token_mask" if infix == "group_" else f"{infix}mask"] = partial(select, self.mask)
            makers[f"{infix}lengths"] = partial(_sum_of, partial(select, self.mask))
            if infix == "group_":
                makers["group_mask"] = partial(select, self.mask.new_ones(self.mask.shape[0]))
            for key, values in rows.items():
                model = key.removesuffix("token_logps")
                if model != key:
                    makers[f"{model}{infix}token_logps"] = partial(select, values)
                    makers[f"{model}{infix}logps"] = partial(_sum_of, partial(select, values))
                else:
                    makers[f"{infix}{key}"] = partial(select, values)
        return makers

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on another device; itself when it is there already. Nothing waits for a GPU."""
        device, here = torch.device(device), self.input_ids.device
        if device.type == here.type and device.index in (None, here.index):
            return self
        support = self.sampling.support
        mappings = (self.roles, self.rows, self.data)
        tensors = [self.input_ids, self.position_ids, self.predict, self.targets, self.scatter, self.last, self.mask]
        tensors += [tensor for mapping in mappings for tensor in mapping.values()]
        sent = iter(send_tensors([*tensors, *([] if support is None else [support])], device))
        return replace(
            self,
            input_ids=next(sent),
            position_ids=next(sent),
            predict=next(sent),
            targets=next(sent),
            scatter=next(sent),
            last=next(sent),
            mask=next(sent),
            roles={name: next(sent) for name in self.roles},
            rows={name: next(sent) for name in self.rows},
            data={name: next(sent) for name in self.data},
            sampling=replace(self.sampling, support=None if support is None else next(sent)),
        )


# The vocabulary's letters of each role's dimensions.
_LETTERS = {"chosen_": "P", "rejected_": "P", "": "N", "mismatched_": "M", "group_": "GK"}

# Kernels read aligned tensors faster, and compiled ones are compiled again when alignment changes.
_ALIGNMENT = 128


def send_tensors(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors on another device, as views of one buffer per type: fifteen small transfers would take fifteen launches.

    To a GPU the buffers are pinned, so that the caller goes on while they travel; from a GPU the caller waits, because a
    transfer under way would be read before it ends.
    """
    sent: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        own = [(number, tensor) for number, tensor in enumerate(tensors) if tensor.dtype == dtype]
        unit = _ALIGNMENT // dtype.itemsize
        begins = list(accumulate((-(-tensor.numel() // unit) * unit for _, tensor in own), initial=0))
        source = own[0][1].device
        to_gpu = device.type == "cuda" and source.type == "cpu"
        buffer = torch.empty(begins[-1], dtype=dtype, device=source, pin_memory=to_gpu)
        for begin, (_, tensor) in zip(begins, own, strict=False):
            buffer[begin : begin + tensor.numel()].copy_(tensor.reshape(-1))
        there = buffer.to(device, non_blocking=to_gpu)
        for begin, (number, tensor) in zip(begins, own, strict=False):
            sent[number] = there[begin : begin + tensor.numel()].view(tensor.shape)
    return [sent[number] for number in range(len(tensors))]


def _select(values: Tensor, index: Tensor) -> Tensor:
    return values[index]


def _select_valid(values: Tensor, index: Tensor) -> Tensor:
    """[G, K] or [G, K, T] values of rows, 0 where the list has no such completion."""
    valid = (index >= 0).to(values)
    return values[index.clamp(min=0)] * valid.view(*valid.shape, *[1] * (values.dim() - 1))


def _sum_of(tokens: Callable[[], Tensor]) -> Tensor:
    return tokens().sum(-1)


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
    groups: list[Group] = []
    own_lengths: list[int] = []
    start = 0
    for example in examples:
        sizes = [len(completion) for completion in example.completion_ids]
        groups.append(Group(start, tuple(accumulate(sizes, initial=len(example.prompt_ids)))))
        own_lengths += sizes
        start += groups[-1].length
    # One entry a group, then one a row, then one a token: no loop over tokens in Python.
    starts = np.array([group.start for group in groups])
    prompts = np.array([group.starts[0] for group in groups])
    counts = np.array([len(group.starts) - 1 for group in groups])
    lengths = np.array(own_lengths)
    ends = lengths.cumsum()
    begins = prompts.cumsum().repeat(counts) + ends - lengths  # packed position of each row's first token
    pieces = chain.from_iterable((example.prompt_ids, *example.completion_ids) for example in examples)
    ids = np.fromiter(chain.from_iterable(pieces), dtype=np.int64, count=start)
    width = int(lengths.max())
    column = np.arange(int(ends[-1])) - (ends - lengths).repeat(lengths)
    own = begins.repeat(lengths) + column
    predict = own - 1
    predict[ends - lengths] = (starts + prompts - 1).repeat(counts)
    positions = np.arange(start) - starts.repeat([group.length for group in groups])
    positions[own] = prompts.repeat(counts).repeat(lengths) + column
    return PackedBatch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        groups=tuple(groups),
        predict=torch.from_numpy(predict),
        targets=torch.from_numpy(ids[own]),
        scatter=torch.from_numpy((np.arange(len(lengths)) * width).repeat(lengths) + column),
        last=torch.from_numpy(begins + lengths - 1),
        mask=torch.from_numpy(np.arange(width) < lengths[:, None]).to(dtype),
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


def mismatched_roles(examples: Sequence[Example]) -> Mapping[str, Tensor]:
    """As `flat_roles`, but for the last completion of each prompt, which belongs to another prompt: KTO's baseline."""
    last = torch.tensor([len(example.completion_ids) for example in examples]).cumsum(0) - 1
    rows = torch.arange(int(last[-1]) + 1)
    return {"": rows[~torch.isin(rows, last)], "mismatched_": last}


def group_roles(examples: Sequence[Example]) -> Mapping[str, Tensor]:
    """[G, K] rows, K the longest list's; -1 behind the end of a shorter one."""
    lengths = torch.tensor([len(example.completion_ids) for example in examples])
    column = torch.arange(int(lengths.max()))
    rows = (lengths.cumsum(0) - lengths).unsqueeze(-1) + column
    return {"group_": torch.where(column < lengths.unsqueeze(-1), rows, -1)}


def split_by_tokens(examples: Iterable[Example], budget: int) -> list[list[Example]]:
    """Consecutive examples in as few parts of at most `budget` packed tokens as possible, the largest as small as possible.

    A single example beyond the budget is a part of its own.
    """
    parts: list[list[Example]] = []
    for too_large, members in groupby(examples, key=lambda example: example.tokens > budget):
        run = list(members)
        parts.extend([[example] for example in run] if too_large else _split_evenly(run, budget))
    return parts


def _split_evenly(examples: list[Example], budget: int) -> list[list[Example]]:
    """`split_by_tokens` of examples that fit the budget, each."""
    before = list(accumulate((example.tokens for example in examples), initial=0))

    def bounds(limit: int) -> list[int]:
        """Where parts begin and end when each takes as many examples as fit `limit`."""
        found = [0]
        while found[-1] < len(examples):
            found.append(bisect_right(before, before[found[-1]] + limit) - 1)
        return found

    fewest = len(bounds(budget))
    least = max(example.tokens for example in examples)  # a smaller limit would hold no part with the largest example
    limit = bisect_left(range(least, budget), True, key=lambda limit: len(bounds(limit)) <= fewest) + least
    return [examples[begin:end] for begin, end in pairwise(bounds(limit))]
