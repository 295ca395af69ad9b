"""What benchmarks.zoo runs: zoo.yaml read, checked against the registry, and turned into trials and cells."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

import losses
from benchmarks.zoo_cells import CellBudget, CellSpec
from losses.types import VOCABULARY
from prefopt import algorithms
from prefopt.errors import ConfigError
from prefopt.stages import content_key


def offline_policy_losses() -> list[str]:
    """Every registered loss that trains a policy on a fixed data set: no rollouts, and not a reward head alone."""
    found = []
    for name in algorithms.trainable_names():
        algorithm = algorithms.get(name)
        tensors = algorithms.loss_tensors(algorithm.loss)
        trains_policy = any(VOCABULARY[t].source == "policy" and t.endswith("logps") for t in tensors)
        if trains_policy and not algorithm.on_policy:
            found.append(name)
    return found


@dataclass(frozen=True)
class Trial:
    """One point of a loss's sweep."""

    learning_rate: float
    hyper: Mapping[str, Any]

    def text(self, border: Collection[str] = ()) -> str:
        """`beta 0.3, lr 0.001`, with a star behind each number that `border` names."""
        starred = {flag for name in border for flag in name.split("+")}
        numbers = {**self.hyper, "learning_rate": self.learning_rate}
        said = {flag: f"{_number(value)}{'*' if flag in starred else ''}" for flag, value in numbers.items()}
        return ", ".join(f"{'lr' if flag == 'learning_rate' else flag} {value}" for flag, value in said.items())


@dataclass(frozen=True)
class Sweep:
    """How one loss is tuned: its strength over a grid, options that are fixed, and all learning rates.

    Args:
        loss: name in the registry.
        strength: the flag that is swept, or several joined by "+" that take one value; None where the loss has none.
        values: its grid.
        fixed: options that differ from the defaults.
        learning_rates: crossed with `values`.
    """

    loss: str
    strength: str | None
    values: tuple[float, ...]
    fixed: Mapping[str, Any]
    learning_rates: tuple[float, ...]

    def trials(self) -> list[Trial]:
        """Every combination; as many for each loss."""
        if self.strength is None:
            return [Trial(rate, dict(self.fixed)) for rate in self.learning_rates]
        flags = self.strength.split("+")
        return [
            Trial(rate, {**dict.fromkeys(flags, value), **self.fixed})
            for value, rate in itertools.product(self.values, self.learning_rates)
        ]

    def border(self, trial: Trial) -> list[str]:
        """Which of a trial's numbers are the least or the greatest of their grid: the best may lie outside."""
        swept = {"learning_rate": (trial.learning_rate, self.learning_rates)}
        if self.strength is not None:
            swept[self.strength] = (trial.hyper[self.strength.split("+")[0]], self.values)
        return [name for name, (value, grid) in swept.items() if value in (min(grid), max(grid))]


@dataclass(frozen=True)
class Part:
    """A part of the final study: every loss in every world under every label model."""

    losses: tuple[str, ...]
    worlds: tuple[int, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Tuning:
    """Where settings are chosen. Its worlds and its seed are none of the final study's."""

    worlds: tuple[int, ...]
    seed: int
    labels: str
    trials: int
    checkpoints: int


@dataclass(frozen=True)
class Zoo:
    """zoo.yaml, checked.

    Args:
        budget: of a final cell; a trial has fewer checkpoints and is otherwise equal.
        tuning: worlds, seed and trials.
        targets: KLs in nats at which reward is read.
        primary: the target whose comparisons are the study's end point.
        seed: of the final cells.
        sweeps: by loss.
        left_out: losses that are parts of others, each with the reason.
        everything: part A, all losses.
        headline: part B, some losses under several label models.
    """

    budget: CellBudget
    tuning: Tuning
    targets: tuple[float, ...]
    primary: float
    seed: int
    sweeps: Mapping[str, Sweep]
    left_out: Mapping[str, str]
    everything: Part
    headline: Part

    @property
    def unswept(self) -> list[str]:
        """Losses that the study could run and that zoo.yaml does not name: new ones, until somebody gives them a sweep."""
        return sorted(set(offline_policy_losses()) - self.sweeps.keys() - self.left_out.keys())

    def key(self, sweep: Sweep) -> str:
        """Content of all that a tuned setting follows from, the code aside: when it changes, the loss is tuned again."""
        trials = [asdict(trial) for trial in sweep.trials()]
        return content_key(sweep.loss, trials, asdict(self.tuning), asdict(self.budget) | {"checkpoints": 0})

    def trial_spec(self, loss: str, trial: Trial, world: int) -> CellSpec:
        """The cell of one trial in one tuning world."""
        budget = replace(self.budget, checkpoints=self.tuning.checkpoints)
        return CellSpec(loss, trial.hyper, trial.learning_rate, world, self.tuning.seed, self.tuning.labels, budget)

    def cell_spec(self, loss: str, trial: Trial, world: int, labels: str) -> CellSpec:
        """A final cell of a loss with its tuned numbers."""
        return CellSpec(loss, trial.hyper, trial.learning_rate, world, self.seed, labels, self.budget)

    def cells(self, chosen: Mapping[str, Trial]) -> Iterator[CellSpec]:
        """Every final cell of the losses in `chosen`, world by world, so that a process works long in one world."""
        for world in sorted({*self.everything.worlds, *self.headline.worlds}):
            seen: set[tuple[str, str]] = set()
            for part in (self.everything, self.headline):
                for labels, loss in itertools.product(part.labels, part.losses):
                    if world in part.worlds and loss in chosen and (loss, labels) not in seen:
                        seen.add((loss, labels))
                        yield self.cell_spec(loss, chosen[loss], world, labels)


def load(path: Path, *, quick: bool = False) -> Zoo:
    """Reads a study.

    Args:
        path: YAML, laid out as benchmarks/zoo.yaml.
        quick: the parts that its `quick` section names, which are parts of the full study too.

    Raises:
        ConfigError: a file that cannot be read, numbers that make no fair study, or losses missing or unknown.
    """
    try:
        raw = yaml.safe_load(path.read_text())
        budget, tuning, final = CellBudget(**raw["cell"]), raw["tuning"], raw["final"]
        rates = tuple(raw["learning_rates"]["grid"])
        alone = tuple(raw["learning_rates"]["without_strength"])
        sweeps = {name: _sweep(name, entry or {}, rates, alone) for name, entry in raw["losses"].items()}
        parts = {name: {**final[name], **(raw["quick"][name] if quick else {})} for name in ("everything", "headline")}
        zoo = Zoo(
            budget, Tuning(tuple(tuning["worlds"]), tuning["seed"], tuning["labels"], tuning["trials"], tuning["checkpoints"]),
            tuple(map(float, final["targets"])), float(final["primary"]), final["seed"], sweeps, raw.get("left_out") or {},
            _part(tuple(sweeps), parts["everything"]), _part(tuple(parts["headline"]["losses"]), parts["headline"]),
        )  # fmt: skip
    except OSError as error:
        raise ConfigError(
            f"--config {path}: {error.strerror or error}; give a file laid out as benchmarks/zoo.yaml."
        ) from error
    except (KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        what = f"the entry {error} is missing" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"{path} is not laid out as benchmarks/zoo.yaml: {what}.") from error
    _check(zoo, path)
    return zoo


def _sweep(name: str, entry: Mapping[str, Any], rates: tuple[float, ...], alone: tuple[float, ...]) -> Sweep:
    swept = {flag: tuple(value) for flag, value in entry.items() if isinstance(value, list)}
    fixed = {flag: value for flag, value in entry.items() if flag not in swept}
    if len(swept) > 1:
        raise ConfigError(f"losses.{name}: one strength is swept, got {', '.join(swept)}; give the others one number each.")
    strength = next(iter(swept), None)
    return Sweep(name, strength, swept.get(strength or "", ()), fixed, rates if strength else alone)


def _part(names: tuple[str, ...], entry: Mapping[str, Any]) -> Part:
    return Part(names, tuple(entry["worlds"]), tuple(entry["labels"]))


def _check(zoo: Zoo, path: Path) -> None:
    """Equal trials, disjoint worlds and seeds, and losses and options that exist."""
    for name, sweep in zoo.sweeps.items():
        numbers = [*sweep.learning_rates, *sweep.values]
        if not all(isinstance(number, int | float) for number in numbers):
            raise ConfigError(f"{path}, losses.{name}: expected numbers, got {numbers}; YAML reads 1e-3 as text: write 1.0e-3.")
        if len(sweep.trials()) != zoo.tuning.trials:
            raise ConfigError(
                f"{path}, losses.{name}: {len(sweep.trials())} trials, but every loss gets {zoo.tuning.trials}; "
                "change the grid of its strength."
            )
    final = {*zoo.everything.worlds, *zoo.headline.worlds}
    if final & {*zoo.tuning.worlds} or zoo.seed == zoo.tuning.seed:
        raise ConfigError(f"{path}: settings must be tuned in worlds and with a seed that the final study never uses.")
    if zoo.primary not in zoo.targets:
        raise ConfigError(f"{path}: final.primary {zoo.primary} must be one of final.targets {list(zoo.targets)}.")
    unknown = {*zoo.headline.losses} - zoo.sweeps.keys()
    if unknown:
        raise ConfigError(f"{path}: headline losses {', '.join(sorted(unknown))} are not among its losses.")
    _check_names(zoo, path)
    for name, sweep in zoo.sweeps.items():
        algorithms.get(name).setting(**sweep.trials()[0].hyper)


def _check_names(zoo: Zoo, path: Path) -> None:
    listed, registered = [*zoo.sweeps, *zoo.left_out], set(offline_policy_losses())
    odd, twice = sorted({*listed} - registered), sorted(zoo.sweeps.keys() & zoo.left_out.keys())
    if odd or twice:
        said = [f"{what}: {', '.join(names)}" for what, names in (("unknown", odd), ("twice", twice)) if names]
        raise ConfigError(f"{path} names offline losses that train a policy, each once; {'; '.join(said)}.")
    for name in zoo.left_out:
        if not any(name in _terms(other) for other in registered - {name}):
            raise ConfigError(f"{path}: left_out is for terms of other losses; {name} is a loss of its own.")


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _terms(name: str) -> Sequence[str]:
    return [term.name for term in losses.get(name).terms]
