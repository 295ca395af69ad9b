"""What a length does to a loss: pairs of losses that agree on completions of one length and part on others."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from losses import get

EQUAL, VARYING = 4, [1, 7, 3, 5]
"""Lengths, of the same mean."""


class Twins(NamedTuple):
    """On completions of `EQUAL` tokens the first loss is `scale` times the second."""

    first: str
    first_options: dict[str, Any]
    second: str
    second_options: dict[str, Any]
    scale: float = 1.0


CLIPS = {"clip_low": 0.2, "clip_high": 0.3}
TWINS = {
    "ipo mean and sum": Twins("ipo", {"tau": 0.3}, "ipo", {"tau": 0.3 / EQUAL, "average_log_prob": False}, 1 / EQUAL**2),
    "dpo_norm and dpo": Twins("dpo_norm", {"beta": 2.0}, "dpo", {"beta": 2.0 / EQUAL}),
    "ld_dpo and dpo": Twins("ld_dpo", {"beta": 0.4, "ld_alpha": 0.3}, "dpo", {"beta": 0.4}),
    "grpo and dapo": Twins("grpo", {**CLIPS, "beta": 0.0}, "dapo", CLIPS),
}


def batch(seed: int, lengths: list[int]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Pairs and rollouts of these lengths (rejected completions have them in the other order), and the policy's tokens."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    leaves = []
    for side, of_side in (("chosen_", lengths), ("rejected_", lengths[::-1]), ("", lengths)):
        mask = (torch.arange(max(lengths)) < torch.tensor(of_side)[:, None]).double()
        tensors |= {f"{side}mask": mask, f"{side}lengths": mask.sum(-1)}
        base = -0.5 - 2 * torch.rand(mask.shape, generator=generator, dtype=torch.float64)
        for model in ("policy", "reference", "old"):
            noise = 0.3 * torch.randn(mask.shape, generator=generator, dtype=torch.float64)
            token_logps = ((base + noise) * mask).requires_grad_(model == "policy")
            tensors |= {f"{model}_{side}token_logps": token_logps, f"{model}_{side}logps": token_logps.sum(-1)}
            leaves += [token_logps] if model == "policy" else []
    # One advantage a completion, as a baseline over the group gives.
    advantages = torch.randn(len(lengths), 1, generator=generator, dtype=torch.float64)
    return {**tensors, "advantages": advantages.expand_as(tensors["mask"])}, leaves


def measured(name: str, options: dict[str, Any], seed: int, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Objective and its gradient by every token of the policy."""
    tensors, leaves = batch(seed, lengths)
    (out,) = get(name).bind(**options)(tensors).values()
    gradients = torch.autograd.grad(out.mean(), leaves, allow_unused=True, materialize_grads=True)
    return out.mean().detach(), torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("twins", TWINS.values(), ids=TWINS)
@settings(max_examples=5)
@given(seed=st.integers(0, 2**31))
def test_lengths_that_are_equal_change_no_more_than_a_scale(twins: Twins, seed: int) -> None:
    value, gradient = measured(twins.first, twins.first_options, seed, [EQUAL] * 4)
    other_value, other_gradient = measured(twins.second, twins.second_options, seed, [EQUAL] * 4)
    torch.testing.assert_close(value, twins.scale * other_value)
    torch.testing.assert_close(gradient, twins.scale * other_gradient)


@pytest.mark.parametrize("twins", TWINS.values(), ids=TWINS)
@settings(max_examples=5)
@given(seed=st.integers(0, 2**31))
def test_lengths_that_vary_change_value_and_direction(twins: Twins, seed: int) -> None:
    """By a hundredth of the value, and by more than 8 degrees (cosine 0.99) of the gradient."""
    value, gradient = measured(twins.first, twins.first_options, seed, VARYING)
    other_value, other_gradient = measured(twins.second, twins.second_options, seed, VARYING)
    assert abs(value - twins.scale * other_value) > 0.01 * abs(value)
    assert torch.cosine_similarity(gradient, other_gradient, dim=0) < 0.99
