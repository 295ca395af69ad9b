"""The data report: what was read, how it was split and what tokenising did. It never shows the text of a row."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from prefopt.data.read_report import Dropped, LengthBaseline, ReadReport
from prefopt.data.roles import ROLES, RoleReport
from prefopt.data.token_report import TokenReport


@dataclass(frozen=True)
class DataReport:
    """The reports of the steps that were taken; None for a step that was not (the exact world reads no files)."""

    read: ReadReport | None = None
    roles: RoleReport | None = None
    tokens: TokenReport | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        parts = {"read": self.read, "roles": self.roles, "tokens": self.tokens}
        return {name: part.as_dict() if part is not None else None for name, part in parts.items()}


def render(report: DataReport) -> RenderableType:
    """The report for a rich console."""
    parts: list[RenderableType] = []
    if report.read is not None:
        parts += _read(report.read)
    if report.roles is not None:
        parts += _roles(report.roles)
    if report.tokens is not None:
        parts += _tokens(report.tokens)
    return Group(*parts)


def render_plain(report: DataReport, width: int = 120) -> str:
    """The same as text without colours, `width` characters wide."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, markup=False, emoji=False)
    console.print(render(report))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table whose first column is words and whose numbers stand on the right."""
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    table = Table(title=Text(title, "bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(columns):
        numbers = bool(cells) and all(row[i].replace(",", "").replace(".", "").isdigit() for row in cells)
        table.add_column(Text(name), justify="right" if numbers else "left", overflow="fold")
    for row in cells:
        # Text, not str: a file's name is not markup.
        table.add_row(*(Text(cell) for cell in row))
    return table


def _line(text: str, *, warn: bool = False) -> Text:
    return Text(text, "yellow" if warn else "")


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items()) or "none"


def _dropped(title: str, drops: Iterable[Dropped]) -> list[RenderableType]:
    rows = [(drop.count, drop.reason, ", ".join(drop.examples)) for drop in drops]
    return [_table(title, ("rows", "reason", "for example"), rows)] if rows else []


def _baseline(where: str, baseline: LengthBaseline | None, unit: str) -> list[RenderableType]:
    if baseline is None:
        return []
    pairs = baseline.longer + baseline.shorter + baseline.ties
    return [
        _line(
            f"Length baseline{where}: the longer side is preferred in {baseline.longer_wins:.1%} of {pairs:,} pairs ({unit})."
        )
    ]


def _read(report: ReadReport) -> list[RenderableType]:
    files = [file for source in report.sources for file in source.files]
    rows = [
        (
            file.name,
            file.format or "not understood",
            file.rows,
            file.kept,
            file.rows - file.kept,
            "test" if file.official_test else "",
        )
        for file in files
    ]
    parts: list[RenderableType] = [_table("Files", ("file", "format", "rows", "kept", "left out", "official split"), rows)]
    parts += _dropped("Rows left out", (drop for file in files for drop in file.dropped))
    parts.append(_line(f"Records: {report.records:,} ({_counts(report.kinds)}); optional labels: {_counts(report.labels)}."))
    parts.append(
        _line(
            f"Duplicates: {report.duplicates:,}; contradictions: {report.contradictions:,} (both kept).",
            warn=report.duplicates + report.contradictions > 0,
        )
    )
    ignored = {name: None for file in files for name in file.ignored_columns}
    if ignored:
        parts.append(_line(f"Columns that nothing reads: {', '.join(ignored)}."))
    for source in report.sources:
        parts += _baseline(f", {source.name}", source.length_baseline, "in characters")
    return parts


def _roles(report: RoleReport) -> list[RenderableType]:
    table = _table(
        "Roles", ("role", "records", "first turns"), [(role, report.rows[role], report.keys[role]) for role in ROLES]
    )
    official = ", ".join(report.official_test_sources) or "none"
    near = {pair: count for pair, count in report.near_duplicates.items() if count}
    return [
        table,
        _line(f"First turns in more than one role: {report.shared_keys} (checked over all sources)."),
        _line(f"Sources with a test split of their own: {official}."),
        _line(f"Records removed since their first turn stands in a test split: {report.removed:,}."),
        _line(f"Near-duplicate first turns between roles: {_counts(near)}.", warn=bool(near)),
    ]


def _tokens(report: TokenReport) -> list[RenderableType]:
    rows = [
        (name, f"{lengths.mean:.1f}", f"{lengths.p50:.0f}", f"{lengths.p90:.0f}", f"{lengths.p99:.0f}", lengths.max)
        for name, lengths in report.lengths.items()
    ]
    parts: list[RenderableType] = [_table("Tokens", ("part", "mean", "p50", "p90", "p99", "max"), rows)]
    parts += _dropped("Records left out by tokenising", report.dropped)
    cut = report.prompts_truncated + report.completions_truncated
    parts.append(
        _line(
            f"Records: {report.kept:,} of {report.rows:,}. Cut: {report.prompts_truncated:,} prompts "
            f"({report.prompt_tokens_cut:,} tokens, on the left), {report.completions_truncated:,} completions "
            f"({report.completion_tokens_cut:,} tokens, on the right).",
            warn=cut > 0,
        )
    )
    parts.append(
        _line(f"Prompts whose end merges with a completion: {report.boundary_merges:,}.", warn=report.boundary_merges > 0)
    )
    return parts + _baseline("", report.length_baseline, "in tokens")
