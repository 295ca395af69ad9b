"""`prefopt evaluate NAME=SOURCE...`: policies that other tools trained, measured as `compare` measures its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from inspect import Parameter as Argument
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from losses.suggestions import suggest_option
from prefopt.cli.flags import Flag, make_command, option_flags, parameter_defaults
from prefopt.errors import ConfigError
from prefopt.machine import standard_console
from prefopt.options import build_options, default_cache
from prefopt.outside import evaluate_outsiders, read_outsiders
from prefopt.tasks import build_task
from prefopt.tasks.text import TextTask

_RUN = "Evaluation"
_HELP = """KL, judges, win rates, lengths, accuracies and statistics of policies that were trained anywhere.

A SOURCE is a model's folder or hub id, an adapter's folder, a run of `prefopt train`, or a file of samples (JSONL of prompt \
and completion). --model is the reference, --data has the test rows. A NAME that is given several times is one setting with \
several seeds. The report says that nothing about their training is known."""


def build(tokens: Sequence[str]) -> App:
    """`evaluate`."""
    app = App("evaluate", version_flags=(), default_parameter=parameter_defaults(), help_format="plaintext", help=_HELP)
    words: Any = Annotated[str, Parameter(help="NAME=FOLDER, NAME=org/model, NAME=samples.jsonl.", group=_RUN)]
    app.default(
        make_command(_run, [*_flags(), *option_flags()], _RUN, Argument("policy", Argument.VAR_POSITIONAL, annotation=words))
    )
    return app


def explain_unknown(tokens: Sequence[str], option: str) -> str:
    """A suggestion."""
    name = option.lstrip("-").partition("=")[0].replace("-", "_")
    hint = suggest_option(name, [flag.name for flag in (*_flags(), *option_flags())])
    return f"evaluate has no option {option.partition('=')[0]}{hint}. `prefopt evaluate --help` lists them."


def _flags() -> list[Flag]:
    return [
        Flag("output_dir", Path | None, None, "A new folder for results and report (required).", _RUN),
        Flag("prompts_to", Path | None, None, "Only write the test prompts to this JSONL, for other tools to sample on.", _RUN),
    ]


def _run(*words: str, output_dir: Path | None = None, prompts_to: Path | None = None, **values: Any) -> None:
    options, console = build_options(values), standard_console()
    if prompts_to is not None:
        task = build_task(options, default_cache(), console)
        if not isinstance(task, TextTask):
            raise ConfigError("--prompts-to: only preference data has test prompts to sample on.")
        rows = task.prompt_rows()
        prompts_to.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        console.print(f"{len(rows)} prompts: {prompts_to}; add a completion to each row", highlight=False, soft_wrap=True)
        return
    outsiders = read_outsiders(words)
    if output_dir is None:
        raise ConfigError("name the folder of the report: --output-dir FOLDER.")
    evaluate_outsiders(outsiders, options, output_dir, cache=default_cache(), console=console)
