"""Users' own functions as judges: of single completions, or of pairs. N pairs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prefopt.data.records import Text
from prefopt.errors import ConfigError, TrainingError
from prefopt.judges.verdicts import BothOrders, PairJudge, from_scorer
from prefopt.rewards.functions import Function, FunctionScorer, import_function

_FORMS = "expected f(prompts, completions) -> scores, or f(prompts, first, second) -> probabilities that first is preferred"


def function_judge(name: str) -> PairJudge:
    """The judge that `module:function` or `path/to/file.py:function` names; importing it runs its code.

    A function of two arguments scores completions; one of three compares pairs, and is asked in both orders.

    Raises:
        ConfigError: no such function, or one of other arguments.
    """
    function = import_function(name)
    try:
        needed = [
            parameter
            for parameter in inspect.signature(function).parameters.values()
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
            and parameter.default is parameter.empty
        ]
    except ValueError as error:
        raise ConfigError(f"judge {name}: its arguments cannot be seen; {_FORMS}.") from error
    if len(needed) == 2:
        return from_scorer(FunctionScorer(function, name))
    if len(needed) == 3:
        return BothOrders(PairFunction(function, name))
    raise ConfigError(f"judge {name}: a function of {len(needed)} arguments; {_FORMS}.")


class PairFunction:
    """A function of plain values that compares pairs; None is a verdict that could not be read."""

    def __init__(self, function: Function, name: str) -> None:
        self._function: Any = function
        self._name = name

    def __call__(self, prompts: Sequence[Text], first: Sequence[str], second: Sequence[str]) -> Tensor:
        """[N] float64; `prefopt.judges.verdicts.check_shares` says whether they are shares.

        Raises:
            TrainingError: the function failed, or returned something else than N numbers.
        """
        plain = [prompt if isinstance(prompt, str) else [dict(turn) for turn in prompt] for prompt in prompts]
        try:
            found = self._function(plain, list(first), list(second))
            values = found.tolist() if hasattr(found, "tolist") else list(found)
            return torch.tensor([float("nan") if value is None else float(value) for value in values], dtype=torch.float64)
        except Exception as error:
            raise TrainingError(
                f"the judge {self._name} failed on {len(prompts)} pairs: {type(error).__name__}: {error}. Make it return a "
                "probability for every pair, or None where there is no verdict."
            ) from error
