"""Equal tuning for benchmarks.zoo: the same trials for every loss, in worlds that the final study never uses.

zoo_tuned.json holds each loss's choice with every trial behind it, and a key of what it follows from: an entry whose sweep or
budget has changed since no longer counts, and the others stay.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.zoo_cells import CellResult, Runner
from benchmarks.zoo_config import Sweep, Trial, Zoo
from benchmarks.zoo_statistics import lowest_regret
from prefopt.errors import ConfigError
from prefopt.files import write_json

CRITERION = "lowest regret (beta 0.5) along the path, mean over tuning worlds"


@dataclass(frozen=True)
class Tuned:
    """What tuning chose for a loss.

    Args:
        key: of what the choice follows from (`Zoo.key`).
        chosen: the trial of least `criterion`.
        criterion: `CRITERION`; the mean over worlds.
        border: which of the chosen numbers stand at the border of their grid.
        trials: every trial with its criterion, None where it failed.
    """

    key: str
    chosen: Trial
    criterion: float
    border: Sequence[str]
    trials: Sequence[Mapping[str, Any]]


def choose(zoo: Zoo, sweep: Sweep, results: Mapping[str, CellResult]) -> Tuned:
    """The best trial of a loss; one that failed in a world cannot be chosen.

    Args:
        results: cells by file name.

    Raises:
        ConfigError: every trial failed.
    """
    rows, found = [], []
    for trial in sweep.trials():
        cells = [results[zoo.trial_spec(sweep.loss, trial, world).file] for world in zoo.tuning.worlds]
        errors = [cell.error for cell in cells if cell.error]
        regrets = [lowest_regret(cell.path) for cell in cells if not cell.error]
        criterion = None if errors else math.fsum(regrets) / len(regrets)
        rows.append({**asdict(trial), "criterion": criterion, "error": errors[0] if errors else ""})
        if criterion is not None and math.isfinite(criterion):
            found.append((criterion, trial))
    if not found:
        raise ConfigError(f"{sweep.loss}: every trial failed; the first: {rows[0]['error']}")
    criterion, chosen = min(found, key=lambda item: item[0])
    return Tuned(zoo.key(sweep), chosen, criterion, sweep.border(chosen), rows)


def tune(zoo: Zoo, names: Sequence[str], path: Path, runner: Runner, folder: Path) -> dict[str, str]:
    """Tunes losses and writes each to `path` as soon as its last trial is in; what could not be tuned, with the reason.

    Args:
        zoo: the study.
        names: losses to tune.
        path: zoo_tuned.json.
        runner: of the cells.
        folder: of finished trials.
    """
    owners = {
        zoo.trial_spec(name, trial, world).file: name
        for name in names
        for trial in zoo.sweeps[name].trials()
        for world in zoo.tuning.worlds
    }
    waiting = {name: sum(owner == name for owner in owners.values()) for name in names}
    results: dict[str, CellResult] = {}
    failed: dict[str, str] = {}

    def seen(result: CellResult) -> None:
        results[result.spec.file] = result
        name = owners[result.spec.file]
        waiting[name] -= 1
        if waiting[name] == 0:
            try:
                _store(path, name, choose(zoo, zoo.sweeps[name], results))
            except ConfigError as error:
                failed[name] = str(error)

    # Loss by loss, so that an interrupted tuning has finished some.
    specs = [
        zoo.trial_spec(name, trial, world)
        for name in names
        for world in zoo.tuning.worlds
        for trial in zoo.sweeps[name].trials()
    ]
    runner.worlds(zoo.tuning.worlds, zoo.targets)
    runner.cells(specs, folder, "tuning", seen)
    return failed


def read(path: Path) -> dict[str, Tuned]:
    """The tuned settings, current or not; none where there is no file.

    Raises:
        ConfigError: not a file of `tune`.
    """
    if not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text())
        return {
            name: Tuned(e["key"], Trial(**e["chosen"]), e["criterion"], tuple(e["border"]), tuple(e["trials"]))
            for name, e in stored["losses"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not a file that tuning wrote ({error}); delete it and tune again: --tune.") from error


def current(zoo: Zoo, tuned: Mapping[str, Tuned]) -> dict[str, Tuned]:
    """Those tuned settings that this study would choose again; an entry of another sweep or budget is left out."""
    return {name: tuned[name] for name in zoo.sweeps if name in tuned and tuned[name].key == zoo.key(zoo.sweeps[name])}


def missing(zoo: Zoo, tuned: Mapping[str, Tuned], names: Iterable[str]) -> dict[str, str]:
    """The losses among `names` without a current setting, each with the reason."""
    held = current(zoo, tuned)
    return {
        name: "its sweep or budget has changed since it was tuned" if name in tuned else "never tuned"
        for name in names
        if name not in held
    }


def _store(path: Path, name: str, tuned: Tuned) -> None:
    entries = {**read(path), name: tuned}
    write_json(path, {"criterion": CRITERION, "losses": {key: asdict(entries[key]) for key in sorted(entries)}})
