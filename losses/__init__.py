"""Pure preference losses on log-prob tensors. Needs torch and einops only.

    from losses import dpo_loss
    dpo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta=0.1).mean()

Modules of this package are found, not listed: every function that a module registers is importable from here.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING

from losses.registry import BoundLoss, Coefficient, Loss, RegistrationError, UnknownName, compose, get, names, register
from losses.types import VOCABULARY, LossOutput, Max

IS_PREFOPT = True  # tells prefopt that this is its own package and not a foreign module of the same name

__all__ = [
    "VOCABULARY", "BoundLoss", "Coefficient", "Loss", "LossOutput", "Max", "RegistrationError", "UnknownName",
    "compose", "get", "names", "register",
]  # fmt: skip

if TYPE_CHECKING:

    def __getattr__(name: str) -> Callable[..., LossOutput]: ...  # type checkers cannot see what the loop below finds


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
for _name in names():
    for _term in get(_name).terms:
        globals()[_term.function.__name__] = _term.function
