"""A study whose answers are known: eight losses, DPO under a second name, DPO as CPL-KL writes it, and DPO with a slip.

    python -m benchmarks.trust            10 settings, 5 seeds in the exact world: under half an hour on 2 cores
    python -m benchmarks.trust --quick    3 of them, a few updates: a test that it runs

Checked: DPO under two names is equal bit for bit; CPL-KL with bias 1 gives DPO's losses to 1e-5 in the first steps, and the
test does not tell them apart; the slip is found. The exit status is 1 where one of these fails.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from prefopt.errors import PrefoptError
from prefopt.files import write_json
from prefopt.machine import standard_console
from prefopt.report.grid import to_rich
from prefopt.report.schema import Results
from prefopt.study import Study

STUDY = Path(__file__).with_name("trust.yaml")
DPO, TWIN, SAME_LOSS, SLIP = "dpo", "dpo again", "cpl_kl, bias 1", "dpo with a slip"
# Updates in which two ways of writing one loss still round alike.
FIRST_STEPS, TOLERANCE = 5, 1e-5


def quick(study: Study) -> Study:
    """What runs, not what comes out."""
    options = replace(study.options, budget=replace(study.options.budget, max_steps=6))
    return replace(study, entries=study.entries[:4], seeds=(0,), options=options, kl_targets=())


def checks(results: Results) -> dict[str, Mapping[str, Any]]:
    """What must hold, each with whether it does and the numbers behind it."""
    pairs = list(zip(results.cells_of(DPO), results.cells_of(TWIN), strict=True))
    equal = all((one.final, one.path, one.curve) == (other.final, other.path, other.curve) for one, other in pairs)
    gaps = [
        abs(one.curve[step]["loss"] - other.curve[step]["loss"])
        for one, other in zip(results.cells_of(DPO), results.cells_of(SAME_LOSS), strict=True)
        for step in range(FIRST_STEPS)
    ]
    found: dict[str, Mapping[str, Any]] = {
        "DPO under two names is equal bit for bit": {"holds": equal and bool(pairs), "seeds": len(pairs)},
        f"CPL-KL with bias 1 gives DPO's losses in the first {FIRST_STEPS} steps": {
            "holds": max(gaps) <= TOLERANCE, "largest difference": max(gaps), "allowed": TOLERANCE,
        },
    }  # fmt: skip
    if not results.smoke:
        same, slip = results.compare(DPO, SAME_LOSS), results.compare(DPO, SLIP)
        found |= {
            "the test does not tell CPL-KL with bias 1 and DPO apart": {"holds": not same.told_apart, "says": same.sentence},
            "the slip is found": {"holds": slip.told_apart and slip.difference > 0, "says": slip.sentence},
        }
    return found


def show(found: Mapping[str, Mapping[str, Any]], results: Results, console: Console) -> None:
    """The matched-KL tables, then every check with its numbers."""
    for target in results.kl_targets:
        console.print(to_rich(results.table(kl=target)))
    for name, facts in found.items():
        rest = ", ".join(
            f"{key} {value:.2g}" if isinstance(value, float) else f"{key}: {value}" for key, value in facts.items()
        )
        console.print(f"{name}: {rest}", highlight=False, markup=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 where a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output-dir", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of one thread each (%(default)s)")
    asked = parser.parse_args(arguments)
    console = standard_console()
    study = Study.load(STUDY, imports=[str(STUDY.with_name("planted.py"))])
    study = quick(study) if asked.quick else study
    output = asked.output_dir or Path("runs/trust" + ("-quick" if asked.quick else ""))
    try:
        results = study.run(output, workers=asked.workers, console=console)
    except PrefoptError as error:
        raise SystemExit(f"error: {error}") from error
    found = checks(results)
    show(found, results, console)
    if asked.json:
        write_json(asked.json, found)
    return 0 if all(facts["holds"] for facts in found.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
