"""Plain values of JSON and YAML as typed ones, checked against annotations: the reader of files that prefopt wrote."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from prefopt.errors import DataError

Record = TypeVar("Record")


def decode(kind: type[Record], raw: Any, where: str) -> Record:
    """One JSON object as a dataclass.

    Args:
        kind: the dataclass.
        raw: what a JSON or YAML file holds.
        where: names the place in errors.

    Raises:
        DataError: a missing or unknown field, or a wrong type.
    """
    if not isinstance(raw, dict):
        raise DataError(f"{where}: expected an object ({kind.__name__}), got {type(raw).__name__}.")
    hints = get_type_hints(kind)
    declared = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(raw.keys() - declared.keys())
    if unknown:
        raise DataError(f"{where}: unknown field {', '.join(unknown)}; {kind.__name__} has {', '.join(declared)}.")
    missing = [n for n, f in declared.items() if n not in raw and f.default is MISSING and f.default_factory is MISSING]
    if missing:
        raise DataError(f"{where}: field {', '.join(missing)} is missing; {kind.__name__} needs it.")
    return kind(**{name: decode_value(hints[name], value, f"{where}: {name}") for name, value in raw.items()})


def decode_value(kind: Any, value: Any, where: str) -> Any:
    """One JSON value as the annotated type; the error names the place."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        return None if value is None else decode_value(next(item for item in arguments if item is not type(None)), value, where)
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(decode_value(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {name: decode_value(arguments[1], item, f"{where}.{name}") for name, item in value.items()}
    if is_dataclass(kind) and isinstance(kind, type):
        return decode(kind, value, where)
    if kind is float and (value is None or (isinstance(value, int | float) and not isinstance(value, bool))):
        return math.nan if value is None else float(value)
    if kind is int and isinstance(value, int | float) and not isinstance(value, bool) and float(value).is_integer():
        return int(value)
    if kind in (str, bool) and isinstance(value, kind):
        return value
    wanted = " or ".join(map(repr, arguments)) if origin is Literal else getattr(origin or kind, "__name__", str(kind))
    raise DataError(f"{where}: expected {wanted}, got {value!r:.80}.")


def unquoted(kind: Any, value: Any) -> Any:
    """What a text says where no text is wanted: YAML and the command line hand over 1e-3 and true as words."""
    if isinstance(value, list | tuple):
        return [unquoted(next(iter(get_args(kind)), Any), item) for item in value]
    if not isinstance(value, str) or kind is str or str in get_args(kind) or value in get_args(kind):
        return value
    if value.lower() in ("none", "null") and type(None) in get_args(kind):
        return None
    with contextlib.suppress(ValueError):
        return float(value)
    return yaml.safe_load(value)
