"""Decoding with static key-value buffers: a prompt is encoded once, its K samples read its keys side by side.

Prefill packs the prompts without padding, as training does, and keeps what each layer's attention sees; a decode step is a
packed sequence of one token per row. Both are layouts of the packed attention, so every model that trains can decode.

R rows (samples), G prompts of a shelf, K samples of a prompt, P padded prompt length, T limit of new tokens, H query heads,
h key-value heads, m = H / h, D head size, S packed tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prefopt.errors import ConfigError
from prefopt.models.attention import Layout, build_layout
from prefopt.models.causal_lm import CausalLMPolicy
from prefopt.models.shelves import Shelf, build_shelves, part_tokens
from prefopt.packing import Group


@dataclass(frozen=True)
class PrefillLayout:
    """Causal attention within each prompt, as in training, that also puts keys and values on their shelves.

    Args:
        inner: attention of the packed prompts.
        places: shelf and [G, P] packed position of each of its tokens, 0 where padded.
    """

    inner: Layout
    places: Sequence[tuple[Shelf, Tensor]]

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None,
        dropout: float,
        window: int | None,
    ) -> Tensor:
        """See `Layout.attend`.

        Raises:
            ConfigError: the attention module does not say which layer it is, or two share a layer.
        """
        layer = _layer(module)
        # Under autocast rotated queries and keys are float32, to be rounded in the product: here once for all steps.
        query, key = query.to(value.dtype), key.to(value.dtype)
        for shelf, index in self.places:
            if layer in shelf.keys:
                raise ConfigError(
                    f"{type(module).__name__}: two attention calls say that they are layer {layer}; decoding keeps the keys "
                    "of one attention a layer. Models that share attention between layers cannot be sampled from."
                )
            for buffers, tensor in ((shelf.keys, key), (shelf.values, value)):
                buffers[layer] = tensor[:, index].transpose(0, 1).contiguous()
        return self.inner.attend(module, query, key, value, scale=scale, dropout=dropout, window=window)


class DecodeLayout:
    """Attention of one new token per row to its prompt's keys on the shelf and to the row's own earlier tokens.

    All rows are equally far. On a CPU a step reads what is filled; on a GPU (`static`) all shapes stay the same and the step
    is a tensor on the device, so that nothing waits for the host.

    Args:
        shelves: filled by prefill; the packed rows stand in their order.
        limit: T.
        static: constant shapes.
        device: of the buffers.
    """

    def __init__(self, shelves: list[Shelf], limit: int, static: bool, device: torch.device) -> None:
        self.shelves = shelves
        self.limit = limit
        self.static = static
        self.device = device
        self.keys: dict[int, Tensor] = {}  # layer -> [R, h, T, D]
        self.values: dict[int, Tensor] = {}
        self.step: int | Tensor = torch.zeros(1, dtype=torch.long, device=device) if static else 0
        self._hidden: dict[tuple[int, int | None], Tensor | None] = {}

    def advance(self) -> None:
        """To the next token."""
        self.step += 1
        self._hidden.clear()

    def keep(self, stay: Tensor) -> None:
        """Drops rows. `stay` is [R] bool on the CPU."""
        index = stay.nonzero().squeeze(-1).to(self.device)
        filled = int(self.step)
        for buffers in (self.keys, self.values):
            for layer, tensor in buffers.items():
                # Within the buffer that is there: rows only move towards its front.
                tensor[: len(index), :, :filled] = tensor[index, :, :filled]
                buffers[layer] = tensor[: len(index)]
        left = []
        for shelf, part in zip(self.shelves, stay.split([s.rows for s in self.shelves]), strict=True):
            if part.any():
                if not part.all():
                    shelf.keep(part)
                left.append(shelf)
        self.shelves = left
        self._hidden.clear()

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None,
        dropout: float,
        window: int | None,
    ) -> Tensor:
        """See `Layout.attend`. Without dropout: decoding draws from the policy as it is scored."""
        heads, rows, size = query.shape
        layer, shared = _layer(module), key.shape[0]
        own_keys = self._write(self.keys, layer, key.to(value.dtype))  # [R, h, t, D]
        own_values = self._write(self.values, layer, value)
        queries = query.transpose(0, 1).reshape(rows, shared, heads // shared, size)
        queries = queries * (size**-0.5 if scale is None else scale)
        own = queries @ own_keys.transpose(-1, -2)  # [R, h, m, t]
        own_hidden = self._own_hidden(window)
        if own_hidden is not None:
            own = own.masked_fill(own_hidden, -torch.inf)
        outputs, begin = [], 0
        for number, shelf in enumerate(self.shelves):
            end = begin + shelf.rows
            prompt_keys, prompt_values = shelf.keys[layer], shelf.values[layer]
            scores = shelf.by_row(shelf.by_prompt(queries[begin:end]) @ prompt_keys.transpose(-1, -2))  # [rows, h, m, P]
            hidden = self._prompt_hidden(number, shelf, window)
            if hidden is not None:
                scores = scores.masked_fill(hidden, -torch.inf)
            # One softmax over the prompt and the row's own tokens, in float32 or wider as in transformers.
            joint = torch.cat([scores, own[begin:end]], dim=-1)
            weights = joint.softmax(-1, dtype=torch.promote_types(joint.dtype, torch.float32)).to(prompt_values.dtype)
            of_prompt, of_own = weights.split([scores.shape[-1], own.shape[-1]], dim=-1)
            read = shelf.by_row(shelf.by_prompt(of_prompt) @ prompt_values)
            outputs.append(read + of_own @ own_values[begin:end])
            begin = end
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return joined.flatten(1, 2)

    def _write(self, buffers: dict[int, Tensor], layer: int, new: Tensor) -> Tensor:
        """Appends [h, R, D] in place; what may be read of the buffer, [R, h, t, D]."""
        shared, rows, size = new.shape
        if layer not in buffers:
            # On a CPU untouched pages of an empty buffer cost nothing; a static one is read in full, and NaN would spread.
            make = new.new_zeros if self.static else new.new_empty
            buffers[layer] = make(rows, shared, self.limit, size)
        buffer = buffers[layer]
        if isinstance(self.step, Tensor):
            buffer.index_copy_(2, self.step, new.transpose(0, 1).unsqueeze(2))
            return buffer
        buffer[:, :, self.step] = new.transpose(0, 1)
        return buffer[:, :, : self.step + 1]

    def _own_hidden(self, window: int | None) -> Tensor | None:
        """[t] True where a row's own token is not seen; None where all are."""
        if isinstance(self.step, int) and (window is None or self.step < window):
            return None
        if (-1, window) not in self._hidden:
            age = self.step - torch.arange(self.limit if self.static else int(self.step) + 1, device=self.device)
            self._hidden[-1, window] = age < 0 if window is None else (age < 0) | (age >= window)
        return self._hidden[-1, window]

    def _prompt_hidden(self, number: int, shelf: Shelf, window: int | None) -> Tensor | None:
        """[rows, 1, 1, P] True where a token of the shelf is padding or out of the window; None where all are seen."""
        if (number, window) not in self._hidden:
            hidden = None
            if shelf.padded or window is not None:
                place = torch.arange(shelf.width, device=self.device)
                lengths = shelf.lengths.unsqueeze(-1)
                hidden = place >= lengths
                if window is not None:
                    hidden = hidden | (lengths + self.step - place >= window)
                hidden = hidden[shelf.owner].unsqueeze(1).unsqueeze(1)
            self._hidden[number, window] = hidden
        return self._hidden[number, window]


class Decoder:
    """Rows of a policy, decoded side by side.

    Args:
        policy: with its adapter as it stands.
        prompts: token ids, each at least one; sorted by length, so that shelves fill.
        counts: samples of each prompt, at least one; rows stand prompt by prompt.
        limit: tokens a row may get.
        static: constant shapes and no waiting for the device; None is yes on a GPU.
    """

    def __init__(
        self,
        policy: CausalLMPolicy,
        prompts: Sequence[Sequence[int]],
        counts: Sequence[int],
        limit: int,
        *,
        static: bool | None = None,
    ) -> None:
        self._policy = policy
        self.static = policy.device.type != "cpu" if static is None else static
        self._layout = DecodeLayout(build_shelves(prompts, counts, policy.device), limit, self.static, policy.device)

    def prefill(self) -> Tensor:
        """[R, V] logits of each row's first token: the prompts in parts of whole shelves, their last states to the head.

        Raises:
            ConfigError: some layer of the model keeps a state that is not the keys and values of the packed attention.
        """
        limit = part_tokens(self._policy.device)
        parts: list[list[Shelf]] = []
        size = 0
        for shelf in self._layout.shelves:
            tokens = sum(len(ids) for ids in shelf.prompts)
            if not parts or size + tokens > limit:
                parts.append([])
                size = 0
            parts[-1].append(shelf)
            size += tokens
        states = torch.cat([self._encode(part) for part in parts])
        self._check_layers()
        owners, begin = [], 0
        for shelf in self._layout.shelves:
            owners.append(shelf.owner + begin)
            begin += len(shelf.counts)
        self._positions = torch.cat([shelf.lengths[shelf.owner] for shelf in self._layout.shelves])
        return self._logits(states)[torch.cat(owners)]

    def step(self, tokens: Tensor) -> Tensor:
        """[R, V] logits of the tokens after `tokens` [R]."""
        states = self._policy.encode(tokens, self._positions, self._layout)
        self._layout.advance()
        self._positions = self._positions + 1
        return self._logits(states)

    def keep(self, stay: Tensor) -> None:
        """Drops the rows where `stay` [R] (on the CPU) is False; the others close up in their order."""
        self._layout.keep(stay)
        self._positions = self._positions[stay.to(self._positions.device)]

    def _encode(self, shelves: Sequence[Shelf]) -> Tensor:
        """[G, D] last states of the shelves' prompts, packed."""
        device = self._policy.device
        prompts = [ids for shelf in shelves for ids in shelf.prompts]
        lengths = torch.tensor([len(ids) for ids in prompts])
        starts = lengths.cumsum(0) - lengths
        groups = [Group(start, (length,)) for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)]
        places, begin = [], 0
        for shelf in shelves:
            first = starts[begin : begin + len(shelf.prompts)].unsqueeze(-1)
            offsets = torch.arange(shelf.width)
            real = offsets < lengths[begin : begin + len(shelf.prompts)].unsqueeze(-1)
            places.append((shelf, torch.where(real, first + offsets, 0).to(device)))
            begin += len(shelf.prompts)
        ids = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        positions = torch.cat([torch.arange(length) for length in lengths.tolist()]).to(device)
        states = self._policy.encode(ids, positions, PrefillLayout(build_layout(groups, device), places))
        return states[(starts + lengths - 1).to(device)]

    def _logits(self, states: Tensor) -> Tensor:
        with self._policy.autocast():
            logits: Tensor = self._policy.head(states)
        return logits

    def _check_layers(self) -> None:
        config = self._policy.base.config.get_text_config()
        kept = len(self._layout.shelves[0].keys)
        if kept != config.num_hidden_layers:
            raise ConfigError(
                f"{type(self._policy.base).__name__} has {config.num_hidden_layers} layers, of which {kept} use the packed "
                "attention; a layer that carries another state from token to token (recurrent, convolutional) cannot be "
                "decoded. Use a model whose layers all have standard attention."
            )


def _layer(module: nn.Module) -> int:
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise ConfigError(
            f"{type(module).__name__} has no layer_idx, so its keys cannot be told from those of other layers; sampling needs "
            "a model whose attention modules carry one, as those of transformers do."
        )
    return int(layer)
