"""What a loss declares, in words and grids: `prefopt losses`, the README's table and docs/losses.md are drawn from it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin

import losses
from losses.declaration import HyperParameter, read_options
from losses.registry import Loss, Term
from losses.types import VOCABULARY
from prefopt import algorithms
from prefopt.errors import ConfigError
from prefopt.report.grid import Column, Entry, Grid
from prefopt.rollouts import rollouts

PARTS = "parts of other losses"
"""The family of losses that no stream can train alone."""

# From what most people have to what fewest do; a family that is not named here comes after these.
_READING_ORDER = (
    "pairs with a reference", "pairs without a reference", "completions", "unpaired", "lists", "policy gradient", "rewards",
)  # fmt: skip


class Citation(NamedTuple):
    """A paper as a docstring names it ("Hejna et al. 2023") and its key in references.bib."""

    text: str
    key: str


def first_line(doc: str) -> str:
    """The first line of a docstring: of a loss, its equation."""
    return doc.partition("\n")[0].removesuffix(".")


def equation(loss: Loss) -> str:
    """The equation that opens a loss's docstring."""
    return first_line(loss.doc)


def paragraphs(doc: str, without: Sequence[str] = ("Args",)) -> list[str]:
    """A docstring after its first line and without the sections named, a line for each paragraph."""
    rest = doc.partition("\n")[2]
    for section in without:
        rest = re.sub(rf"^{section}:\n(?:[ ]+.*(?:\n|$)|\n)+", "", rest, flags=re.MULTILINE)
    return [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", rest) if paragraph.strip()]


def citations(doc: str) -> list[Citation]:
    """The papers of a docstring in order, each once: the author and year that stand before `[key]`."""
    text = " ".join(doc.split())
    found = re.findall(r"([A-Z]\S*(?: (?:[A-Z]\S*|and|et al\.))* \d{4})[^\[\]()]*\[([a-z]+\d{4}\w*)\]", text)
    first: dict[str, Citation] = {}
    for author, key in found:
        first.setdefault(key, Citation(author, key))
    return list(first.values())


def family(loss: Loss) -> str:
    """What a loss learns from; `PARTS` where it cannot be trained alone."""
    try:
        return algorithms.family(loss)
    except ConfigError:
        return PARTS


def by_family(members: Iterable[Loss]) -> dict[str, list[Loss]]:
    """Losses by family: families in reading order, losses by name."""
    found: dict[str, list[Loss]] = {}
    for loss in sorted(members, key=lambda loss: loss.name):
        found.setdefault(family(loss), []).append(loss)
    order = {name: index for index, name in enumerate(_READING_ORDER)}
    return dict(sorted(found.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))


def term_weight(term: Term) -> str:
    """The weight of a term in its sum: its number times its flags."""
    flags = [flag for flag, _ in term.coefficients]
    return "*".join([*([f"{term.scale:g}"] if term.scale != 1 or not flags else []), *flags])


def sums_with(loss: Loss) -> list[str]:
    """Registered sums of which all of this loss's terms are a part."""
    own = {term.name for term in loss.terms}
    others = [other for other in map(losses.get, losses.names()) if own < {term.name for term in other.terms}]
    return [other.name for other in others]


def compact(names: Iterable[str]) -> str:
    """Names of tensors as the vocabulary writes them: `{policy,reference}_{chosen,rejected}_logps`."""
    shown = list(names)
    for group in (("chosen", "rejected"), ("policy", "reference", "old")):
        for name in list(shown):
            head, sep, tail = name.partition(group[0])
            twins = [f"{head}{word}{tail}" for word in group if f"{head}{word}{tail}" in shown]
            if sep and len(twins) > 1:
                words = ",".join(word for word in group if f"{head}{word}{tail}" in shown)
                shown[shown.index(name)] = f"{head}{{{words}}}{tail}"
                shown = [other for other in shown if other not in twins]
    return ", ".join(shown)


def tensors(loss: Loss) -> dict[str, bool]:
    """The tensors that a loss names, in the order of its terms: whether each is required."""
    required = {name: True for term in loss.terms for name in term.signature.required}
    return required | {name: False for term in loss.terms for name in term.signature.optional if name not in required}


def advantage_options(loss: Loss) -> dict[str, HyperParameter]:
    """The options of a loss's advantage function, with this loss's defaults."""
    if loss.advantage is None:
        return {}
    return _with_defaults(loss, read_options(loss.advantage, f"advantage of {loss.name!r}"))


def rollout_options(loss: Loss | None = None, *, changed_only: bool = False) -> dict[str, HyperParameter]:
    """The options that all algorithms on rollouts share, with a loss's defaults; or only those whose defaults it changes."""
    options = read_options(rollouts, "the rollout stream")
    if loss is None:
        return options
    if changed_only:
        options = {name: option for name, option in options.items() if name in loss.defaults}
    return _with_defaults(loss, options)


def _with_defaults(loss: Loss, options: Mapping[str, HyperParameter]) -> dict[str, HyperParameter]:
    return {name: option._replace(default=loss.defaults.get(name, option.default)) for name, option in options.items()}


def on_policy(loss: Loss) -> bool:
    """Whether it trains on rollouts."""
    return family(loss) != PARTS and algorithms.get(loss.name).on_policy


def options_with_defaults(options: Iterable[HyperParameter]) -> str:
    """`beta 0.1, label_smoothing 0.0`."""
    return ", ".join(f"{option.name} {option.default}" for option in options)


def facts(loss: Loss) -> list[str]:
    """What a loss trains on and what sets it apart, a sentence each."""
    group = family(loss)
    found = (
        "Cannot be trained alone: it is a part of other losses."
        if group == PARTS
        else f"Family: {group}. Stream: {algorithms.stream_of(loss)}.",
        "Coupled: the rows of a batch interact, so it is computed once over the whole step." if loss.coupled else "",
        f"Advantage function: {loss.advantage.__name__}." if loss.advantage is not None else "",
        f"Defaults that it changes: {', '.join(f'{k} {v}' for k, v in loss.defaults.items())}." if loss.defaults else "",
        f"A term of {', '.join(sums)}." if (sums := sums_with(loss)) else "",
    )
    return [sentence for sentence in found if sentence]


def grids(loss: Loss, *, whole: bool) -> list[Grid]:
    """The tables of one loss: its terms, if it is a sum, its tensors and its options.

    Args:
        whole: show all options of rollouts; else those whose defaults this loss changes.
    """
    found = [_terms_grid(loss)] if len(loss.terms) > 1 else []
    shared = rollout_options(loss, changed_only=not whole) if on_policy(loss) else {}
    sections = (
        ("Options", loss.hyper),
        (f"Options of {getattr(loss.advantage, '__name__', '')}", advantage_options(loss)),
        ("Options of rollouts" if whole else "Changed options of rollouts", shared),
    )
    grids = (options_grid(title, options.values()) for title, options in sections if options)
    return [*found, _tensors_grid(loss), *grids]


def options_grid(title: str, options: Iterable[HyperParameter]) -> Grid:
    """Hyper-parameters: flag, type, default and help."""
    rows = ((f"--{o.name.replace('_', '-')}", _kind(o.annotation), str(o.default), o.help) for o in options)
    return _grid(title, ("flag", "type", "default", "meaning"), rows)


def _terms_grid(loss: Loss) -> Grid:
    rows = ((term_weight(term), term.name, equation(losses.get(term.name))) for term in loss.terms)
    return _grid("Sum of", ("weight", "term", "loss"), rows)


def _tensors_grid(loss: Loss) -> Grid:
    rows = []
    for name, required in tensors(loss).items():
        spec = VOCABULARY[name]
        mark = "" if required or "optional" in spec.meaning else " (optional data)"
        rows.append((name, f"[{', '.join(spec.shape)}]", spec.source, f"{spec.meaning}{mark}"))
    return _grid("Tensors", ("name", "shape", "from", "meaning"), rows)


def _kind(annotation: Any) -> str:
    """A type as people write it: the choices of a Literal, else its name."""
    if get_origin(annotation) is Literal:
        return " or ".join(map(str, get_args(annotation)))
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace(" | None", " or none")


def _grid(title: str, headers: Sequence[str], rows: Iterable[Sequence[str]]) -> Grid:
    columns = tuple(Column(header, numeric=False) for header in headers)
    return Grid(title, columns, tuple(tuple(map(Entry, row)) for row in rows))
