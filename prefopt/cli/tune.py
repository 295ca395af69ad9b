"""`prefopt tune STUDY.yaml | ALGO...`: choose every algorithm's numbers by equally many trials, as a study file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from cyclopts import App

from prefopt.cli import compare as compare_command
from prefopt.cli.compare import TUNING, output_of, study_command
from prefopt.cli.flags import Flag, field_flags
from prefopt.compare import prepare_folder, tune
from prefopt.executors import Placement
from prefopt.machine import standard_console
from prefopt.options import TuningOptions, default_cache
from prefopt.study import Study

TRIALS = 8
TUNED_FILE = "tuned.yaml"
_STUDY = "Study"


def build(tokens: Sequence[str]) -> App:
    """`tune`, with the flags of `compare` that say what is trained."""
    flags = [*compare_command.study_flags(), *_run_flags(), *field_flags(TuningOptions, TUNING, trials=TRIALS)]
    return study_command("tune", tokens, flags, _run, trials=TRIALS)


def explain_unknown(tokens: Sequence[str], option: str) -> str:
    """As for `compare`."""
    return compare_command.explain_unknown(tokens, option).replace("compare has", "tune has", 1)


def _run_flags() -> list[Flag]:
    return [
        *compare_command.placement_flags(),
        Flag("overwrite", bool, False, "Delete the study that the folder holds.", _STUDY),
    ]


def _run(study: Study, values: Mapping[str, Any]) -> None:
    output, console = output_of(values), standard_console()
    placement = Placement(**compare_command.placement_values(values))
    prepare_folder(output, study, values.get("overwrite", False))
    found, _ = tune(study, output, cache=default_cache(), placement=placement, console=console)
    path = output / TUNED_FILE
    path.write_text(_as_yaml(found), encoding="utf-8")
    console.print(
        f"{path}: a study file with these numbers. `prefopt compare --trials {study.tuning.trials}` on the same study and "
        "folder takes them over.",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def _as_yaml(study: Study) -> str:
    """The algorithms with their numbers, for --config."""
    items = [
        {entry.algorithm: {"as": entry.label, **({"group": entry.group} if entry.group else {}), **entry.values}}
        for entry in study.entries
    ]
    return yaml.safe_dump({"algorithms": items}, sort_keys=False, allow_unicode=True)
