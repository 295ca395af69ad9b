"""The tables of a report: results, tests, judges, settings, cost.

Rows stand in the order of the settings; nothing is ranked. Under three seeds every seed's plain value is shown and the title
begins with "smoke run: no ranking".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from rich.table import Table

from prefopt.report.grid import Column, Entry, Grid, Style, to_markdown, to_rich
from prefopt.report.power import LEVEL
from prefopt.report.schema import Cell, Judge, Metric, Results, Setting, Timings
from prefopt.report.statistics import NO_SCIPY, PromptSummary, mean_interval, scipy_installed

SMOKE = "smoke run: no ranking"
JUDGE_FLOOR = 0.55
"""A judge whose held-out accuracy may lie below this is greyed out (protocol, rule 7)."""
NOTHING = "n/a"
_CLOCKS = {
    "seconds": ("seconds", ",.1f"),
    "seconds_per_step": ("seconds per step", ".3g"),
    "tokens_per_second": ("tokens per second", ",.0f"),
    "peak_memory_mb": ("peak MB", ",.0f"),
}


def results_table(results: Results, timings: Timings | None = None) -> Table:
    """The main table for the terminal: the reference and every setting by every metric."""
    return to_rich(results_grid(results, timings))


def results_markdown(results: Results, timings: Timings | None = None) -> str:
    """The main table as Markdown, for READMEs."""
    return to_markdown(results_grid(results, timings))


def heading(results: Results) -> str:
    """The title with what a reader must not overlook in front."""
    return f"{SMOKE} — {results.title}" if results.smoke else results.title


def tuning_line(results: Results) -> str:
    """Whether hyper-parameters were chosen or are the defaults of the papers."""
    tuned = [setting.label for setting in results.settings if setting.tuned]
    if not tuned:
        return "untuned defaults"
    rest = [setting.label for setting in results.settings if not setting.tuned]
    return (
        "tuned on rows and seeds of their own"
        if not rest
        else f"tuned: {', '.join(tuned)}; untuned defaults: {', '.join(rest)}"
    )


def seeds_line(results: Results) -> str:
    """What the numbers of the main table are."""
    count = f"{len(results.seeds)} seed{'' if len(results.seeds) == 1 else 's'}"
    if results.smoke:
        return f"{count}, each seed's value"
    if not scipy_installed():
        return f"mean over {count}; {NO_SCIPY}"
    return f"mean ± half-width of the {LEVEL:.0%} t interval over {count}"


def results_grid(results: Results, timings: Timings | None = None) -> Grid:
    """Reference and settings by metrics, then seconds and peak memory where measured, then failures where there are any."""
    failures = any(cell.status == "failed" for cell in results.cells)
    columns = [Column("setting", numeric=False), *(_metric_column(results, metric) for metric in results.metrics)]
    clocks = _clocks(results, timings, ("seconds", "peak_memory_mb"))
    columns += [Column(header, note="mean over the seeds that finished") for header, _ in clocks]
    if failures:
        columns.append(Column("failed cells", numeric=False))
    styles = [column.style for column in columns[1:]]
    width = len(columns)
    reference = [Entry("reference", "strong")]
    for metric in results.metrics:
        reference.append(Entry(number(results.reference.get(metric.key, math.nan), metric.format)))
    rows = [(*reference, *[Entry("")] * (width - len(reference)))]
    for setting in results.settings:
        row = [Entry(setting.label, "strong")]
        broken = not results.cells_of(setting.label)
        for metric, style in zip(results.metrics, styles, strict=False):
            values = list(results.values(setting.label, metric.key).values())
            text = "failed" if broken else over_seeds(results, values, metric.format)
            row.append(Entry(text, "failed" if broken else style, f"#{cells_anchor(results, setting)}"))
        row += [Entry(texts[setting.label]) for _, texts in clocks]
        if failures:
            row.append(Entry("; ".join(_failure(cell) for cell in results.failed_of(setting.label)), "failed"))
        rows.append(tuple(row))
    title = f"{heading(results)} ({seeds_line(results)}; {tuning_line(results)})"
    return Grid(title, tuple(columns), tuple(rows), tuple(_results_captions(results)))


def cells_grid(results: Results, folders: Mapping[tuple[str, int], str]) -> Grid:
    """Every cell with its own values: where the numbers of the main table came from.

    Args:
        results: of the comparison.
        folders: of each label and seed, its folder as seen from the report; a cell without one is not linked.
    """
    rows = []
    for setting in results.settings:
        for index, cell in enumerate((*results.cells_of(setting.label), *results.failed_of(setting.label))):
            failed = cell.status == "failed"
            anchor = "" if index else cells_anchor(results, setting)
            folder = folders.get((setting.label, cell.seed), "")
            name = Entry(f"{setting.label}, seed {cell.seed}", "strong", folder, anchor)
            values = [number(cell.final.get(metric.key, math.nan), metric.format) for metric in results.metrics]
            rows.append((name, *(Entry("failed" if failed else value, "failed" if failed else "") for value in values)))
    columns = (Column("cell", numeric=False), *(Column(metric.label) for metric in results.metrics))
    return Grid("cells: each setting on each seed", columns, tuple(rows))


def cells_anchor(results: Results, setting: Setting) -> str:
    """Where the page shows a setting's cells."""
    return f"cells-{results.settings.index(setting)}"


def judges_grid(judges: Sequence[Judge]) -> Grid:
    """What is known about each judge; a row is dim when the lower end of its accuracy is under 55%."""
    rows = []
    for judge in judges:
        style: Style = "dim" if weak(judge) else ""
        remarks = [judge.note] if judge.note else []
        if judge.same_backbone:
            remarks.append("same backbone as the policy")
        if weak(judge):
            remarks.append(f"greyed out: may be right less than {JUDGE_FLOOR:.0%} of the time")
        texts = (
            judge.name,
            number(judge.accuracy, ".1%"),
            f"{number(judge.low, '.1%')} to {number(judge.high, '.1%')}",
            f"{judge.n:,}",
            number(judge.ece, ".3f"),
            number(judge.length_bias, "+.3f"),
            number(judge.error_correlation, "+.2f"),
            "; ".join(remarks),
        )
        rows.append(tuple(Entry(text, style) for text in texts))
    columns = (
        Column("judge", numeric=False),
        Column("held-out accuracy"),
        Column(f"{LEVEL:.0%} interval"),
        Column("pairs"),
        Column("ECE", note="expected calibration error: 0 when a probability of preference is what it says"),
        Column("length bias"),
        Column("error correlation", note="of its errors with those of the reward model that PPO trains on"),
        Column("remarks", numeric=False),
    )
    return Grid("judges, on labelled pairs held out from all training", columns, tuple(rows))


def prompts_grid(summaries: Sequence[PromptSummary]) -> Grid:
    """How much the test prompts alone can resolve, by setting and judge."""
    rows = []
    for item in summaries:
        numbers = [number(value, ".3f") for value in (item.score, item.deviation, item.detectable)]
        rows.append(tuple(Entry(text) for text in (item.label, item.judge, f"{item.prompts:,}", *numbers)))
    columns = (
        Column("setting", numeric=False), Column("judge", numeric=False), Column("prompts"), Column("mean score"),
        Column("sd over prompts"), Column("smallest detectable difference"),
    )  # fmt: skip
    caption = "Seeds are averaged first; detectable with probability 0.8 by a two-sided 5% test over prompts."
    return Grid("test prompts", columns, tuple(rows), (caption,))


def settings_grid(results: Results) -> Grid:
    """Every hyper-parameter of every setting."""
    rows = []
    for setting in results.settings:
        hyper = ", ".join(f"{name}={plain(value)}" for name, value in setting.hyper.items()) or "none"
        rows.append(
            (Entry(setting.label, "strong"), Entry(setting.algorithm), Entry("yes" if setting.tuned else "no"), Entry(hyper))
        )
    columns = tuple(Column(name, numeric=False) for name in ("setting", "algorithm", "tuned", "hyper-parameters"))
    return Grid("settings", columns, tuple(rows))


def ledger_grid(results: Results, timings: Timings | None = None) -> Grid:
    """What each setting consumed: means over the seeds that finished."""
    counts = (
        "labels",
        "unique_prompts",
        "epochs",
        "trained_tokens",
        "reference_tokens",
        "generated_tokens",
        "reward_model_tokens",
    )
    clocks = _clocks(results, timings, tuple(_CLOCKS))
    columns = [Column("setting", numeric=False), *(Column(words(name)) for name in counts)]
    columns += [Column(header) for header, _ in clocks]
    rows = []
    for setting in results.settings:
        cells = results.cells_of(setting.label)
        row = [Entry(setting.label, "strong")]
        for name in counts:
            spent = [float(getattr(cell.ledger, name)) for cell in cells]
            row.append(Entry(number(mean_interval(spent).mean, ",.2f" if name == "epochs" else ",.0f")))
        row += [Entry(texts[setting.label]) for _, texts in clocks]
        rows.append(tuple(row))
    captions = ["Means over the seeds that finished."]
    if results.shared_ledger:
        captions.append(
            "Shared by all settings: " + ", ".join(f"{words(k)} {v:,.0f}" for k, v in results.shared_ledger.items()) + "."
        )
    if timings is not None and timings.shared:
        captions.append("Shared seconds: " + ", ".join(f"{words(k)} {v:,.1f}" for k, v in timings.shared.items()) + ".")
    return Grid("cost", tuple(columns), tuple(rows), tuple(captions))


def weak(judge: Judge) -> bool:
    """Whether the judge may be too close to chance; an interval that is not a number counts as that."""
    return not judge.low >= JUDGE_FLOOR


def judge_of(results: Results, metric: Metric) -> Judge | None:
    """The judge behind a metric: its key is the judge's name, or ends with a slash and the name (`win_rate/<name>`)."""
    return next((judge for judge in results.judges if metric.key == judge.name or metric.key.endswith(f"/{judge.name}")), None)


def number(value: float | None, spec: str) -> str:
    """A number in its format, `n/a` when there is none."""
    return NOTHING if value is None or not math.isfinite(value) else format(value, spec)


def plain(value: object) -> str:
    """A hyper-parameter as a person would type it."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def words(name: str) -> str:
    """A field's name as words."""
    return name.replace("_", " ")


def over_seeds(results: Results, values: Sequence[float], spec: str) -> str:
    """One value: plain per seed in a smoke run, else mean and interval; says when seeds are missing."""
    if not values:
        return NOTHING
    if results.smoke:
        return " / ".join(number(value, spec) for value in values)
    found = mean_interval(values)
    text = number(found.mean, spec)
    if found.half_width is not None:
        text += f" ± {number(found.half_width, spec.lstrip('+'))}"
    return text if found.n == len(results.seeds) else f"{text} ({found.n} of {len(results.seeds)} seeds)"


def _clocks(results: Results, timings: Timings | None, names: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """Header and text by setting of the timings that were measured at all; memory is not, on a CPU."""
    if timings is None:
        return []
    made = []
    for name in names:
        means = {setting.label: results.clock(timings, setting.label, name) for setting in results.settings}
        if any(map(math.isfinite, means.values())):
            header, spec = _CLOCKS[name]
            made.append((header, {label: number(mean, spec) for label, mean in means.items()}))
    return made


def _metric_column(results: Results, metric: Metric) -> Column:
    judge = judge_of(results, metric)
    # A no-break space keeps the mark on the line of the label.
    mark = {"up": "\u00a0↑", "down": "\u00a0↓", None: ""}[metric.better] + ("\u00a0†" if metric.diagnostic else "")
    dim = metric.diagnostic or (judge is not None and weak(judge))
    return Column(f"{metric.label}{mark}", style="dim" if dim else "", note=metric.note)


def _results_captions(results: Results) -> list[str]:
    captions = []
    primary = results.primary
    if primary is not None and results.kl_targets:
        captions.append(
            f"Final values, at each setting's own KL: exploratory. Primary end point: {primary.label} at "
            f"{results.kl_targets[0]:g} nats, in the table of equal KL."
        )
    elif primary is not None and not results.smoke:
        captions.append(f"Primary end point: {primary.label}; every other column is exploratory.")
    if any(metric.diagnostic for metric in results.metrics):
        captions.append("† A diagnostic, not a result.")
    for baseline in results.baselines:
        metric = results.metric(baseline.metric)
        label, spec = (metric.label, metric.format) if metric else (words(baseline.metric), ".3f")
        captions.append(f"Baseline without a model, {label}: {baseline.label} {number(baseline.value, spec)}.")
    grey = [metric.label for metric in results.metrics if (judge := judge_of(results, metric)) is not None and weak(judge)]
    if grey:
        captions.append(
            f"Greyed out ({', '.join(grey)}): the judge may be right less than {JUDGE_FLOOR:.0%} of the time on held-out pairs."
        )
    captions += [f"{metric.label}: {metric.note.rstrip('.')}." for metric in results.metrics if metric.note]
    return captions


def _failure(cell: Cell) -> str:
    return f"seed {cell.seed}: failed: {cell.error_line}"
