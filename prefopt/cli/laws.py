"""`prefopt laws NAME...`: the laws that every loss obeys, on losses of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from cyclopts import App, Parameter
from rich import box
from rich.table import Table
from rich.text import Text

import losses
from losses.laws import check
from prefopt import algorithms
from prefopt.cli.flags import parameter_defaults
from prefopt.cli.lookup import find_loss
from prefopt.errors import ConfigError
from prefopt.machine import standard_console

BROKEN = 1


def build(tokens: Sequence[str]) -> App:
    app = App("laws", version_flags=(), help_format="plaintext", default_parameter=parameter_defaults())
    app.default(_laws)
    return app


def _laws(
    *name: Annotated[str, Parameter(help="Losses or weighted sums of them; without one, those of --import.")],
    imports: Annotated[tuple[str, ...], Parameter(name="--import", help="Python files of your own that register losses.")] = (),
    seed: Annotated[int, Parameter(help="Of the tensors that are drawn.")] = 0,
) -> int:
    new = algorithms.import_files(imports)
    names = [*name] or new
    if not names:
        raise ConfigError(f"name the losses to check: prefopt laws NAME. Known: {', '.join(losses.names())}.")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("loss", "law", "outcome", "detail"):
        table.add_column(column, overflow="fold")
    results = [(each, result) for each in names for result in check(find_loss(each).name, seed)]
    for each, result in results:
        table.add_row(*map(Text, (each, result.law, result.outcome, result.detail)))
    standard_console().print(table)
    broken = sum(result.outcome == "failed" for _, result in results)
    print(f"{broken} of {len(results)} broken" if broken else f"{len(results)} laws checked, none broken")
    return BROKEN if broken else 0
