"""Advantage actor-critic: policy gradient, value loss and entropy bonus, each with its own denominator."""

from __future__ import annotations

import losses.entropy
import losses.reinforce
import losses.value  # noqa: F401  these three register the terms
from losses.advantages import gae
from losses.registry import Coefficient, compose

compose(
    "a2c",
    reinforce=1.0,
    value=Coefficient("vf_coef", 0.1),
    entropy=Coefficient("entropy_coef", 0.0),
    advantage=gae,
    defaults={"ppo_epochs": 1},
    doc="""L = reinforce + vf_coef*value + entropy_coef*entropy, advantages by `gae`: PPO without ratio and clip.

    Mnih et al. 2016, section 4 [mnih2016a3c], in its synchronous form; RLAIF (Lee et al. 2023 [lee2023rlaif]) trains with it.
    One pass over each batch of rollouts, since nothing corrects for a policy that has moved.
    """,
)
