"""What judges say, as tables: win rates, templates and orders, agreement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prefopt.judges.judged import JudgedPairs, JudgeSummary
from prefopt.judges.winrate import Agreement, WinRate
from prefopt.report.grid import Column, Entry, Grid, Style
from prefopt.report.schema import Judge
from prefopt.report.tables import JUDGE_FLOOR, NOTHING, number, weak
from prefopt.rewards.quality import MATCHED


def win_rate_grid(summaries: Sequence[JudgeSummary], records: Mapping[str, Judge], unit: str, names: tuple[str, str]) -> Grid:
    """Raw, length-controlled and length-matched rates by judge; dim where the judge's own record is weak.

    Args:
        records: of the judges that were measured on labelled pairs.
        unit: of lengths.
        names: of ours and theirs.
    """
    columns = (
        Column("judge", numeric=False),
        Column("win rate"),
        Column("95% interval"),
        Column("at equal length"),
        Column("95% interval"),
        Column("length-matched"),
        Column("pairs"),
        Column("ties"),
        Column("unread"),
        Column("position bias"),
        Column("held-out accuracy"),
    )
    rows = tuple(_row(summary, records.get(summary.judge)) for summary in summaries)
    return Grid(f"win rate of {names[0]} against {names[1]}", columns, rows, tuple(_captions(summaries, records, unit)))


def _row(summary: JudgeSummary, record: Judge | None) -> tuple[Entry, ...]:
    style: Style = "dim" if record is not None and weak(record) else ""
    controlled, matched = summary.length_controlled, summary.length_matched
    extrapolated = controlled is not None and controlled.extrapolated
    biases = [found.position_bias.rate for found in summary.templates.values()]
    texts = (
        summary.judge,
        number(summary.win_rate.rate, ".1%"),
        _interval(summary.win_rate),
        NOTHING if controlled is None else f"{controlled.rate:.1%}{' †' if extrapolated else ''}",
        NOTHING if controlled is None else f"{controlled.low:.1%} to {controlled.high:.1%}",
        number(matched.rate, ".1%"),
        f"{matched.pairs:,}",
        f"{summary.win_rate.ties:,}",
        f"{summary.win_rate.unread:,}",
        number(sum(biases) / len(biases) if biases else None, ".1%"),
        "not measured" if record is None else f"{record.accuracy:.1%} ({record.low:.1%} to {record.high:.1%})",
    )
    return tuple(Entry(text, style) for text in texts)


def _captions(summaries: Sequence[JudgeSummary], records: Mapping[str, Judge], unit: str) -> list[str]:
    found = [
        "Win rate: wins and half of the ties, over the pairs with a verdict; its interval is over prompts.",
        f"At equal length: intercept of a logistic regression on the log ratio of lengths in {unit}.",
        f"Length-matched: pairs whose lengths differ by at most {MATCHED:.0%}; how many there are stands behind it.",
    ]
    if any(summary.length_controlled is not None and summary.length_controlled.extrapolated for summary in summaries):
        found.append("† One side is longer in every pair: the rate at equal length is extrapolated.")
    if any(summary.templates for summary in summaries):
        found.append("Position bias: share of pairs in which the same place won in both orders; mean over templates.")
    grey = [name for name, record in records.items() if weak(record)]
    if grey:
        found.append(f"Greyed out ({', '.join(grey)}): may be right less than {JUDGE_FLOOR:.0%} of the time on held-out pairs.")
    for summary in summaries:
        rate = summary.win_rate
        if rate.unread:
            low, high = rate.bounds
            found.append(
                f"{summary.judge}: {rate.unread} of {rate.pairs + rate.unread} pairs have no verdict; whatever it would have "
                f"been, the rate is between {low:.1%} and {high:.1%}."
            )
    return found


def template_grid(summaries: Sequence[JudgeSummary]) -> Grid | None:
    """Judges that see a first and a second completion, by template; None without any."""
    rows = [
        (
            summary.judge, name, number(found.win_rate.rate, ".1%"), _interval(found.win_rate), f"{found.win_rate.ties:,}",
            f"{found.win_rate.unread:,}", number(found.position_bias.rate, ".1%"), number(found.position_bias.first, ".1%"),
        )
        for summary in summaries
        for name, found in summary.templates.items()
    ]  # fmt: skip
    if not rows:
        return None
    headers = ("win rate", "95% interval", "ties", "unread", "position bias", "of it: first")
    columns = (Column("judge", numeric=False), Column("template", numeric=False), *map(Column, headers))
    captions = [
        f"{summary.judge}: the templates' win rates lie {summary.spread:.1%} apart."
        for summary in summaries
        if summary.spread is not None
    ]
    return Grid("both orders, by template", columns, tuple(tuple(Entry(text) for text in row) for row in rows), tuple(captions))


def agreement_grid(found: Sequence[Agreement]) -> Grid | None:
    """Agreement of every two judges; None under two."""
    if not found:
        return None
    rows = tuple(
        tuple(
            Entry(text)
            for text in (
                item.one,
                item.other,
                f"{item.pairs:,}",
                number(item.same, ".1%"),
                number(item.kappa, "+.2f"),
                number(item.decided, ".1%"),
            )
        )
        for item in found
    )
    columns = (
        Column("judge", numeric=False),
        Column("and judge", numeric=False),
        *map(Column, ("pairs", "same verdict", "kappa", "same, ties left out")),
    )
    return Grid("agreement of judges", columns, rows, ("Win, tie and loss are three verdicts; kappa is Cohen's.",))


def length_line(judged: JudgedPairs, names: tuple[str, str]) -> str:
    """How long the two sides are."""
    ours, theirs = judged.lengths.double().mean(0).tolist()
    longer = float((judged.lengths[:, 0] > judged.lengths[:, 1]).double().mean())
    return (
        f"Mean length in {judged.unit}: {names[0]} {ours:.1f}, {names[1]} {theirs:.1f}; {names[0]} is longer in {longer:.0%} "
        "of the pairs."
    )


def _interval(rate: WinRate) -> str:
    return NOTHING if rate.interval == "none" else f"{rate.low:.1%} to {rate.high:.1%}"
