"""Contrastive preference optimization. P pairs, T tokens."""

from __future__ import annotations

import losses.cpo_preference
import losses.sft  # noqa: F401  these two register the terms
from losses.registry import Coefficient, compose

compose(
    "cpo",
    cpo_preference=1.0,
    sft=Coefficient("nll_coef", 1.0),
    doc="""L = cpo_preference + nll_coef*sft: DPO without a reference plus the likelihood of the chosen completions.

    Xu et al. 2024, eq. 5 [xu2024cpo]. The likelihood stands in for the reference, which holds nothing here. It is a mean over
    all chosen tokens of the step, as TRL's.
    """,
)
