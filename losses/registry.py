"""Losses by name: a loss's signature is its declaration.

`register` reads a function's signature: positional parameters are tensors of the vocabulary (one with default None is
optional data), keyword-only parameters are hyper-parameters. `compose` makes a weighted sum of registered losses in which
each term keeps its own denominator. Nothing else lists names, flags, defaults or needs.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor

from losses.types import VOCABULARY, LossOutput, check_shapes

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
    required, optional = [], []
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
        given = {name: tensors[name] for name in sorted(self.needs | (self.optional & tensors.keys()))}
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
                raise UnknownName(
                    f"{self.name} has no option {name!r}{suggest_option(name, self.hyper)}. Its options: {known}."
                )
        values = {name: hyper.get(name, parameter.default) for name, parameter in self.hyper.items()}
        bound = []
        for term in self.terms:
            coefficient = values[term.coefficient.flag] if isinstance(term.coefficient, Coefficient) else term.coefficient
            if coefficient == 0:
                continue
            keywords = {keyword: values[flag] for flag, keyword in term.flags.items()}
            signature = term.signature
            needs, optional = frozenset(signature.required), frozenset(signature.optional)
            bound.append(BoundTerm(term.name, float(coefficient), term.coupled, needs, optional, term.function, keywords))
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
        term = Term(name, function, signature, coupled, 1.0, {flag: flag for flag in signature.hyper})
        _add(Loss(name, (term,), advantage, inspect.getdoc(function) or ""))
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
        advantage: as in `register`; by default the one that the terms name.
        doc: what it is and where it comes from; `--help` prints it.
        prefix_flags: name the flags `<term>_<flag>`; without it two terms that share a flag are an error.

    Raises:
        RegistrationError: one term twice, two terms with the same flag or different advantage functions, a weight on a
            sum that has weights of its own, or the name is taken.
        UnknownName: a term that is not registered.
    """
    made: list[Term] = []
    taken: dict[str, str] = {}
    for term_name, coefficient in terms.items():
        for part in get(term_name).terms:
            if any(part.name == other.name for other in made):
                raise RegistrationError(f"loss {name!r}: the term {part.name!r} appears twice; give it one coefficient.")
            flags = {f"{term_name}_{flag}" if prefix_flags else flag: keyword for flag, keyword in part.flags.items()}
            weight = _weight_of(name, term_name, coefficient, part.coefficient)
            for flag in [*flags, *([weight.flag] if isinstance(weight, Coefficient) else [])]:
                if flag in taken:
                    raise RegistrationError(
                        f"loss {name!r}: {taken[flag]!r} and {part.name!r} both have a flag {flag!r}; use prefix_flags=True."
                    )
                taken[flag] = part.name
            made.append(Term(part.name, part.function, part.signature, part.coupled, weight, flags))
    loss = Loss(name, tuple(made), advantage or _advantage_of(name, terms), inspect.cleandoc(doc))
    _add(loss)
    return loss


def _weight_of(name: str, term_name: str, outer: float | Coefficient, own: float | Coefficient) -> float | Coefficient:
    """A term's weight inside a sum, when it already has one there where it comes from."""
    if not isinstance(outer, Coefficient) and not isinstance(own, Coefficient):
        return float(outer) * own
    if own == 1:
        return outer
    if outer == 1:
        return own
    raise RegistrationError(f"loss {name!r}: {term_name!r} is itself a sum with weights of its own; name its terms instead.")


def _advantage_of(name: str, terms: Mapping[str, float | Coefficient]) -> Callable[..., Any] | None:
    found = {get(term).advantage for term in terms} - {None}
    if len(found) > 1:
        known = ", ".join(sorted(function.__name__ for function in found if function))
        raise RegistrationError(f"loss {name!r}: its terms name different advantage functions ({known}); pass advantage=.")
    return found.pop() if found else None


def get(name: str) -> Loss:
    """The loss registered under `name`.

    Raises:
        UnknownName: with the nearest name, or ours for a peer's name.
    """
    if name not in _LOSSES:
        ours = _PEER_NAMES.get(name.lower())
        hint = f" (peers' {name!r} is {ours!r} here)" if ours in _LOSSES else _suggest(name, _LOSSES)
        raise UnknownName(f"unknown algorithm {name!r}{hint}. Known: {', '.join(names())}.")
    return _LOSSES[name]


def names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_LOSSES)


# What peers call our losses. It serves error messages only: nothing is looked up by a peer's name.
_PEER_NAMES = {
    "sigmoid": "dpo", "cdpo": "dpo", "sigmoid_norm": "dpo_norm", "exo_pair": "exo", "nca_pair": "nca", "sppo_hard": "sppo",
    "robust": "robust_dpo", "ppo_clip": "ppo_policy", "nll": "sft", "cross_entropy": "sft", "rm": "bradley_terry",
    "reward": "bradley_terry", "kto_pair": "kto", "offline_ppo": "ppo_offline", "bc": "sft",
}  # fmt: skip

# What peers call our options; error messages only, like the names above. The first of ours that the loss has is suggested.
_PEER_OPTIONS = {
    "epsilon": ("clip_low", "label_smoothing"), "eps": ("clip_low",), "clip_eps": ("clip_low",), "cliprange": ("clip_low",),
    "epsilon_low": ("clip_low",), "epsilon_high": ("clip_high",), "delta": ("dual_clip",), "cliprange_value": ("value_clip",),
    "beta": ("tau", "alpha"), "contrastive_bias": ("bias",), "bc_coeff": ("bc_coef",), "lam": ("gae_lambda",),
    "center_rewards_coefficient": ("center_coef",), "value_coeff": ("vf_coef",), "loss_agg_mode": ("length_norm",),
}  # fmt: skip


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
    return (*functions, *(term.coefficient for term in loss.terms))


def suggest_option(name: str, known: Collection[str]) -> str:
    """A remark for an error message: the nearest of the known options, or ours for a peer's name; "" when none is near."""
    if name in ("loss_type", "loss"):
        return " (an algorithm is chosen by its own name, not by an option)"
    ours = [option for option in _PEER_OPTIONS.get(name, ()) if option in known]
    return f" (peers' {name!r} is {ours[0]!r} here)" if ours else _suggest(name, known)


def _suggest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


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
