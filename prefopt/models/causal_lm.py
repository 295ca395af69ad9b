"""A causal LM of transformers as a policy: shared forward, optional LoRA adapters, optional value and reward heads."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from prefopt.errors import ConfigError
from prefopt.forward import scatter_all, token_quantities
from prefopt.models.attention import IMPLEMENTATION, Layout, build_layout
from prefopt.models.attention_weights import ATTENTION, encode_watched
from prefopt.models.fingerprint import fingerprint
from prefopt.models.heads import check_lm_head, new_head
from prefopt.models.lora import FIRST, LoRA, adapted_layers, add_lora, switched
from prefopt.models.packed import PackedPolicy, Reference
from prefopt.packing import PackedBatch

# A linear head on a frozen-scale feature learns with steps ten times those of the backbone.
HEAD_LR_SCALE = 10.0


class CausalLMPolicy(PackedPolicy):
    """The policy protocol for a Hugging Face causal LM.

    Args:
        model: any causal LM with the standard attention interface; used in place.
        tokenizer: saved beside the model.
        lora: adapters; None trains all weights.
        more_adapters: names of adapters beside the policy's own, for `adapter`.
        heads: any of "value" (a value before each token) and "reward" (one at the last token).
        dropout: keep the model's dropout in training; off by default, so that policy and reference agree at step 0.
        checkpointing: keep only the inputs of the model's layers for backward and compute the layers twice (Chen 2016).

    Attributes:
        reference: what `evaluate` takes full-vocabulary KLs against (TDPO); `build_policy` sets it.

    Raises:
        ConfigError: peft is missing; the model's logits are not its output embedding of its last hidden state; or
            checkpointing was asked for and the model has no layers that can be.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        lora: LoRA | None = None,
        more_adapters: Sequence[str] = (),
        heads: Collection[str] = (),
        dropout: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.reference: FrozenReference | None = None
        self.dropout = dropout
        self.checkpointing = checkpointing
        self.lora = lora
        self.device = next(model.parameters()).device
        self.dtype = next(model.parameters()).dtype
        check_lm_head(model)
        self.model = model if lora is None else add_lora(model, lora, more_adapters)
        self._adapters = {"policy": FIRST} | {name: name for name in more_adapters}
        self._adapted = [] if lora is None else adapted_layers(self.model)
        base = self.base
        self.heads = nn.ModuleDict({name: new_head(name, base.config.hidden_size) for name in sorted(heads)})
        self.heads.to(self.device, torch.float64 if self.dtype == torch.float64 else torch.float32)
        base.set_attn_implementation(IMPLEMENTATION)
        if checkpointing and not any(isinstance(module, GradientCheckpointingLayer) for module in base.modules()):
            raise ConfigError(f"{type(base).__name__} has no layers that can be checkpointed: train it without.")
        self.train(False)

    @property
    def base(self) -> Any:
        """The transformers model, adapters (if any) in its layers."""
        return self.model if self.lora is None else self.model.get_base_model()

    @property
    def vocabulary(self) -> int:
        return int(self.base.config.get_text_config().vocab_size)

    @contextlib.contextmanager
    def adapter(self, name: str | None) -> Iterator[None]:
        """Puts one adapter in force: "policy" is the one that acts, None is none."""
        if name not in (*self._adapters, None):
            known = ", ".join(map(repr, self._adapters))
            raise ConfigError(f"this policy has no adapter {name!r}; it has {known} (and None: adapters off).")
        if name is None and self.lora is None:
            raise ConfigError(
                "adapter=None means the reference under LoRA; a fully fine-tuned policy needs a reference model of its own."
            )
        with switched(self._adapted, None if name is None else self._adapters[name]):
            yield

    @property
    def in_force(self) -> str | None:
        """peft's name of the adapter in force; None where there is none, or adapters are off."""
        layer = self._adapted[0] if self._adapted else None
        return None if layer is None or layer.disable_adapters else str(layer.active_adapters[0])

    @contextlib.contextmanager
    def plain_attention(self) -> Iterator[Any]:
        """The model with transformers' own attention and mask, for padded generation."""
        self.base.set_attn_implementation("sdpa")
        try:
            yield self.model
        finally:
            self.base.set_attn_implementation(IMPLEMENTATION)

    def encode(self, input_ids: Tensor, position_ids: Tensor, layout: Layout) -> Tensor:
        """[S, D] last hidden states of [S] packed tokens that see each other as `layout` says."""
        inner = getattr(self.base, self.base.base_model_prefix)
        with self.autocast(), self._checkpointed():
            output = inner(
                input_ids=input_ids.unsqueeze(0), position_ids=position_ids.unsqueeze(0), use_cache=False, layout=layout
            )
        return output.last_hidden_state[0]

    @contextlib.contextmanager
    def _checkpointed(self) -> Iterator[None]:
        """Layers compute again in backward, if that was asked for.

        Not transformers' own switch: that one asks for training mode, which would switch dropout on.
        """
        layers = [m for m in self.base.modules() if isinstance(m, GradientCheckpointingLayer)] if self.checkpointing else []
        for layer in layers:
            layer.forward = partial(
                checkpoint, self._as_now(layer.forward), use_reentrant=False, preserve_rng_state=self.dropout
            )
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    def _as_now(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward` with the adapter of now, also when backward calls it: another one may be in force by then."""
        if not self._adapted:
            return forward
        name = self.in_force

        def run(*arguments: Any, **keywords: Any) -> Any:
            with switched(self._adapted, name):
                return forward(*arguments, **keywords)

        return run

    def hidden(self, batch: PackedBatch) -> Tensor:
        """[S, D] last hidden states of the packed tokens."""
        return self.encode(batch.input_ids, batch.position_ids, build_layout(batch.groups, batch.input_ids.device))

    @property
    def head(self) -> Any:
        """States -> logits."""
        return self.base.get_output_embeddings()

    def rows(
        self, batch: PackedBatch, quantities: Collection[str], *, reference: FrozenReference | None = None
    ) -> dict[str, Tensor]:
        """Row tensors: [N, T] `values`, the quantities of `forward.token_quantities` and `ATTENTION`; [N] `rewards`.

        Args:
            batch: on any device.
            quantities: which of them.
            reference: the live reference for full-vocabulary KLs.
        """
        batch = batch.to(self.device)
        watched = [name for name in quantities if name in ATTENTION]
        hidden, attention = encode_watched(self.encode, batch, watched) if watched else (self.hidden(batch), {})
        found: dict[str, Tensor] = {}
        for name, position in (("values", batch.predict), ("rewards", batch.last)):
            if name in quantities:
                found[name] = self._head(name)(hidden[position]).squeeze(-1)
        wanted = [name for name in quantities if name not in found and name not in attention]
        if wanted:
            other = None
            if reference is not None:
                other = (reference.hidden(batch)[batch.predict], reference.head)
            with self.autocast():
                found |= token_quantities(
                    hidden[batch.predict],
                    batch.targets,
                    self.head,
                    names=wanted,
                    sampling=batch.sampling,
                    reference=other,
                )
        per_token = {name: value for name, value in found.items() if name != "rewards"}
        return {**found, **attention, **scatter_all(batch, per_token)}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Matrices decay, vectors do not; heads take larger steps."""
        weights = [p for p in self.model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in weights if p.dim() >= 2], "lr_scale": 1.0, "decay": True},
            {"params": [p for p in weights if p.dim() < 2], "lr_scale": 1.0, "decay": False},
            {"params": [p for p in self.heads.parameters() if p.requires_grad], "lr_scale": HEAD_LR_SCALE, "decay": False},
        ]
        return [group for group in groups if group["params"]]

    def save(self, folder: Path) -> None:
        """Model (or adapter), tokenizer and chat template in the Hugging Face layout; heads in heads.safetensors."""
        from safetensors.torch import save_file

        with self.plain_attention():
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        if self.heads:
            save_file(
                {name: value.contiguous() for name, value in self.heads.state_dict().items()}, folder / "heads.safetensors"
            )

    def _head(self, quantity: str) -> nn.Module:
        name = {"values": "value", "rewards": "reward"}[quantity]
        if name not in self.heads:
            raise ConfigError(
                f"the loss needs {quantity!r}, but this policy was built without a {name} head: pass heads=({name!r},)."
            )
        return self.heads[name]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """bf16 for a float32 model on a GPU; nothing on a CPU, where bf16 is emulated and six times slower."""
        if self.device.type == "cuda" and self.dtype == torch.float32:
            return torch.autocast("cuda", torch.bfloat16)
        return contextlib.nullcontext()


class FrozenReference(Reference):
    """A causal LM as the reference."""

    @property
    def head(self) -> Any:
        """States -> logits; called while adapters may be on, which all-linear LoRA keeps off the head."""
        return self._policy.head

    def hidden(self, batch: PackedBatch) -> Tensor:
        """[S, D] last hidden states."""
        with self.frozen() as model:
            return model.hidden(batch)


def build_policy(
    model: Any,
    tokenizer: Any,
    *,
    lora: LoRA | None = None,
    heads: Collection[str] = (),
    dropout: bool = False,
    checkpointing: bool = False,
) -> tuple[CausalLMPolicy, FrozenReference]:
    """A policy that starts at `model`, and the reference it starts from.

    Under LoRA the two share their weights and the reference is the policy with adapters off; otherwise the reference is a
    frozen copy.
    """
    weights = fingerprint(model)
    policy = frozen = CausalLMPolicy(model, tokenizer, lora=lora, heads=heads, dropout=dropout, checkpointing=checkpointing)
    if lora is None:
        frozen = copy.deepcopy(policy, {id(tokenizer): tokenizer})  # a copy's head needs no second check
        frozen.dropout = False
        frozen.heads = nn.ModuleDict()
        frozen.requires_grad_(False)
    policy.reference = FrozenReference(frozen, weights)
    return policy, policy.reference
