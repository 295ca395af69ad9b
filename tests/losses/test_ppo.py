"""The PPO sum: its terms, and what a coefficient of 0 takes away."""

from __future__ import annotations

import math

import pytest
import torch

from losses import get
from losses.advantages import gae
from losses.sampling import sample_tensors


def test_ppo_terms_and_needs() -> None:
    ppo = get("ppo")
    assert ppo.advantage is gae
    default = ppo.bind()
    assert [(term.name, term.coefficient) for term in default.terms] == [("ppo_policy", 1.0), ("value", 0.1)]
    assert "entropies" not in default.needs, "no entropies are computed for a bonus of 0"
    assert "entropies" in ppo.bind(entropy_coef=0.01).needs
    critic_free = ppo.bind(vf_coef=0.0)
    assert critic_free.needs == {"policy_token_logps", "old_token_logps", "advantages", "mask"}


def test_ppo_flags_reach_their_terms() -> None:
    bound = get("ppo").bind(clip_high=0.5, value_clip=None, entropy_coef=0.01)
    keywords = {term.name: dict(term.keywords) for term in bound.terms}
    assert keywords["ppo_policy"]["clip_high"] == 0.5
    assert keywords["value"] == {"value_clip": None}
    outputs = bound(sample_tensors(bound, torch.Generator().manual_seed(0)))
    assert set(outputs) == {"ppo_policy", "value", "entropy"}


def test_ppo_declaration() -> None:
    """Advantages by `gae`, a value loss of 0.1, no entropy bonus, clips of 0.2."""
    assert get("ppo").bind().hyper == {
        "clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "length_norm": "token",
        "vf_coef": 0.1, "value_clip": 0.2, "entropy_coef": 0.0,
    }  # fmt: skip
    assert get("ppo").defaults == {}


def test_ppo_closed_form() -> None:
    """One token, ratio 1.1, A = 2: -2.2; value 0.5*(1 - 3)^2 = 2 times 0.3; entropy -0.7 times 0.5."""
    one = {
        "policy_token_logps": math.log(1.1) - 1, "old_token_logps": -1.0, "advantages": 2.0, "values": 1.0, "old_values": 0.9,
        "returns": 3.0, "entropies": 0.7, "mask": 1.0,
    }  # fmt: skip
    tensors = {name: torch.tensor([[value]], dtype=torch.float64) for name, value in one.items()}
    bound = get("ppo").bind(vf_coef=0.3, entropy_coef=0.5)
    outputs = bound(tensors)
    objective = sum(term.coefficient * outputs[term.name].mean().item() for term in bound.terms)
    assert objective == pytest.approx(-2.2 + 0.3 * 2 - 0.5 * 0.7)
