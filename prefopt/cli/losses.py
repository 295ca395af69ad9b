"""`prefopt losses [NAME...]`: every registered loss by family, or some of them whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Annotated

from cyclopts import App, Parameter
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

import losses
from losses.registry import Loss
from prefopt import algorithms
from prefopt.cli import catalogue
from prefopt.cli.flags import parameter_defaults
from prefopt.cli.lookup import find_loss
from prefopt.machine import standard_console
from prefopt.report.grid import to_rich


def build(tokens: Sequence[str]) -> App:
    app = App("losses", version_flags=(), help_format="plaintext", default_parameter=parameter_defaults())
    app.default(_losses)
    return app


def _losses(
    *name: Annotated[str, Parameter(help="Losses or weighted sums of them, to be shown whole; without one, a list of all.")],
    imports: Annotated[tuple[str, ...], Parameter(name="--import", help="Python files of your own that register losses.")] = (),
) -> None:
    algorithms.import_files(imports)
    console = standard_console()
    if name:
        for loss in [find_loss(each) for each in name]:
            _show(loss, console)
        return
    for family, members in catalogue.by_family(map(losses.get, losses.names())).items():
        _list(family, members, console)
    console.print("`prefopt losses NAME` shows one whole; a weighted sum of losses, as dpo:1.0+sft:0.2, is a loss as well.")


def _list(family: str, members: Sequence[Loss], console: Console) -> None:
    """A family under its heading, which says once what most of it needs and what all of it takes."""
    usual = Counter(map(_needs, members)).most_common(1)[0][0]
    heading = f"{family} ({len(members)}); needs {usual}{' where nothing else is said' if len(members) > 1 else ''}"
    if any(map(catalogue.on_policy, members)):
        heading += f"; all take {catalogue.options_with_defaults(catalogue.rollout_options().values())}"
    console.print(Text(heading, style="bold"))
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for loss in members:
        table.add_row(f"  {loss.name}", Text("\n").join(_lines(loss, usual)))
    console.print(table)
    console.print()


def _lines(loss: Loss, usual: str) -> Iterator[Text]:
    """Equation; papers, flags and coupling; tensors. Text, not str: a docstring's brackets are no markup."""
    yield Text(catalogue.equation(loss))
    papers = ", ".join(citation.text for citation in catalogue.citations(loss.doc))
    own = [loss.hyper, catalogue.advantage_options(loss), catalogue.rollout_options(loss, changed_only=True)]
    flags = catalogue.options_with_defaults(option for options in own for option in options.values())
    yield Text("; ".join(filter(None, (papers, flags, "coupled" if loss.coupled else ""))), style="dim")
    if _needs(loss) != usual:
        yield Text(f"needs {_needs(loss)}", style="dim")


def _needs(loss: Loss) -> str:
    return catalogue.compact(sorted(algorithms.loss_tensors(loss)))


def _show(loss: Loss, console: Console) -> None:
    console.print(Text(loss.name, style="bold"))
    for paragraph in (catalogue.equation(loss), *catalogue.paragraphs(loss.doc), " ".join(catalogue.facts(loss))):
        console.print(Padding(Text(paragraph), (0, 0, 1, 2), expand=False))
    for grid in catalogue.grids(loss, whole=True):
        console.print(Padding(to_rich(grid), (0, 0, 0, 2), expand=False))
