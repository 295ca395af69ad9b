"""The A2C sum: its terms and coefficients, what a coefficient of 0 takes away, one pass over a rollout."""

from __future__ import annotations

import pytest
import torch

from losses import get
from losses.advantages import gae
from losses.laws import measure
from losses.sampling import sample_tensors


def test_a2c_declaration() -> None:
    a2c = get("a2c")
    assert a2c.advantage is gae
    assert a2c.defaults == {"ppo_epochs": 1}
    default = a2c.bind()
    assert [(term.name, term.coefficient) for term in default.terms] == [("reinforce", 1.0), ("value", 0.1)]
    assert default.hyper == {"length_norm": "token", "vf_coef": 0.1, "value_clip": 0.2, "entropy_coef": 0.0}
    assert default.needs == {"policy_token_logps", "advantages", "mask", "values", "old_values", "returns"}
    assert a2c.bind(vf_coef=0.0).needs == {"policy_token_logps", "advantages", "mask"}
    assert a2c.bind(entropy_coef=0.5).needs == default.needs | {"entropies"}


def test_a2c_closed_form() -> None:
    """One token: -A log pi = 2*3 = 6; value 0.5*(1 - 3)^2 = 2 times 0.3; entropy -0.7 times 0.5."""
    one = {
        "policy_token_logps": -3.0, "advantages": 2.0, "values": 1.0, "old_values": 0.9, "returns": 3.0, "entropies": 0.7,
        "mask": 1.0,
    }  # fmt: skip
    tensors = {name: torch.tensor([[value]], dtype=torch.float64) for name, value in one.items()}
    bound = get("a2c").bind(vf_coef=0.3, entropy_coef=0.5)
    outputs = bound(tensors)
    objective = sum(term.coefficient * outputs[term.name].mean().item() for term in bound.terms)
    assert objective == pytest.approx(6 + 0.3 * 2 - 0.5 * 0.7)


def test_a2c_gradient_reaches_each_head_by_its_own_term() -> None:
    bound = get("a2c").bind(vf_coef=0.3, entropy_coef=0.5, value_clip=None)
    tensors = sample_tensors(bound, torch.Generator().manual_seed(0))
    heads = {"policy_token_logps", "values", "entropies"}
    leaves = {name: tensor.requires_grad_(name in heads) for name, tensor in tensors.items()}
    gradients = measure(bound, [leaves], leaves).gradients
    share = leaves["mask"] / leaves["mask"].sum()
    torch.testing.assert_close(gradients["policy_token_logps"], -leaves["advantages"] * share)
    torch.testing.assert_close(gradients["values"], 0.3 * (leaves["values"] - leaves["returns"]).detach() * share)
    torch.testing.assert_close(gradients["entropies"], -0.5 * share)
