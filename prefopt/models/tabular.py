"""A table as the policy of the exact world: free logits after every prompt and prefix, so nothing but sampling can go wrong.

A policy that can be any distribution at all tells an algorithm's own error from that of the model it trains. Shapes: G prompts,
N prefixes, V = symbols + 1 next tokens, S packed tokens, R rows that are decoded side by side.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prefopt.data.exact_world import ExactWorld
from prefopt.errors import ConfigError
from prefopt.models.causal_lm import CausalLMPolicy, FrozenReference
from prefopt.models.packed import PackedPolicy
from prefopt.packing import PackedBatch

VALUE_LR_SCALE = 3.0


class TabularPolicy(CausalLMPolicy):
    """Softmax over a row of logits for each prompt and prefix; with the head "value", a free value beside each row.

    A token's "hidden state" is its row of the table (and its value behind it), the head that makes logits of states a constant
    that leaves out the value: the shared forward, its chunks and its full-vocabulary quantities need no case for a table.

    Args:
        world: the prompts and prefixes that rows stand for.
        next_logps: [G, N, V] log-probs that the table starts at.
        heads: "value" or none.

    Raises:
        ConfigError: another head: a reward of whole completions is no entry of this table.
    """

    rows_at_once = 1 << 14
    """Decoded side by side: a row is a few numbers."""

    def __init__(self, world: ExactWorld, next_logps: Tensor, *, heads: Collection[str] = ()) -> None:
        nn.Module.__init__(self)  # of the parent's set-up nothing applies: there is no transformer
        if unknown := sorted(set(heads) - {"value"}):
            raise ConfigError(f"a table has a value for each prefix and no head {unknown[0]!r}: train a language model on it.")
        self.world = world
        self.tokenizer = world.tokenizer
        self.reference = None
        self.lora = None
        self.dropout = self.checkpointing = False
        prompts, prefixes, width = next_logps.shape
        self._numbers = {ids: g for g, ids in enumerate(world.prompt_ids)}
        self.logits = nn.Parameter(next_logps.detach().double().flatten(0, 1).clone())
        self.values = nn.Parameter(self.logits.new_zeros(prompts * prefixes, 1)) if "value" in heads else None
        self.heads = nn.ModuleDict({} if self.values is None else {"value": _LastColumn()})
        self._readout = nn.Linear(width + len(self.heads), width, bias=False).requires_grad_(False)
        self._readout.weight.data = torch.eye(width, width + len(self.heads), dtype=self.logits.dtype)
        self.device, self.dtype = self.logits.device, self.logits.dtype
        self.train(False)

    @property
    def base(self) -> Any:
        """Itself: there is no transformers model underneath."""
        return self

    @property
    def vocabulary(self) -> int:
        return self.logits.shape[1]

    @property
    def head(self) -> nn.Linear:
        """Rows of the table -> logits."""
        return self._readout

    # A table has no adapters, and its reference is a table of its own.
    adapter = PackedPolicy.adapter

    @contextmanager
    def plain_attention(self) -> Iterator[Any]:
        """Itself: nothing to switch."""
        yield self

    def hidden(self, batch: PackedBatch) -> Tensor:
        """[S, V] (with values [S, V + 1]) rows of the table; positions that predict no scored token take the first row.

        Raises:
            ConfigError: a prompt of another world, or a completion beyond this world's limit.
        """
        completions, width = batch.mask.shape
        if width > self.world.layout.limit:
            raise _too_long(width, self.world)
        ids = batch.mask.new_zeros(completions * width, dtype=torch.long)
        ids[batch.scatter] = batch.targets
        prompts = self._prompt_numbers(_prompts(batch)).repeat_interleave(
            torch.tensor([len(group.starts) - 1 for group in batch.groups])
        )
        rows = self._rows(prompts[:, None], self._prefixes(ids.view(completions, width)))
        index = torch.zeros_like(batch.input_ids)
        index[batch.predict] = rows.flatten()[batch.scatter]
        table = self.logits if self.values is None else torch.cat([self.logits, self.values], dim=-1)
        return F.embedding(index, table)

    def next_logps(self) -> Tensor:
        """[G, N, V] log-probs of every next token, without gradient: what `ExactWorld.next_logps` is for a language model."""
        return self.logits.detach().log_softmax(-1).unflatten(0, (len(self._numbers), -1))

    def decoder(self, prompts: Sequence[Sequence[int]], counts: Sequence[int], limit: int) -> TabularDecoder:
        """What `prefopt.generate` walks instead of a transformer's keys and values; arguments as those of `Decoder`."""
        if limit > self.world.layout.limit:
            raise _too_long(limit, self.world)
        numbers = self._prompt_numbers([tuple(ids) for ids in prompts]).repeat_interleave(torch.tensor(list(counts)))
        return TabularDecoder(self, numbers)

    def row_logits(self, prompts: Tensor, prefixes: Tensor) -> Tensor:
        """[R, V] logits after prefixes [R] of prompts [R]."""
        return self.logits[self._rows(prompts, prefixes)]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Nothing decays: a logit of 0 means nothing. Values start at 0 and have to catch up with the policy."""
        groups: list[dict[str, Any]] = [{"params": [self.logits], "lr_scale": 1.0, "decay": False}]
        if self.values is not None:
            groups.append({"params": [self.values], "lr_scale": VALUE_LR_SCALE, "decay": False})
        return groups

    def save(self, folder: Path) -> None:
        """The tables in table.safetensors, the world that they belong to in world.json."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.trainable_state().items()}, folder / "table.safetensors")
        (folder / "world.json").write_text(json.dumps(asdict(self.world.config), indent=2))
        self.tokenizer.save_pretrained(folder)

    def _prompt_numbers(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        unknown = next((ids for ids in prompts if ids not in self._numbers), None)
        if unknown is not None:
            raise ConfigError(
                f"the table has no prompt {unknown}; it has the {len(self._numbers)} prompts of exact world "
                f"{self.world.config.seed} and nothing else."
            )
        return torch.tensor([self._numbers[ids] for ids in prompts])

    def _prefixes(self, ids: Tensor) -> Tensor:
        """[N, T] index of the prefix before each token of completions [N, T]."""
        layout = self.world.layout
        # What follows an EOS is padding, so it does not matter which symbol EOS is taken for.
        symbols = ids.clamp(max=layout.symbols - 1)
        within = torch.zeros_like(symbols)
        for t in range(1, ids.shape[1]):
            within[:, t] = within[:, t - 1] * layout.symbols + symbols[:, t - 1]
        return torch.tensor(layout.starts[: ids.shape[1]]) + within

    def _rows(self, prompts: Tensor, prefixes: Tensor) -> Tensor:
        return prompts * self.world.layout.prefixes + prefixes


class TabularDecoder:
    """Rows of the table, walked side by side: the interface of `prefopt.models.decoding.Decoder`."""

    static = False

    def __init__(self, policy: TabularPolicy, prompts: Tensor) -> None:
        self._policy, self._prompts = policy, prompts
        self._within = torch.zeros_like(prompts)
        self._depth = 0

    def prefill(self) -> Tensor:
        """[R, V] logits of each row's first token."""
        return self._logits()

    def step(self, tokens: Tensor) -> Tensor:
        """[R, V] logits of the tokens after `tokens` [R]; rows that have ended go on as if by another symbol."""
        symbols = self._policy.world.layout.symbols
        self._within = self._within * symbols + tokens.clamp(max=symbols - 1)
        self._depth += 1
        return self._logits()

    def keep(self, stay: Tensor) -> None:
        """Drops the rows where `stay` [R] is False."""
        self._prompts, self._within = self._prompts[stay], self._within[stay]

    def _logits(self) -> Tensor:
        return self._policy.row_logits(self._prompts, self._policy.world.layout.starts[self._depth] + self._within)


def build_tabular(
    world: ExactWorld, next_logps: Tensor, *, heads: Collection[str] = ()
) -> tuple[TabularPolicy, FrozenReference]:
    """A table that starts at `next_logps` [G, N, V], and the frozen table that it starts from."""
    policy, frozen = TabularPolicy(world, next_logps, heads=heads), TabularPolicy(world, next_logps)
    frozen.requires_grad_(False)
    content = repr(world.prompt_ids).encode() + frozen.logits.detach().numpy().tobytes()
    policy.reference = FrozenReference(frozen, hashlib.sha256(content).hexdigest()[:16])
    return policy, policy.reference


class _LastColumn(nn.Module):
    """The value, which stands behind the logits of a row."""

    def forward(self, rows: Tensor) -> Tensor:
        return rows[..., -1:]


def _prompts(batch: PackedBatch) -> list[tuple[int, ...]]:
    ids = batch.input_ids.tolist()
    return [tuple(ids[group.start : group.start + group.starts[0]]) for group in batch.groups]


def _too_long(tokens: int, world: ExactWorld) -> ConfigError:
    limit = world.layout.limit
    return ConfigError(f"the table ends at {limit} tokens, got {tokens}: tokenise and sample with a limit of {limit}.")
