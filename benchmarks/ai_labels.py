"""A language model as a labeller of HH: position bias, agreement with people, what averaging orders and rationales change.

    python -m benchmarks.ai_labels --hh harmless-base helpful-base          SmolLM2-135M-Instruct, 200 pairs of each
    python -m benchmarks.ai_labels --hh harmless-base --model MODEL_FOLDER https://host/v1#name    several sizes
    python -m benchmarks.ai_labels --only synthetic                         labellers of known bias, no model

Sources are reported apart. The pairs are a sample by hash; labels are kept in --labels, so that the same command goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.found import find_model
from benchmarks.measuring import Table, print_machine, write_json
from prefopt.data.read_report import is_pair
from prefopt.data.records import Record
from prefopt.data.sources import load
from prefopt.errors import PrefoptError
from prefopt.label.build import build_labeller
from prefopt.label.labellers import Asking, Labeller
from prefopt.label.measure import AVERAGED, ORDER_1, ORDER_2, Difference, LabelReport, length_baseline, measure_labels
from prefopt.label.probabilities import Average, average_orders, is_right
from prefopt.label.run import Labelled, label_rows
from prefopt.machine import standard_console
from prefopt.options import default_cache

AVERAGES: tuple[Average, ...] = ("probabilities", "logits")
_NOTE = "95% intervals: Wilson's for shares, normal for paired differences; ties count half"


def reaverage(labelled: Labelled, by: Average) -> Labelled:
    """The same replies, their two orders averaged in another way."""
    orders = torch.tensor([judgement.orders for judgement in labelled.judgements], dtype=torch.float64)
    judgements = zip(labelled.judgements, average_orders(orders, by).tolist(), strict=True)
    return replace(labelled, judgements=tuple(replace(judgement, p=p) for judgement, p in judgements))


def agreement_gain(one: Labelled, other: Labelled) -> Difference | None:
    """Agreement with the human labels, `one` minus `other`, paired over the pairs that both have labels for."""
    values = []
    for labelled in (one, other):
        p = torch.tensor([judgement.p for judgement in labelled.judgements], dtype=torch.float64)
        right = is_right(p, torch.tensor(labelled.firsts) == 0)
        values.append(torch.where(p.isnan(), torch.nan, right))
    differences = values[0] - values[1]
    return Difference.of(differences[~differences.isnan()])


def synthetic_table() -> Table:
    """The largest error of each average on labellers of known bias: truths from 0.3 to 0.7, biases up to 0.3 or 4 nats."""
    truths = torch.linspace(0.3, 0.7, 41, dtype=torch.float64)
    table = Table("labellers of known bias: largest error of p(A) over truths of 0.3 to 0.7", forms={"error": ".1e"})
    for kind, biases in {"additive": (0.1, 0.3), "logit": (1.0, 4.0)}.items():
        for bias in biases:
            shown = torch.stack([truths, 1 - truths], -1)
            orders = shown + bias if kind == "additive" else torch.sigmoid(shown.logit() + bias)
            row: dict[str, Any] = {
                "bias": kind,
                "of": f"{bias:g}",
                "one_order": f"{float((orders[:, 0] - truths).abs().max()):.2f}",
            }
            for by in AVERAGES:
                row[f"averaged_{by}"] = f"{float((average_orders(orders, by) - truths).abs().max()):.1e}"
            table.add(**row)
    return table


def sample(source: str, pairs: int) -> list[Record]:
    """Pairs of a source in an order drawn by the hash of their ids."""
    records = [record for record in load([source], cache=default_cache()).records if is_pair(record)]
    return sorted(records, key=lambda record: hashlib.sha256(record.id.encode()).digest())[:pairs]


def add_row(table: Table, how: str, labelled: Labelled, labeller: Labeller, seconds: float) -> LabelReport:
    """One way of asking as a row."""
    report = measure_labels(labelled, labeller)
    single = {name: report.agreement.get(name) for name in (ORDER_1, ORDER_2, AVERAGED)}
    by_logits = measure_labels(reaverage(labelled, "logits"), labeller).agreement.get(AVERAGED)
    table.add(
        labeller=report.labeller, asked=how, pairs=report.pairs, no_label=report.unreadable,
        same_place_wins=_text(report.position_bias), of_these_first=_text(report.first_place),
        agrees_order_1=_text(single[ORDER_1]), agrees_order_2=_text(single[ORDER_2]), agrees_both=_text(single[AVERAGED]),
        by_logits=_text(by_logits), gain_of_averaging=_text(report.averaging), prefers_longer=_text(report.longer),
        confidence=report.confidence, nll=report.nll, minutes=seconds / 60,
    )  # fmt: skip
    return report


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def run_source(source: str, arguments: argparse.Namespace) -> tuple[Table, list[dict[str, Any]]]:
    """All labellers and ways of asking on one source; the table, and the reports for JSON."""
    records = sample(source, arguments.pairs)
    baseline = length_baseline(records)
    table = Table(
        f"{Path(source).name}: {len(records)} pairs, longer wins {baseline}", note=_NOTE,
        forms={"confidence": ".3f", "nll": ".3f", "minutes": ".1f"},
    )  # fmt: skip
    kept: list[dict[str, Any]] = []
    lines = []
    own = "helpful" if "helpful" in source else "harmless"
    ways: dict[str, tuple[Asking, int]] = {own: (Asking(preamble=own), len(records))}
    ways |= {name: (Asking(preamble=name), arguments.variant_pairs) for name in arguments.preambles if name != own}
    rationale = Asking(preamble=own, rationales=1, rationale_tokens=arguments.rationale_tokens)
    ways |= {f"{own}, rationale": (rationale, arguments.rationale_pairs)}
    for model in arguments.model or [find_model(None)]:
        base: Labelled | None = None
        for how, (asking, count) in ways.items():
            if count == 0:
                continue
            labeller = build_labeller(model, asking, cache=default_cache(), device=arguments.device)
            begin = time.perf_counter()
            labelled = label_rows(
                records[:count], labeller, batch=arguments.batch_size, folder=arguments.labels, console=standard_console()
            )
            seconds = time.perf_counter() - begin
            report = add_row(table, how, labelled, labeller, seconds)
            kept.append({"source": Path(source).name, "asked": how, "seconds": seconds, **report.as_dict()})
            if base is None:
                base = labelled
            else:
                part = replace(base, records=records[:count], firsts=base.firsts[:count], judgements=base.judgements[:count])
                gain = agreement_gain(labelled, part)
                lines.append(f"{labeller.name}: {how} minus {own}, on the same {len(part.records)} pairs: {gain} of agreement")
                kept[-1]["gain_over_first"] = None if gain is None else vars(gain)
    table.print()
    for line in lines:
        print(line)
    return table, kept


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--hh", nargs="+", default=[], help="HH files, folders or hub ids, reported apart")
    made.add_argument("--model", nargs="+", help="labellers, as `prefopt label` names chat models; by default SmolLM2")
    made.add_argument("--only", choices=["synthetic"], help="labellers of known bias alone")
    made.add_argument("--pairs", type=int, default=200, help="pairs of each source")
    made.add_argument("--preambles", nargs="*", default=["plain"], help="other preambles than the source's own")
    made.add_argument("--variant-pairs", type=int, default=200, help="pairs for them")
    made.add_argument("--rationale-pairs", type=int, default=50, help="pairs for chain of thought; 0 leaves it out")
    made.add_argument("--rationale-tokens", type=int, default=64, help="the limit of a rationale")
    made.add_argument("--batch-size", type=int, default=10, help="pairs that are asked about, and kept, together")
    made.add_argument("--device", default="auto")
    made.add_argument("--labels", type=Path, default=Path("runs/ai_labels"), help="folder where labels are kept")
    made.add_argument("--json", type=Path, help="write tables, machine and settings to this file")
    return made


def main(tokens: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(tokens)
    if not (arguments.hh or arguments.only):
        raise SystemExit("error: name the data, --hh FOLDER (or hub id), or ask for --only synthetic.")
    print_machine()
    tables, reports = [synthetic_table()], []
    tables[0].print()
    try:
        for source in arguments.hh if arguments.only is None else ():
            table, kept = run_source(source, arguments)
            tables.append(table)
            reports += kept
    except PrefoptError as error:
        raise SystemExit(f"error: {error}") from error
    settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "labels")}
    write_json(arguments.json, "ai_labels", tables, settings=settings, reports=reports)


if __name__ == "__main__":
    main()
