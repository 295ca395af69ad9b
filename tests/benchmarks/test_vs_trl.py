"""The comparison with TRL: what is compared, what is dropped, and that both sides compute the same on a tiny model."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

pytest.importorskip("trl")

from benchmarks.duel import CACHED, LOOP, MODES, TINY, Contest, Duel, Turn, peak_of_prefopt, peak_of_trl, tiny_batches
from benchmarks.measuring import Peak, Spread
from benchmarks.vs_trl import (
    Report,
    compare_setting,
    compare_tiny,
    disagreements,
    first_steps,
    padded_tokens,
    parse,
    ratio_table,
    ratios,
    real_tokens,
    step_table,
    why_not,
)
from prefopt.data.records import Example
from prefopt.streams import Budget, OfflineStream

pytestmark = pytest.mark.peer


def turn(number: int, side: str, mode: str, seconds: float, **more: float) -> Turn:
    plain = Turn(number, side, mode, seconds, 0.0, 0.0, 100.0, 0.5, 2.0)
    return replace(plain, **more)  # type: ignore[arg-type]


def rounds() -> list[Turn]:
    """Two rounds: TRL 12 and 10 seconds in the loop, 8 precomputed; prefopt 4 in the loop (1 of them the pass), 2 cached."""
    turns = []
    for number, slow in ((1, 12.0), (2, 10.0)):
        turns += [
            turn(number, "trl", LOOP, slow),
            turn(number, "prefopt", LOOP, 4.0, pass_seconds=1.0),
            turn(number, "trl", CACHED, 8.0),
            turn(number, "prefopt", CACHED, 2.0),
        ]
    return turns


def test_ratios_of_rounds() -> None:
    """12/4, 10/4; 8/2; 12/2, 10/2; and over two epochs 12/(2 + 1/2), 10/(2 + 1/2)."""
    table = ratio_table("x", rounds(), epochs=2.0)
    found = [row["ratio"] for row in table.rows]
    assert found[0] == Spread(2.75, 2.5, 3.0, 2)
    assert found[1] == Spread(4.0, 4.0, 4.0, 2)
    assert found[2] == Spread(5.5, 5.0, 6.0, 2)
    assert found[3] == Spread(4.4, 4.0, 4.8, 2)


def test_a_round_counts_only_with_both_sides_and_with_the_pass_that_it_needs() -> None:
    """Without prefopt's first turn in the loop, round 1 has neither that ratio nor a pass to count."""
    table = ratio_table("x", [t for t in rounds() if (t.round, t.side, t.mode) != (1, "prefopt", LOOP)], epochs=1.0)
    assert [row["rounds"] for row in table.rows] == [1, 2, 2, 1]
    assert table.rows[3]["ratio"].median == pytest.approx(10 / 3)


def test_a_faster_machine_in_one_turn_is_taken_out() -> None:
    """TRL's turn ran while the machine made 80 GFLOP/s, prefopt's at 100: 8 s there are 6.4 s here."""
    turns = [turn(1, "trl", CACHED, 8.0, gflops=80.0), turn(1, "prefopt", CACHED, 2.0)]
    assert ratios(turns, CACHED, lambda t: t.seconds, CACHED, calibrated=True).median == pytest.approx(3.2)
    assert ratios(turns, CACHED, lambda t: t.seconds, CACHED, calibrated=False).median == pytest.approx(4.0)


def test_disturbed_steps_and_the_warm_up_are_left_out_and_counted() -> None:
    turns = [turn(0, "trl", LOOP, 99.0), turn(1, "trl", LOOP, 2.0), turn(2, "trl", LOOP, 50.0, others=0.06)]
    contest = Contest(TINY, tiny_batches(3, 2))
    peaks = {(side, mode): Peak(1.0, None, 0.0) for side in ("trl", "prefopt") for mode in MODES}
    row = step_table("x", contest, turns, peaks).rows[0]
    assert (row["seconds"].median, row["steps"], row["dropped"]) == (2.0, 1, 1)
    assert row["tokens/s"].median == real_tokens(contest.batches[1]) / 2.0


def test_tokens_of_a_step() -> None:
    """Prompt 3 and completions 2 and 4; prompt 1 and completions 1 and 1: 12 real tokens, 4 rows of 7 when padded."""
    batch = [Example("a", (1, 2, 3), ((4, 5), (6, 7, 8, 9))), Example("b", (1,), ((2,), (3,)))]
    assert real_tokens(batch) == 12
    assert padded_tokens(batch) == 28


def test_the_steps_are_those_of_a_run() -> None:
    examples = [pair for batch in tiny_batches(20, 1) for pair in batch]
    warm_up, *steps = first_steps(examples, pairs=3, steps=4, seed=5)
    stream = OfflineStream(examples, kind="pairs", budget=Budget(batch_size=3, seed=5))
    for own, micro_batches in zip(steps, stream, strict=False):
        assert tuple(example.id for example in own) == tuple(i for batch in micro_batches for i in batch.ids)
    assert len(steps) == 4
    left = [example.tokens for example in examples if example not in {e for step in steps for e in step}]
    assert sorted(example.tokens for example in warm_up) == sorted(left)[:3]


def test_what_does_not_fit_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's 1,000 MB and three times 100 MB of trainable weights, of which this process holds 400 MB already."""
    peaks = {(side, mode): Peak(1000.0, None, 100.0) for side in ("trl", "prefopt") for mode in MODES}
    monkeypatch.setattr("benchmarks.vs_trl.memory_mb", lambda: 400.0)
    for free, fits in ((899.0, False), (901.0, True)):
        monkeypatch.setattr("benchmarks.vs_trl.available_memory_mb", lambda free=free: free)
        assert (why_not(peaks) == "") is fits
    peaks["trl", LOOP] = Peak(math.nan, None, None, "does not fit: ended")
    assert "does not fit" in why_not(peaks)


def test_a_setting_that_does_not_fit_is_said_and_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peaks = {(side, mode): Peak(1000.0, None, 100.0) for side in ("trl", "prefopt") for mode in MODES}
    peaks["trl", LOOP] = Peak(math.nan, None, None, "does not fit: ended when 900 MB were left")
    monkeypatch.setattr("benchmarks.vs_trl.measure_peaks", lambda contest: peaks)
    monkeypatch.setattr("benchmarks.vs_trl.hh_batches", lambda *_, pairs, steps, **__: tiny_batches(steps + 1, pairs))
    report = Report()
    compare_setting("full", 4, parse(["--hh", "x", "--model", "y", "--steps", "2"]), report)
    printed = " ".join(capsys.readouterr().out.split())
    assert "full, 4 pairs a step, at most 512 tokens: not timed: trl, reference in the loop: does not fit" in printed
    assert not report.failures
    assert report.tables[0].rows[0]["peak MB"].startswith("does not fit")
    assert report.tables[0].rows[1]["peak MB"] == 1000.0


@pytest.mark.parametrize("lora", [0, 4])
def test_both_sides_compute_the_same_turn_by_turn(lora: int) -> None:
    contest = Contest(TINY, tiny_batches(3, 2), lora=lora, learning_rate=1e-2 if lora else 1e-4)
    said: list[str] = []
    turns = Duel(contest, calibration=0.0, say=said.append).play()
    assert [line.split(":")[0] for line in said] == ["warm-up", "round 1", "round 2"]
    order = [(LOOP, "trl"), (LOOP, "prefopt"), (CACHED, "trl"), (CACHED, "prefopt")]
    assert [(t.round, t.mode, t.side) for t in turns] == [(number, *who) for number in range(3) for who in order]
    loss, norm = disagreements(turns)
    assert loss < 1e-4
    assert norm < 1e-3
    assert turns[0].loss == pytest.approx(math.log(2), abs=1e-4)
    assert abs(turns[-1].loss - math.log(2)) > 1e-3, "the weights did not move, so nothing was compared"
    assert all((t.pass_seconds > 0) == (t.side == "prefopt" and t.mode == LOOP) for t in turns)
    assert all(t.pass_seconds < t.seconds for t in turns)


@pytest.mark.parametrize("wrong", [{"loss": 0.5002}, {"grad_norm": 2.01}, {"loss": math.nan}])
def test_a_difference_between_the_sides_fails_the_run(wrong: dict[str, float]) -> None:
    report = Report()
    report.check("same", rounds())
    assert not report.failures
    report.check("other", [*rounds()[:-1], turn(2, "prefopt", CACHED, 2.0, **wrong)])
    assert len(report.failures) == 1


def test_the_tiny_comparison_reports_both_sides(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    compare_tiny(report, duels=1, rounds=2)
    assert "losses differ by at most" in capsys.readouterr().out
    # A busy machine drops the duel and says so; nothing else may fail.
    assert all("disturbed" in failure for failure in report.failures)
    measured = next(iter(report.raw.values()))["turns"]
    assert {(t["side"], t["mode"]) for t in measured} == {(side, mode) for side in ("trl", "prefopt") for mode in MODES}


def test_options_out_of_range_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--steps", "0"])
    assert "must be positive" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_each_side_trains_alone_for_its_peak(mode: str) -> None:
    """Both report the size of the same trainable weights."""
    contest = Contest(TINY, tiny_batches(2, 2))
    assert peak_of_trl(contest, mode) == peak_of_prefopt(contest, mode) > 1
