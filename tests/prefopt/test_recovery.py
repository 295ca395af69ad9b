"""What a run does about trouble: steps that are not finite, memory that is not enough, disks that are full."""

from __future__ import annotations

import io
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from losses.types import VOCABULARY
from prefopt import algorithms, checkpoint
from prefopt.data.exact_world import ExactWorld, WorldConfig
from prefopt.data.records import Example, Labels
from prefopt.errors import ConfigError, OutputError, SaveError, TrainingError
from prefopt.memory import halves
from prefopt.models.tabular import TabularPolicy, build_tabular
from prefopt.optimization import Logging, Optimization
from prefopt.packing import PackedBatch, Sampling, flat_roles, pack
from prefopt.parallel.strategy import Strategy
from prefopt.recovery import Recovery
from prefopt.reference import ReferenceCache
from prefopt.runlog import read_lines
from prefopt.streams import Budget, OfflineStream
from prefopt.trainer import FitResult, fit

WORLD = ExactWorld(WorldConfig.tabular(seed=3))


def pairs(count: int = 24) -> list[Example]:
    """Pairs of different completions, of lengths from 1 to the limit."""
    generator = torch.Generator().manual_seed(0)
    ids, lengths = WORLD.layout.ids.tolist(), WORLD.layout.lengths.tolist()
    found = []
    for row in range(count):
        one, other = torch.randperm(len(ids), generator=generator)[:2].tolist()
        completions = (tuple(ids[one][: lengths[one]]), tuple(ids[other][: lengths[other]]))
        found.append(Example(f"row:{row + 1}", WORLD.prompt_ids[row % 4], completions))
    return found


class Poisoned(OfflineStream):
    """In some steps the reference's log-probs are not numbers."""

    poisoned: Collection[int] = (2,)

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        for step in super().__iter__():
            # Steps are made ahead, and a resumed run begins in the middle: the position says which step it is.
            if self.state_dict()["step"] in self.poisoned:
                rows = {name: values * math.nan for name, values in step[0].rows.items()}
                step = [replace(step[0], rows=rows), *step[1:]]
            yield step


class Small(TabularPolicy):
    """A table on a machine that holds so many tokens of a micro-batch and no more."""

    room = 10**9
    error: Exception = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    def evaluate(self, batch: PackedBatch, needs: Collection[str], **options: Any) -> dict[str, Tensor]:
        if batch.tokens > self.room:
            raise self.error
        return super().evaluate(batch, needs, **options)


def run(
    folder: Path | None = None,
    *,
    name: str = "dpo",
    stream_type: type[OfflineStream] = OfflineStream,
    recovery: Recovery | None = None,
    room: int = 10**9,
    steps: int = 6,
    resume: bool = False,
    logging: Logging | None = None,
    console: Console | None = None,
    strategy: Strategy | None = None,
) -> tuple[TabularPolicy, FitResult]:
    """Steps of eight pairs in micro-batches of four."""
    setting = algorithms.get(name).setting()
    policy, reference = build_tabular(WORLD, WORLD.source_next_logps)
    policy.__class__ = Small
    policy.room = room  # type: ignore[attr-defined]
    budget = Budget(batch_size=8, micro_batch_size=4, max_steps=steps, epochs=10)
    stream = stream_type(
        pairs(), kind=setting.algorithm.stream, budget=budget, needs=setting.loss.needs, reference=ReferenceCache(reference),
        dtype=torch.float64,
    )  # fmt: skip
    result = fit(
        policy, setting.loss, stream, Optimization(learning_rate=1e-2), logging=logging or Logging(log_every=1),
        recovery=recovery, folder=folder, resume=resume, console=console, strategy=strategy,
    )  # fmt: skip
    return policy, result


@pytest.fixture
def said() -> Console:
    return Console(record=True, width=2000, file=open("/dev/null", "w"))


@pytest.mark.fault(10)
def test_a_bad_step_stops_and_leaves_its_batch_to_be_looked_at(tmp_path: Path) -> None:
    Poisoned.poisoned = (2,)
    with pytest.raises(
        TrainingError, match=r"step 2: the loss is not finite .*Rows: row:.*The batch is in .*bad-step-2"
    ) as error:
        run(tmp_path, stream_type=Poisoned)
    assert "--skip-bad-steps" in str(error.value)
    kept = json.loads((tmp_path / "bad-step-2" / "batch.json").read_text())
    assert (kept["step"], kept["loss"]) == (2, "nan")
    rows = [row for batch in kept["micro_batches"] for row in batch["rows"]]
    by_id = {example.id: example for example in pairs()}
    assert len(rows) == 8
    for row in rows:
        assert f"{row['id']}" in str(error.value)
        assert tuple(row["prompt_ids"]) == by_id[row["id"]].prompt_ids
        assert tuple(map(tuple, row["completion_ids"])) == by_id[row["id"]].completion_ids
    tensors = load_file(tmp_path / "bad-step-2" / "batch.safetensors")
    assert tensors["0.rows.reference_token_logps"].isnan().all()
    assert tensors["1.rows.reference_token_logps"].isfinite().all()
    assert tensors["1.input_ids"].numel() == sum(by_id[row["id"]].tokens for row in kept["micro_batches"][1]["rows"])


@pytest.mark.fault(10)
def test_some_bad_steps_can_be_left_out(tmp_path: Path, said: Console) -> None:
    """Steps 2 and 4 are bad: their updates are not made, the others are finite and counted, and a resumed run is the same."""
    Poisoned.poisoned = (2, 4)
    skipping = Recovery(skip_bad_steps=2)
    policy, result = run(tmp_path / "whole", stream_type=Poisoned, recovery=skipping, console=said)
    assert [line["skipped_steps"] for line in result.lines] == [0, 1, 1, 2, 2, 2]
    assert [("loss" in line, "rewards/margins" in line) for line in result.lines] == [
        (step not in (2, 4),) * 2 for step in range(1, 7)
    ]
    assert all(math.isfinite(value) for line in result.lines for value in line.values())
    text = " ".join(said.export_text().split())
    assert "step 2: the loss is not finite" in text
    assert "left out (2 of at most 2)" in text
    assert sorted(path.name for path in (tmp_path / "whole").glob("bad-*")) == ["bad-step-2", "bad-step-4"]
    logging = Logging(log_every=1, save_every=3)
    Poisoned.poisoned = (2, 4, 5)
    with pytest.raises(TrainingError, match="step 5: the loss is not finite"):
        run(tmp_path / "cut", stream_type=Poisoned, recovery=skipping, logging=logging)
    Poisoned.poisoned = (2, 4)
    resumed, again = run(tmp_path / "cut", stream_type=Poisoned, recovery=skipping, logging=logging, resume=True)
    assert again.lines == result.lines
    for key, value in policy.trainable_state().items():
        assert resumed.trainable_state()[key].equal(value)


def test_skipping_changes_nothing_where_nothing_is_bad() -> None:
    (one, first), (two, second) = run(), run(recovery=Recovery(skip_bad_steps=3))
    for line, other in zip(first.lines, second.lines, strict=True):
        assert line == pytest.approx({key: value for key, value in other.items() if key != "skipped_steps"}, rel=1e-12)
    assert all(other.equal(one.trainable_state()[key]) for key, other in two.trainable_state().items())


@pytest.mark.fault(11)
def test_out_of_memory_says_what_the_step_held_and_what_to_lower() -> None:
    with pytest.raises(
        TrainingError,
        match=r"step 1: out of memory \(CUDA out of memory\. Tried to allocate 2\.00 GiB\)\. The step has 2 micro-batches; the "
        r"largest has 4 rows of \d+ tokens together, the longest completion \d\. Rows: row:.*Lower --micro-batch-tokens or "
        r"--max-length.*--activation-checkpointing or --lora.*--on-out-of-memory halve",
    ):
        run(room=20)


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (RuntimeError("[enforce fail a.cpp] DefaultCPUAllocator: can't allocate memory: tried to allocate 9 bytes."), True),
        (MemoryError(), True),
        (RuntimeError("shapes do not match"), False),
    ],
)
@pytest.mark.fault(11)
def test_what_memory_that_is_not_enough_looks_like(error: Exception, ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Small, "error", error)
    with pytest.raises(TrainingError if ours else RuntimeError, match="out of memory" if ours else "shapes") as raised:
        run(room=20)
    assert "enforce" not in str(raised.value)


@pytest.mark.parametrize("name", ["dpo", "kto", "aot", "bco", "plackett_luce"])
@pytest.mark.fault(11)
def test_halved_micro_batches_make_the_same_update(name: str, said: Console) -> None:
    """Rooms for two pairs, and for one: the policy and every metric are those of whole micro-batches up to rounding."""
    name = name if name != "plackett_luce" else "pl_dpo"
    whole, result = run(name=name)
    for room in (26, 13):
        parts, parts_result = run(name=name, room=room, recovery=Recovery(on_out_of_memory="halve"), console=said)
        for key, value in whole.trainable_state().items():
            torch.testing.assert_close(parts.trainable_state()[key], value, atol=1e-10, rtol=0)
        for first, second in zip(result.lines[1:], parts_result.lines[1:], strict=True):
            assert first == pytest.approx(second, rel=1e-8, abs=1e-10)
    assert "tokens and more are halved" in said.export_text()


@pytest.mark.fault(11)
def test_what_cannot_be_halved_any_more_is_said() -> None:
    """The one row that does not fit, not the micro-batch that it was in; and what is on already is not recommended."""
    with pytest.raises(
        TrainingError,
        match=r"step 1: out of memory .*has 8 micro-batches, halved as far as they can be; the largest has 1 rows of \d+ tokens"
        r" .*Rows: row:\d+\. Lower --max-length, or set",
    ) as error:
        run(room=1, recovery=Recovery(on_out_of_memory="halve"))
    assert "--on-out-of-memory" not in str(error.value)
    assert "--micro-batch-tokens" not in str(error.value)


@pytest.mark.parametrize("kind", ["pairs", "completions", "groups", "labelled", "mismatched", "rollouts"])
def test_halves_hold_what_the_whole_holds(kind: str) -> None:
    examples = [replace(example, labels=Labels(ranks=(0, 1), utility_id=row)) for row, example in enumerate(pairs(5))]
    if kind == "rollouts":
        lengths = [len(ids) for example in examples for ids in example.completion_ids]
        scored = torch.arange(sum(lengths), dtype=torch.uint8).unsqueeze(-1)
        old = [torch.rand(length) for length in lengths]
        whole = pack(examples, roles=flat_roles, rows={"old_token_logps": old}, sampling=Sampling(0.7, scored))
    else:
        needs = ("policy_mismatched_logps",) if kind == "mismatched" else ()
        _, reference = build_tabular(WORLD, WORLD.source_next_logps)
        stream = OfflineStream(
            examples, kind="labelled" if kind == "mismatched" else kind, budget=Budget(batch_size=5, max_steps=1), needs=needs,
            reference=ReferenceCache(reference),
        )  # fmt: skip
        [[whole]] = stream
    parts = halves(whole)
    assert parts is not None
    assert [len(part.ids) for part in parts] == [2, 3]
    assert sum((part.ids for part in parts), ()) == whole.ids
    names = whole.tensors(VOCABULARY)
    assert len(names) >= 4
    for name, value in names.items():
        found = [part.tensors([name])[name] for part in parts]
        assert torch.equal(torch.cat(found) if value.dim() else found[0], value), name
    policy, _ = build_tabular(WORLD, WORLD.source_next_logps)
    asked = [f"policy_{infix}logps" for infix in whole.roles]
    if kind != "rollouts":  # whose support is not one that the table can read
        for name in asked:
            found = [policy.evaluate(part, [name])[name] for part in parts]
            assert torch.equal(torch.cat(found), policy.evaluate(whole, [name])[name]), name
    else:
        assert torch.equal(torch.cat([part.sampling.support for part in parts]), scored)
    one = halves(parts[0])
    assert one is not None
    assert halves(one[0]) is None


@pytest.fixture
def largest_file() -> Iterator[Callable[[int], None]]:
    """Sets the size beyond which files cannot be written: the system answers as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.fault(5)
def test_a_full_disk_stops_with_the_old_checkpoint_whole(tmp_path: Path, largest_file: Callable[[int], None]) -> None:
    logging = Logging(log_every=0, save_every=2)
    _, whole = run(tmp_path / "whole", logging=logging)
    run(tmp_path / "cut", logging=logging, steps=6)
    shutil.rmtree(tmp_path / "cut" / "checkpoint-6")
    largest_file(10_000)
    with pytest.raises(OutputError, match=r"could not write .*checkpoint-6: .*[Ff]ile too large.*Earlier .* intact"):
        run(tmp_path / "cut", logging=logging, resume=True)
    assert not list((tmp_path / "cut").glob(".tmp-*"))
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "cut")] == ["checkpoint-4"]
    largest_file(resource.RLIM_INFINITY)
    assert run(tmp_path / "cut", logging=logging, resume=True)[1].lines == whole.lines


@pytest.mark.fault(5)
def test_a_full_disk_may_be_waited_for(tmp_path: Path, largest_file: Callable[[int], None], said: Console) -> None:
    """Checkpoints and log lines fail for two steps in the middle of a run; nothing of the log is missing at its end."""
    whole, _ = run(tmp_path / "whole", logging=Logging(log_every=1))

    class Filling(OfflineStream):
        prefetchable = False

        def __iter__(self) -> Iterator[list[PackedBatch]]:
            for number, step in enumerate(super().__iter__(), start=1):
                if number in (3, 5):
                    size = (tmp_path / "run" / "metrics.jsonl").stat().st_size
                    largest_file(size + 10 if number == 3 else resource.RLIM_INFINITY)
                yield step

    logging = Logging(log_every=1, save_every=1, keep=9)
    policy, _ = run(
        tmp_path / "run", stream_type=Filling, logging=logging, recovery=Recovery(on_failed_save="continue"), console=said
    )
    names = [path.name for path in checkpoint.list_checkpoints(tmp_path / "run")]
    assert names == [f"checkpoint-{step}" for step in (1, 2, 5, 6)]
    assert said.export_text().count("Going on without this checkpoint.") == 2
    assert read_lines(tmp_path / "run") == read_lines(tmp_path / "whole")
    assert all(value.equal(whole.trainable_state()[key]) for key, value in policy.trainable_state().items())
    with pytest.raises(OutputError, match=r"could not write .*metrics\.jsonl"):
        run(tmp_path / "stops", stream_type=Filling_into(tmp_path / "stops", largest_file), logging=Logging(log_every=1))


def Filling_into(folder: Path, largest_file: Callable[[int], None]) -> type[OfflineStream]:
    class Full(OfflineStream):
        prefetchable = False

        def __iter__(self) -> Iterator[list[PackedBatch]]:
            for step in super().__iter__():
                yield step
                largest_file((folder / "metrics.jsonl").stat().st_size + 10)

    return Full


@pytest.mark.parametrize(
    "wrong", [{"skip_bad_steps": -1}, {"reward_timeout": -1.0}, {"on_failed_save": "wait"}, {"on_out_of_memory": "skip"}]
)
def test_options_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Recovery(**wrong)


@pytest.mark.fault(26)
def test_a_policy_with_nothing_to_train_is_refused() -> None:
    policy, reference = build_tabular(WORLD, WORLD.source_next_logps)
    for parameter in policy.parameters():
        parameter.requires_grad_(False)
    stream = OfflineStream(pairs(), kind="pairs", budget=Budget(batch_size=8), reference=ReferenceCache(reference))
    with pytest.raises(ConfigError, match="no trainable parameter"):
        fit(policy, algorithms.get("dpo").setting().loss, stream)


SMALL_DISK = """
    mount -t tmpfs -o size=150k prefopt-test {folder} || exit 77
    {python} -m prefopt train dpo --data control:gridworld --segment-length 4 --pairs 40 --batch-size 10 --eval-pairs 20 \
      --checkpoints 1 --save-every 1 --keep 50 --max-steps 40 --epochs 20 --output-dir {folder}/run
    echo "ended with $?"
    ls -A {folder}/run
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare, to mount a small file system")
@pytest.mark.fault(5)
def test_a_real_disk_that_fills_up(tmp_path: Path) -> None:
    """A file system of 150 kB, of which each checkpoint takes 30: the run stops at the fifth with four whole ones."""
    script = textwrap.dedent(SMALL_DISK).format(folder=tmp_path, python=sys.executable)
    asked = [] if os.getuid() == 0 else ["--map-root-user"]
    done = subprocess.run(
        ["unshare", *asked, "--mount", "sh", "-c", script], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip(f"no small file system can be mounted here: {done.stderr}")
    assert "ended with 2" in done.stdout, done.stderr
    assert "No space left: " in done.stderr
    assert "Earlier checkpoints are intact. Free space and resume; --on-failed-save continue goes on" in done.stderr
    kept = done.stdout.partition("ended with 2")[2].split()
    assert len([name for name in kept if name.startswith("checkpoint-")]) >= 2
    assert not [name for name in kept if name.startswith(".tmp-")]


def test_checkpoints_written_in_the_background_are_those_of_the_foreground(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every one is written only when the next update is done, and holds the state as it was before."""
    generators = checkpoint.generator_state()
    run(tmp_path / "fore", logging=Logging(log_every=4, save_every=1, keep=9))
    checkpoint.load_generator_state(generators)
    save, updates, late = checkpoint.save, [0], [0]

    class Counted(OfflineStream):
        def after_update(self, metrics: Any) -> None:
            updates[0] += 1

    def save_late(folder: Path, step: int, tree: Any, **options: Any) -> Path:
        deadline = time.monotonic() + 60
        while updates[0] < min(step + 1, 6):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        late[0] += updates[0] > step
        return save(folder, step, tree, **options)

    monkeypatch.setattr(checkpoint, "save", save_late)
    run(tmp_path / "back", stream_type=Counted, logging=Logging(log_every=4, save_every=1, keep=9, save_in_background=True))
    assert late == [5]
    for step in range(1, 7):
        one, other = (checkpoint.load(tmp_path / name / f"checkpoint-{step}")[1] for name in ("fore", "back"))
        assert checkpoint.to_bytes(one) == checkpoint.to_bytes(other)


def test_a_failure_in_the_background_stops_the_run_or_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the next checkpoint, or at the end; an error that ends the run meanwhile is the one that is raised."""

    def full(folder: Path, step: int, *_: Any, **__: Any) -> None:
        raise SaveError(f"could not write checkpoint-{step}: the disk is full.")

    monkeypatch.setattr(checkpoint, "save", full)
    for every, first in ((2, 2), (6, 6)):
        with pytest.raises(SaveError, match=f"checkpoint-{first}: the disk is full"):
            run(tmp_path / str(every), logging=Logging(log_every=1, save_every=every, save_in_background=True))
    said = Console(record=True, width=200, quiet=False, file=io.StringIO())
    logging = Logging(log_every=1, save_every=3, save_in_background=True)
    _, result = run(tmp_path / "on", logging=logging, recovery=Recovery(on_failed_save="continue"), console=said)
    assert result.steps == 6
    assert said.export_text().count("Going on without this checkpoint.") == 2
    poisoned = type("Fifth", (Poisoned,), {"poisoned": (5,)})
    with pytest.raises(TrainingError, match="step 5"):
        run(
            tmp_path / "bad",
            stream_type=poisoned,
            logging=Logging(log_every=1, save_every=4, save_in_background=True),
            console=said,
        )
    assert "checkpoint-4: the disk is full" in said.export_text()


def test_processes_that_write_together_do_not_do_so_in_the_background(tmp_path: Path) -> None:
    class Together(Strategy):
        name = "fsdp2"
        saves_together = True

    with pytest.raises(ConfigError, match="under fsdp2 all processes write together"):
        run(tmp_path, logging=Logging(save_every=1, save_in_background=True), strategy=Together())
