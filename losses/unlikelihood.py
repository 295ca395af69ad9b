"""Unlikelihood training on pairs. P pairs, T tokens."""

from __future__ import annotations

import losses.sft
import losses.unlikelihood_rejected  # noqa: F401  these two register the terms
from losses.registry import Coefficient, compose

compose(
    "unlikelihood",
    sft=1.0,
    unlikelihood_rejected=Coefficient("coef", 1.0),
    doc="""L = sft + coef*unlikelihood_rejected: chosen tokens become likelier, rejected ones less likely, each for itself.

    Welleck et al. 2019, eq. 5 [welleck2019unlikelihood], with the rejected completion's tokens as negative candidates. Both
    terms are means over tokens.
    """,
)
