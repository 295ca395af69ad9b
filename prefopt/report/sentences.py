"""What the tests say, in plain words: one sentence a pair."""

from __future__ import annotations

from prefopt.report.power import LEVEL, MOST_SEEDS, seeds_needed
from prefopt.report.statistics import SIGNIFICANT, Comparison


def in_words(pair: Comparison, *, interest: float | None = None) -> str:
    """One sentence on a pair.

    Args:
        pair: with its p value after Holm's correction.
        interest: the difference that the study wants to see, in the metric's unit; the observed one where None. The observed
            difference of a pair that cannot be told apart is itself uncertain, and so is the number of seeds that it names.
    """
    if pair.half_width is None or pair.p_holm is None:
        return f"{pair.left} − {pair.right} is {signed(pair, pair.difference)}; no test: {pair.missing}."
    facts = f"{LEVEL:.0%} interval {interval(pair)}"
    if pair.told_apart:
        way = "above" if pair.difference > 0 else "below"
        holm = f" after Holm over {pair.tests} tests" if pair.tests > 1 else ""
        size = format(abs(pair.difference), unsigned(pair))
        return f"{pair.left} is {way} {pair.right} by {size} ({facts}; p = {pair.p_holm:.2g}{holm}; {pair.n} seeds)."
    text = (
        f"{pair.left} and {pair.right} cannot be told apart at {pair.n} seeds "
        f"(difference {signed(pair, pair.difference)}, {facts}"
    )
    if abs(pair.difference) > pair.half_width:
        text += f", which is not corrected for {pair.tests} tests; p = {pair.p_holm:.2g} after Holm"
    return f"{text}); {needed_in_words(pair, interest)}."


def needed_in_words(pair: Comparison, interest: float | None = None) -> str:
    """How many seeds a difference would need at this spread."""
    count = seeds_wanted(pair, interest)
    seeds = f"more than {MOST_SEEDS}" if count is None else str(count)
    difference = abs(pair.difference if interest is None else interest)
    return f"{seeds} seeds would be needed for a difference of {format(difference, unsigned(pair))}"


def seeds_wanted(pair: Comparison, interest: float | None = None) -> int | None:
    """Seeds that find a difference at this spread by the strictest of Holm's tests (level 0.05 / tests); None for more than
    `MOST_SEEDS`."""
    difference = abs(pair.difference if interest is None else interest)
    return seeds_needed(pair.deviation or 0.0, difference, level=1 - SIGNIFICANT / pair.tests)


def interval(pair: Comparison) -> str:
    """The uncorrected interval of the difference, low to high."""
    margin = pair.half_width or 0.0
    return f"{signed(pair, pair.difference - margin)} to {signed(pair, pair.difference + margin)}"


def signed(pair: Comparison, value: float) -> str:
    """A difference with its sign, in the metric's format."""
    return format(value, "+" + unsigned(pair))


def unsigned(pair: Comparison) -> str:
    """The metric's format without a sign."""
    return pair.format.lstrip("+")
