"""`prefopt score`: many losses on one shared forward pass: values, implicit rewards and gradients by pair."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from cyclopts import App, Parameter
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import losses
from losses.registry import BoundLoss
from losses.suggestions import suggest_option
from prefopt import algorithms
from prefopt.cli.flags import (
    Flag,
    check_values,
    import_flag,
    make_command,
    option_flags,
    parameter_defaults,
)
from prefopt.cli.lookup import find_algorithm, find_loss
from prefopt.environment import environment
from prefopt.errors import ConfigError, OutputError
from prefopt.files import write_json
from prefopt.machine import standard_console
from prefopt.options import Options, build_options, default_cache
from prefopt.runlog import counter
from prefopt.score import Accuracy, LossScore, ScoreTable, score
from prefopt.score_inputs import Role, policy_folder, read_inputs, run_options
from prefopt.score_pairs import pair_batches
from prefopt.study import Entry, typed
from prefopt.tasks import prepare_process

SCHEMA_VERSION = 1
SCORES_FILE, PAIRS_FILE, COSINE_FILE, TIMINGS_FILE = "scores.json", "per_pair.jsonl", "cosine.png", "timings.json"
ALL = "all"
_SCORING = "Scoring"
_FORM = "expected NAME:FLAG=VALUE,FLAG=VALUE, for example dpo:beta=0.5."
# Of the common options, what reading pairs and a start depends on.
_GROUPS = frozenset({"Data", "Model"})
_MORE = frozenset({"batch_size", "micro_batch_size", "micro_batch_tokens", "eval_pairs", "sft_epochs", "sft_learning_rate"})
_IDLE = frozenset({"lora", "judge_pairs"})  # a policy's adapter says its rank itself, and nothing is judged


def build(tokens: Sequence[str]) -> App:
    app = App("score", version_flags=(), default_parameter=parameter_defaults(), help_format="plaintext")
    app.default(make_command(_run, [*_own_flags(), *_shared_flags()], _SCORING))
    return app


def explain_unknown(tokens: Sequence[str], option: str) -> str:
    """What to do about an option that `score` does not have; it is often a hyper-parameter of one loss."""
    name = option.lstrip("-").partition("=")[0].replace("-", "_")
    hint = suggest_option(name, [flag.name for flag in (*_own_flags(), *_shared_flags())])
    return f"score has no option {option.partition('=')[0]}{hint}. Hyper-parameters are set by --losses NAME:FLAG=VALUE."


def _own_flags() -> list[Flag]:
    chosen: Any = Annotated[tuple[str, ...], Parameter(name=("--losses", "--loss"))]
    words = (
        "Losses, or weighted sums as dpo:1.0+sft:0.2, each as NAME or NAME:FLAG=VALUE,FLAG=VALUE; all is every registered "
        "one, with its paper's defaults."
    )
    return [
        Flag("words", chosen, (ALL,), words, _SCORING),
        Flag("policy", Path | None, None, "A run of prefopt train, scored against its start; else the start.", _SCORING),
        Flag("role", Role, "test", "Rows of which role.", _SCORING),
        Flag("output_dir", Path | None, None, "Folder for scores, values by pair and the picture.", _SCORING),
        Flag("overwrite", bool, False, "Replace the scores that the folder holds.", _SCORING),
        import_flag(_SCORING),
    ]


def _shared_flags() -> list[Flag]:
    return [flag for flag in option_flags() if (flag.group in _GROUPS or flag.name in _MORE) and flag.name not in _IDLE]


def _run(
    *,
    words: tuple[str, ...] = (ALL,),
    policy: Path | None = None,
    role: Role = "test",
    output_dir: Path | None = None,
    overwrite: bool = False,
    imports: tuple[str, ...] = (),
    **values: Any,
) -> None:
    algorithms.import_files(imports)
    wanted = parse_losses(words)
    folder = None if policy is None else policy_folder(policy)
    options = build_options(values, **({} if folder is None else run_options(folder)))
    if output_dir is not None:
        _claim(output_dir, overwrite)
    console = standard_console()
    prepare_process(options, 1)
    inputs = read_inputs(options, role, folder, default_cache(), console)
    begin = time.perf_counter()
    if inputs.reference is not None:
        inputs.reference.rows(inputs.examples)
    reference_seconds = time.perf_counter() - begin
    progress = counter(console, "scoring")
    total = len(inputs.examples)
    table = score(
        inputs.policy, wanted,
        pair_batches(inputs.examples, options.budget, reference=inputs.reference, dtype=inputs.policy.dtype),
        on_progress=None if progress is None else lambda done: progress(done, total),
    )  # fmt: skip
    show(table, console, f"{total} {role} pairs, {'the start' if policy is None else policy}", options.budget.batch_size)
    if output_dir is not None:
        about = {"policy": None if policy is None else str(policy), "role": role, **_read_options(options)}
        write(table, output_dir, about, reference_seconds)
        console.print(f"scores: {output_dir}", highlight=False, soft_wrap=True)


def parse_losses(words: Sequence[str]) -> dict[str, BoundLoss]:
    """Losses by label from NAME, NAME:FLAG=VALUE,FLAG=VALUE and `all`.

    Raises:
        ConfigError: an unknown loss, flag or value, or one loss twice with the same values.
    """
    found: dict[str, BoundLoss] = {}
    for word in words:
        if word == ALL:
            continue
        name, hyper = _read_word(word)
        label = Entry(name, hyper).label
        if label in found:
            raise ConfigError(f"--losses {word}: {label!r} is named twice; leave one out, or give it other values.")
        # A loss that is part of others has no stream, but without hyper-parameters it needs none to be scored or listed.
        found[label] = check_values(find_algorithm(name).setting(**hyper)).loss if hyper else find_loss(name).bind()
    if ALL in words:
        found.update({name: losses.get(name).bind() for name in losses.names() if name not in found})
    return found


def _read_word(word: str) -> tuple[str, dict[str, Any]]:
    """Name and values. A sum has colons of its own: the flags stand after the last one before the first `=`."""
    head, equals, _ = word.partition("=")
    name = head.rpartition(":")[0] if equals else word
    assignments = word[len(name) + 1 :]
    # One loss with a weight is a sum as well, but here a flag was forgotten.
    if not name or (":" in name and "+" not in name):
        raise ConfigError(f"--losses {word}: {_FORM}")
    found: dict[str, Any] = {}
    for text in assignments.split(",") if assignments else []:
        flag, equals, value = text.partition("=")
        if not (flag and equals):
            raise ConfigError(f"--losses {word}: {_FORM}")
        flag, algorithm = flag.replace("-", "_"), find_algorithm(name)
        if flag not in algorithm.flags:
            hint = suggest_option(flag, algorithm.flags)
            raise ConfigError(f"{name} has no option {flag!r}{hint}. Its options: {', '.join(algorithm.flags) or 'none'}.")
        found[flag] = typed(name, flag, value)
    return name, found


def _claim(output: Path, overwrite: bool) -> None:
    """Refuses, before anything is computed, a folder whose content would be lost or mixed up.

    Raises:
        OutputError: it holds scores already, or something else; or it cannot be written.
    """
    if output.exists() and not output.is_dir():
        raise OutputError(f"--output-dir {output} is a file; name a folder.")
    held = output.is_dir() and any(output.iterdir())
    if held and not (output / SCORES_FILE).exists():
        raise OutputError(f"{output} is not empty and holds no scores; name another --output-dir.")
    if held and not overwrite:
        raise OutputError(f"{output} holds scores already: --overwrite replaces them; or name another folder.")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"--output-dir {output} cannot be written ({error.strerror}); name another folder.") from error


def _read_options(options: Options) -> dict[str, Any]:
    """The options that scores depend on."""
    known = options.as_dict()
    names = {flag.name for flag in _shared_flags()}
    return {part: kept for part, held in known.items() if (kept := {name: held[name] for name in held if name in names})}


def show(table: ScoreTable, console: Console, title: str, batch_size: int) -> None:
    """The table, what was not scored, and what it cost."""
    console.print(_rich_table(table, title))
    for line in _lines(table, batch_size):
        console.print(Text(line))


def _rich_table(table: ScoreTable, title: str) -> Table:
    grid = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("loss", "value", "accuracy (own score)", "reward w", "reward l", "P g_w", "P g_l", "no gradient", "nearest"):
        grid.add_column(column, justify="left" if column in ("loss", "nearest") else "right", overflow="fold")
    count = len(table.ids)
    for index, found in enumerate(table.scores):
        pairs = found.pairs
        grid.add_row(
            *map(Text, (
                found.label, f"{found.objective:.4g}", _accuracy(found.accuracy),
                _mean(pairs.chosen_reward), _mean(pairs.rejected_reward),
                _mean(pairs.chosen_coefficient * count), _mean(pairs.rejected_coefficient * count),
                f"{found.zero_gradient:.0%}", _nearest(table, index),
            ))
        )  # fmt: skip
    return grid


def _accuracy(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return "-"
    if accuracy.ties == accuracy.pairs:
        return "all tie"
    return f"{accuracy.share:.1%} [{accuracy.low:.0%}, {accuracy.high:.0%}]"


def _mean(values: torch.Tensor) -> str:
    known = values[~values.isnan()]
    return f"{float(known.mean()):.4g}" if len(known) else "-"


def _nearest(table: ScoreTable, index: int) -> str:
    """The other loss whose gradient is most nearly parallel."""
    row = [(float(value), other) for other, value in enumerate(table.cosine[index]) if other != index and not value.isnan()]
    if not row:
        return "-"
    value, other = max(row)
    return f"{table.scores[other].label} {value:.3f}"


def _lines(table: ScoreTable, batch_size: int) -> Iterator[str]:
    yield (
        "P g: d objective / d log-prob of a completion (w chosen, l rejected; negative pushes it up), mean over its tokens, "
        "times the number of pairs; mean over pairs. no gradient: share of pairs. nearest: largest cosine of gradients, over "
        "all tokens."
    )
    if table.at_reference:
        yield (
            "The policy is its own reference: every log-ratio is 0, so losses on log-ratios weigh all pairs alike and their "
            "rewards tie; losses without a reference differ by pair."
        )
    elif table.log_ratio_accuracy is not None:
        yield f"Accuracy by the log-ratio sum, for all losses alike: {_accuracy(table.log_ratio_accuracy)}."
    coupled = [found.label for found in table.scores if found.coupled]
    if coupled:
        yield f"Coupled, so scored in batches of {batch_size} pairs: {', '.join(coupled)}."
    for found in table.scores:
        for note in found.notes:
            yield f"{found.label}: {note}."
    for label, reason in table.not_scored.items():
        yield f"not scored: {label}: {reason}"
    yield timing_line(table)


def timing_line(table: ScoreTable) -> str:
    """Seconds of the forward pass and of the losses."""
    timing, count = table.timing, len(table.scores)
    line = (
        f"{timing.forward:.2f} s: {timing.forward_passes} forward passes of {timing.tokens:,} tokens in {timing.batches} "
        f"batches; {timing.first:.3f} s: the first loss"
    )
    if count > 1:
        line += f"; {timing.others:.3f} s: the {count - 1} others together, {timing.share:.1%} of forward pass and first loss"
    return f"{line}."


def write(table: ScoreTable, output: Path, about: Mapping[str, Any], reference_seconds: float) -> None:
    """scores.json, per_pair.jsonl, cosine.png and timings.json; equal scores give equal files but for the last."""
    from prefopt.report.score_figures import cosine_png

    labels = [found.label for found in table.scores]
    with (output / PAIRS_FILE).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for found in table.scores for row in _pair_rows(table, found))
    (output / COSINE_FILE).write_bytes(cosine_png(labels, table.cosine.numpy()))
    timing = table.timing
    write_json(
        output / TIMINGS_FILE,
        {
            "forward_seconds": timing.forward, "first_loss_seconds": timing.first, "other_losses_seconds": timing.others,
            "share_of_others": timing.share, "reference_seconds": reference_seconds, "environment": environment(),
        },
    )  # fmt: skip
    # Last: it says that the folder is complete.
    write_json(
        output / SCORES_FILE,
        {
            "schema_version": SCHEMA_VERSION,
            **about,
            "pairs": len(table.ids),
            "batches": timing.batches,
            "forward_passes": timing.forward_passes,
            "tokens": timing.tokens,
            "at_reference": table.at_reference,
            "log_ratio_accuracy": _accuracy_json(table.log_ratio_accuracy),
            "losses": [_loss_json(found) for found in table.scores],
            "cosine": {"labels": labels, "values": [[_number(value) for value in row] for row in table.cosine.tolist()]},
            "not_scored": dict(table.not_scored),
        },
    )


def _loss_json(found: LossScore) -> dict[str, Any]:
    return {
        "label": found.label, "hyper": dict(found.hyper), "objective": _number(found.objective), "coupled": found.coupled,
        "accuracy": _accuracy_json(found.accuracy), "gradient_norm": _number(found.gradient_norm),
        "zero_gradient": found.zero_gradient, "notes": list(found.notes),
    }  # fmt: skip


def _accuracy_json(accuracy: Accuracy | None) -> dict[str, float] | None:
    return None if accuracy is None else dict(vars(accuracy))


def _pair_rows(table: ScoreTable, found: LossScore) -> Iterator[dict[str, Any]]:
    columns = {name: cast(torch.Tensor, values).tolist() for name, values in vars(found.pairs).items()}
    lengths, log_ratios = table.lengths.tolist(), table.log_ratios.tolist()
    for index, pair in enumerate(table.ids):
        yield {
            "loss": found.label, "pair": pair, **{name: _number(values[index]) for name, values in columns.items()},
            "chosen_length": int(lengths[index][0]), "rejected_length": int(lengths[index][1]),
            "chosen_log_ratio": log_ratios[index][0], "rejected_log_ratio": log_ratios[index][1],
        }  # fmt: skip


def _number(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None
