"""Proximal policy optimization: policy loss, value loss and entropy bonus, each with its own denominator."""

from __future__ import annotations

import losses.entropy
import losses.ppo_policy
import losses.value  # noqa: F401  these three register the terms
from losses.advantages import gae
from losses.registry import Coefficient, compose

compose(
    "ppo",
    ppo_policy=1.0,
    value=Coefficient("vf_coef", 0.1),
    entropy=Coefficient("entropy_coef", 0.0),
    advantage=gae,
    doc="""L = ppo_policy + vf_coef*value + entropy_coef*entropy, on rollouts with advantages by `gae`.

    Schulman et al. 2017, eq. 9 [schulman2017ppo]. The entropy bonus is off by default, as in RLHF practice; then no
    entropies are computed.
    """,
)
