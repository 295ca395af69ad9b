"""A table before it is drawn: one grid serves the terminal (rich), Markdown and the HTML template."""

from __future__ import annotations

import csv
import html
import io
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

Style = Literal["", "dim", "failed", "strong"]

_RICH_STYLES: dict[str, str] = {"": "", "dim": "dim", "failed": "red", "strong": "bold"}
_WIDE = 200
# What LaTeX reads as commands, and what its fonts lack.
_LATEX = {
    **{mark: f"\\{mark}" for mark in "&%$#_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''", "±": r"$\pm$", "−": "$-$",
    "↑": r"$\uparrow$", "↓": r"$\downarrow$", "†": r"\dag{}", "β": r"$\beta$", "\u00a0": "~", "[": "{[}", "]": "{]}",
}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """A header, where its numbers stand, and a note that says what they are."""

    header: str
    numeric: bool = True
    style: Style = ""
    note: str = ""


@dataclass(frozen=True)
class Entry:
    """One value as it is shown. In HTML `link` is where it came from, and `anchor` its own name for links."""

    text: str
    style: Style = ""
    link: str = ""
    anchor: str = ""


@dataclass(frozen=True)
class Grid:
    """Title, columns, rows of as many entries, and what the reader must know (`captions`, one sentence each)."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Entry, ...], ...]
    captions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"Grid {self.title!r}: a row has {len(row)} entries, the header {len(self.columns)}; both must be equal."
                )

    def __str__(self) -> str:
        """As on a terminal, wide enough for every column."""
        console = Console(file=io.StringIO(), width=_WIDE, color_system=None)
        console.print(to_rich(self))
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())  # type: ignore[attr-defined]


def to_rich(grid: Grid) -> Table:
    """For the terminal. Text is passed as text, so brackets in a label are not markup."""
    table = Table(
        title=Text(grid.title),
        caption=Text(" ".join(grid.captions)),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for column in grid.columns:
        align: Literal["right", "left"] = "right" if column.numeric else "left"
        table.add_column(Text(column.header), justify=align, style=_RICH_STYLES[column.style], overflow="fold")
    for row in grid.rows:
        table.add_row(*(Text(entry.text, style=_RICH_STYLES[entry.style]) for entry in row))
    return table


def to_markdown(grid: Grid) -> str:
    """For READMEs: a bold title, a pipe table and the captions, ending in a newline."""
    header = "| " + " | ".join(_escape(column.header) for column in grid.columns) + " |"
    rule = "|" + "|".join("---:" if column.numeric else ":---" for column in grid.columns) + "|"
    rows = ["| " + " | ".join(_escape(entry.text) for entry in row) + " |" for row in grid.rows]
    captions = [_escape(caption) for caption in grid.captions]
    return "\n".join(
        [f"**{_escape(grid.title)}**", "", header, rule, *rows, *(["", " ".join(captions)] if captions else []), ""]
    )


def to_csv(grid: Grid) -> str:
    """For spreadsheets: the header and the rows as they are shown, without title and captions."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([column.header for column in grid.columns])
    writer.writerows([entry.text for entry in row] for row in grid.rows)
    return buffer.getvalue()


def to_latex(grid: Grid) -> str:
    """For papers: a tabular of the package booktabs in a table environment, with title and captions as its caption."""
    columns = "".join("r" if column.numeric else "l" for column in grid.columns)
    lines = [[column.header for column in grid.columns], *([entry.text for entry in row] for row in grid.rows)]
    head, *body = [" & ".join(map(_latex, line)) + r" \\" for line in lines]
    caption = _latex(" ".join([f"{grid.title}.", *grid.captions]))
    return "\n".join(
        [
            r"\begin{table}", r"\centering", rf"\caption{{{caption}}}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule",
            head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}", r"\end{table}", "",
        ]
    )  # fmt: skip


def _latex(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(_LATEX.get(mark, mark) for mark in text.replace("\n", " "))


def _escape(text: str) -> str:
    """Keeps a label from becoming markup: pipes and line ends break the table, the rest would be rendered."""
    escaped = html.escape(" ".join(text.split()), quote=False).replace("\\", "\\\\")
    for mark in "|*_`[]":
        escaped = escaped.replace(mark, "\\" + mark)
    return escaped
