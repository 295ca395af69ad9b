"""Linear heads over a causal LM's last hidden states: values, rewards, and what is asked of the LM's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prefopt.errors import ConfigError


class Head(nn.Linear):
    """A scalar head that stays in its own precision under autocast: bf16 values overflow or quantise."""

    def forward(self, states: Tensor) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return super().forward(states.to(self.weight.dtype))


def new_head(name: str, size: int) -> nn.Linear:
    """A fresh "value" or "reward" head over states of this size."""
    if name not in ("value", "reward"):
        raise ConfigError(f"unknown head {name!r}; known: 'value', 'reward'.")
    # A reward's constant cancels in every comparison; without a bias the head is the `score` of transformers' classifiers.
    head = Head(size, 1, bias=name == "value")
    # V = 0 makes the first advantages the rewards themselves; r = 0 starts Bradley-Terry at log 2, where a random direction
    # would be noise that a short training has to unlearn first.
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return head


@torch.no_grad()
def check_lm_head(model: Any) -> None:
    """The shared forward takes logits as head(hidden); architectures that rescale or cap them would be wrong silently.

    Raises:
        ConfigError: this is one of them.
    """
    ids = torch.arange(min(8, model.config.get_text_config().vocab_size), device=next(model.parameters()).device).unsqueeze(0)
    training = model.training
    model.set_attn_implementation("sdpa")
    model.eval()
    hidden = getattr(model, model.base_model_prefix)(input_ids=ids, use_cache=False).last_hidden_state
    expected, got = model(input_ids=ids, use_cache=False).logits, model.get_output_embeddings()(hidden)
    model.train(training)
    if not torch.allclose(expected, got, atol=1e-3, rtol=1e-3):
        raise ConfigError(
            f"{type(model).__name__}: its logits are not its output embedding of its last hidden state (largest difference "
            f"{(expected - got).abs().max():.3g}); logit scaling or soft-capping is not supported by the shared forward."
        )
