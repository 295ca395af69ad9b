"""Losses by name: a loss's signature is its declaration.

`register` reads a function's signature: positional parameters are tensors of the vocabulary (one with default None is
optional data), keyword-only parameters are hyper-parameters. `compose` makes a weighted sum of registered losses in which
each term keeps its own denominator. Nothing else lists names, flags, defaults or needs.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor

from losses.types import VOCABULARY, LossOutput

LossFunction = Callable[..., LossOutput]


class RegistrationError(ValueError):
    """A loss or advantage function whose declaration cannot be used; the message says what to change."""


class UnknownName(ValueError):
    """A loss or option that does not exist; the message suggests the nearest that does."""


class Coefficient(NamedTuple):
    """A term's weight that users set by a flag, for example `Coefficient("vf_coef", 0.1)`."""

    flag: str
    default: float


@dataclass(frozen=True)
class HyperParameter:
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
    hints = get_type_hints(function)
    help_lines = _argument_help(inspect.getdoc(function) or "")
    required, optional, hyper = [], [], {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            if name not in VOCABULARY:
                raise RegistrationError(
                    f"{owner}: positional parameter {name!r} is not a tensor of the vocabulary{_suggest(name, VOCABULARY)}. "
                    f"Hyper-parameters come after `*`. Known tensors: {', '.join(sorted(VOCABULARY))}."
                )
            if parameter.default is parameter.empty:
                required.append(name)
            elif parameter.default is None:
                optional.append(name)
            else:
                raise RegistrationError(f"{owner}: tensor {name!r} has default {parameter.default!r}; only None (optional data) is allowed.")
        elif parameter.kind is parameter.KEYWORD_ONLY:
            if parameter.default is parameter.empty or name not in hints:
                raise RegistrationError(f"{owner}: hyper-parameter {name!r} needs an annotation and a default, as in `*, {name}: float = 0.1`.")
            hyper[name] = HyperParameter(name, hints[name], parameter.default, help_lines.get(name, ""))
        else:
            raise RegistrationError(f"{owner}: {parameter} hides what the function needs; name each tensor.")
    return Signature(tuple(required), tuple(optional), hyper)


@dataclass(frozen=True)
class Term:
    """One registered function inside a loss. `flags` maps the user's flag to the function's keyword."""

    name: str
    function: LossFunction
    signature: Signature
    coupled: bool
    coefficient: float | Coefficient
    flags: Mapping[str, str]


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
        missing = sorted(self.needs - tensors.keys())
        if missing:
            raise KeyError(f"{self.name}: needs {', '.join(missing)}, got {', '.join(sorted(tensors))}.")
        given = {name: tensors[name] for name in self.needs | (self.optional & tensors.keys())}
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
    """A registered loss: one term, or several made by `compose`."""

    name: str
    terms: tuple[Term, ...]
    advantage: Callable[..., Any] | None
    doc: str

    @property
    def coupled(self) -> bool:
        return any(term.coupled for term in self.terms)

    @cached_property
    def hyper(self) -> dict[str, HyperParameter]:
        """Every flag of this loss, in the order of its terms."""
        flags: dict[str, HyperParameter] = {}
        for term in self.terms:
            if isinstance(term.coefficient, Coefficient):
                what = f"Weight of the {term.name} term; 0 removes it and what it needs."
                flags[term.coefficient.flag] = HyperParameter(term.coefficient.flag, float, term.coefficient.default, what)
            for flag, keyword in term.flags.items():
                flags[flag] = term.signature.hyper[keyword]
        return flags

    def bind(self, **hyper: Any) -> BoundLoss:
        """Sets hyper-parameters; those not named keep their defaults. Terms with coefficient 0 vanish with their needs.

        Raises:
            UnknownName: an option that this loss does not have, with a suggestion.
        """
        for name in hyper:
            if name not in self.hyper:
                known = ", ".join(self.hyper) or "none"
                raise UnknownName(f"{self.name} has no option {name!r}{_suggest(name, self.hyper)}. Its options: {known}.")
        values = {name: hyper.get(name, parameter.default) for name, parameter in self.hyper.items()}
        bound = []
        for term in self.terms:
            coefficient = values[term.coefficient.flag] if isinstance(term.coefficient, Coefficient) else term.coefficient
            if coefficient == 0:
                continue
            keywords = {keyword: values[flag] for flag, keyword in term.flags.items()}
            signature = term.signature
            bound.append(
                BoundTerm(
                    term.name, float(coefficient), term.coupled, frozenset(signature.required), frozenset(signature.optional), term.function, keywords
                )
            )
        if not bound:
            raise ValueError(f"{self.name}: every term has coefficient 0, so there is nothing to minimise.")
        return BoundLoss(self.name, tuple(bound), values)


_LOSSES: dict[str, Loss] = {}


def register(
    name: str, *, coupled: bool = False, advantage: Callable[..., Any] | None = None
) -> Callable[[LossFunction], LossFunction]:
    """Registers a pure loss function under `name`; the function comes back unchanged.

    Args:
        name: the key, the file's name and the function's name without `_loss`.
        coupled: the rows interact (a sort or a baseline over the batch): the trainer then evaluates the loss once
            over all micro-batches and ranks.
        advantage: the function that turns `rewards` into `advantages`, for losses on rollouts.

    Raises:
        RegistrationError: the name is taken, or the signature cannot be read (see `read_signature`).
    """

    def add(function: LossFunction) -> LossFunction:
        signature = read_signature(function, f"loss {name!r}")
        flags = {flag: flag for flag in signature.hyper}
        _add(Loss(name, (Term(name, function, signature, coupled, 1.0, flags),), advantage, inspect.getdoc(function) or ""), function)
        return function

    return add


def compose(
    name: str,
    /,
    *,
    advantage: Callable[..., Any] | None = None,
    doc: str = "",
    prefix_flags: bool = False,
    **terms: float | Coefficient,
) -> Loss:
    """Registers a weighted sum of registered losses, each with its own denominator.

    Args:
        name: the new loss's name.
        terms: coefficient by loss name: a number, or a `Coefficient(flag, default)` that users set.
        advantage: as in `register`.
        doc: what it is and where it comes from; `--help` prints it.
        prefix_flags: name the flags `<term>_<flag>`; without it two terms that share a flag are an error.

    Raises:
        RegistrationError: two terms with the same flag, or the name is taken.
        UnknownName: a term that is not registered.
    """
    made: list[Term] = []
    taken: dict[str, str] = {}
    for term_name, coefficient in terms.items():
        for part in get(term_name).terms:
            flags = {f"{term_name}_{flag}" if prefix_flags else flag: keyword for flag, keyword in part.flags.items()}
            own = part.coefficient
            if len(get(term_name).terms) > 1 and (isinstance(own, Coefficient) or isinstance(coefficient, Coefficient)):
                raise RegistrationError(f"loss {name!r}: {term_name!r} is itself a sum with a weight of its own; name its terms instead.")
            weight = coefficient if not isinstance(own, float) or isinstance(coefficient, Coefficient) else float(coefficient) * own
            for flag in [*flags, *([weight.flag] if isinstance(weight, Coefficient) else [])]:
                if flag in taken:
                    raise RegistrationError(f"loss {name!r}: {taken[flag]!r} and {part.name!r} both have a flag {flag!r}; use prefix_flags=True.")
                taken[flag] = part.name
            made.append(Term(part.name, part.function, part.signature, part.coupled, weight, flags))
    loss = Loss(name, tuple(made), advantage, inspect.cleandoc(doc))
    _add(loss, None)
    return loss


def get(name: str) -> Loss:
    """The loss registered under `name`.

    Raises:
        UnknownName: with the nearest name, or ours for a peer's name.
    """
    if name not in _LOSSES:
        ours = _PEER_NAMES.get(name.lower())
        hint = f"; peers' {name!r} is {ours!r} here" if ours in _LOSSES else _suggest(name, _LOSSES)
        raise UnknownName(f"unknown algorithm {name!r}{hint}. Known: {', '.join(names())}.")
    return _LOSSES[name]


def names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_LOSSES)


# What peers call our losses. It serves error messages only: nothing is looked up by a peer's name.
_PEER_NAMES = {
    "sigmoid": "dpo", "cdpo": "dpo", "sigmoid_norm": "dpo_norm", "exo_pair": "exo", "nca_pair": "nca", "sppo_hard": "sppo",
    "robust": "robust_dpo", "ppo_clip": "ppo_policy", "nll": "sft", "cross_entropy": "sft", "rm": "bradley_terry", "reward": "bradley_terry",
    "kto_pair": "kto", "offline_ppo": "ppo_offline", "bc": "sft",
}  # fmt: skip


def _add(loss: Loss, function: LossFunction | None) -> None:
    known = _LOSSES.get(loss.name)
    if known is not None:
        old = known.terms[0].function
        # Importing one file twice (a reload, a worker process) is not a clash.
        same = function is not None and (old.__qualname__, old.__code__.co_filename) == (function.__qualname__, function.__code__.co_filename)
        if not same:
            raise RegistrationError(f"loss {loss.name!r} is already registered by {old.__code__.co_filename}; choose another name.")
    _LOSSES[loss.name] = loss


def _suggest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _argument_help(doc: str) -> dict[str, str]:
    """The `Args:` section of a docstring as {argument: text}."""
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
