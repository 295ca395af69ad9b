"""Judges by name: `tfidf:PAIRS`, `reward:MODEL`, `llm:MODEL-or-address#model`, `file.py:function`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prefopt.data.roles import split_roles
from prefopt.data.sources import load
from prefopt.errors import ConfigError, DataError
from prefopt.judges.functions import function_judge
from prefopt.judges.record import LabelledPairs, labelled_pairs
from prefopt.judges.verdicts import PairJudge, from_scorer

FORMS = "tfidf:PAIRS, reward:MODEL, llm:MODEL (or llm:https://host/v1#model), path/to/file.py:function"


@dataclass(frozen=True)
class NamedJudge:
    """A judge that a user named.

    Args:
        name: for reports.
        judge: itself.
        note: what it is.
        trained_on: keys of the prompts that it was fitted on here; none where that is not known.
        held_out: pairs of its own source that it has not seen.
    """

    name: str
    judge: PairJudge
    note: str = ""
    trained_on: frozenset[str] = frozenset()
    held_out: LabelledPairs | None = None


def build_judges(
    specs: Sequence[str], *, cache: Path, device: str = "auto", trust_remote_code: bool = False, key_variable: str | None = None
) -> Mapping[str, NamedJudge]:
    """The judges by name, in the order in which they were given.

    Args:
        specs: as the module says.
        cache: of converted models and of replies of endpoints.
        device, trust_remote_code: of models.
        key_variable: the environment variable with an endpoint's key; None reads the chat models' own.

    Raises:
        ConfigError: no such kind, model or function, one judge twice, or an extra that is missing.
        DataError, HubError: as reading and loading do.
    """
    if not specs:
        raise ConfigError(f"name a judge: {FORMS}.")
    if len({*specs}) < len(specs):
        raise ConfigError(f"a judge is named twice in {', '.join(specs)}.")
    short = [_short(spec) for spec in specs]
    found = {}
    for spec, name in zip(specs, short, strict=True):
        name = name if short.count(name) == 1 else spec
        found[name] = _build(spec, name, cache, device, trust_remote_code, key_variable)
    return found


def _short(spec: str) -> str:
    kind, _, rest = spec.partition(":")
    if kind == "tfidf":
        return kind
    if kind == "llm" and "#" in rest:
        return f"llm {rest.rpartition('#')[2]}"
    return f"{kind} {Path(rest).name}" if kind in ("reward", "llm") else Path(spec).name


def _build(spec: str, name: str, cache: Path, device: str, trust_remote_code: bool, key_variable: str | None) -> NamedJudge:
    kind, _, rest = spec.partition(":")
    if not rest:
        raise ConfigError(f"--judge {spec}: expected {FORMS}.")
    if kind == "tfidf":
        from prefopt.judges.tfidf import TfidfJudge, read_judge_rows

        train, held_out = read_judge_rows(rest)
        note = f"TF-IDF Bradley-Terry of completions alone, {len(train)} judge rows of {Path(rest).name}"
        return NamedJudge(name, from_scorer(TfidfJudge(train), log_odds=True), note, frozenset(train.keys), held_out)
    if kind == "reward":
        from prefopt.rewards.layout import load_reward_model

        model = load_reward_model(rest, cache=cache, device=device, trust_remote_code=trust_remote_code)
        return NamedJudge(name, from_scorer(model, log_odds=True), "reward model")
    if kind == "llm":
        from prefopt.chat.build import chat_model
        from prefopt.judges.llm import LLMJudge

        chat = chat_model(rest, cache=cache, device=device, trust_remote_code=trust_remote_code, key_variable=key_variable)
        judge = LLMJudge(chat)
        return NamedJudge(name, judge, f"{chat.name}, {len(judge.templates)} templates, both orders")
    return NamedJudge(name, function_judge(spec), "a function")


def read_held_out(source_names: Sequence[str]) -> LabelledPairs:
    """The test rows of preference data: what no training here has seen, of a file named test* all of it.

    Raises:
        DataError: none of them is a pair in an order.
    """
    records = split_roles(load(source_names).records).test
    try:
        return labelled_pairs(records)
    except DataError as error:
        raise DataError(
            f"--held-out {' '.join(source_names)}: none of its {len(records)} test rows is a pair in an order. A tenth of the "
            "rows are test rows, and of a file whose name begins with test all of them are."
        ) from error
