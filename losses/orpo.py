"""Odds-ratio preference optimization. P pairs, T tokens."""

from __future__ import annotations

import losses.odds_ratio
import losses.sft  # noqa: F401  these two register the terms
from losses.registry import Coefficient, compose

compose(
    "orpo",
    sft=1.0,
    odds_ratio=Coefficient("lam", 0.1),
    doc="""L = sft + lam*odds_ratio: the negative log-likelihood of the chosen completions plus lam times the log odds-ratio.

    Hong et al. 2024, eq. 6 [hong2024orpo]; lam 0.1 is theirs for small models. No reference and no separate SFT stage.

    Differences: the likelihood covers completion tokens; TRL's covers prompt and completion of the chosen side.
    """,
)
