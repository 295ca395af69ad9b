"""The parts of README.md that follow from the code: `make readme` rewrites the tables of losses and the layout."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import losses
from losses.registry import Loss
from prefopt.cli import catalogue

ROOT = Path(__file__).resolve().parent.parent
SUMMARY_WIDTH = 118

# What stands at the top of the repository besides the two packages, whose files say themselves what they are.
TOP = {
    "tests/losses": "per loss: values, gradients, limits, relations; laws for all of them",
    "tests/prefopt": "same folders as prefopt",
    "tests/benchmarks": "the benchmarks' arithmetic, on tiny models",
    "tests/gpu": "what only a CUDA device can show",
    "docs/design.md": "architecture and reasons",
    "docs/peers.md": "what other projects compute, and where this one differs on purpose",
    "docs/profile.md": "where a training step goes, and what bounds it",
    "docs/faults.md": "what goes wrong, what users get then, and which tests show it: `make faults`",
    "docs/readme.py": "writes this tree and the tables of losses",
    "docs/loss_page.py": "writes docs/losses.md, every loss whole: `make docs`",
    "references.bib": "the papers",
    "constraints.txt": "exact versions",
    "pyproject.toml": "package, extras, tools",
    "Makefile": "setup, test, lint, benchmarks",
    ".ci/run": "what has to pass",
}


def render(text: str) -> str:
    """README text with both generated parts brought up to date."""
    return _replace(_replace(text, "losses", losses_table()), "layout", f"```text\n{layout()}\n```")


def losses_table() -> str:
    """A table for each family, one short row a loss: name and file, the first line of its docstring, papers."""
    papers = read_papers((ROOT / "references.bib").read_text())
    parts = []
    for family, members in catalogue.by_family(own_losses()).items():
        rows = [_row(loss, papers) for loss in members]
        parts.append("\n".join([f"**{family.capitalize()}** ({len(rows)})\n", "| name | loss | paper |\n|---|---|---|", *rows]))
    return "\n\n".join(parts)


def own_losses() -> list[Loss]:
    """The losses of this repository, sorted; tests and users register more."""
    return [loss for loss in map(losses.get, losses.names()) if file_of(loss).is_relative_to(ROOT / "losses")]


def read_papers(text: str) -> dict[str, str]:
    """BibTeX entries as short Markdown citations by key, linked where arXiv has them."""
    papers = {}
    for key, fields in read_bibtex(text).items():
        names = [author.split(",")[0] for author in fields["author"].split(" and ")]
        who = " and ".join(names) if len(names) < 3 else f"{names[0]} et al."
        number = re.search(r"arXiv:(\d{4}\.\d{5})", fields.get("journal", ""))
        short = f"{who} {fields['year']}"
        papers[key] = f"[{short}](https://arxiv.org/abs/{number.group(1)})" if number else short
    return papers


def read_bibtex(text: str) -> dict[str, dict[str, str]]:
    """The fields of BibTeX entries by key."""
    entries = re.findall(r"^@\w+\{([^,\s]+),\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)
    return {key: dict(re.findall(r"^\s*(\w+) = \{(.*)\},?$", body, re.MULTILINE)) for key, body in entries}


def layout() -> str:
    """The tree with a line per file of the packages; files that hold losses share one line, since the table lists them."""
    lines = [("losses/<name>.py", "one algorithm, or one tight family, a file")]
    holders = {file_of(loss) for loss in own_losses()} | {
        Path(t.function.__code__.co_filename) for loss in own_losses() for t in loss.terms
    }
    for package in ("losses", "prefopt", "benchmarks"):
        paths = sorted((ROOT / package).rglob("*.py"), key=lambda path: (path.relative_to(ROOT).parent.as_posix(), path.name))
        lines += [
            (path.relative_to(ROOT).as_posix(), summary(path.read_text()))
            for path in paths
            if path not in holders and path.name != "__init__.py"
        ]
    lines += list(TOP.items())
    return "\n".join(_tree(lines))


def summary(source: str) -> str:
    """The first sentence of a module's docstring, cut to fit a line."""
    doc = ast.get_docstring(ast.parse(source)) or ""
    paragraph = " ".join(doc.split("\n\n")[0].split())
    sentence = re.split(r"(?<!et al)\.(?:\s|$)", paragraph)[0]
    return textwrap.shorten(sentence, SUMMARY_WIDTH, placeholder=" …")


def _tree(lines: list[tuple[str, str]]) -> Iterator[str]:
    """Paths below a line for their folder, descriptions in a column."""
    shown: set[str] = set()
    for path, meaning in lines:
        *folders, name = path.split("/")
        for depth in range(len(folders)):
            folder = "/".join(folders[: depth + 1])
            if folder not in shown:
                shown.add(folder)
                yield "  " * depth + folders[depth] + "/"
        yield f"{'  ' * len(folders) + name:<26} {meaning}"


def _row(loss: Loss, papers: dict[str, str]) -> str:
    line = catalogue.equation(loss).replace("`", "")
    cited = ", ".join(papers[citation.key] for citation in catalogue.citations(loss.doc))
    cells = (f"[`{loss.name}`]({file_of(loss).relative_to(ROOT).as_posix()})", f"`{line}`", cited)
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def file_of(loss: Loss) -> Path:
    """Where a loss is written: its own file, or that of its family."""
    own = ROOT / "losses" / f"{loss.name}.py"
    return own if own.exists() else Path(loss.terms[0].function.__code__.co_filename)


def _replace(text: str, name: str, new: str) -> str:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(
            f"README.md needs the lines {begin} and {end}, once each; between them stands what `make readme` writes."
        )
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{new}\n\n{end}{rest.split(end)[1]}"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text()))
