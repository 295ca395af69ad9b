"""Sequence likelihood calibration. P pairs, T tokens."""

from __future__ import annotations

import losses.sft
import losses.slic_calibration  # noqa: F401  these two register the terms
from losses.registry import Coefficient, compose

compose(
    "slic",
    slic_calibration=1.0,
    sft=Coefficient("nll_coef", 0.1),
    doc="""L = slic_calibration + nll_coef*sft: rank calibration plus the negative log-likelihood of the chosen completions.

    Zhao et al. 2023, eq. 1 [zhao2023slic]; nll_coef 0.1 is that of HALOs. Differences: the paper regularises towards its SFT
    targets, this towards the chosen completions, as HALOs; the likelihood is a mean over all chosen tokens of the step
    (HALOs adds [P] and [P, T] tensors, which fails or broadcasts).
    """,
)
