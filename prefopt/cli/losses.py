"""`prefopt losses`: every registered loss with its equation, the data it trains on and its flags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from cyclopts import App, Parameter
from rich import box
from rich.table import Table
from rich.text import Text

import losses
from prefopt import algorithms
from prefopt.cli.flags import parameter_defaults
from prefopt.machine import standard_console


def build(tokens: Sequence[str]) -> App:
    app = App("losses", version_flags=(), help_format="plaintext", default_parameter=parameter_defaults())
    app.default(_losses)
    return app


def _losses(
    *,
    imports: Annotated[tuple[str, ...], Parameter(name="--import", help="Python files of your own that register losses.")] = (),
) -> None:
    algorithms.import_files(imports)
    trainable = set(algorithms.trainable_names())
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("loss", "equation", "trains on", "flags"):
        table.add_column(column, overflow="fold", no_wrap=column == "loss")
    for name in losses.names():
        loss = losses.get(name)
        algorithm = algorithms.get(name) if name in trainable else None
        flags = algorithm.flags if algorithm is not None else loss.hyper
        shown = ", ".join(f"{flag.name} {flag.default}" for flag in flags.values())
        # Text, not str: a docstring's brackets are no markup.
        table.add_row(
            *map(Text, (name, loss.doc.partition("\n")[0], algorithm.stream if algorithm else "part of others", shown))
        )
    standard_console().print(table)
