"""What a study used, ready for a paper: a methods paragraph and its BibTeX.

The papers of a loss are the keys in its docstring, those of its data the keys in the docstring of its task; references.bib,
which comes with the package, holds the entries.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

from prefopt.report.schema import Results
from prefopt.report.statistics import scipy_installed

_KEY = re.compile(r"\[([a-z]+\d{4}\w*)\]")
_TASK_MODULES = {"sentiment": "tasks/sentiment.py", "control": "control/simulate.py"}
_TASKS = {
    "exact": "an exactly solvable world, whose expected reward, KL and optimal policy are computed by enumeration",
    "text": "text, where reward and KL are estimated from samples",
    "sentiment": "controlled sentiment under a known reward",
    "control": "simulated control",
}
_SOURCES = {"hh-rlhf": "bai2022hh"}
_HOLM, _DODGE, _HYPERVOLUME = "holm1979simple", "dodge2019show", "zitzler1999hypervolume"


@dataclass(frozen=True)
class Citation:
    """Sentences that cite by author and year, the keys that they use, in order, and the entries of these."""

    methods: str
    keys: tuple[str, ...]
    bibtex: str


def cite(results: Results) -> Citation:
    """The methods paragraph of a study. Losses of the user's own that are not registered here are named without a paper."""
    by_algorithm = {setting.algorithm: papers_of(setting.algorithm) for setting in results.settings}
    names = [f"{name}{_cited(keys)}" for name, keys in by_algorithm.items()]
    data = _data_keys(results)
    version = results.environment.get("prefopt", "")
    text = [
        f"We compared {_listed(names)} with prefopt{f' {version}' if version else ''} on {_TASKS[results.task]}{_cited(data)}.",
        "All runs share rows, their order, the reference policy and the budget; each setting was trained on "
        f"{len(results.seeds)} seed{'' if len(results.seeds) == 1 else 's'}.",
        _tuning(results),
        _endpoint(results),
        _judges(results),
    ]
    tested = _tested(results)
    own = [*(key for keys in by_algorithm.values() for key in keys), *data]
    own += [_DODGE] if results.tuning else []
    own += [_HYPERVOLUME] if results.kl_targets and results.primary else []
    own += [_HOLM] if tested else []
    keys = tuple(key for key in dict.fromkeys(own) if key in bibliography())
    return Citation(" ".join(filter(None, text)), keys, "\n\n".join(bibliography()[key] for key in keys))


def papers_of(algorithm: str) -> tuple[str, ...]:
    """The first key in the docstring of each part of an algorithm: loss, terms, advantage, stream; none if it is unknown.

    A part's further papers are on its options and relatives.
    """
    from losses.registry import RegistrationError
    from prefopt import algorithms
    from prefopt.errors import ConfigError

    try:
        found = algorithms.get(algorithm)
    except (ConfigError, RegistrationError):
        return ()
    docs = [found.loss.doc, *(_loss_doc(term.name) for term in found.loss.terms)]
    docs.append(found.loss.advantage.__doc__ or "" if found.loss.advantage else "")
    docs.append(algorithms.online.__doc__ or "" if found.online else "")
    first = [_KEY.search(doc) for doc in docs]
    return tuple(dict.fromkeys(match[1] for match in first if match and match[1] in bibliography()))


@lru_cache(maxsize=1)
def bibliography() -> dict[str, str]:
    """Every entry of references.bib by its key, as it is written there."""
    text = (files("prefopt") / "references.bib").read_text(encoding="utf-8")
    return {found[2]: found[1] for found in re.finditer(r"^(@\w+\{([^,\s]+),\n.*?^\})", text, re.MULTILINE | re.DOTALL)}


def short(key: str) -> str:
    """Author and year of an entry: Rafailov et al. 2023."""
    entry = bibliography()[key]
    fields = dict(re.findall(r"^\s*(author|year) = \{(.*)\},?$", entry, re.MULTILINE))
    names = [author.split(",")[0] for author in fields["author"].split(" and ")]
    who = " and ".join(names) if len(names) < 3 else f"{names[0]} et al."
    return f"{re.sub(r'[{}]', '', who)} {fields['year']}"


def _loss_doc(name: str) -> str:
    import losses

    return losses.get(name).doc if name in losses.names() else ""


def _data_keys(results: Results) -> tuple[str, ...]:
    module = _TASK_MODULES.get(results.task)
    keys: Iterable[str] = ()
    if module is not None:
        tree = ast.parse((files("prefopt") / module).read_text(encoding="utf-8"))
        keys = _KEY.findall(ast.get_docstring(tree) or "")
    declared = results.train.get("data", {})
    sources = declared.get("data", ()) if isinstance(declared, dict) else ()
    named = [key for part, key in _SOURCES.items() if any(part in str(source) for source in sources)]
    return tuple(dict.fromkeys([*keys, *named]))


def _tuning(results: Results) -> str:
    if not results.tuning:
        return "Hyper-parameters are the defaults of the papers or as given; they were not tuned."
    trials = sorted({len(item.trials) for item in results.tuning})
    return (
        f"Hyper-parameters were chosen among {' or '.join(map(str, trials))} trials for each, on rows and seeds that no "
        f"result comes from, by {results.tuning[0].criterion}; what fewer trials would give is reported{_cited([_DODGE])}."
    )


def _endpoint(results: Results) -> str:
    metric = results.primary
    if metric is None:
        return ""
    where = "at the end of training"
    if results.kl_targets:
        where = (
            f"at {results.kl_targets[0]:g} nats of KL from the reference, a target fixed before the run, interpolated for each "
            "seed in the square root of KL"
        )
    text = f"The primary end point is {metric.label} {where}."
    if results.kl_targets:
        limit = max(results.kl_targets)
        text += f" The hypervolume{_cited([_HYPERVOLUME])} is taken up to {limit:g} nats over the reference's value."
    if not _tested(results):
        return text
    return (
        f"{text} Differences are paired by seed and tested by two-sided t tests with Holm's correction{_cited([_HOLM])}; "
        "intervals are 95% t intervals over seeds."
    )


def _judges(results: Results) -> str:
    listed = [f"{judge.name} ({judge.accuracy:.1%} of {judge.n:,} held-out pairs)" for judge in results.judges]
    return f"Judges and their agreement with held-out labels: {_listed(listed)}." if listed else ""


def _tested(results: Results) -> bool:
    return results.primary is not None and not results.smoke and scipy_installed()


def _cited(keys: Sequence[str]) -> str:
    known = [short(key) for key in keys if key in bibliography()]
    return f" ({'; '.join(known)})" if known else ""


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""
