"""results.json, timings.json and per_prompt.jsonl as frozen dataclasses, with validation at the file boundary.

Equal runs write equal results.json: everything that a clock or a memory gauge says lives in timings.json. A number that is
not finite is written as null and read back as NaN, because JSON has no NaN.
"""

from __future__ import annotations

import json
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from prefopt.decode import decode
from prefopt.errors import DataError
from prefopt.files import parse_json, write_json

if TYPE_CHECKING:
    from prefopt.report.grid import Grid
    from prefopt.report.statistics import Comparison

SCHEMA_VERSION = 1
RESULTS_FILE, TIMINGS_FILE = "results.json", "timings.json"
REPEAT_FILE = "study.yaml"
"""The whole study, every default included, as a file that `prefopt compare` reads."""
PER_PROMPT_FILE, PER_PAIR_FILE = "per_prompt.jsonl", "per_pair.jsonl"
MINIMUM_SEEDS = 3
"""Under this many seeds there are no intervals over seeds, no tests and no ranking words (protocol, rule 6)."""

Row = TypeVar("Row")
_FORMAT = re.compile(r"\+?,?(\.\d+)?[efg%]")


@dataclass(frozen=True)
class Metric:
    """A column, as an evaluator declares it. `better` is None where neither direction is good in itself (length, KL)."""

    key: str
    label: str
    better: Literal["up", "down"] | None = None
    format: str = ".3f"
    primary: bool = False
    diagnostic: bool = False
    note: str = ""


@dataclass(frozen=True)
class Setting:
    """An algorithm with its hyper-parameters; `label` names it everywhere in the report.

    Settings of one `group` are one algorithm at several strengths: points of one frontier. Alone, a setting is its own group.
    """

    algorithm: str
    label: str
    hyper: Mapping[str, Any] = field(default_factory=dict)
    tuned: bool = False
    group: str = ""

    @property
    def family(self) -> str:
        """What the setting is called where strengths are put together."""
        return self.group or self.label


@dataclass(frozen=True)
class Baseline:
    """What a rule without a model scores on a metric (the longer completion is chosen)."""

    label: str
    metric: str
    value: float


@dataclass(frozen=True)
class Judge:
    """A scorer's own record: held-out accuracy with interval, length bias, correlation of errors with the reward model, and
    calibration (expected calibration error)."""

    name: str
    accuracy: float
    low: float
    high: float
    n: int
    length_bias: float | None = None
    error_correlation: float | None = None
    same_backbone: bool = False
    note: str = ""
    ece: float | None = None


@dataclass(frozen=True)
class FrontierPoint:
    """The optimal policy of one beta in the exact world: KL in nats, expected reward."""

    kl: float
    reward: float
    beta: float


@dataclass(frozen=True)
class Tuning:
    """How a group's hyper-parameters were chosen (protocol, rule 3).

    Args:
        group: as in `Setting`.
        criterion: what the trials were compared by, in words; `better` says which way.
        space: of each tuned number, its range or its values, in words.
        trials: each with its hyper-parameters, its seconds and the criterion, which is null where it failed.
        chosen: the hyper-parameters of the best one.
        value: its criterion.
        border: names of the chosen numbers that lie at the border of their range.
        seeds: of tuning; no cell of the report has one of them.
    """

    group: str
    criterion: str
    better: Literal["up", "down"]
    space: Mapping[str, str]
    trials: tuple[Mapping[str, Any], ...]
    chosen: Mapping[str, Any]
    value: float
    border: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class Ledger:
    """What one cell consumed. Counts, not estimates."""

    labels: int = 0
    unique_prompts: int = 0
    epochs: float = 0.0
    trained_tokens: int = 0
    reference_tokens: int = 0
    generated_tokens: int = 0
    reward_model_tokens: int = 0


@dataclass(frozen=True)
class Cell:
    """One setting on one seed. `path` holds metrics at checkpoints (with `step`), `curve` the training log."""

    algorithm: str
    label: str
    seed: int
    status: Literal["ok", "failed"]
    error: str | None = None
    final: Mapping[str, float] = field(default_factory=dict)
    path: tuple[Mapping[str, float], ...] = ()
    curve: tuple[Mapping[str, float], ...] = ()
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def error_line(self) -> str:
        """The first line of the error, for tables."""
        lines = (self.error or "").strip().splitlines()
        return lines[0] if lines else "no message"


@dataclass(frozen=True)
class Results:
    """A comparison: everything that can be said about it except how long it took.

    `kl_targets` are nats at which the primary metric is read at equal KL; the first is the primary one. They were fixed before
    the run. `question` is what the study asks, in the words of who asks it.
    """

    schema_version: int
    title: str
    task: Literal["exact", "text", "sentiment", "control"]
    settings: tuple[Setting, ...]
    seeds: tuple[int, ...]
    metrics: tuple[Metric, ...]
    cells: tuple[Cell, ...]
    preset: str = ""
    created: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    train: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    reference: Mapping[str, float] = field(default_factory=dict)
    baselines: tuple[Baseline, ...] = ()
    judges: tuple[Judge, ...] = ()
    frontier: tuple[FrontierPoint, ...] | None = None
    shared_ledger: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    question: str = ""
    kl_targets: tuple[float, ...] = ()
    tuning: tuple[Tuning, ...] = ()

    @property
    def smoke(self) -> bool:
        """Too few seeds to say anything about an order."""
        return len(self.seeds) < MINIMUM_SEEDS

    @property
    def primary(self) -> Metric | None:
        """The one primary end point, if the comparison declares one."""
        return next((metric for metric in self.metrics if metric.primary), None)

    def metric(self, key: str) -> Metric | None:
        """The declared metric of this key."""
        return next((metric for metric in self.metrics if metric.key == key), None)

    def cells_of(self, label: str) -> tuple[Cell, ...]:
        """The cells of a setting that finished, in the order of the seeds."""
        mine = [cell for cell in self.cells if cell.label == label and cell.status == "ok"]
        return tuple(sorted(mine, key=lambda cell: self.seeds.index(cell.seed)))

    def failed_of(self, label: str) -> tuple[Cell, ...]:
        """The cells of a setting that did not finish."""
        return tuple(cell for cell in self.cells if cell.label == label and cell.status == "failed")

    def clock(self, timings: Timings, label: str, name: str) -> float:
        """Mean of one field of `CellTiming` over the seeds of a setting that finished; NaN if it was never measured."""
        finished = {cell.seed for cell in self.cells_of(label)}
        values = [float(getattr(cell, name)) for cell in timings.cells if cell.label == label and cell.seed in finished]
        values = [value for value in values if math.isfinite(value)]
        return sum(values) / len(values) if values else math.nan

    def values(self, label: str, key: str) -> dict[int, float]:
        """Finite final values of a metric by seed; seeds that failed or have no such value are absent."""
        found = {cell.seed: cell.final.get(key, math.nan) for cell in self.cells_of(label)}
        return {seed: value for seed, value in found.items() if math.isfinite(value)}

    def table(self, kl: float | None = None) -> Grid:
        """The main table, or the primary metric with its tests at a KL in nats; `print` draws it. Raises ConfigError."""
        from prefopt.report.matched_tables import target_grid
        from prefopt.report.tables import results_grid

        return results_grid(self) if kl is None else target_grid(self, kl)

    def compare(self, left: str, right: str, kl: float | None = None) -> Comparison:
        """The test of one pair at the primary end point, or at another KL in nats; `.sentence` says it in words.

        Raises:
            ConfigError: as `prefopt.report.matched.compare`.
        """
        from prefopt.report.matched import compare

        return compare(self, left, right, kl)


@dataclass(frozen=True)
class CellTiming:
    """Clock and memory of one cell; a number that was not measured is NaN (null in the file)."""

    label: str
    seed: int
    seconds: float = math.nan
    seconds_per_step: float = math.nan
    tokens_per_second: float = math.nan
    peak_memory_mb: float = math.nan


@dataclass(frozen=True)
class Timings:
    """timings.json: `shared` has the seconds of what all cells share (SFT, reward model, reference cache)."""

    cells: tuple[CellTiming, ...] = ()
    shared: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptRow:
    """One line of per_prompt.jsonl: one completion of one prompt, scored by one judge."""

    label: str
    seed: int
    prompt_id: str
    judge: str | None = None
    score: float = math.nan
    kl: float = math.nan
    log_ratio: float = math.nan
    length: float = math.nan


@dataclass(frozen=True)
class PairRow:
    """One line of per_pair.jsonl: a held-out pair under one policy. Log-ratios are log(policy/reference) of completions."""

    label: str
    seed: int
    pair_id: str
    chosen_log_ratio: float
    rejected_log_ratio: float
    chosen_length: int
    rejected_length: int

    @property
    def margin(self) -> float:
        """Log-ratio of chosen minus that of rejected, nats."""
        return self.chosen_log_ratio - self.rejected_log_ratio


def parse_results(raw: Any, where: str = RESULTS_FILE) -> Results:
    """A decoded results.json as `Results`.

    Raises:
        DataError: another schema version, a missing or unknown field, a wrong type, or parts that contradict each other.
    """
    if not isinstance(raw, dict):
        raise DataError(f"{where}: expected an object, got {type(raw).__name__}; is it the file that `prefopt compare` wrote?")
    version = raw.get("schema_version")
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{where}: schema_version is {version!r}, this prefopt reads {SCHEMA_VERSION}. "
            "Make the report with the prefopt version that ran the comparison, or run the comparison again."
        )
    results = decode(Results, raw, where)
    _check(results, where)
    return results


def load_results(path: Path) -> Results:
    """Reads results.json from a folder, or from the file itself. Raises DataError as `parse_results`."""
    file = path / RESULTS_FILE if path.is_dir() else path
    if not file.is_file():
        raise DataError(
            f"{file}: expected the results of a comparison, found no file; name a folder that `prefopt compare` wrote."
        )
    return parse_results(_load_json(file), str(file))


def save_results(results: Results, folder: Path) -> Path:
    """Checks the results and writes folder/results.json; a reader never sees half a file. Returns its path."""
    file = folder / RESULTS_FILE
    _check(results, str(file))
    return _save_json(asdict(results), file)


def load_timings(folder: Path) -> Timings | None:
    """Reads folder/timings.json; None when the comparison has none."""
    file = folder / TIMINGS_FILE
    return decode(Timings, _load_json(file), str(file)) if file.is_file() else None


def save_timings(timings: Timings, folder: Path) -> Path:
    """Writes folder/timings.json and returns its path."""
    return _save_json(asdict(timings), folder / TIMINGS_FILE)


def load_prompt_rows(folder: Path) -> tuple[PromptRow, ...]:
    """Reads folder/per_prompt.jsonl; empty when the comparison has none."""
    return _load_rows(PromptRow, folder / PER_PROMPT_FILE)


def load_pair_rows(folder: Path) -> tuple[PairRow, ...]:
    """Reads folder/per_pair.jsonl; empty when the comparison has none."""
    return _load_rows(PairRow, folder / PER_PAIR_FILE)


def _load_rows(kind: type[Row], file: Path) -> tuple[Row, ...]:
    if not file.is_file():
        return ()
    with file.open(encoding="utf-8") as lines:
        return tuple(
            decode(kind, _parse_json(line, f"{file}:{number}"), f"{file}:{number}")
            for number, line in enumerate(lines, start=1)
            if line.strip()
        )


def save_rows(rows: Sequence[PromptRow | PairRow], file: Path) -> None:
    """Writes JSON lines that `load_prompt_rows` and `load_pair_rows` read."""
    file.write_text("".join(json.dumps(_plain(asdict(row))) + "\n" for row in rows), encoding="utf-8")


def _check(results: Results, where: str) -> None:
    """What types cannot say: names are unique, cells belong to settings and seeds, formats format."""
    labels = [setting.label for setting in results.settings]
    cell_names = [f"{cell.label} seed {cell.seed}" for cell in results.cells]
    named = (
        ("label", labels),
        ("metric", [metric.key for metric in results.metrics]),
        ("seed", results.seeds),
        ("cell", cell_names),
    )
    for what, names in named:
        twice = sorted({str(name) for name in names if list(names).count(name) > 1})
        if twice:
            raise DataError(f"{where}: {what} {', '.join(twice)} occurs more than once; each must be unique.")
    if sum(metric.primary for metric in results.metrics) > 1:
        raise DataError(
            f"{where}: more than one metric is primary; a comparison has one primary end point, the rest is exploratory."
        )
    for metric in results.metrics:
        if not _FORMAT.fullmatch(metric.format):
            raise DataError(
                f"{where}: metric {metric.key!r} has format {metric.format!r}; expected one such as '.3f', '+.2f', '.1%'."
            )
    for cell in results.cells:
        if cell.label not in labels or cell.seed not in results.seeds:
            raise DataError(
                f"{where}: cell {cell.label!r} seed {cell.seed} is of no declared setting and seed ({', '.join(labels)})."
            )
        if cell.status == "failed" and cell.error is None:
            raise DataError(f"{where}: cell {cell.label!r} seed {cell.seed} failed without an error; write what stopped it.")


def _plain(value: Any) -> Any:
    """Ready for JSON: numpy scalars become numbers, numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    raise DataError(
        f"results: {value!r:.80} of type {type(value).__name__} cannot be written as JSON; convert it to a number or text."
    )


def _save_json(value: Mapping[str, Any], file: Path) -> Path:
    write_json(file, _plain(value))
    return file


def _load_json(file: Path) -> Any:
    return _parse_json(file.read_text(encoding="utf-8"), str(file))


def _parse_json(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: expected JSON, got something else at line {error.lineno}, column {error.colno}: {error.msg}."
        ) from error
