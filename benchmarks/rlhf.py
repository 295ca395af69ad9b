"""On-policy algorithms against the truth: how much of E[r] - beta KL each of them reaches in the exactly solvable world.

    python -m benchmarks.rlhf                       every setting of rlhf.yaml on 3 seeds, the learned reward, best of n
    python -m benchmarks.rlhf --models tabular      with the table of free logits only
    python -m benchmarks.rlhf --only ppo rloo       these settings only

The hidden reward with KL priced at beta has one optimum, known exactly. A setting whose expected gradient vanishes there should
close the gap between the reference and it; another one is compared with its own point of rest, known exactly as well.
A finished cell is kept in --output-dir, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown

from benchmarks.rlhf_cells import BestOfNRow, RlhfResult, run_best_of_n, run_cells
from benchmarks.rlhf_config import RlhfStudy, load_study
from prefopt.errors import ConfigError, PrefoptError
from prefopt.files import write_json
from prefopt.machine import standard_console
from prefopt.options import default_cache
from prefopt.report.statistics import Interval, mean_interval

HERE = Path(__file__).parent


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", nargs="+", metavar="LABEL", help="these settings of rlhf.yaml only")
    made.add_argument("--models", nargs="+", metavar="MODEL", help="lm, tabular or both (both)")
    made.add_argument("--seeds", nargs="+", type=int, help="other seeds than those of rlhf.yaml, for tuning")
    made.add_argument("--config", type=Path, default=HERE / "rlhf.yaml", help="the study (benchmarks/rlhf.yaml)")
    made.add_argument("--output-dir", type=Path, default=Path("runs/rlhf"), help="finished cells and README.md (%(default)s)")
    made.add_argument("--json", type=Path, help="also write all numbers there")
    made.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="processes of one thread each; 0 runs in this one (%(default)s)",
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 when a cell failed or a target was missed; 2 for bad options."""
    options = parser().parse_args(arguments)
    console = standard_console()
    try:
        study = narrowed(load_study(options.config), options.only, options.models, options.seeds)
        cache, folder = default_cache(), options.output_dir / "cells"
        best = run_best_of_n(study, cache) if study.best_of_n else []  # also trains the reference, before any two cells would
        results = run_cells([*study.specs(), *study.learned_specs()], folder, cache, options.workers, said(console))
    except PrefoptError as error:
        console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    page = markdown(study, results, best)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "README.md").write_text(page)
    if options.json:
        write_json(options.json, as_dict(study, results, best))
    console.print(Markdown(page) if console.is_terminal else page, markup=False, highlight=False, soft_wrap=True)
    return int(any(result.error for result in results) or not all(row["met"] for row in lines(study, results)))


def narrowed(
    study: RlhfStudy, only: Sequence[str] | None, models: Sequence[str] | None, seeds: Sequence[int] | None
) -> RlhfStudy:
    """The part of a study that was asked for: without its learned reward and best of n where settings or models are named.

    Raises:
        ConfigError: a setting or model that is not in the study.
    """
    for asked, known, what in ((only, study.settings, "settings"), (models, study.models, "models")):
        unknown = sorted(set(asked or ()) - set(known))
        if unknown:
            raise ConfigError(f"no {unknown[0]!r} among the {what} of the study: {', '.join(known)}.")
    kept = replace(
        study,
        settings={label: setting for label, setting in study.settings.items() if only is None or label in only},
        models={name: budget for name, budget in study.models.items() if models is None or name in models},
        seeds=tuple(seeds or study.seeds),
    )
    return replace(kept, learned={}, best_of_n={}) if only or models else kept


def said(console: Console) -> Callable[[RlhfResult], None]:
    """Prints a line for each finished cell."""

    def say(result: RlhfResult) -> None:
        spec = result.spec
        text = result.error or f"{result.share:.1%} of the gap, KL {result.path[-1]['kl']:.2f}, {result.seconds:.0f} s"
        learned = ", learned reward" if spec.reward == "model" else ""
        console.print(f"{spec.label}, {spec.model}, seed {spec.seed}{learned}: {text}", markup=False, highlight=False)

    return say


def lines(study: RlhfStudy, results: Sequence[RlhfResult]) -> Iterator[dict[str, Any]]:
    """One line of the table for each setting and model: intervals over seeds, and whether the target is met."""
    for label, setting in study.settings.items():
        for model, budget in study.models.items():
            own = [r for r in results if (r.spec.label, r.spec.model, r.spec.reward) == (label, model, "true") and not r.error]
            if not own:
                continue
            asked = setting.point == "optimum" and not setting.reported
            share = mean_interval([result.share for result in own])
            distances = [result.to_point for result in own if result.to_point is not None]
            yield {
                "setting": label,
                "model": model,
                "share": share,
                "target": budget.target if asked else None,
                "met": not asked or share.mean >= budget.target,
                "point": setting.point,
                "point_share": own[0].point_share,
                "to_point": mean_interval(distances) if distances else None,
                "start_to_point": own[0].start_to_point,
                "reward": mean_interval([result.path[-1]["reward"] for result in own]),
                "kl": mean_interval([result.path[-1]["kl"] for result in own]),
                "samples": own[0].spec.budget.updates * own[0].spec.budget.samples,
                "seconds": sum(result.seconds for result in own) / len(own),
            }


def markdown(study: RlhfStudy, results: Sequence[RlhfResult], best: Sequence[BestOfNRow]) -> str:
    """The whole read-out."""
    start = next((result.path[0]["reward"] for result in results if not result.error), float("nan"))
    parts = [
        f"# On-policy algorithms in exact world {study.world}",
        f"Hidden reward, beta {study.beta}, temperature 1 without top-p, seeds {', '.join(map(str, study.seeds))}; means with "
        "95% intervals over seeds. *Share* is how much of the gap between the reference's E[r] - beta KL and the optimum's "
        "was closed; *own point* the share where the setting's expected gradient vanishes, *KL to it* that of the final policy "
        f"(and of the reference). The reference's reward is {start:+.3f}. {os.cpu_count()}-core {platform.machine()}, "
        f"torch {torch.__version__.split('+')[0]}.",
        _table(_HEADS, map(_line, lines(study, results))),
    ]
    for label, setting in study.settings.items():
        if setting.reported:
            parts.append(f"{label}: no target, {setting.reported}.")
    learned = [result for result in results if result.proxy is not None]
    if learned:
        parts.append(_learned(study, learned))
    if best:
        parts.append(
            "## Best of n from the reference\n\nSampled KL is the mean of log(best of n / reference) over the kept samples, "
            "with its standard error; KL of ranks follows from the ties among all draws."
        )
        parts.append(_table(_BEST_HEADS, map(_best_line, best)))
    failed = [f"- {r.spec.label}, {r.spec.model}, seed {r.spec.seed}: {r.error}" for r in results if r.error]
    if failed:
        parts.append("## Failed\n\n" + "\n".join(failed))
    return "\n\n".join(parts) + "\n"


def _learned(study: RlhfStudy, results: Sequence[RlhfResult]) -> str:
    row = [
        _text(mean_interval([result.proxy for result in results if result.proxy is not None]), "+.3f"),
        _text(mean_interval([result.true for result in results if result.true is not None]), "+.3f"),
        _text(mean_interval([result.share for result in results]), ".1%"),
        _text(mean_interval([result.path[-1]["kl"] for result in results]), ".2f"),
    ]
    spec = results[0].spec
    return (
        f"## Learned reward\n\n{spec.label} with {spec.model} on a reward model trained on {study.pairs} labelled pairs; gains "
        "over the reference, and the share of the true gap.\n\n"
    ) + _table(("proxy reward", "true reward", "share", "KL"), [_row(*row)])


_HEADS = ("setting", "model", "share", "target", "own point", "KL to it", "reward", "KL", "samples", "seconds")
_BEST_HEADS = ("n", "sampled KL", "KL of ranks", "exact KL", "log n - (n-1)/n", "reward", "share")


def _table(heads: Sequence[str], rows: Iterable[str]) -> str:
    return "\n".join([_row(*heads), "|---" * len(heads) + "|", *rows])


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _line(row: dict[str, Any]) -> str:
    target = "reported" if row["target"] is None else f"{row['target']:.0%}{'' if row['met'] else ' missed'}"
    distance = "infinite" if row["to_point"] is None else f"{_text(row['to_point'], '.3f')} (from {row['start_to_point']:.2f})"
    point = "the optimum" if row["point"] == "optimum" else f"{row['point']}: {row['point_share']:.1%}"
    return _row(
        row["setting"], row["model"], _text(row["share"], ".1%"), target, point, distance, _text(row["reward"], "+.3f"),
        _text(row["kl"], ".2f"), f"{row['samples']:,}", f"{row['seconds']:.0f}",
    )  # fmt: skip


def _best_line(row: BestOfNRow) -> str:
    sampled = f"{row.sampled:.4f} ± {row.error:.4f}"
    kls = [f"{value:.4f}" for value in (row.ranks, row.exact, row.bound)]
    return _row(str(row.n), sampled, *kls, f"{row.reward:+.3f}", f"{row.share:.1%}")


def _text(interval: Interval, spec: str) -> str:
    if interval.half_width is None:
        return f"{interval.mean:{spec}}"
    return f"{interval.mean:{spec}} ± {interval.half_width:{spec.removeprefix('+')}}"


def as_dict(study: RlhfStudy, results: Sequence[RlhfResult], best: Sequence[BestOfNRow]) -> dict[str, Any]:
    """All numbers, as plain values."""
    return {
        "study": asdict(study),
        "lines": [
            {name: asdict(value) if isinstance(value, Interval) else value for name, value in row.items()}
            for row in lines(study, results)
        ],
        "cells": [asdict(result) for result in results],
        "best_of_n": [asdict(row) for row in best],
    }


if __name__ == "__main__":
    raise SystemExit(main())
