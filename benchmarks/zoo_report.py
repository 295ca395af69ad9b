"""The read-out of benchmarks.zoo: reward at matched KL with what may be said about the order, as data and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.zoo_cells import CellResult, World
from benchmarks.zoo_config import Part, Trial, Zoo
from benchmarks.zoo_statistics import ASSUMPTIONS, Comparison, Standing, compare, lowest_regret
from prefopt import algorithms
from prefopt.report.matched import reward_at


@dataclass(frozen=True)
class Row:
    """One loss in the worlds of a block, all its cells finished; lists have one value a world.

    Args:
        loss: its name.
        stream: what it trains on.
        trial: its numbers.
        reward: by target KL; None in a world where the path never gets that far.
        regret: the lowest along the path.
        end_kl, most_kl: at the last update, and the largest along the path; nats.
    """

    loss: str
    stream: str
    trial: Trial
    reward: Mapping[float, Sequence[float | None]]
    regret: Sequence[float]
    end_kl: Sequence[float]
    most_kl: Sequence[float]

    def rewards(self, target: float) -> list[float]:
        """The rewards at a target if every world has one; else nothing."""
        found = [value for value in self.reward[target] if value is not None]
        return found if len(found) == len(self.regret) else []

    def reached(self, target: float) -> int:
        """Worlds in which the path gets to the target."""
        return sum(value is not None for value in self.reward[target])


@dataclass(frozen=True)
class Block:
    """Losses x worlds under one label model.

    Args:
        labels: the label model.
        worlds: their seeds.
        rows: losses whose cells all finished, in the order of the study.
        failed: the first error of each loss with a cell that failed.
        at: the comparison of rewards at each target, of the losses that reach it in every world.
        regret: the comparison of lowest regrets, of all losses.
    """

    labels: str
    worlds: Sequence[int]
    rows: Sequence[Row]
    failed: Mapping[str, str]
    at: Mapping[float, Comparison]
    regret: Comparison


@dataclass(frozen=True)
class Report:
    """A finished study.

    Args:
        targets, primary: KLs in nats.
        everything: part A, a block a label model.
        headline: part B.
        worlds: what is possible in each.
        left_out: losses that did not run, with the reason.
        border: by loss, which of its numbers stand at the border of their grid.
        trials: of every loss.
        facts: date, minutes, machine, versions, command.
    """

    targets: Sequence[float]
    primary: float
    everything: Sequence[Block]
    headline: Sequence[Block]
    worlds: Mapping[int, World]
    left_out: Mapping[str, str]
    border: Mapping[str, Sequence[str]]
    trials: int
    facts: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def blocks(zoo: Zoo, part: Part, chosen: Mapping[str, Trial], results: Mapping[str, CellResult]) -> list[Block]:
    """A part of the study as one block a label model."""
    return [_block(zoo, part, labels, chosen, results) for labels in part.labels]


def _block(zoo: Zoo, part: Part, labels: str, chosen: Mapping[str, Trial], results: Mapping[str, CellResult]) -> Block:
    rows: list[Row] = []
    failed = {}
    for loss in part.losses:
        if loss not in chosen:
            continue
        cells = [results[zoo.cell_spec(loss, chosen[loss], world, labels).file] for world in part.worlds]
        errors = [cell.error for cell in cells if cell.error]
        if errors:
            failed[loss] = f"{len(errors)} of {len(cells)} cells: {errors[0]}"
            continue
        paths = [cell.path for cell in cells]
        curves = [[(point["kl"], point["reward"]) for point in path] for path in paths]
        rows.append(
            Row(
                loss, algorithms.get(loss).stream, chosen[loss],
                {target: [reward_at(curve, target) for curve in curves] for target in zoo.targets},
                [lowest_regret(path) for path in paths],
                [path[-1]["kl"] for path in paths], [max(point["kl"] for point in path) for path in paths],
            )
        )  # fmt: skip
    at = {target: compare({row.loss: row.rewards(target) for row in rows if row.rewards(target)}) for target in zoo.targets}
    regret = compare({row.loss: row.regret for row in rows}, lower_is_better=True)
    return Block(labels, part.worlds, rows, failed, at, regret)


def markdown(report: Report) -> str:
    """The whole read-out."""
    parts = [f"# Every offline loss in the exactly solvable world\n\n{_facts(report)}"]
    for block in report.everything:
        parts.append(f"## All losses, labels {block.labels}, {len(block.worlds)} worlds\n\n{everything_table(report, block)}")
        parts.append(_apart(report, block))
    if _has_rows(report.headline):
        parts.append(f"## Under other labels\n\n{headline_table(report)}")
        parts.append("Settings are those tuned on the labels of the first part. " + _scale(report, report.headline))
    if report.left_out:
        parts.append("Left out: " + "; ".join(f"{name} ({reason})" for name, reason in report.left_out.items()) + ".")
    parts.append(_method(report))
    return "\n\n".join(part for part in parts if part) + "\n"


def readme_block(report: Report, figures: str = "docs/figures") -> str:
    """What the README shows: the facts of the run, the table of all losses, the one of labels, and two figures."""
    minutes = report.facts["cpu_minutes"] / max(1, report.facts["workers"])
    block = report.everything[0]
    head = (
        f"**Every offline loss in the exactly solvable world** (`{report.facts['command']}`; {minutes:.0f} minutes of cells on "
        f"{report.facts['workers']} processes, settings tuned before by `make bench-zoo-tune`; {report.facts['date']}, "
        f"{report.facts['machine']}, torch {report.facts['torch']})."
    )
    pictures = (
        f"![Reward at {report.primary:g} nat and rank intervals of every loss]({figures}/zoo.png)",
        f"![What each loss pulls on the chosen and the rejected completion, over the margin]({figures}/gradients.png)",
    )
    left = "; ".join(f"{name} ({reason})" for name, reason in report.left_out.items())
    parts = [
        head, _reading(report, block), pictures[0], everything_table(report, block), _apart(report, block),
        f"Left out: {left}." if left else "", headline_table(report) if _has_rows(report.headline) else "",
        _scale(report, report.headline) if _has_rows(report.headline) else "", pictures[1], _method(report),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part)


def everything_table(report: Report, block: Block) -> str:
    """One row for each loss that reaches the primary target in every world, best first; the optimum on top."""
    others = [target for target in report.targets if target != report.primary]
    head = [
        "loss", "trains on", "setting", f"reward at {report.primary:g} nat", "rank", "alike",
        *(f"at {target:g}" for target in others), f"regret at {report.primary:g}", "lowest regret", "rank", "alike",
        "KL at the end",
    ]  # fmt: skip
    lines = [head, ["---"] * len(head), _optimum_line(report, block, others)]
    by_name = {row.loss: row for row in block.rows}
    for name in ranked(report, block):
        row = by_name[name]
        lines.append(
            [
                f"`{name}`", row.stream, row.trial.text(report.border.get(row.loss, ())),
                f"{_mean(row.rewards(report.primary)):.3f}", *_standing(block.at[report.primary], name),
                *(_or_reached(row, target) for target in others),
                f"{_regret_at(report, block, row):.3f}",
                f"{_mean(row.regret):.3f}", *_standing(block.regret, name), f"{_mean(row.end_kl):.2f}",
            ]
        )  # fmt: skip
    return _table(lines)


def ranked(report: Report, block: Block) -> list[str]:
    """The losses that reach the primary target in every world, by mean reward there."""
    reached = {row.loss: _mean(row.rewards(report.primary)) for row in block.rows if row.rewards(report.primary)}
    return sorted(reached, key=lambda name: -reached[name])


def unreached(report: Report, block: Block) -> list[Row]:
    """The losses that do not, by how far they get."""
    return sorted((row for row in block.rows if not row.rewards(report.primary)), key=lambda row: -_mean(row.most_kl))


def equal_losses(block: Block) -> list[list[str]]:
    """Losses that come to the same in every world, regret and final KL alike; they are no independent evidence."""
    groups: list[list[Row]] = []
    for row in block.rows:
        for group in groups:
            pairs = zip([*row.regret, *row.end_kl], [*group[0].regret, *group[0].end_kl], strict=True)
            if all(abs(one - other) < 1e-3 for one, other in pairs):
                group.append(row)
                break
        else:
            groups.append([row])
    return [[row.loss for row in group] for group in groups if len(group) > 1]


def headline_table(report: Report) -> str:
    """Reward at the primary target under each label model, with letters."""
    names = list(dict.fromkeys(row.loss for block in report.headline for row in block.rows))
    head = ["loss", *(f"{block.labels}: reward at {report.primary:g} nat" for block in report.headline)]
    lines = [head, ["---"] * len(head)]
    for name in names:
        line = [f"`{name}`"]
        for block in report.headline:
            row = next((row for row in block.rows if row.loss == name), None)
            if row is None:
                line.append("failed")
                continue
            rank, alike = _standing(block.at[report.primary], name)
            text = _or_reached(row, report.primary)
            line.append(f"{text} ({rank}) {alike}" if row.rewards(report.primary) and alike else text)
        lines.append(line)
    return _table(lines)


def _optimum_line(report: Report, block: Block, others: Sequence[float]) -> list[str]:
    worlds = [report.worlds[seed] for seed in block.worlds]
    best = {target: _mean([world.optimal_reward[target] for world in worlds]) for target in report.targets}
    reference = _mean([world.reference_reward for world in worlds])
    return [
        "*optimal policy*", "", f"reference: {reference:.3f}", f"*{best[report.primary]:.3f}*", "", "",
        *(f"*{best[target]:.3f}*" for target in others), "", "*0*", "", "", "",
    ]  # fmt: skip


def _regret_at(report: Report, block: Block, row: Row) -> float:
    """Mean regret (beta 0.5) of the matched reward when the whole target KL is charged."""
    best = [report.worlds[seed].optimal_objective for seed in block.worlds]
    price = report.worlds[block.worlds[0]].beta * report.primary
    return _mean([top - (reward - price) for top, reward in zip(best, row.rewards(report.primary), strict=True)])


def _apart(report: Report, block: Block) -> str:
    """What the table of all losses does not show: those that do not get so far, are the same here, or failed."""
    parts = []
    rows = unreached(report, block)
    if rows:
        others = [target for target in report.targets if target != report.primary]
        head = ["loss", "trains on", "setting", "worlds that reach it", "largest KL", *(f"at {t:g}" for t in others),
                "lowest regret", "rank", "alike"]  # fmt: skip
        lines = [head, ["---"] * len(head)]
        for row in rows:
            reached = f"{row.reached(report.primary)} of {len(block.worlds)}"
            lines.append(
                [
                    f"`{row.loss}`", row.stream, row.trial.text(report.border.get(row.loss, ())), reached,
                    f"{_mean(row.most_kl):.2f}", *(_or_reached(row, target) for target in others), f"{_mean(row.regret):.3f}",
                    *_standing(block.regret, row.loss),
                ]
            )  # fmt: skip
        parts.append(f"Not reached: {report.primary:g} nat, in every world.\n\n{_table(lines)}")
    same = equal_losses(block)
    if same:
        parts.append("Equal to 0.001 in every world: " + "; ".join(", ".join(f"`{n}`" for n in names) for names in same) + ".")
    if block.failed:
        parts.append("Failed: " + "; ".join(f"`{name}`, {error}" for name, error in block.failed.items()) + ".")
    return "\n\n".join(parts)


def _facts(report: Report) -> str:
    facts = report.facts
    return (
        f"`{facts['command']}`, {facts['date']}, {facts['machine']}, torch {facts['torch']}; {facts['cells']} cells of "
        f"{facts['cell_seconds']:.1f} s, {facts['cpu_minutes'] / max(1, facts['workers']):.1f} minutes on {facts['workers']} "
        "processes."
    )


def _reading(report: Report, block: Block) -> str:
    """What can and cannot be said, in a sentence or two; no order where there is none."""
    comparison = block.at[report.primary]
    if not comparison.standings:
        return f"No ranking: {comparison.missing}."
    first = [f"`{standing.name}`" for standing in comparison.standings if standing.best_rank == 1]
    behind = len(comparison.standings) - len(first)
    return (
        f"{len(comparison.standings)} losses reach {report.primary:g} nat in all {comparison.worlds} worlds; {behind} are "
        f"significantly worse than some other, and {len(first)} than none: {', '.join(first)}."
    )


def _method(report: Report) -> str:
    """How to read the columns, and what the intervals assume."""
    every = report.everything
    starred = " A star marks a number at the border of its grid." if any(report.border.values()) else ""
    return (
        "Rewards are the hidden reward at a KL of at most the target, along one run's path; KL, reward and regret are exact. "
        f"The end point is the reward at {report.primary:g} nat; the other columns are exploratory. Every loss was tuned with "
        f"{report.trials} trials outside of these worlds, by its lowest regret (beta 0.5): grids in benchmarks/zoo.yaml, "
        f"trials in benchmarks/zoo_tuned.json.{starred} "
        "`rank` is 1 + the losses that are significantly better, to their number less those significantly worse; losses that "
        f"share a letter under `alike` cannot be told apart (Tukey, 95% over all pairs). {_scale(report, every)} "
        f"Assumed: {'; '.join(ASSUMPTIONS)}."
    )


def _has_rows(found: Sequence[Block]) -> bool:
    return any(block.rows or block.failed for block in found)


def _scale(report: Report, found: Iterable[Block]) -> str:
    """How far apart two means have to be, in each block."""
    said = []
    for block in found:
        comparison = block.at[report.primary]
        said.append(
            f"{block.labels}: {comparison.missing}" if comparison.missing else
            f"{block.labels}: {comparison.hsd:.3f} (residual deviation {comparison.deviation:.3f}, {comparison.degrees} "
            "degrees of freedom)"
        )  # fmt: skip
    return f"Means differ significantly from a distance of: {'; '.join(said)}."


def _standing(comparison: Comparison, name: str) -> tuple[str, str]:
    """Rank interval and letters; empty where nothing can be said."""
    found: Standing | None = next((standing for standing in comparison.standings if standing.name == name), None)
    return ("", "") if found is None else (f"{found.best_rank}-{found.worst_rank}", found.letters)


def _or_reached(row: Row, target: float) -> str:
    rewards = row.rewards(target)
    if rewards:
        return f"{_mean(rewards):.3f}"
    reached = row.reached(target)
    return f"not reached ({reached} of {len(row.regret)})" if reached else "not reached"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
