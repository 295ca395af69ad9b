"""`prefopt cite DIR`: a methods paragraph and the BibTeX of what a comparison used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from prefopt.report import load_results
from prefopt.report.cite import cite


def build(tokens: Sequence[str]) -> App:
    app = App("cite", version_flags=(), help_format="plaintext")
    app.default(_cite)
    return app


def _cite(folder: Annotated[Path, Parameter(help="Folder of a comparison: it holds results.json.")], /) -> None:
    citation = cite(load_results(folder))
    print(citation.methods)
    print()
    print(citation.bibtex)
