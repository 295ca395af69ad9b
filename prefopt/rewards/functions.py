"""Users' own functions as rewards: found by name, called with plain values, and checked. N completions."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefopt.data.records import Text
from prefopt.errors import ConfigError, TrainingError
from prefopt.rewards.scorers import RewardError
from prefopt.rewards.timeout import TooSlow, call_within

Function = Callable[[list[Any], list[str]], Any]
"""f(prompts, completions) -> N numbers; a prompt is text, or the list of messages of a conversation."""


def is_function(name: str) -> bool:
    """True for `module:function` and `path/to/file.py:function`."""
    return ":" in name


def import_function(name: str) -> Function:
    """The function that `module:function` or `path/to/file.py:function` names; its module is imported, which runs its code.

    Raises:
        ConfigError: no such module, file or function; or importing it failed.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise ConfigError(f"reward {name!r}: expected module:function or path/to/file.py:function.")
    module = _import_file(Path(place), name) if place.endswith(".py") else _import_module(place, name)
    function = getattr(module, attribute, None)
    if not callable(function):
        what = "has no" if function is None else f"has a {type(function).__name__}, not a function, named"
        raise ConfigError(f"reward {name!r}: {place} {what} {attribute!r}. It should be f(prompts, completions) -> numbers.")
    return function


def _import_module(place: str, name: str) -> Any:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is not None and not f"{place}.".startswith(f"{error.name}."):
            raise ConfigError(f"reward {name!r}: importing {place} failed: {error}.") from error
        raise ConfigError(
            f"reward {name!r}: there is no module {place!r} among the installed packages. A file of your own is named by its "
            "path: path/to/file.py:function."
        ) from error
    except Exception as error:
        raise ConfigError(f"reward {name!r}: importing {place} failed: {type(error).__name__}: {error}") from error


def _import_file(path: Path, name: str) -> Any:
    if not path.is_file():
        raise ConfigError(f"reward {name!r}: there is no file {path}.")
    module_name = f"prefopt_reward_{path.stem}_{abs(hash(path.resolve()))}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise ConfigError(f"reward {name!r}: {path} failed: {type(error).__name__}: {error}") from error
    return module


class FunctionScorer:
    """A function as a scorer. What it returns may be a list, a NumPy array or a tensor of N numbers.

    Args:
        function: called with lists; it may change them.
        name: for error messages.
        timeout: seconds that a call may take, and the search for the completion that took so long; 0 waits for ever. A call
            that takes longer is left running in a thread of its own, which ends with the process.
    """

    def __init__(self, function: Function, name: str = "", *, timeout: float = 0.0) -> None:
        self._function = function
        self._timeout = timeout
        self._name = name or getattr(function, "__qualname__", type(function).__name__)

    def __call__(self, prompts: Sequence[Text], completions: Sequence[str]) -> Tensor:
        """[N] float32.

        Raises:
            RewardError: it raises, takes too long, or returns something else than a number, for one completion.
            TrainingError: what it returns is not one number for each completion.
        """
        try:
            found = self._call(prompts, completions)
        except TooSlow:
            raise self._blame_slow(prompts, completions) from None
        except Exception as error:
            raise self._blame(prompts, completions, error) from error
        return self._numbers(found, len(completions))

    def _call(self, prompts: Sequence[Text], completions: Sequence[str], limit: float | None = None) -> Any:
        plain = [prompt if isinstance(prompt, str) else [dict(message) for message in prompt] for prompt in prompts]
        return call_within(self._timeout if limit is None else limit, self._function, plain, list(completions))

    def _blame(self, prompts: Sequence[Text], completions: Sequence[str], error: Exception) -> TrainingError:
        """Which completion it is: the first for which the function fails when it is asked one by one."""
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            try:
                self._call([prompt], [completion])
            except Exception as own:
                failure = f"{self._name} raised {type(own).__name__}: {own}. Its completion is {completion[:80]!r}. "
                return RewardError(index, failure + "Make the function return a number for every text.")
        return TrainingError(
            f"the reward function {self._name} raised {type(error).__name__}: {error}, for {len(completions)} completions "
            "together but for none of them alone. Make it return a number for every text, however many there are."
        )

    def _blame_slow(self, prompts: Sequence[Text], completions: Sequence[str]) -> TrainingError:
        """Which completion it is: the one at which it is when, asked one by one, it has taken as long once more."""
        end = time.monotonic() + self._timeout
        advice = "Make it faster, or raise --reward-timeout."
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            try:
                self._call([prompt], [completion], max(1e-3, end - time.monotonic()))
            except TooSlow:
                failure = f"{self._name} was not done after {self._timeout:g} seconds. Its completion is {completion[:80]!r}. "
                return RewardError(index, failure + advice)
            except Exception as error:
                return self._blame(prompts, completions, error)
        return TrainingError(
            f"the reward function {self._name} was not done with {len(completions)} completions together after "
            f"{self._timeout:g} seconds, but with each alone. {advice}"
        )

    def _numbers(self, found: Any, count: int) -> Tensor:
        if found is None:
            raise TrainingError(f"the reward function {self._name} returned None: return one number for each completion.")
        if hasattr(found, "__array__") or isinstance(found, Tensor):
            array = torch.as_tensor(found)
            if not (array.is_complex() or array.dtype == torch.bool) and array.shape == (count,):
                return array.detach().to("cpu", torch.float32)
            found = array
        if not isinstance(found, Sequence) or isinstance(found, str) or len(found) != count:
            raise TrainingError(
                f"the reward function {self._name} returned {_shape(found)} for {count} completions: return one number for "
                "each completion, in their order."
            )
        for index, value in enumerate(found):
            if not _is_number(value):
                raise RewardError(
                    index,
                    f"{self._name} returned {value!r:.60} ({type(value).__name__}). Make it return a number for every text.",
                )
        return torch.tensor([float(value) for value in found], dtype=torch.float32)


def _is_number(value: Any) -> bool:
    """Booleans are numbers, 0-d arrays too; text that reads like a number is not."""
    if isinstance(value, str) or value is None:
        return False
    try:
        float(value)
    except (TypeError, ValueError, RuntimeError):
        return False
    return True


def _shape(found: Any) -> str:
    if isinstance(found, Tensor):
        return f"an array of shape {list(found.shape)}"
    if isinstance(found, Sequence) and not isinstance(found, str):
        return f"{len(found)} values"
    return f"{found!r:.60} ({type(found).__name__})"
