"""Hydra's first stage: one backbone learns to speak and to judge. P pairs, T tokens."""

from __future__ import annotations

import losses.bradley_terry
import losses.sft  # noqa: F401  these two register the terms
from losses.registry import Coefficient, compose

compose(
    "hydra_sft",
    sft=1.0,
    bradley_terry=Coefficient("reward_coef", 1.0),
    doc="""L = sft + reward_coef*bradley_terry: the LM head imitates chosen completions while a reward head learns the pairs.

    Santacroce et al. 2023 [santacroce2023hydra]. What comes out is the reference and the reward model of `--hydra joined` and
    `--hydra split` in one: neither is held in memory beside the policy. reward_coef 1 weighs a nat a token against a nat a
    pair; more of it makes a better judge of a worse speaker.

    Differences: the likelihood is a mean over all chosen tokens of the step. Both heads read one forward pass of the pair.
    """,
)
