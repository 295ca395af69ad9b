"""Flags of the command line, made from what declares them: signatures of losses and the dataclasses of options.

Nothing here lists a loss, an option or a default.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, get_type_hints

import torch
from cyclopts import CoercionError, Group, Parameter, Token

from losses.declaration import argument_help
from losses.sampling import sample_tensors
from prefopt.algorithms import Algorithm, Setting
from prefopt.errors import ConfigError
from prefopt.options import Options

# Set from elsewhere: the order of rows follows --seed.
_HIDDEN = frozenset({"seed"})


@dataclass(frozen=True)
class Flag:
    """One flag: `name` in Python's spelling, `group` the heading of its help."""

    name: str
    annotation: Any
    default: Any
    help: str
    group: str


def hyper_flags(algorithm: Algorithm) -> list[Flag]:
    """The hyper-parameters of an algorithm, with the defaults of their papers."""
    group = f"{algorithm.name} options"
    return [Flag(flag.name, flag.annotation, flag.default, _sentence(flag.help), group) for flag in algorithm.flags.values()]


def option_flags(**defaults: Any) -> list[Flag]:
    """Every field of the option dataclasses; `defaults` replace those of the dataclasses."""
    return [flag for part, kind in get_type_hints(Options).items() for flag in field_flags(kind, part.capitalize(), **defaults)]


def field_flags(kind: type, group: str, **defaults: Any) -> list[Flag]:
    """The fields of one dataclass of options; `defaults` replace its own."""
    hints, help_lines = get_type_hints(kind), argument_help(inspect.getdoc(kind) or "")
    flags = []
    for item in fields(kind):
        if item.name not in _HIDDEN:
            assert item.default is not MISSING
            help_line = _sentence(help_lines.get(item.name, ""))
            flags.append(Flag(item.name, hints[item.name], defaults.get(item.name, item.default), help_line, group))
    return flags


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def make_command(
    run: Callable[..., int | None], flags: Sequence[Flag], first_group: str = "", positional: inspect.Parameter | None = None
) -> Callable[..., int | None]:
    """A function for cyclopts whose signature holds `flags`; it calls `run` with those that were given.

    Raises:
        ConfigError: one name twice, as when a loss takes the name of a common option.
    """
    names = [flag.name for flag in flags]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        owners = " and ".join(repr(flag.group) for flag in flags if flag.name == twice[0])
        raise ConfigError(f"the flag {twice[0]!r} is in {owners}; rename the hyper-parameter of the loss.")
    headings = dict.fromkeys([*([first_group] if first_group else []), *(flag.group for flag in flags)])
    groups = {name: Group(name, sort_key=index) for index, name in enumerate(headings)}
    parameters = [] if positional is None else [positional]
    for flag in flags:
        # What is off has no --no- form.
        negative = "" if flag.default is False else None
        parameter = Parameter(
            help=flag.help,
            group=groups[flag.group],
            show_default=_shown(flag.default),
            negative=negative,
            converter=_whole_number if flag.annotation in (int, int | None) else None,
        )
        of_flag = inspect.Parameter(flag.name, inspect.Parameter.KEYWORD_ONLY, default=flag.default)
        parameters.append(of_flag.replace(annotation=Annotated[flag.annotation, parameter]))

    def command(*args: Any, **values: Any) -> int | None:
        return run(*args, **values)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _whole_number(annotation: Any, tokens: Sequence[Token]) -> int | None:
    """cyclopts would silently cut 2.5 to 2."""
    text = tokens[0].value
    if annotation is not int and text.lower() in ("none", "null"):
        return None
    try:
        return int(text)
    except ValueError:
        raise CoercionError(msg=f"{tokens[0].keyword or tokens[0].source} is {text!r}; expected a whole number.") from None


def _shown(default: Any) -> Any:
    """How help shows a default: a tuple as the words one would type, and nothing where nothing is set."""
    if default is None or default is False or default in ("", ()):
        return False
    return (lambda value: " ".join(map(str, value))) if isinstance(default, tuple) else True


def parameter_defaults() -> Parameter:
    """What all flags share: `--data a b` reads two values, and there are no --no- or --empty- forms of lists."""
    return Parameter(consume_multiple=True, negative_iterable=(), negative_none=())


def import_paths(tokens: Iterable[str]) -> list[str]:
    """The files of `--import FILE...`, which must be known before sub-commands can be built."""
    return option_values(tokens, "--import")


def option_values(tokens: Iterable[str], name: str) -> list[str]:
    """The values of an option before anything is parsed: `name value...` and `name=value`."""
    found: list[str] = []
    reading = False
    for token in tokens:
        if token.startswith("-"):
            reading = token == name
            if token.startswith(f"{name}="):
                found.append(token.removeprefix(f"{name}="))
        elif reading:
            found.append(token)
    return found


def import_flag(group: str) -> Flag:
    """`--import FILE`, which is read by `import_paths` and stands here for help and parsing."""
    parameter = Parameter(name="--import")
    return Flag("imports", Annotated[tuple[str, ...], parameter], (), "Python files of your own that register losses.", group)


def check_values(setting: Setting) -> Setting:
    """The setting, after its loss has seen tensors: a number out of range is found before any data is read.

    Raises:
        ConfigError: the loss refuses a hyper-parameter.
    """
    try:
        setting.loss(sample_tensors(setting.loss, torch.Generator().manual_seed(0)))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return setting
