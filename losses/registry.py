"""Losses by name: a loss's signature is its declaration.

`register` reads a function's signature: positional parameters are tensors of the vocabulary (one with default None is
optional data), keyword-only parameters are hyper-parameters. `compose` makes a weighted sum of registered losses in which
each term keeps its own denominator, and `get("dpo:1.0+sft:0.2")` makes one on the spot. Nothing else lists names, flags,
defaults or needs.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from losses.declaration import HyperParameter, RegistrationError, Signature, read_signature
from losses.suggestions import PEER_NAMES, suggest, suggest_option
from losses.types import LossOutput, check_shapes

LossFunction = Callable[..., LossOutput]


class UnknownName(ValueError):
    """A loss or option that does not exist; the message suggests the nearest that does."""


class Coefficient(NamedTuple):
    """A term's weight that users set by a flag, for example `Coefficient("vf_coef", 0.1)`."""

    flag: str
    default: float


@dataclass(frozen=True)
class Term:
    """One registered function inside a loss: its weight is `scale` times the values of the flags in `coefficients`.

    `flags` maps the user's flag to the function's keyword.
    """

    name: str
    function: LossFunction
    signature: Signature
    coupled: bool
    flags: Mapping[str, str]
    scale: float = 1.0
    coefficients: tuple[Coefficient, ...] = ()


@dataclass(frozen=True)
class BoundTerm:
    """A term with its numbers: calls the pure function on the tensors that it names."""

    name: str
    coefficient: float
    coupled: bool
    needs: frozenset[str]
    optional: frozenset[str]
    function: LossFunction
    keywords: Mapping[str, Any]

    def __call__(self, tensors: Mapping[str, Tensor]) -> LossOutput:
        """The function on those of `tensors` that it names, in float32 or wider.

        Raises:
            KeyError: a required tensor is missing.
            ValueError: a wrong shape, or a hyper-parameter out of range.
        """
        missing = sorted(self.needs - tensors.keys())
        if missing:
            raise KeyError(f"{self.name}: needs {', '.join(missing)}, got {', '.join(sorted(tensors))}.")
        given = {name: _widened(tensors[name]) for name in sorted(self.needs | (self.optional & tensors.keys()))}
        check_shapes(self.name, given)
        return self.function(**given, **self.keywords)


@dataclass(frozen=True)
class BoundLoss:
    """A loss with all hyper-parameters set: what a trainer runs."""

    name: str
    terms: tuple[BoundTerm, ...]
    hyper: Mapping[str, Any]

    @property
    def needs(self) -> frozenset[str]:
        """Names of the tensors that must be provided."""
        return frozenset().union(*(term.needs for term in self.terms))

    @property
    def optional(self) -> frozenset[str]:
        """Names of the tensors that are used when the batch has them."""
        return frozenset().union(*(term.optional for term in self.terms)) - self.needs

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, LossOutput]:
        """Each term's output by term name; the objective is the sum of coefficient * (loss*weight).sum() / W."""
        return {term.name: term(tensors) for term in self.terms}


@dataclass(frozen=True)
class Loss:
    """A registered loss: one term, or several made by `compose`.

    Args:
        name: the key.
        terms: what is summed.
        advantage: the advantage function, for losses on rollouts.
        doc: what it is and where it comes from.
        defaults: values that this algorithm changes among the defaults of its stream and its advantage function.
    """

    name: str
    terms: tuple[Term, ...]
    advantage: Callable[..., Any] | None
    doc: str
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def coupled(self) -> bool:
        return any(term.coupled for term in self.terms)

    @cached_property
    def hyper(self) -> dict[str, HyperParameter]:
        """Every flag of this loss, in the order of its terms."""
        flags: dict[str, HyperParameter] = {}
        for term in self.terms:
            for flag, default in term.coefficients:
                what = f"weight of the {term.name} term; 0 removes it and what it needs."
                flags.setdefault(flag, HyperParameter(flag, float, default, what))
            for flag, keyword in term.flags.items():
                flags[flag] = term.signature.hyper[keyword]._replace(name=flag)
        return flags

    def bind(self, **hyper: Any) -> BoundLoss:
        """Sets hyper-parameters; those not named keep their defaults. Terms with coefficient 0 vanish with their needs.

        Raises:
            UnknownName: an option that this loss does not have, with a suggestion.
            ValueError: no term is left.
        """
        for name in hyper:
            if name not in self.hyper:
                known = ", ".join(self.hyper) or "none"
                raise UnknownName(
                    f"{self.name} has no option {name!r}{suggest_option(name, self.hyper)}. Its options: {known}."
                )
        values = {name: hyper.get(name, parameter.default) for name, parameter in self.hyper.items()}
        bound = []
        for term in self.terms:
            coefficient = term.scale * math.prod(values[flag] for flag, _ in term.coefficients)
            if coefficient == 0:
                continue
            keywords = {keyword: values[flag] for flag, keyword in term.flags.items()}
            needs, optional = frozenset(term.signature.required), frozenset(term.signature.optional)
            bound.append(BoundTerm(term.name, coefficient, term.coupled, needs, optional, term.function, keywords))
        if not bound:
            raise ValueError(f"{self.name}: every term has coefficient 0, so there is nothing to minimise.")
        return BoundLoss(self.name, tuple(bound), values)


_LOSSES: dict[str, Loss] = {}


def register(
    name: str,
    *,
    coupled: bool = False,
    advantage: Callable[..., Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Callable[[LossFunction], LossFunction]:
    """Registers a pure loss function under `name`; the function comes back unchanged.

    Args:
        name: the key, the file's name (or that of its family) and the function's name without `_loss`.
        coupled: the rows interact (a sort or a baseline over the batch): the trainer then evaluates the loss once
            over all micro-batches and ranks.
        advantage: the function that turns `rewards` into `advantages`, for losses on rollouts.
        defaults: as in `Loss`.

    Raises:
        RegistrationError: the name is taken, or the signature cannot be read (see `read_signature`).
    """

    def add(function: LossFunction) -> LossFunction:
        signature = read_signature(function, f"loss {name!r}")
        term = Term(name, function, signature, coupled, {flag: flag for flag in signature.hyper})
        _add(Loss(name, (term,), advantage, inspect.getdoc(function) or "", dict(defaults or {})))
        return function

    return add


def compose(
    name: str,
    /,
    *,
    advantage: Callable[..., Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
    doc: str = "",
    prefix_flags: bool = False,
    **terms: float | Coefficient,
) -> Loss:
    """Registers a weighted sum of registered losses, each with its own denominator.

    Args:
        name: the new loss's name.
        terms: coefficient by loss name: a number, or a `Coefficient(flag, default)` that users set. It multiplies the
            weights that a sum has of its own.
        advantage: as in `register`; by default the one that the terms name.
        defaults: as in `Loss`; by default those of the terms.
        doc: what it is and where it comes from; `--help` prints it.
        prefix_flags: name the flags `<term>_<flag>`; without it two terms that share a flag are an error.

    Raises:
        RegistrationError: one term twice, two terms with the same flag or different advantage functions or defaults, or
            the name is taken.
        UnknownName: a term that is not registered.
    """
    loss = _sum(name, terms, advantage, defaults, inspect.cleandoc(doc), prefix_flags)
    _add(loss)
    return loss


def _sum(
    name: str,
    terms: Mapping[str, float | Coefficient],
    advantage: Callable[..., Any] | None,
    defaults: Mapping[str, Any] | None,
    doc: str,
    prefix_flags: bool,
) -> Loss:
    made: list[Term] = []
    taken: dict[str, str] = {}
    for term_name, outer in terms.items():
        prefix = f"{term_name}_" if prefix_flags else ""
        weights, scale = ((outer,), 1.0) if isinstance(outer, Coefficient) else ((), float(outer))
        for part in get(term_name).terms:
            if any(part.name == other.name for other in made):
                raise RegistrationError(f"loss {name!r}: the term {part.name!r} appears twice; give it one coefficient.")
            flags = {f"{prefix}{flag}": keyword for flag, keyword in part.flags.items()}
            coefficients = (*weights, *(Coefficient(f"{prefix}{flag}", default) for flag, default in part.coefficients))
            for flag in (*flags, *(coefficient.flag for coefficient in coefficients)):
                owner = taken.setdefault(flag, term_name)
                if owner != term_name:
                    raise RegistrationError(
                        f"loss {name!r}: {owner!r} and {term_name!r} both have a flag {flag!r}; use prefix_flags=True."
                    )
            made.append(Term(part.name, part.function, part.signature, part.coupled, flags, scale * part.scale, coefficients))
    inherited = (
        _common(name, terms, "advantage function", {t: get(t).advantage for t in terms}) if advantage is None else advantage
    )
    if defaults is None:
        known = {t: get(t).defaults or None for t in terms}
        defaults = _common(name, terms, "defaults", known) or {}
    return Loss(name, tuple(made), inherited, doc, dict(defaults))


def _common(name: str, terms: Mapping[str, Any], what: str, found: Mapping[str, Any]) -> Any:
    """What the terms that say something agree on."""
    said = {term: value for term, value in found.items() if value is not None}
    values = list(said.values())
    if any(value != values[0] for value in values):
        shown = ", ".join(f"{term}: {getattr(value, '__name__', value)}" for term, value in said.items())
        raise RegistrationError(
            f"loss {name!r}: its terms name different {what} ({shown}); pass one to compose, or leave a term out."
        )
    return values[0] if values else None


def get(name: str) -> Loss:
    """The loss registered under `name`, or the sum that it spells: `dpo:1.0+sft:0.2`, flags prefixed by the term's name.

    Raises:
        UnknownName: with the nearest name, or ours for a peer's name.
        RegistrationError: terms that cannot be summed.
    """
    if name in _LOSSES:
        return _LOSSES[name]
    if ":" in name or "+" in name:
        terms = _read_sum(name)
        equation = " + ".join(f"{coefficient:g}*{term}" for term, coefficient in terms.items())
        return _sum(name, terms, None, None, f"L = {equation}, each term with its own denominator.", True)
    ours = PEER_NAMES.get(name.lower())
    hint = f" (peers' {name!r} is {ours!r} here)" if ours in _LOSSES else suggest(name, _LOSSES)
    raise UnknownName(
        f"unknown algorithm {name!r}{hint}." if hint else f"unknown algorithm {name!r}. Known: {', '.join(names())}."
    )


def _read_sum(text: str) -> dict[str, float]:
    """{name: coefficient} from `name:number+name:number`; a coefficient left out is 1."""
    found: dict[str, float] = {}
    for part in re.split(r"(?<![eE])\+", text):  # 1e+3 is one number
        term, colon, number = part.strip().partition(":")
        try:
            coefficient = float(number) if colon else 1.0
        except ValueError:
            coefficient = math.nan
        if not term or not math.isfinite(coefficient):
            raise UnknownName(f"{text!r} is no sum of losses: {part!r} should be NAME:NUMBER, as in dpo:1.0+sft:0.2.")
        if term in found:
            raise RegistrationError(f"loss {text!r}: the term {term!r} appears twice; give it one coefficient.")
        found[term] = coefficient
    return found


def names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_LOSSES)


def _add(loss: Loss) -> None:
    known = _LOSSES.get(loss.name)
    # Importing one file twice (a reload, a worker process) is not a clash.
    if known is not None and _identity(known) != _identity(loss):
        where = known.terms[0].function.__code__.co_filename
        raise RegistrationError(f"loss {loss.name!r} is already registered by {where}; choose another name.")
    if loss.advantage is not None:
        signature = read_signature(loss.advantage, f"advantage function {loss.advantage.__name__!r} of {loss.name!r}")
        clash = sorted(signature.hyper.keys() & loss.hyper.keys())
        if clash:
            raise RegistrationError(f"loss {loss.name!r} and its advantage function both have a flag {clash[0]!r}; rename one.")
    _LOSSES[loss.name] = loss


def _identity(loss: Loss) -> tuple[Any, ...]:
    functions = ((term.name, term.function.__qualname__, term.function.__code__.co_filename) for term in loss.terms)
    return (*functions, *((term.scale, term.coefficients) for term in loss.terms))


def _widened(tensor: Tensor) -> Tensor:
    """Half precision as float32: a sum over tokens or a difference of sums has no digits left in bf16."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
