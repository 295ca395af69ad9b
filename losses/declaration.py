"""What a pure function on named tensors declares: its signature, read as tensors and hyper-parameters."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, get_type_hints

from losses.suggestions import suggest
from losses.types import VOCABULARY


class RegistrationError(ValueError):
    """A loss or advantage function whose declaration cannot be used; the message says what to change."""


class HyperParameter(NamedTuple):
    """A keyword-only parameter: its name is the flag, its default the paper's."""

    name: str
    annotation: Any
    default: Any
    help: str


@dataclass(frozen=True)
class Signature:
    """What a pure function on named tensors declares."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    hyper: Mapping[str, HyperParameter]


def read_signature(function: Callable[..., Any], owner: str) -> Signature:
    """Reads tensors and hyper-parameters off a signature.

    Raises:
        RegistrationError: a tensor name outside the vocabulary, a hyper-parameter without default or annotation, or
            `*args`/`**kwargs`.
    """
    required, optional = [], []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            if name not in VOCABULARY:
                raise RegistrationError(
                    f"{owner}: positional parameter {name!r} is not a tensor of the vocabulary{suggest(name, VOCABULARY)}. "
                    f"Hyper-parameters come after `*`. Known tensors: {', '.join(sorted(VOCABULARY))}."
                )
            if parameter.default is parameter.empty:
                required.append(name)
            elif parameter.default is None:
                optional.append(name)
            else:
                raise RegistrationError(
                    f"{owner}: tensor {name!r} has default {parameter.default!r}; only None (optional data) is allowed."
                )
        elif parameter.kind is not parameter.KEYWORD_ONLY:
            raise RegistrationError(f"{owner}: {parameter} hides what the function needs; name each tensor.")
    return Signature(tuple(required), tuple(optional), read_options(function, owner))


def read_options(function: Callable[..., Any], owner: str) -> dict[str, HyperParameter]:
    """The keyword-only parameters of a function as hyper-parameters, with their help from its docstring's `Args:`.

    Raises:
        RegistrationError: one without annotation or default.
    """
    hints = get_type_hints(function)
    help_lines = argument_help(inspect.getdoc(function) or "")
    options = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        if parameter.default is parameter.empty or name not in hints:
            raise RegistrationError(
                f"{owner}: hyper-parameter {name!r} needs an annotation and a default, as in `*, {name}: float = 0.1`."
            )
        options[name] = HyperParameter(name, hints[name], parameter.default, help_lines.get(name, ""))
    return options


def argument_help(doc: str) -> dict[str, str]:
    """The `Args:` section of a docstring (cleaned, as `inspect.getdoc` returns it) as {argument: text}."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)+)", doc, re.MULTILINE)
    found: dict[str, str] = {}
    current = ""
    for line in section.group(1).splitlines() if section else []:
        match = re.match(r"    (\w[\w, ]*): (.*)", line)
        if match:
            current = match.group(1)
            found[current] = match.group(2).strip()
        elif current and line.strip():
            found[current] += " " + line.strip()
    return {name.strip(): text for joined, text in found.items() for name in joined.split(",")}
