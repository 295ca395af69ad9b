"""Policies from anywhere: folders, adapters, hub ids and files of samples in one report, whoever trained them.

Each is measured as `prefopt compare` measures its own. What they were trained on, and for how long, nobody here knows, and the
report says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from prefopt.compare import command_line
from prefopt.data.report import render
from prefopt.environment import environment
from prefopt.errors import ConfigError, OutputError
from prefopt.judges.samples import read_samples
from prefopt.models.causal_lm import CausalLMPolicy, FrozenReference, build_policy
from prefopt.options import Options
from prefopt.reference import ReferenceCache
from prefopt.report import print_summary, save_results, save_timings, write_report
from prefopt.report.schema import (
    PER_PAIR_FILE,
    PER_PROMPT_FILE,
    SCHEMA_VERSION,
    Cell,
    PairRow,
    PromptRow,
    Results,
    Setting,
    Timings,
    save_rows,
)
from prefopt.score_inputs import load_policy, policy_folder
from prefopt.tasks import Measured, Task, build_task, prepare_process
from prefopt.tasks.text import TextTask

ELSEWHERE = "made elsewhere"
UNCONTROLLED = (
    "These policies were not trained by this study: data, order, budget, reference and tuning are not controlled, and "
    "differences may come from any of them."
)
_SAMPLES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Outsider:
    """One policy, or its samples.

    Args:
        name: heads its row; outsiders of one name are seeds of one setting.
        source: a folder, an adapter's folder, a run of `prefopt train`, a hub id, or a file of samples.
        seed: counts those of one name.
    """

    name: str
    source: str
    seed: int

    @property
    def samples(self) -> bool:
        return self.source.endswith(_SAMPLES)


def read_outsiders(words: Sequence[str]) -> tuple[Outsider, ...]:
    """NAME=SOURCE, or SOURCE alone, which names itself; a name given again is its next seed.

    Raises:
        ConfigError: none, or an empty name or source.
    """
    if not words:
        raise ConfigError("name what is evaluated: NAME=FOLDER, NAME=org/model or NAME=samples.jsonl, once for each seed.")
    made: list[Outsider] = []
    for word in words:
        name, equals, source = word.partition("=")
        if not equals:
            name, source = Path(word).name.removesuffix(".gz").removesuffix(".jsonl"), word
        if not name or not source:
            raise ConfigError(f"{word}: expected NAME=SOURCE.")
        made.append(Outsider(name, source, sum(other.name == name for other in made)))
    return tuple(made)


def evaluate_outsiders(
    outsiders: Sequence[Outsider], options: Options, output: Path, *, cache: Path, console: Console | None = None
) -> Results:
    """Measures every policy and writes results, rows and the report.

    Args:
        outsiders: what is measured.
        options: data with its test rows, the reference model that KL is measured to, and what is measured.
        output: a new folder.
        cache: of judges and reference log-probs.
        console: for people; None is silent.

    Raises:
        PrefoptError: a policy that cannot be loaded or does not fit the reference; bad data or output folder.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output} is not empty; name another --output-dir.")
    console = console or Console(quiet=True)
    prepare_process(options, 1)
    task = build_task(options, cache, console)
    console.print(render(task.training(0).report))
    shared = task.shared(on_policy=False)
    cells: list[Cell] = []
    rows: list[PromptRow] = []
    pairs: list[PairRow] = []
    for number, one in enumerate(outsiders, start=1):
        measured = _measure(one, task, options, cache)
        console.print(f"[{number}/{len(outsiders)}] {one.name} seed {one.seed}: {one.source}", highlight=False, markup=False)
        path = ({"step": 0.0, **measured.metrics},)
        cells.append(Cell(ELSEWHERE, one.name, one.seed, "ok", None, measured.metrics, path))
        rows += [replace(row, label=one.name, seed=one.seed) for row in measured.rows]
        pairs += [replace(row, label=one.name, seed=one.seed) for row in measured.pairs]
    names = list(dict.fromkeys(one.name for one in outsiders))
    results = Results(
        schema_version=SCHEMA_VERSION,
        title="Policies made elsewhere",
        task=options.data.task,
        settings=tuple(Setting(ELSEWHERE, name, _sources(name, outsiders)) for name in names),
        seeds=tuple(range(max(one.seed for one in outsiders) + 1)),
        metrics=tuple(task.metrics),
        cells=tuple(cells),
        created=datetime.now(UTC).strftime("%Y-%m-%d"),
        environment=environment(),
        command=command_line(""),
        train=options.as_dict(),
        data=task.training(0).report.as_dict(),
        reference=dict(shared.reference),
        baselines=tuple(shared.baselines),
        judges=tuple(shared.judges),
        frontier=tuple(shared.frontier) if shared.frontier is not None else None,
        notes=(UNCONTROLLED, *shared.notes),
    )
    output.mkdir(parents=True, exist_ok=True)
    save_rows(rows, output / PER_PROMPT_FILE)
    save_rows(pairs, output / PER_PAIR_FILE)
    save_timings(Timings(), output)
    save_results(results, output)
    report = write_report(output)
    print_summary(results, None, console)
    console.print(str(report), highlight=False, soft_wrap=True)
    return results


def _sources(name: str, outsiders: Sequence[Outsider]) -> dict[str, Any]:
    return {"source": [one.source for one in outsiders if one.name == name]}


def _measure(one: Outsider, task: Task, options: Options, cache: Path) -> Measured:
    if one.samples:
        if not isinstance(task, TextTask):
            raise ConfigError(f"{one.source}: samples can be judged on preference data; of this data name the policy itself.")
        return task.measure_samples(read_samples(Path(one.source)), one.seed)
    policy, reference = _load(one, task, cache)
    known = ReferenceCache(reference, cache / "reference", micro_batch_tokens=options.budget.micro_batch_tokens)
    return task.evaluate(policy, reference, known, None, one.seed)


def _load(one: Outsider, task: Task, cache: Path) -> tuple[CausalLMPolicy, FrozenReference]:
    """The policy in the reference's vocabulary.

    Raises:
        ConfigError: it cannot be loaded, or its token ids mean something else.
    """
    start, tokenizer = task.start()
    folder = Path(one.source)
    model, own_tokenizer = load_policy(policy_folder(folder) if folder.is_dir() else one.source, start, cache)
    if own_tokenizer is not None and own_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"{one.source} has another tokenizer than the reference, so KL and log-ratios have no meaning: name its samples "
            "(NAME=samples.jsonl), or another --model as the reference."
        )
    _, reference = build_policy(start, tokenizer)
    policy = CausalLMPolicy(model, tokenizer)
    policy.train(False)
    return policy, reference
