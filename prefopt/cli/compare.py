"""`prefopt compare STUDY.yaml | ALGO...`: several algorithms on several seeds, and one report; `tune` shares its flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from inspect import Parameter as Argument
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from cyclopts.config import Dict

from losses.suggestions import suggest_option
from prefopt import algorithms
from prefopt.cli.flags import (
    Flag,
    check_values,
    field_flags,
    import_flag,
    make_command,
    option_flags,
    option_values,
    parameter_defaults,
)
from prefopt.cli.lookup import find_algorithm
from prefopt.compare import compare
from prefopt.errors import ConfigError
from prefopt.executors import ExecutorName, Placement
from prefopt.machine import standard_console
from prefopt.options import TuningOptions
from prefopt.plan import describe
from prefopt.study import Match, Study, assign, preset_file, presets, read_item, read_study, study_of
from prefopt.tuning import tuning_study

_COMMAND, _STUDY, TUNING = "compare", "Study", "Tuning"
# What a study file may name besides flags.
_ALGORITHMS = "algorithms"
_ALGORITHM_HELP = (
    "Losses (`prefopt losses`), or weighted sums of them as dpo:1.0+sft:0.2; online_ before an offline one trains it on fresh "
    "samples of the policy, ordered by the reward: online_dpo. Or one study file, as --config names it."
)
_SUFFIXES = (".yaml", ".yml")


def build(tokens: Sequence[str]) -> App:
    """`compare`; the values of the study file, `--config` and `--preset` stand in for the flags that are not given.

    Raises:
        ConfigError: a study file that cannot be read.
    """
    return study_command(_COMMAND, tokens, [*study_flags(), *_run_flags(), *field_flags(TuningOptions, TUNING)], _run)


def study_command(command: str, tokens: Sequence[str], flags: Sequence[Flag], run: Any, **defaults: Any) -> App:
    """A command on a study: `run(study, values)` gets it with all flags that were given; `defaults` are the command's own."""
    files = [("the study", Path(path)) for path in _named_files(tokens, command)]
    files += [("--config", Path(path)) for path in option_values(tokens, "--config")]
    files += [("--preset", preset_file(name)) for name in option_values(tokens, "--preset")]
    settings = [(flag, read_study(path, flag)) for flag, path in files]  # a config's values win over a preset's
    items: Sequence[Any] = next((values[_ALGORITHMS] for _, values in settings if _ALGORITHMS in values), [])
    seeds = next((values.pop("seeds") for _, values in settings if isinstance(values.get("seeds"), list)), None)
    for _, values in settings:
        values.pop(_ALGORITHMS, None)

    def start(*given: str, **values: Any) -> int | None:
        named = [name for name in (*given, *values.pop("named", ())) if not name.endswith(_SUFFIXES)]
        if seeds is not None:
            values.setdefault("seeds", seeds)
        return run(_study(named or items, {**defaults, **values}), values)

    positional = Argument(
        "algorithm",
        Argument.VAR_POSITIONAL,
        annotation=Annotated[str, Parameter(help=_ALGORITHM_HELP, group=_STUDY)],
    )
    # Under the command's own name: of a flat mapping cyclopts drops every key that is also a command, such as `data`.
    config = [Dict({command: values}, source=flag) for flag, values in settings]
    app = App(command, version_flags=(), default_parameter=parameter_defaults(), help_format="plaintext", config=config)
    app.default(make_command(start, [*flags, *option_flags()], _STUDY, positional))
    return app


def _named_files(tokens: Sequence[str], command: str) -> list[str]:
    """Words right after the command that are study files."""
    words = list(tokens[tokens.index(command) + 1 :]) if command in tokens else []
    first = [word for word in words[:1] if word.endswith(_SUFFIXES)]
    if first and any(word.endswith(_SUFFIXES) for word in words[1:2]):
        raise ConfigError(f"{command} takes one study file, got {' and '.join(words[:2])}.")
    return first


def explain_unknown(tokens: Sequence[str], option: str) -> str:
    """What to do about an option that `compare` does not have; it is often a hyper-parameter of one algorithm."""
    name = option.lstrip("-").partition("=")[0].replace("-", "_")
    flags = [*study_flags(), *_run_flags(), *field_flags(TuningOptions, TUNING), *option_flags()]
    hint = suggest_option(name, [flag.name for flag in flags])
    return f"compare has no option {option.partition('=')[0]}{hint}. Hyper-parameters are set by --set ALGO.NAME=VALUE."


def study_flags() -> list[Flag]:
    """What is trained, for every command on a study."""
    named: Any = Annotated[tuple[str, ...], Parameter(name=("--loss", "--losses"))]
    chosen: Any = Annotated[tuple[str, ...], Parameter(name="--set")]
    return [
        Flag("named", named, (), "More algorithms, as those named before the flags.", _STUDY),
        Flag(
            "output_dir",
            Path | None,
            None,
            "Folder of results and report (required); a finished cell is not run again.",
            _STUDY,
        ),
        Flag("seeds", int, 3, "How many seeds; each trains every algorithm once. Under 3 there is no ranking.", _STUDY),
        Flag(
            "assignments", chosen, (),
            "Numbers of one algorithm as ALGO.NAME=VALUE: hyper-parameters, learning_rate and other options of optimizer, "
            "budget and reward. dpo.beta=0.03,0.1,0.3 is a grid of strengths, read as one frontier.", _STUDY,
        ),
        Flag(
            "kl_targets", tuple[float, ...], (),
            "Nats at which algorithms are compared, fixed before the run; the first is the primary end point's.", _STUDY,
        ),
        Flag(
            "match", Match, "labels",
            "What settings spend alike: labels, or the tokens (trained and sampled) or seconds of the first setting's run; a "
            "few updates of each are measured for it.", _STUDY,
        ),
        Flag("question", str, "", "What the study asks, in one sentence; heads the report.", _STUDY),
        Flag("config", Path | None, None, "A study file: YAML with the same names, and `algorithms`; flags win.", _STUDY),
        Flag("preset", str, "", f"A study that comes with prefopt: {', '.join(presets())}. --config and flags win.", _STUDY),
        Flag("title", str, "", "Heads the report.", _STUDY),
        import_flag(_STUDY),
    ]  # fmt: skip


def _run_flags() -> list[Flag]:
    return [
        Flag("dry_run", bool, False, "Show rows, cells, options, expected time and disk, and train nothing.", _STUDY),
        Flag("probe", bool, False, "With --dry-run: time a few updates of each setting first.", _STUDY),
        *placement_flags(),
        Flag(
            "shard", str, "",
            "i/n: only every n-th cell, from the i-th on. Start one of each on machines that share the folder (an array job); "
            "who ends last writes the report.", _STUDY,
        ),
        Flag("save_policies", bool, False, "Keep every trained policy.", _STUDY),
        Flag("overwrite", bool, False, "Delete the comparison that the folder holds.", _STUDY),
    ]  # fmt: skip


def placement_flags() -> list[Flag]:
    """Where cells run: the fields of `Placement`."""
    return [
        Flag(
            "executor", ExecutorName, "processes",
            "What runs cells: processes of this machine, or a Ray cluster whose machines share this folder and the study's.",
            _STUDY,
        ),
        Flag(
            "workers", int | None, None,
            "Cells side by side; 0 runs them in this process. Chosen by task and cores, or by the cluster, if not given.",
            _STUDY,
        ),
        Flag(
            "ray_address", str, "",
            "HOST:PORT of a running Ray cluster, or auto on one of its machines; one is started on this machine if not given.",
            _STUDY,
        ),
    ]  # fmt: skip


PLACEMENT = tuple(item.name for item in fields(Placement))


def _study(items: Sequence[Any], values: Mapping[str, Any]) -> Study:
    """The study that flags and files describe, every number of it tried once.

    Raises:
        ConfigError: it makes no sense.
    """
    algorithms.import_files(values.get("imports", ()))
    if not items:
        raise ConfigError(
            f"name the algorithms to compare: prefopt compare dpo ipo. Known: {', '.join(algorithms.trainable_names())}."
        )
    for item in items:
        find_algorithm(read_item(item)[0])
    plain = {name: value for name, value in values.items() if name not in _NOT_OF_THE_STUDY}
    study = study_of({**plain, _ALGORITHMS: assign(items, values.get("assignments", ()))}, preset=values.get("preset", ""))
    for setting in study.settings():
        check_values(setting)
    if study.tuning.trials:
        tuning_study(study)  # a space that makes no sense is found before anything is trained
    return study


# Flags of a run of it, or that were used to make it.
_NOT_OF_THE_STUDY = frozenset(
    {"assignments", "output_dir", "config", "preset", "dry_run", "probe", "shard", "save_policies", "overwrite", *PLACEMENT}
)


def _run(study: Study, values: Mapping[str, Any]) -> None:
    """Runs or describes the study."""
    console = standard_console()
    keep, workers = values.get("save_policies", False), values.get("workers")
    if values.get("probe") and not values.get("dry_run"):
        raise ConfigError("--probe times a few updates for --dry-run; alone it does nothing: add --dry-run, or leave it out.")
    if values.get("dry_run"):
        describe(study, console, probe=values.get("probe", False), save_policies=keep, workers=workers or 1)
        return
    compare(
        study, output_of(values), shard=_shard(values.get("shard", "")), save_policies=keep,
        overwrite=values.get("overwrite", False), console=console, **placement_values(values),
    )  # fmt: skip


def placement_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `Placement` that were given."""
    return {name: values[name] for name in PLACEMENT if name in values}


def output_of(values: Mapping[str, Any]) -> Path:
    """The folder of the study. Raises ConfigError where none is named."""
    output = values.get("output_dir")
    if output is None:
        raise ConfigError("name the folder of this comparison: --output-dir FOLDER; or look first: --dry-run.")
    return Path(output)


def _shard(text: str) -> tuple[int, int]:
    if not text:
        return 1, 1
    one, slash, all_of_them = text.partition("/")
    if not (slash and one.isdecimal() and all_of_them.isdecimal()):
        raise ConfigError(f"--shard {text}: expected i/n, for example 2/8.")
    return int(one), int(all_of_them)
