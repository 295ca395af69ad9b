"""What a reader sees first: one answer with its uncertainty, and one line of what it rests on."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from prefopt.report.grid import to_rich
from prefopt.report.health import health_grid
from prefopt.report.matched import Endpoint, endpoint
from prefopt.report.matched_tables import matched_grid, paired_grids
from prefopt.report.power import LEVEL, MOST_SEEDS
from prefopt.report.schema import MINIMUM_SEEDS, Results, Timings
from prefopt.report.sentences import interval, needed_in_words, seeds_wanted, signed, unsigned
from prefopt.report.statistics import NO_SCIPY, Comparison, mean_interval, scipy_installed
from prefopt.report.tables import JUDGE_FLOOR, judge_of, judges_grid, number, results_grid, tuning_line, weak


def print_summary(results: Results, timings: Timings | None, console: Console) -> None:
    """Results, the tests against the reference and the judges on a terminal; tests of pairs are in the report."""
    health = health_grid(results)
    tests = paired_grids(results)[:1]
    for grid in (results_grid(results, timings), matched_grid(results), *tests, judges_grid(results.judges), health):
        if grid.rows:
            console.print(to_rich(grid))
    console.print(Text(answer(results)))
    for note in results.notes:
        console.print(Text(f"note: {note}"))


def answer(results: Results) -> str:
    """The one answer, from the tests at the primary end point. A smoke run has none, and no ranking words."""
    if results.smoke:
        count = f"{len(results.seeds)} seed{'' if len(results.seeds) == 1 else 's'}"
        return f"No answer yet: {count} of at least {MINIMUM_SEEDS}. The run shows that everything works, and no order."
    end = endpoint(results)
    if end is None:
        return "No answer: the comparison declares no primary end point."
    if not scipy_installed():
        return f"No answer: {NO_SCIPY}."
    parts = [_order(end), _reference(end), _left_out(end), _judge(results, end)]
    return " ".join(filter(None, parts))


def facts(results: Results, prompts: int = 0) -> str:
    """Seeds, prompts, judge, smallest detectable difference, trials, what was matched, failed cells; one line.

    Args:
        results: of the comparison.
        prompts: distinct test prompts, where per-prompt results are at hand.
    """
    count = len(results.seeds)
    parts = [f"{count} seed{'' if count == 1 else 's'}"]
    if prompts:
        parts.append(f"{prompts:,} test prompts")
    parts += [_judge_line(results), _detectable_line(results), _trials_line(results), _matched_line(results)]
    failed = sum(cell.status == "failed" for cell in results.cells)
    parts.append(f"{failed} of {len(results.cells)} cells failed")
    return "; ".join(filter(None, parts)) + "."


def _order(end: Endpoint) -> str:
    """Who stands at the top, from whom it is told apart, and from whom not."""
    place = end.place[0].upper() + end.place[1:]
    if not end.compared:
        return f"No answer: nothing was measured {end.place}."
    means = {reading.name: mean_interval(list(reading.values.values())) for reading in end.compared}
    down = end.metric.better == "down"
    ranked = sorted(means, key=lambda name: means[name].mean, reverse=not down)
    top, rest = ranked[0], ranked[1:]
    spec, extreme = end.metric.format, "lowest" if down else "highest"
    level = number(means[top].mean, spec)
    if means[top].half_width is not None:
        level += f" ± {number(means[top].half_width, spec.lstrip('+'))}"
    if not rest:
        return f"{place}, only {top} is compared: {end.metric.label} is {level}."
    pairs = {name: _pair(end.pairs, top, name) for name in rest}
    apart = [pair for pair in pairs.values() if pair.told_apart]
    close = [pair for pair in pairs.values() if not pair.told_apart]
    if not any(pair.told_apart for pair in end.pairs):
        if all(pair.p is None for pair in end.pairs):
            return f"{place}, no test could be made: {close[0].missing}; the mean {end.metric.label} of {top} is {level}."
        least = min((pair.detectable for pair in end.pairs if pair.detectable is not None), default=math.nan)
        low, high = sorted((means[ranked[0]].mean, means[ranked[-1]].mean))
        return (
            f"{place}, no two of the {len(ranked)} can be told apart at {means[top].n} seeds: mean {end.metric.label} lies "
            f"between {number(low, spec)} and {number(high, spec)}, and no pair could have shown a difference under "
            f"{number(least, spec.lstrip('+'))} with probability 0.8."
        )
    text = f"{place}, {top} has the {extreme} {end.metric.label} ({level})"
    if apart:
        text += f" and is told apart from {_listed([pair.right for pair in apart])} ({_gaps(apart)})"
    if close:
        text += f"; it cannot be told apart from {_close(close)}"
    return text + "."


def _gaps(pairs: Sequence[Comparison]) -> str:
    """How far pairs are apart, and how sure that is."""
    gaps = sorted(abs(pair.difference) for pair in pairs)
    span = format(gaps[0], unsigned(pairs[0])) + (f" to {gaps[-1]:{unsigned(pairs[0])}}" if len(gaps) > 1 else "")
    holm = f" after Holm's correction over {pairs[0].tests} tests" if pairs[0].tests > 1 else ""
    return f"by {span}, p {'=' if len(pairs) == 1 else 'at most'} {max(pair.p_holm or 0.0 for pair in pairs):.2g}{holm}"


def _close(pairs: Sequence[Comparison]) -> str:
    """Names with what is known about their differences to the top. Each pair by itself stands in the table of tests."""
    names = _listed([pair.right if pair.half_width is not None else f"{pair.right} ({pair.missing})" for pair in pairs])
    tested = [pair for pair in pairs if pair.half_width is not None]
    if len(tested) == 1:
        pair = tested[0]
        facts = f"difference {signed(pair, pair.difference)}, {LEVEL:.0%} interval {interval(pair)}"
        return f"{names} ({facts}; {needed_in_words(pair)})"
    if not tested:
        return names
    gaps = sorted(abs(pair.difference) for pair in tested)
    spec = unsigned(tested[0])
    counts = [seeds_wanted(pair) for pair in tested]
    known = sorted(count for count in counts if count is not None)
    span = "" if not known else f"{known[0]} to {known[-1]}" if known[0] != known[-1] else f"{known[0]}"
    more = f"more than {MOST_SEEDS}" if len(known) < len(counts) else ""
    seeds = " or ".join(filter(None, (span, more)))
    return f"{names}: differences of {gaps[0]:{spec}} to {gaps[-1]:{spec}}, which {seeds} seeds would be needed to tell apart"


def _reference(end: Endpoint) -> str:
    """Who is told apart from the reference, and to which side."""
    if not end.against:
        return ""
    sides = {
        "above": [pair.left for pair in end.against if pair.told_apart and pair.difference > 0],
        "below": [pair.left for pair in end.against if pair.told_apart and pair.difference < 0],
    }
    rest = [pair.left for pair in end.against if not pair.told_apart]
    parts = [f"{_who(end, names)} {side} it" for side, names in sides.items() if names]
    rest = [pair.left for pair in end.against if not pair.told_apart]
    if len(rest) == len(end.against) > 1:
        parts.append("none can be told apart from it")
    elif rest:
        parts.append(f"{_listed(rest)} cannot be told apart from it")
    return f"Against the reference ({number(end.reference, end.metric.format)}): {'; '.join(parts)}."


def _who(end: Endpoint, names: Sequence[str]) -> str:
    """Names and their verb; one word where these are all."""
    if len(names) == len(end.against) > 1:
        return "all are"
    return f"{_listed(names)} {'is' if len(names) == 1 else 'are'}"


def _left_out(end: Endpoint) -> str:
    listed = "; ".join(f"{reading.name}, {reading.missing}" for reading in end.left_out)
    return f"Not compared: {listed}." if listed else ""


def _judge(results: Results, end: Endpoint) -> str:
    judge = judge_of(results, end.metric)
    if judge is None or not weak(judge):
        return ""
    return f"The judge, {judge.name}, may be right less than {JUDGE_FLOOR:.0%} of the time, so this says little."


def _judge_line(results: Results) -> str:
    judge = judge_of(results, results.primary) if results.primary else None
    if judge is not None:
        return f"judge {judge.name} right on {judge.accuracy:.1%} ({judge.low:.1%} to {judge.high:.1%}) of held-out pairs"
    return "reward known exactly" if results.task == "exact" else "no judge"


def _detectable_line(results: Results) -> str:
    end = None if results.smoke else endpoint(results)
    found = [pair for pair in end.pairs if pair.detectable is not None] if end else []
    if not found:
        return "no smallest detectable difference"
    values = sorted(pair.detectable or 0.0 for pair in found)
    spec = unsigned(found[0])
    span = format(values[0], spec) if len(values) == 1 else f"{values[0]:{spec}} to {values[-1]:{spec}}, by pair"
    return f"smallest detectable difference {span}"


def _trials_line(results: Results) -> str:
    trials = sorted({len(item.trials) for item in results.tuning})
    return f"tuned, {' or '.join(map(str, trials))} trials each" if trials else tuning_line(results)


def _matched_line(results: Results) -> str:
    """What is equal for all."""
    kl = f"KL ({', '.join(f'{target:g}' for target in results.kl_targets)} nats)" if results.kl_targets else ""
    labels = {cell.ledger.labels for cell in results.cells if cell.status == "ok"}
    same = f"labels ({next(iter(labels)):,} each)" if len(labels) == 1 and labels != {0} else ""
    return "matched: " + ", ".join(filter(None, ("rows, order and reference", same, kl)))


def _pair(pairs: Sequence[Comparison], left: str, right: str) -> Comparison:
    found = next(pair for pair in pairs if {pair.left, pair.right} == {left, right})
    return found if found.left == left else found.turned


def _listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""
