"""Is CPL consistent? Regret and return labels in an exactly solvable decision process (Hejna et al. 2023 [hejna2023cpl]).

    python -m benchmarks.mdp                     250 to 64,000 pairs of segments, 3 draws each
    --quick                                      two sizes, two draws, few updates: a test that it runs
    --figures FOLDER                             mdp.png
    --json FILE                                  tables, findings, and every trained policy's numbers

CPL says: where the labeller compares segments by regret and labels are drawn, its loss with the labeller's temperature and
discount and bias 1 ends at the soft-optimal policy, whatever made the data. Here a table of the gridworld's policy learns from
segments of a uniform policy, two steps long, so that the loss on infinitely many pairs can be minimised too: trained policies
are compared with the soft-optimal policy, with that limit, and with the best policy on the same pairs.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.mdp_cells import Draw, Method, Outcome, by_method, run_draw
from benchmarks.mdp_exact import LENGTH, Exact
from benchmarks.mdp_figures import draw_consistency
from benchmarks.measuring import Table, print_machine, write_json
from prefopt.control.gridworld import Layout, draw_layout, gridworld
from prefopt.control.mdp import TabularMDP
from prefopt.control.segments import Preferences
from prefopt.errors import PrefoptError
from prefopt.machine import end_with_parent, standard_console
from prefopt.options import default_cache
from prefopt.report.statistics import mean_interval

LABELS: tuple[Preferences, ...] = get_args(Preferences)
BIASES = (1.0, 0.5)


@dataclass(frozen=True)
class Scale:
    """How much is run: sizes of the data, which of them all methods learn from, draws, and updates of each policy."""

    sizes: tuple[int, ...]
    compared: int
    seeds: tuple[int, ...]
    updates: int


FULL = Scale((250, 1_000, 4_000, 16_000, 64_000), 16_000, (0, 1, 2), 1_000)
QUICK = Scale((250, 2_000), 2_000, (0, 1), 150)


def cpl(mdp: TabularMDP, bias: float) -> Method:
    """CPL with the labeller's temperature and discount."""
    return Method("cpl", {"alpha": mdp.temperature, "gamma": mdp.discount, "bias": bias})


def others(mdp: TabularMDP) -> tuple[Method, ...]:
    """The other methods at the labeller's temperature, as far as each has one.

    IPO's best margin is h = (p - 1/2) / tau, p = sigma(difference of scores), of log-ratios averaged over LENGTH steps: for
    small differences that is the margin of CPL where tau = temperature * LENGTH / 4.
    """
    return (
        Method("dpo", {"beta": mdp.temperature}),
        Method("ipo", {"tau": mdp.temperature * LENGTH / 4}),
        Method("cpl_kl", {"alpha": mdp.temperature}),
        Method("sft"),
    )


def draws(scale: Scale, mdp: TabularMDP) -> list[Draw]:
    """Every draw of pairs, those that take longest first."""
    always = tuple(cpl(mdp, bias) for bias in BIASES)
    return [
        Draw(preferences, pairs, seed, always + others(mdp) if pairs == scale.compared else always, scale.updates)
        for pairs, preferences, seed in product(sorted(scale.sizes, reverse=True), LABELS, scale.seeds)
    ]


def run_all(planned: Sequence[Draw], workers: int, cache: Path) -> Iterator[list[Outcome]]:
    """The outcomes of each draw; 0 workers runs them in this process."""
    if workers == 0:
        yield from (run_draw(draw, cache) for draw in planned)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
        yield from pool.map(run_draw, planned, [cache] * len(planned))


def curve_table(outcomes: Sequence[Outcome], scale: Scale, exact: Exact) -> Table:
    """CPL against the size of its data."""
    table = Table(
        "CPL as data grow",
        note="KL(policy || other), nats a step, mean over states; ±: 95%, t over draws. Limit: the best policy on infinitely "
        "many pairs with these labels and this bias, the nearest if there are several. Sample: the best policy on the same "
        "pairs, found without the trainer (- where the loss of a draw has no minimum). Regret: exact.",
    )
    for preferences, bias in product(LABELS, BIASES):
        for pairs in scale.sizes:
            own = by_method(outcomes, cpl(exact.mdp, bias).label, preferences, pairs)
            left = [o.to_sample for o in own if o.to_sample is not None]
            table.add(
                labels=preferences, bias=bias, pairs=f"{pairs:,}",
                KL_to_optimum=shown([o.metrics["kl_optimal"] for o in own]),
                KL_to_limit=shown([exact.to_limit(o.logps, preferences, bias) for o in own]),
                KL_to_sample=f"{mean_interval(left).mean:.1g}" if len(left) == len(own) else None,
                regret=shown([o.metrics["regret"] for o in own]),
            )  # fmt: skip
    return table


def limit_table(exact: Exact) -> Table:
    """Where infinitely many pairs lead, beside policies that are known."""
    mdp = exact.mdp
    table = Table(
        "Where infinitely many pairs lead",
        forms={**dict.fromkeys(exact.measures(exact.best), ".3f"), "KL_to_optimum": ".4f", "loss": ".5f"},
        note=f"Myopic: softmax(r / alpha). Behaviour: uniform. cpl with alpha {mdp.temperature:g} and gamma {mdp.discount:g}, "
        f"dpo with beta {mdp.temperature:g}: every minimum that was found of the loss on infinitely many pairs.",
    )
    for name, logps in {"soft-optimal": exact.best, "myopic": exact.myopic, "behaviour": exact.behaviour}.items():
        table.add(policy=name, **exact.measures(logps), loss=None)
    for preferences, bias in product(LABELS, BIASES):
        for limit in exact.limits(preferences, bias):
            name = f"cpl, {preferences} labels, bias {bias:g}"
            table.add(policy=name, **exact.measures(limit.logps), loss=limit.loss)
    for preferences in LABELS:
        for limit in exact.limits(preferences, 1.0, gamma=1.0):  # its reference, uniform, cancels
            table.add(policy=f"dpo, {preferences} labels", **exact.measures(limit.logps), loss=limit.loss)
    return table


def method_table(outcomes: Sequence[Outcome], scale: Scale, mdp: TabularMDP) -> Table:
    """Every method on labels of both kinds."""
    table = Table(
        f"All methods on {scale.compared:,} pairs",
        note="The reference is uniform, as the behaviour: dpo is then cpl with bias 1, undiscounted. ±: 95%, t over draws.",
    )
    for preferences, method in product(LABELS, (*(cpl(mdp, bias) for bias in BIASES), *others(mdp))):
        own = by_method(outcomes, method.label, preferences, scale.compared)
        columns = {"KL_to_optimum": "kl_optimal", "regret": "regret", "return": "return", "KL_to_reference": "kl"}
        found = {name: shown([o.metrics[key] for o in own]) for name, key in columns.items()}
        table.add(labels=preferences, method=method.label, **found)
    return table


def shown(values: Sequence[float]) -> str:
    """Mean ± half-width of the interval over seeds, where there is one."""
    interval = mean_interval(values)
    return f"{interval.mean:.3g}" + ("" if interval.half_width is None else f" ± {interval.half_width:.1g}")


def findings(outcomes: Sequence[Outcome], scale: Scale, exact: Exact) -> list[str]:
    """What the tables say, in sentences."""
    few, many = scale.sizes[0], scale.sizes[-1]

    def reached(preferences: Preferences, bias: float, pairs: int = many) -> list[Outcome]:
        return by_method(outcomes, cpl(exact.mdp, bias).label, preferences, pairs)

    def to_optimum(bias: float, pairs: int = many) -> float:
        return mean_interval([o.metrics["kl_optimal"] for o in reached("regret", bias, pairs)]).mean

    constant, elsewhere = exact.constant(), exact.limits("return", 1.0)
    plateau = exact.measures(exact.limits("regret", 0.5)[0].logps)["KL_to_optimum"]
    where, short, start = (exact.measures(logps) for logps in (elsewhere[0].logps, exact.myopic, exact.behaviour))
    farthest = max(exact.to_limit(o.logps, "return", 1.0) for o in reached("return", 1.0))
    left = [
        o.to_sample / exact.to_limit(o.logps, preferences, bias)
        for preferences, bias in product(LABELS, BIASES)
        for o in reached(preferences, bias)
        if o.to_sample is not None
    ]
    return [
        f"Regret labels, bias 1: KL to the soft-optimal policy falls from {to_optimum(1.0, few):.2g} with {few:,} pairs to "
        f"{to_optimum(1.0):.2g} with {many:,}. The theory of maximum likelihood says {constant:.0f} / pairs in the end, "
        f"{constant / many:.2g} there.",
        f"Regret labels, bias 0.5: with {many:,} pairs it is {to_optimum(0.5):.3f}; on infinitely many pairs {plateau:.3f}.",
        f"Return labels, bias 1: infinitely many pairs lead {where['KL_to_optimum']:.3f} from the soft-optimal policy, "
        f"{where['KL_to_myopic']:.3f} from the myopic softmax(r / alpha), {where['KL_to_behaviour']:.3f} from the behaviour; "
        f"regret is {where['regret']:.2f} there, {short['regret']:.2f} of the myopic policy, {start['regret']:.2f} of the "
        f"behaviour. Minima found: {len(elsewhere)}, losses {', '.join(f'{limit.loss:.5f}' for limit in elsewhere)}; every "
        f"draw of {many:,} pairs ends {farthest:.2g} or less from one of them.",
        f"Optimisation: KL to the best policy on the same {many:,} pairs is {max(left, default=math.nan):.1%} or less of KL to "
        f"the limit.",
    ]


def figure(outcomes: Sequence[Outcome], scale: Scale, exact: Exact, layout: Layout) -> bytes:
    """mdp.png."""
    curves = {
        (preferences, bias): {
            pairs: [o.logps for o in by_method(outcomes, cpl(exact.mdp, bias).label, preferences, pairs)]
            for pairs in scale.sizes
        }
        for preferences, bias in product(LABELS, BIASES)
    }
    return draw_consistency(exact, layout, curves)


def run(arguments: argparse.Namespace) -> None:
    """Trains, prints, writes and draws."""
    scale = QUICK if arguments.quick else FULL
    exact, console, outcomes = Exact(gridworld()), standard_console(), list[Outcome]()
    planned, begin = draws(scale, exact.mdp), time.perf_counter()
    for done, (draw, found) in enumerate(zip(planned, run_all(planned, arguments.workers, default_cache()), strict=True), 1):
        outcomes += found
        console.print(
            f"[{done}/{len(planned)}] {draw.pairs:,} pairs by {draw.preferences}, seed {draw.seed} "
            f"({time.perf_counter() - begin:.0f} s)", highlight=False, markup=False,
        )  # fmt: skip
    tables = [curve_table(outcomes, scale, exact), limit_table(exact), method_table(outcomes, scale, exact.mdp)]
    said = findings(outcomes, scale, exact)
    for table in tables:
        table.print()
    print(*said, sep="\n")
    if arguments.figures:
        arguments.figures.mkdir(parents=True, exist_ok=True)
        (arguments.figures / "mdp.png").write_bytes(figure(outcomes, scale, exact, draw_layout()))
    cells = [_plain(outcome) for outcome in outcomes]
    write_json(arguments.json, "mdp", tables, settings=vars(arguments), findings=said, cells=cells)


def _plain(outcome: Outcome) -> dict[str, Any]:
    return {**asdict(outcome), "logps": [[round(x, 5) for x in row] for row in outcome.logps.tolist()]}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="a small part: the path, not the result")
    made.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1,
        help="draws side by side, each on a thread; 0 runs them in this process (%(default)s)",
    )  # fmt: skip
    made.add_argument("--figures", type=Path, metavar="FOLDER", help="also write mdp.png there")
    made.add_argument("--json", type=Path, help="write tables, findings and policies to this file")
    return made


def main(tokens: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(tokens)
    torch.set_num_threads(1)
    print_machine()
    try:
        run(arguments)
    except PrefoptError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
