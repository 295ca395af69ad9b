"""`prefopt compare ALGO...`: several algorithms on several seeds, and one report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import Parameter as Argument
from pathlib import Path
from typing import Annotated, Any

import yaml
from cyclopts import App, Parameter
from cyclopts.config import Dict

from losses.suggestions import suggest_option
from prefopt import algorithms
from prefopt.cli.flags import (
    Flag,
    build_options,
    check_values,
    import_flag,
    make_command,
    option_flags,
    option_values,
    parameter_defaults,
    parse_value,
)
from prefopt.cli.lookup import find_algorithm
from prefopt.compare import Entry, Study, compare, describe
from prefopt.errors import ConfigError
from prefopt.machine import standard_console

_COMMAND, _STUDY = "compare", "Study"
_PRESETS = Path(__file__).parent.parent / "presets"
# What the YAML file may name besides flags.
_ALGORITHMS = "algorithms"
_ALGORITHM_HELP = (
    "Losses (`prefopt losses`), or weighted sums of them as dpo:1.0+sft:0.2; online_ before an offline one trains it on fresh "
    "samples of the policy, ordered by the reward: online_dpo."
)


def build(tokens: Sequence[str]) -> App:
    """`compare`; the values of `--config` stand in for the flags that are not given.

    Raises:
        ConfigError: a config file that cannot be read.
    """
    files = [("--config", Path(path)) for path in option_values(tokens, "--config")]
    files += [("--preset", _preset(name)) for name in option_values(tokens, "--preset")]
    settings = [(flag, _read_config(path, flag)) for flag, path in files]  # a config's values win over a preset's
    names = [str(name) for _, values in settings for name in values.pop(_ALGORITHMS, [])]

    def run(*given: str, **values: Any) -> None:
        _run([*given, *values.get("named", ())] or names, values)

    positional = Argument(
        "algorithm",
        Argument.VAR_POSITIONAL,
        annotation=Annotated[str, Parameter(help=_ALGORITHM_HELP, group=_STUDY)],
    )
    # Under the command's own name: of a flat mapping cyclopts drops every key that is also a command, such as `data`.
    config = [Dict({_COMMAND: values}, source=flag) for flag, values in settings]
    app = App(_COMMAND, version_flags=(), default_parameter=parameter_defaults(), help_format="plaintext", config=config)
    app.default(make_command(run, [*_study_flags(), *option_flags()], _STUDY, positional))
    return app


def explain_unknown(tokens: Sequence[str], option: str) -> str:
    """What to do about an option that `compare` does not have; it is often a hyper-parameter of one algorithm."""
    name = option.lstrip("-").partition("=")[0].replace("-", "_")
    hint = suggest_option(name, [flag.name for flag in (*_study_flags(), *option_flags())])
    return f"compare has no option {option.partition('=')[0]}{hint}. Hyper-parameters are set by --set ALGO.FLAG=VALUE."


def _study_flags() -> list[Flag]:
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
        Flag("assignments", chosen, (), "Hyper-parameters as ALGO.FLAG=VALUE, for example dpo.beta=0.5.", _STUDY),
        Flag("config", Path | None, None, "YAML with the same names (and `algorithms`); flags given here win.", _STUDY),
        Flag("preset", str, "", f"A study that comes with prefopt: {', '.join(_presets())}. --config and flags win.", _STUDY),
        Flag("title", str, "", "Heads the report.", _STUDY),
        Flag("dry_run", bool, False, "Show rows, cells and options, and train nothing.", _STUDY),
        Flag(
            "workers",
            int | None,
            None,
            "Processes side by side; 0 runs in this one. Chosen by task and cores if not given.",
            _STUDY,
        ),
        Flag("save_policies", bool, False, "Keep every trained policy.", _STUDY),
        Flag("overwrite", bool, False, "Delete the comparison that the folder holds.", _STUDY),
        import_flag(_STUDY),
    ]


def _run(names: Sequence[str], values: Mapping[str, Any]) -> None:
    """Builds the study and runs or describes it."""
    imports = values.get("imports", ())
    algorithms.import_files(imports)
    if not names:
        raise ConfigError(
            f"name the algorithms to compare: prefopt compare dpo ipo. Known: {', '.join(algorithms.trainable_names())}."
        )
    for name in names:
        find_algorithm(name)
    hyper = parse_assignments(names, values.get("assignments", ()))
    entries = [Entry(name, hyper[name]) for name in names]
    seeds = values.get("seeds", 3)
    if seeds < 1:
        raise ConfigError(f"--seeds is {seeds}; it is how many seeds to run, at least 1.")
    title = {"title": values["title"]} if values.get("title") else {}
    preset = values.get("preset", "")
    study = Study(entries, tuple(range(seeds)), build_options(values), tuple(imports), preset=preset, **title)
    for setting in study.settings():
        check_values(setting)
    console = standard_console()
    if values.get("dry_run"):
        describe(study, console)
        return
    output = values.get("output_dir")
    if output is None:
        raise ConfigError("name the folder of this comparison: --output-dir FOLDER; or look first: --dry-run.")
    keep, overwrite = values.get("save_policies", False), values.get("overwrite", False)
    compare(study, output, workers=values.get("workers"), save_policies=keep, overwrite=overwrite, console=console)


def parse_assignments(names: Sequence[str], assignments: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Hyper-parameters by algorithm from ALGO.FLAG=VALUE.

    Raises:
        ConfigError: another form, an algorithm that is not compared, an unknown flag or a value of another type.
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    for text in assignments:
        where, equals, value = text.partition("=")
        name, dot, flag = where.rpartition(".")
        if not (equals and dot and name and flag.replace("-", "_").isidentifier()):
            raise ConfigError(f"--set {text}: expected ALGO.FLAG=VALUE, for example --set {names[0]}.FLAG=VALUE.")
        if name not in found:
            raise ConfigError(
                f"--set {text}: {name!r} is not compared{suggest_option(name, names)}. Compared: {', '.join(names)}."
            )
        found[name][flag.replace("-", "_")] = parse_value(find_algorithm(name), flag, value)
    return found


def _presets() -> list[str]:
    """The studies in prefopt/presets, by name."""
    return sorted(path.stem for path in _PRESETS.glob("*.yaml"))


def _preset(name: str) -> Path:
    if name not in _presets():
        raise ConfigError(
            f"--preset {name}: there is none{suggest_option(name, _presets())}. There are: {', '.join(_presets())}."
        )
    return _PRESETS / f"{name}.yaml"


def _read_config(path: Path, flag: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{flag} {path}: cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag} {path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not isinstance(values.get(_ALGORITHMS, []), list):
        raise ConfigError(f"{flag} {path}: expected `name: value` lines with the names of flags, and `algorithms: [dpo, ipo]`.")
    return {str(name): value for name, value in values.items()}
