"""A study: which settings are compared on which seeds, under which options. Plain values in, `Study` out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import yaml

from losses.suggestions import suggest_option
from prefopt import algorithms
from prefopt.decode import decode, decode_value, unquoted
from prefopt.errors import ConfigError, DataError
from prefopt.optimization import Optimization
from prefopt.options import Options, RewardOptions, TuningOptions, build_options
from prefopt.streams import Budget

if TYPE_CHECKING:
    from rich.console import Console

    from prefopt.report.schema import Results

PRESETS = Path(__file__).parent / "presets"
# What an entry may set besides hyper-parameters, by the part of the options that it belongs to.
_OVERRIDES: Mapping[str, type] = {"reward": RewardOptions, "optimization": Optimization, "budget": Budget}


Match = Literal["labels", "tokens", "seconds"]


@dataclass(frozen=True)
class Entry:
    """One algorithm of a study with the numbers that differ from its defaults, and a name if it needs one.

    Args:
        algorithm: a loss or a sum of losses, `online_` before it for fresh samples.
        hyper: its hyper-parameters.
        name: heads its row; made from the others if empty.
        reward: fields of `RewardOptions` that differ from the study's, so that rewards can be compared as algorithms are.
        optimization: fields of `Optimization` that differ from the study's.
        budget: fields of `Budget` that differ from the study's.
        group: entries of one group are one algorithm at several strengths; alone if empty.
        tuned: its numbers were chosen by tuning.
    """

    algorithm: str
    hyper: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    reward: Mapping[str, Any] = field(default_factory=dict)
    optimization: Mapping[str, Any] = field(default_factory=dict)
    budget: Mapping[str, Any] = field(default_factory=dict)
    group: str = ""
    tuned: bool = False

    @property
    def label(self) -> str:
        """Its name in the report: as given, or the algorithm's with the values that were set."""
        return self.name or self.algorithm + "".join(f" {name}={value}" for name, value in self.values.items())

    @property
    def family(self) -> str:
        """What its strengths have in common: the group's name, or its own."""
        return self.group or self.label

    @property
    def values(self) -> dict[str, Any]:
        """Everything that was set, for the report."""
        return {**self.hyper, **self.reward, **self.optimization, **self.budget}

    def options(self, shared: Options) -> Options:
        """The study's options with what this entry sets."""
        return replace(
            shared,
            reward=replace(shared.reward, **self.reward),
            optimization=replace(shared.optimization, **self.optimization),
            budget=replace(shared.budget, **self.budget),
        )

    def setting(self) -> algorithms.Setting:
        """The algorithm with all its numbers. Raises ConfigError for an unknown algorithm or option."""
        return algorithms.get(self.algorithm).setting(**self.hyper)

    def changed(self, values: Mapping[str, Any]) -> Entry:
        """The entry with more values, by their names.

        Raises:
            ConfigError: a name that is no hyper-parameter of the algorithm and no option of reward, optimizer or budget; a
                value of another type.
        """
        own: dict[str, Any] = {"hyper": {**self.hyper}, **{part: {**getattr(self, part)} for part in _OVERRIDES}}
        for name, value in values.items():
            part = value_part(self.algorithm, name)
            own[part][name] = typed(self.algorithm, name, value)
        return replace(self, **own)


def value_part(algorithm: str, name: str) -> str:
    """Where a value of an entry belongs: "hyper", "reward", "optimization" or "budget".

    Raises:
        ConfigError: nowhere, with a suggestion.
    """
    flags = algorithms.get(algorithm).flags
    # The order of rows follows the seeds of the study.
    parts = {part: {item.name for item in fields(kind)} - {"seed"} for part, kind in _OVERRIDES.items()}
    for part, names in {"hyper": flags.keys(), **parts}.items():
        if name in names:
            return part
    hint = suggest_option(name, [*flags, *(known for names in parts.values() for known in sorted(names))])
    raise ConfigError(f"{algorithm} has no option {name!r}{hint}. Its own are: {', '.join(flags) or 'none'}.")


def _kind(algorithm: str, name: str) -> Any:
    """The annotation of a value. Raises as `value_part`."""
    part = value_part(algorithm, name)
    return algorithms.get(algorithm).flags[name].annotation if part == "hyper" else get_type_hints(_OVERRIDES[part])[name]


def typed(algorithm: str, name: str, value: Any) -> Any:
    """A value as its option's type.

    Raises:
        ConfigError: it is of another.
    """
    kind = _kind(algorithm, name)
    try:
        return decode_value(kind, unquoted(kind, value), f"{algorithm}.{name}")
    except DataError as error:
        raise ConfigError(str(error)) from error


def takes_many(algorithm: str, name: str) -> bool:
    """Whether a list is one value of this option, and not several strengths of it."""
    return get_origin(_kind(algorithm, name)) in (tuple, list)


def entries_of(algorithm: str, values: Mapping[str, Any], name: str = "") -> list[Entry]:
    """An algorithm as it stands in a study file: a list of values of one number is a grid of strengths, a group.

    Raises:
        ConfigError: as `Entry.changed`.
    """
    fixed = {key: value for key, value in values.items() if not isinstance(value, list | tuple) or takes_many(algorithm, key)}
    grid = {key: [*value] for key, value in values.items() if key not in fixed}
    base = Entry(algorithm, name=name).changed(fixed)
    if not grid:
        return [base]
    made = []
    for point in product(*grid.values()):
        strength = dict(zip(grid, point, strict=True))
        entry = replace(base.changed(strength), group=base.label)
        made.append(replace(entry, name=f"{name} " + " ".join(f"{k}={v}" for k, v in strength.items())) if name else entry)
    return made


@dataclass(frozen=True)
class Study:
    """What is compared.

    Args:
        entries: algorithms with hyper-parameters; labels must differ.
        seeds: each trains every algorithm once.
        options: data, model, budget, evaluation.
        imports: users' files with losses of their own.
        title: heads the report.
        preset: how the options came about, for the report.
        notes: lines for the report.
        question: what the study asks, in one sentence.
        kl_targets: nats at which algorithms are compared; the first is the primary end point's.
        tuning: how hyper-parameters are chosen before; the entries are what is tuned.
        match: what settings spend alike: labels (rows and passes), or the tokens or seconds of the first setting's run.
    """

    entries: Sequence[Entry]
    seeds: Sequence[int]
    options: Options = field(default_factory=Options)
    imports: Sequence[str] = ()
    title: str = "Preference optimization, compared"
    preset: str = ""
    notes: Sequence[str] = ()
    question: str = ""
    kl_targets: Sequence[float] = ()
    tuning: TuningOptions = field(default_factory=TuningOptions)
    match: Match = "labels"

    def __post_init__(self) -> None:
        if self.match not in get_args(Match):
            raise ConfigError(f"match is {self.match!r}; expected {', '.join(get_args(Match))}.")
        labels = [entry.label for entry in self.entries]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if not labels or twice:
            raise ConfigError(f"name each setting once; {', '.join(twice) or 'nothing'} was named {'twice' if twice else ''}.")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"seeds must be one or more different numbers, got {list(self.seeds)}.")
        if any(not target > 0 for target in self.kl_targets) or len(set(self.kl_targets)) != len(self.kl_targets):
            raise ConfigError(f"kl_targets must be different positive numbers of nats, got {list(self.kl_targets)}.")

    def settings(self) -> list[algorithms.Setting]:
        """Every entry with all its numbers. Raises ConfigError for an unknown algorithm or option."""
        algorithms.import_files(self.imports)
        return [entry.setting() for entry in self.entries]

    @classmethod
    def load(cls, path: str | Path, **changes: Any) -> Study:
        """A study from a YAML file, or one that comes with prefopt by its name.

        Args:
            path: file or preset.
            changes: by the names that the file may use; they win.

        Raises:
            ConfigError: a file that cannot be read, or what it says makes no sense.
        """
        file = preset_file(str(path)) if str(path) in presets() else Path(path)
        return study_of({**read_study(file), **changes}, preset=str(path) if file.parent == PRESETS else "")

    def values(self) -> dict[str, Any]:
        """What a file would say, every default included: `study_of` gives the study back, but for preset and notes."""
        options = self.options.as_dict()
        own = {name: value for part in options.values() for name, value in part.items()} | asdict(self.tuning)
        own["algorithms"] = [
            {entry.algorithm: {**entry.values, "as": entry.label, **({"group": entry.group} if entry.group else {})}}
            for entry in self.entries
        ]
        own |= {name: getattr(self, name) for name in ("title", "question", "match")}
        own |= {name: [*getattr(self, name)] for name in ("seeds", "kl_targets")} | {"imports": [*map(str, self.imports)]}
        own.pop("seed")  # of the order of rows, which follows the study's seeds
        plain: dict[str, Any] = json.loads(json.dumps(own))
        return plain

    def run(self, output: str | Path, **how: Any) -> Results:
        """Runs what is not finished yet and writes the report: `prefopt.compare.compare`, whose arguments it takes."""
        from prefopt.compare import compare

        return compare(self, Path(output), **how)

    def describe(self, console: Console) -> None:
        """What `run` would do, without training."""
        from prefopt.plan import describe

        describe(self, console)


def study_of(values: Mapping[str, Any], *, preset: str = "") -> Study:
    """A study from the plain values of a YAML file or of flags.

    `algorithms` lists names, or `name: {option: value}`; a list of values is a grid of strengths, `as` names the row (the
    group, where there are strengths), `group` what it is a strength of. `seeds` is how many, or which.

    Raises:
        ConfigError: an unknown name, or a value that makes no sense.
    """
    algorithms.import_files(values.get("imports", ()))
    known = {*_OWN, *(item.name for kind in get_type_hints(Options).values() for item in fields(kind))} - {"seed"}
    for name in values:
        if name not in known:
            raise ConfigError(f"a study has no {name!r}{suggest_option(name, sorted(known))}.")
    seeds = values.get("seeds", 3)
    if isinstance(seeds, int):
        if seeds < 1:
            raise ConfigError(f"seeds is {seeds}; it is how many seeds to run, at least 1, or a list of them.")
        seeds = range(seeds)
    return Study(
        [
            entry
            for name, own in map(read_item, assign(values.get("algorithms", ()), values.get("set", ())))
            for entry in _entries(name, own)
        ],
        tuple(seeds),
        build_options(values),
        tuple(values.get("imports", ())),
        preset=preset,
        question=values.get("question", ""),
        match=values.get("match", "labels"),
        kl_targets=tuple(map(float, values.get("kl_targets", ()))),
        tuning=_tuning(values),
        **({"title": values["title"]} if values.get("title") else {}),
    )


def _tuning(values: Mapping[str, Any]) -> TuningOptions:
    try:
        return decode(TuningOptions, {f.name: values[f.name] for f in fields(TuningOptions) if f.name in values}, "tuning")
    except DataError as error:
        raise ConfigError(str(error)) from error


# What a study file names besides options.
_OWN = (
    "algorithms",
    "set",
    "seeds",
    "imports",
    "title",
    "question",
    "kl_targets",
    "match",
    *(item.name for item in fields(TuningOptions)),
)


# What names an item: its row, and the group that it is a strength of.
_NAMES = ("as", "group")


def _entries(name: str, values: Mapping[str, Any]) -> list[Entry]:
    made = entries_of(name, {key: value for key, value in values.items() if key not in _NAMES}, values.get("as", ""))
    return [replace(entry, group=values["group"]) for entry in made] if values.get("group") else made


def read_item(item: Any) -> tuple[str, Mapping[str, Any]]:
    """An item of `algorithms` as name and values."""
    if isinstance(item, str):
        return item, {}
    if isinstance(item, Mapping) and len(item) == 1:
        ((name, values),) = item.items()
        if isinstance(name, str) and isinstance(values, Mapping):
            return name, values
    raise ConfigError(f"algorithms: expected a name, or `name: {{option: value}}`, got {item!r}.")


def assign(items: Sequence[Any], assignments: Sequence[str]) -> list[Any]:
    """The items of a study file's `algorithms` with what ALGO.NAME=VALUE says; several values with commas are strengths.

    Raises:
        ConfigError: another form, or an algorithm that is not compared.
    """
    found = [read_item(item) for item in items]
    names = [name for name, _ in found]
    values: dict[str, dict[str, Any]] = {}
    for text in assignments:
        where, equals, value = text.partition("=")
        name, dot, option = where.rpartition(".")
        if not (equals and dot and name and option.replace("-", "_").isidentifier()):
            raise ConfigError(f"--set {text}: expected ALGO.NAME=VALUE, for example --set {names[0]}.NAME=VALUE.")
        if name not in names:
            raise ConfigError(
                f"--set {text}: {name!r} is not compared{suggest_option(name, names)}. Compared: {', '.join(names)}."
            )
        option = option.replace("-", "_")
        many = value.split(",")
        values.setdefault(name, {})[option] = many if len(many) > 1 or takes_many(name, option) else value
    return [{name: {**own, **values.get(name, {})}} for name, own in found]


def presets() -> list[str]:
    """The studies in prefopt/presets, by name."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def preset_file(name: str) -> Path:
    """Its file. Raises ConfigError where there is none."""
    if name not in presets():
        raise ConfigError(
            f"--preset {name}: there is none{suggest_option(name, presets())}. There are: {', '.join(presets())}."
        )
    return PRESETS / f"{name}.yaml"


def read_study(path: Path, flag: str = "study") -> dict[str, Any]:
    """The plain values of a study file.

    Raises:
        ConfigError: it cannot be read, or is no YAML of names and values.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{flag} {path}: cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag} {path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not isinstance(values.get("algorithms", []), list):
        raise ConfigError(f"{flag} {path}: expected `name: value` lines with the names of flags, and `algorithms: [dpo, ipo]`.")
    return {str(name): value for name, value in values.items()}
