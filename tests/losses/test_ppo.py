"""The PPO sum: its terms, and what a coefficient of 0 takes away."""

from __future__ import annotations

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
