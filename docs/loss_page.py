"""docs/losses.md, built from the code by `make docs`: every loss with equation, text, tensors, options and papers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from readme import ROOT, file_of, own_losses, read_bibtex, read_papers

from losses.declaration import read_options
from losses.registry import Loss
from prefopt.algorithms import ONLINE
from prefopt.cli import catalogue
from prefopt.report.grid import to_markdown
from prefopt.rollouts import online, rollouts

PAGE = ROOT / "docs" / "losses.md"

_INTRO = """# Losses

Built from the code by `make docs`. P pairs, N sequences, T tokens, G prompts, K completions, M mismatched prompts. A loss asks
for a tensor by naming a parameter after it; its options are flags of `prefopt train NAME`. A weighted sum of losses is a loss
as well: `prefopt train dpo:1.0+sft:0.2 --dpo-beta 0.3`."""


def write(path: Path = PAGE) -> None:
    """Builds the page; its links to files assume the folder of `PAGE`."""
    path.write_text(page(), encoding="utf-8")


def page() -> str:
    """An index by family, a section for each loss, then what losses share: advantage functions and rollouts."""
    bibliography = (ROOT / "references.bib").read_text(encoding="utf-8")
    entries = read_bibtex(bibliography)
    papers = {key: f"{short}: {_plain(entries[key]['title'])}" for key, short in read_papers(bibliography).items()}
    families = catalogue.by_family(own_losses())
    parts = [_INTRO, "\n".join(f"- {name.capitalize()}: {', '.join(map(_link, found))}" for name, found in families.items())]
    for name, members in families.items():
        parts.append(f"## {name.capitalize()}")
        for loss in members:
            parts += _section(loss, papers)
    parts += _shared([loss for members in families.values() for loss in members], papers)
    return "\n\n".join(part.strip() for part in parts) + "\n"


def prose(text: str) -> str:
    """A paragraph of a docstring as Markdown: what stands outside of backticks is not markup."""
    pieces = re.split(r"(`[^`]+`)", text)
    return "".join(piece if index % 2 else re.sub(r"([\\*_<\[\]|])", r"\\\1", piece) for index, piece in enumerate(pieces))


def _section(loss: Loss, papers: Mapping[str, str]) -> Iterator[str]:
    yield f"### {loss.name}"
    yield from _text(loss.doc, papers)
    yield prose(" ".join(catalogue.facts(loss)))
    file = file_of(loss).relative_to(ROOT).as_posix()
    yield f"File: [{file}](../{file})"
    yield from map(to_markdown, catalogue.grids(loss, whole=False))


def _text(doc: str, papers: Mapping[str, str]) -> Iterator[str]:
    """A docstring without its arguments, and the papers that it cites."""
    yield f"```text\n{catalogue.first_line(doc)}\n```"
    yield from map(prose, catalogue.paragraphs(doc))
    cited = catalogue.citations(doc)
    if cited:
        yield "\n".join(f"- [{citation.key}] {papers[citation.key]}" for citation in cited)


def _shared(members: list[Loss], papers: Mapping[str, str]) -> Iterator[str]:
    yield "## Advantage functions"
    functions = {loss.advantage.__name__: loss.advantage for loss in members if loss.advantage is not None}
    for name, function in sorted(functions.items()):
        yield f"### {name}"
        yield from _text(inspect.getdoc(function) or "", papers)
        yield to_markdown(catalogue.options_grid("Options", read_options(function, name).values()))
        yield "Losses: " + ", ".join(_link(loss) for loss in members if loss.advantage is function)
    yield "## Rollouts"
    yield from _text(inspect.getdoc(rollouts) or "", papers)
    yield to_markdown(catalogue.options_grid("Options", catalogue.rollout_options().values()))
    yield "## Fresh samples for offline losses"
    yield f"`{ONLINE}` before the name of an offline loss (`{ONLINE}dpo`, `{ONLINE}sft`, `{ONLINE}kto`)."
    yield from _text(inspect.getdoc(online) or "", papers)
    yield to_markdown(catalogue.options_grid("Options", read_options(online, "the online stream").values()))


def _link(loss: Loss) -> str:
    return f"[{loss.name}](#{loss.name})"


def _plain(title: str) -> str:
    """A BibTeX title without the braces that protect its capitals."""
    return prose(title.replace("{", "").replace("}", ""))


if __name__ == "__main__":
    write()
