"""Equal cost instead of equal updates: how many updates of each setting cost what the first setting's run costs.

Equal labels is the default budget: every setting sees the same rows equally often. Settings that do more with a row (fresh
samples, four models) then cost more. Here each is measured by a few updates first, and gets as many as its share of the cost
allows; cells stay ordinary cells with a number of updates of their own, so nothing in them depends on a clock.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from filelock import FileLock
from rich.console import Console

from prefopt.errors import ConfigError
from prefopt.files import write_json
from prefopt.plan import probe, updates_of
from prefopt.study import Entry, Study
from prefopt.tasks import Task

MATCH_FILE = "match.json"


def matched(study: Study, task: Task, output: Path, cache: Path, console: Console) -> Study:
    """The study with as many updates for each setting as cost what the first one's cost; as it is where labels are matched.

    What was measured is kept in output/match.json, so that a study that goes on, and one that takes new algorithms, keeps the
    numbers of its finished cells.

    Raises:
        ConfigError: a setting cannot be measured.
    """
    if study.match == "labels":
        return study
    file = output / MATCH_FILE
    with FileLock(output / f".{MATCH_FILE}.lock"):  # processes that share a folder must share the seconds that one measured
        known: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.exists() else {}
        for entry in study.entries:
            if entry.label not in known:
                found = probe(study, entry, cache)
                known[entry.label] = {"tokens": found.tokens, "seconds": found.seconds}
                write_json(file, known)
    known = {entry.label: known[entry.label] for entry in study.entries}
    first = study.entries[0]
    updates = updates_of(first.options(study.options), len(task.training(study.seeds[0]).examples))
    counts = equal_updates(known, first.label, updates, study.match)
    for label, count in counts.items():
        console.print(f"matched {study.match}: {label} makes {count} updates", highlight=False, markup=False)
    return replace(study, entries=[_with_updates(entry, counts[entry.label]) for entry in study.entries])


def equal_updates(costs: Mapping[str, Mapping[str, float]], first: str, updates: int, unit: str) -> dict[str, int]:
    """Updates by setting: `updates` times the first one's cost of an update over its own, at least one.

    Raises:
        ConfigError: an update that costs nothing.
    """
    if any(not own[unit] > 0 for own in costs.values()):
        nothing = next(label for label, own in costs.items() if not own[unit] > 0)
        raise ConfigError(f"--match {unit}: an update of {nothing} was measured to cost nothing; match labels instead.")
    return {label: max(1, round(updates * costs[first][unit] / own[unit])) for label, own in costs.items()}


def _with_updates(entry: Entry, updates: int) -> Entry:
    # As many epochs as it takes: the updates decide.
    return replace(entry, name=entry.label, budget={**entry.budget, "max_steps": updates, "epochs": 1e6})
