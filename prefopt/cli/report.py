"""`prefopt report DIR`: the page of a comparison, made anew from its results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from prefopt.report import write_report


def build(tokens: Sequence[str]) -> App:
    app = App("report", version_flags=(), help_format="plaintext")
    app.default(_report)
    return app


def _report(folder: Annotated[Path, Parameter(help="Folder of a comparison: it holds results.json.")], /) -> None:
    print(write_report(folder))
