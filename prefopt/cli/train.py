"""`prefopt train ALGO`: one cell of a comparison with console progress, and the policy saved."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cyclopts import App, Group
from rich.console import Console
from rich.table import Table
from rich.text import Text

import losses
from losses.registry import Loss
from losses.suggestions import suggest_option
from prefopt import algorithms
from prefopt.cell import CellResult, run_cell
from prefopt.cli import catalogue
from prefopt.cli.flags import (
    Flag,
    check_values,
    field_flags,
    hyper_flags,
    import_flag,
    import_paths,
    make_command,
    option_flags,
    option_values,
    parameter_defaults,
)
from prefopt.cli.lookup import find_algorithm
from prefopt.data.report import DataReport, render, render_plain
from prefopt.environment import environment
from prefopt.errors import ConfigError, OutputError
from prefopt.files import contents, differences, empty, locked, parse_json, staged_folder, write_json
from prefopt.machine import standard_console
from prefopt.options import Options, ParallelOptions, build_options, build_part, default_cache
from prefopt.parallel.choice import open_strategy
from prefopt.parallel.strategy import Strategy
from prefopt.report.schema import PER_PAIR_FILE, PER_PROMPT_FILE, Metric, save_rows
from prefopt.rewards.quality import Quality, measure_quality, quality_table
from prefopt.runlog import FILE as METRICS_FILE
from prefopt.tasks import build_task, prepare_process

CONFIG_FILE, RESULT_FILE, POLICY_FOLDER = "config.json", "result.json", "policy"
REWARD_FILE, RELIABILITY_FILE = "reward_report.json", "reliability.png"
# What may be otherwise when a run goes on: it changes none of its numbers.
_MAY_DIFFER = ("recovery", "logging.keep", "logging.save_every", "logging.save_in_background")
# A run by hand is worth resuming; a comparison's cells are short and many.
SAVE_EVERY = 50
_RUN, _LOSS = "Run", "--loss"
_HELP = (
    "Train one algorithm and measure the policy. ALGO is a loss or a weighted sum of losses: `prefopt train dpo`, `prefopt "
    "train dpo:1.0+sft:0.2`, or the same as `--loss`; `online_` before an offline loss trains it on fresh samples of the "
    "policy, ordered by the reward: `prefopt train online_dpo`. `prefopt train ALGO --help` lists its flags."
)


def build(tokens: Sequence[str]) -> App:
    """`train` with a sub-command for every trainable loss, those of `--import` included, or with the loss of `--loss`.

    Raises:
        ConfigError: an algorithm that does not exist or cannot be trained alone; none, or more than one.
    """
    algorithms.import_files(import_paths(tokens))
    app = App("train", version_flags=(), default_parameter=parameter_defaults(), help_format="plaintext", help=_HELP)
    asked = _asked(tokens)
    algorithm = find_algorithm(asked) if asked else None
    if algorithm is not None and asked in option_values(tokens, _LOSS):
        app.help = _about(algorithm.loss)
        app.default(_command(algorithm, [Flag("loss", str, "", "The loss, or a weighted sum of losses.", _RUN)]))
        return app
    families = catalogue.by_family(map(losses.get, algorithms.trainable_names()))
    for index, (family, members) in enumerate(families.items()):
        group = Group(family.capitalize(), sort_key=index)
        for loss in members:
            if loss.name != asked:
                app.command(App(loss.name, help=catalogue.equation(loss), version_flags=(), group=group))
    if algorithm is not None:
        app.command(_command(algorithm), name=asked, help=_about(algorithm.loss))
    return app


def _asked(tokens: Sequence[str]) -> str:
    """The word after `train`, or that of `--loss`; "" where help is all that is wanted.

    Raises:
        ConfigError: none, or several.
    """
    following = tokens[tokens.index("train") + 1 :]
    asked = [token for token in following[:1] if not token.startswith("-")] + option_values(following, _LOSS)
    if len(asked) > 1:
        raise ConfigError(
            f"train takes one loss, got {' and '.join(asked)}. Their sum is one: {'+'.join(asked)}. To see them side by side: "
            f"prefopt compare {' '.join(asked)}."
        )
    if following and not asked and not {"--help", "-h"} & {*following}:
        raise ConfigError("name the loss first: prefopt train LOSS, or --loss LOSS. `prefopt losses` lists them.")
    return asked[0] if asked else ""


def _about(loss: Loss) -> str:
    """A loss's docstring without arguments, which are flags, and errors; a paragraph is one line, which help wraps."""
    return "\n\n".join([catalogue.equation(loss), *catalogue.paragraphs(loss.doc, without=("Args", "Raises"))])


def explain_unknown(tokens: Sequence[str], option: str) -> str:
    """What to do about an option that the algorithm named in `tokens` does not have."""
    name = option.lstrip("-").partition("=")[0].replace("-", "_")
    algorithm = find_algorithm(_asked(tokens))
    hint = suggest_option(name, [flag.name for flag in (*hyper_flags(algorithm), *_run_flags(), *option_flags())])
    return (
        f"{algorithm.name} has no option {option.partition('=')[0]}{hint}. `prefopt train {algorithm.name} --help` lists them."
    )


def _run_flags() -> list[Flag]:
    return [
        Flag("output_dir", Path | None, None, "Folder of this run (required): metrics, checkpoints, result and policy.", _RUN),
        Flag("seed", int, 0, "Of the order of rows, adapters, rollouts and the exact world's pairs.", _RUN),
        Flag("resume", bool, False, "Go on from the newest checkpoint in the folder.", _RUN),
        Flag("overwrite", bool, False, "Delete the run that the folder holds.", _RUN),
        import_flag(_RUN),
        *field_flags(ParallelOptions, "Processes"),
    ]


def _command(algorithm: algorithms.Algorithm, more: Sequence[Flag] = ()) -> Any:
    flags = [*hyper_flags(algorithm), *more, *_run_flags(), *option_flags(save_every=SAVE_EVERY)]

    def run(
        *,
        output_dir: Path | None = None,
        seed: int = 0,
        resume: bool = False,
        overwrite: bool = False,
        imports: tuple[str, ...] = (),
        **values: Any,
    ) -> None:
        if output_dir is None:
            raise ConfigError(f"name the folder of this run: prefopt train {algorithm.name} --output-dir FOLDER.")
        setting = check_values(algorithm.setting(**{name: values[name] for name in algorithm.flags if name in values}))
        options = build_options(values, save_every=SAVE_EVERY)
        with open_strategy(build_part(ParallelOptions, values)) as strategy:
            train(
                setting,
                options,
                output_dir,
                seed=seed,
                resume=resume,
                overwrite=overwrite,
                imports=imports,
                console=standard_console() if strategy.leads else Console(quiet=True),
                strategy=strategy,
            )

    return make_command(run, flags)


def train(
    setting: algorithms.Setting,
    options: Options,
    output: Path,
    *,
    seed: int,
    resume: bool,
    overwrite: bool,
    imports: Sequence[str],
    console: Console,
    strategy: Strategy,
) -> None:
    """Trains, measures and saves one setting in `output`; all processes of `strategy` call this.

    Raises:
        OutputError: the folder holds another run, or another process works in it.
    """
    own = {"algorithm": setting.algorithm.name, "hyper": dict(setting.hyper), "seed": seed, "imports": [*imports]}
    config = {**own, **options.as_dict()}
    strategy.agree(config, "the options of the run")
    with locked(output) if strategy.leads else contextlib.nullcontext():
        strategy.lead(lambda: claim(output, config, resume=resume, overwrite=overwrite))
        _train(setting, options, output, seed=seed, resume=resume, console=console, strategy=strategy)


def _train(
    setting: algorithms.Setting,
    options: Options,
    output: Path,
    *,
    seed: int,
    resume: bool,
    console: Console,
    strategy: Strategy,
) -> None:
    """`train` in a folder that is its own."""
    name, policy = setting.algorithm.name, output / POLICY_FOLDER
    if strategy.lead((output / RESULT_FILE).exists):
        console.print(f"already finished; the policy is in {policy}", highlight=False, soft_wrap=True)
        return
    cache = default_cache()
    prepare_process(options, 1)
    if strategy.name != "single":
        console.print(f"{strategy.communicator.world_size} processes, strategy {strategy.name}", highlight=False)
    with strategy.first():
        task = build_task(options, cache, console)
        report = task.training(seed).report
    console.print(render(report))
    strategy.lead(lambda: _write_data_report(report, output))
    result = run_cell(
        task, setting, options, seed, label=name, cache=cache, folder=output, resume=resume, console=console, strategy=strategy
    )
    if not strategy.leads:
        return
    with staged_folder(policy) as staged:
        result.save(staged)
    quality = None
    if result.reward_model is not None:
        quality = measure_quality(result.reward_model, task.held_out())
        _write_quality(quality, name, output)
    _write_result(result, output, strategy)
    console.print(_metrics_table(result, task.metrics))
    if quality is not None:
        console.print(quality_table(quality, f"{name} as a reward model"))
    console.print(f"policy: {policy}", highlight=False, soft_wrap=True)


def claim(output: Path, config: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
    """Takes the folder for this run, or goes on with what it holds of it.

    Raises:
        OutputError: it holds another run, this one without `resume`, or something else; or it cannot be written.
    """
    config = json.loads(json.dumps(config))
    marker = output / CONFIG_FILE
    try:
        output.mkdir(parents=True, exist_ok=True)
        if found := contents(output):
            _refuse_links(found)
            differing = {name for name in differences(_held(marker), config) if not name.startswith(_MAY_DIFFER)}
            # A run that stopped before its first step, as on bad data, left nothing worth keeping.
            if (output / METRICS_FILE).exists() and not (resume and not differing):
                _refuse_unless_told(output, differing, resume, overwrite)
                empty(output)
        write_json(marker, config)
    except OSError as error:
        raise OutputError(f"--output-dir {output} cannot be written ({error.strerror}); name another folder.") from error


def _refuse_links(found: Sequence[Path]) -> None:
    """A folder from elsewhere may hold links through which a run would write to other places."""
    if links := [path for path in found if path.is_symlink()]:
        raise OutputError(f"{links[0]} is a link, and a run writes into its folder alone: remove it, or name another folder.")


def _refuse_unless_told(output: Path, differing: set[str], resume: bool, overwrite: bool) -> None:
    if resume:
        names = ", ".join(sorted(differing))
        raise OutputError(
            f"{output} holds a run with other options ({names}), so --resume cannot go on with it: give it the options in its "
            "config.json, name another folder, or --overwrite it."
        )
    if not overwrite:
        raise OutputError(
            f"{output} holds a run already: --resume goes on with it, --overwrite deletes it; or name another folder."
        )


def _held(marker: Path) -> Any:
    """The config of the run in a folder. Raises OutputError when the folder is not one that `train` wrote."""
    try:
        held = parse_json(marker.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        held = None
    if not isinstance(held, dict) or "algorithm" not in held:
        raise OutputError(f"{marker.parent} is not empty and holds no run of prefopt train; name another --output-dir.")
    return held


def _write_data_report(report: DataReport, output: Path) -> None:
    (output / "data_report.txt").write_text(render_plain(report), encoding="utf-8")
    write_json(output / "data_report.json", report.as_dict())


def _write_quality(quality: Quality, name: str, output: Path) -> None:
    from prefopt.rewards.figures import reliability_png

    write_json(output / REWARD_FILE, quality.as_dict())
    (output / RELIABILITY_FILE).write_bytes(reliability_png(quality, name))


def _write_result(result: CellResult, output: Path, strategy: Strategy) -> None:
    if result.rows:
        save_rows(result.rows, output / PER_PROMPT_FILE)
    if result.pairs:
        save_rows(result.pairs, output / PER_PAIR_FILE)
    # Last: it says that the run is finished.
    timing, cell = asdict(result.timing), asdict(result.cell)
    processes = {"strategy": strategy.name, "processes": str(strategy.communicator.world_size)}
    write_json(output / RESULT_FILE, {"cell": cell, "timing": timing, "environment": {**environment(), **processes}})


def _metrics_table(result: CellResult, metrics: Sequence[Metric]) -> Table:
    table = Table(title=f"{result.cell.label}, seed {result.cell.seed}", title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("what it is")
    for metric in metrics:
        if metric.key in result.cell.final:
            # Text, not str: "E[r]" is no markup.
            table.add_row(Text(metric.label), Text(format(result.cell.final[metric.key], metric.format)), Text(metric.note))
    return table
