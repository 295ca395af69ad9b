"""DPO regularised by the likelihood of the chosen completions. P pairs, T tokens."""

from __future__ import annotations

import losses.dpo
import losses.sft  # noqa: F401  these two register the terms
from losses.registry import Coefficient, compose

compose(
    "rpo",
    dpo=1.0,
    sft=Coefficient("nll_coef", 1.0),
    doc="""L = dpo + nll_coef*sft: DPO plus the negative log-likelihood of the chosen completions.

    Pang et al. 2024, eq. 1 [pang2024irpo]; nll_coef 1 is theirs, Llama 3 took 0.2 (Grattafiori et al. 2024
    [grattafiori2024llama3]). It keeps the chosen log-prob from falling together with the rejected one.

    Differences: the likelihood is a mean over all chosen tokens of the step, as TRL's; the paper and OpenRLHF average the
    per-completion means.
    """,
)
