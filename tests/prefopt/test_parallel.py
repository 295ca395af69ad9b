"""One pair of processes (gloo) against one process: the same training, whatever the strategy; and how a pair ends."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from prefopt import checkpoint
from prefopt.errors import OutputError
from prefopt.parallel.strategy import Strategy

# On one worker of several: they share the pair, which takes two cores as it is.
pytestmark = pytest.mark.xdist_group("pair")
SCRIPT = Path(__file__).with_name("parallel_scenarios.py")
STRATEGIES = ("ddp", "fsdp2")
# In a quiet hour the pair takes under two minutes of two cores.
LIMIT = 900.0


def load_scenarios() -> ModuleType:
    spec = importlib.util.spec_from_file_location("parallel_scenarios", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


scenarios = load_scenarios()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_pair(mode: str, folder: Path) -> list[subprocess.Popen[str]]:
    """Ranks 0 and 1 of the script."""
    environment = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }  # fmt: skip
    command = [sys.executable, str(SCRIPT), mode, str(folder), *(str(free_port()) for _ in STRATEGIES)]
    places = [{**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return [
        subprocess.Popen(command, env=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for place in places
    ]


def end_pair(pair: list[subprocess.Popen[str]], limit: float) -> list[tuple[int, str]]:
    """(exit code, standard error) of each rank; what still runs after `limit` seconds is killed."""
    deadline, found = time.monotonic() + limit, []
    for process in pair:
        try:
            _, said = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            _, said = process.communicate()
            said += "\n(killed by the test: it did not end)"
        found.append((process.returncode, said))
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which one pair has run every scenario, beside the runs of this process alone (in `single`)."""
    folder = tmp_path_factory.mktemp("pair")
    (folder / "single").mkdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for algorithm in scenarios.HEADLINE:
            own = folder / "single" / algorithm
            scenarios.run(scenarios.Scenario(algorithm), Strategy(), folder=own, save_every=scenarios.SAVE_EVERY)
            for name in STRATEGIES:
                shutil.copytree(own, folder / "single" / f"{algorithm}-{name}")
                scenarios.cut(folder / "single" / f"{algorithm}-{name}")
        pair = start_pair("compare", folder)
        for scenario in (*scenarios.EXACT, *scenarios.FLOAT32, *scenarios.OTHERS):
            scenarios.write(folder / "single" / scenario.name, scenarios.run(scenario, Strategy()), Strategy())
        for code, said in end_pair(pair, LIMIT):
            assert code == 0, said
    finally:
        torch.set_num_threads(threads)
    return folder


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(f"{path}.safetensors")


def lines(path: Path) -> list[dict[str, float]]:
    found: list[dict[str, float]] = json.loads(path.with_name(f"{path.name}.json").read_text())
    return found


def furthest(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def check_lines(got: list[dict[str, float]], wanted: list[dict[str, float]], tolerance: float) -> None:
    """The same metrics at the same steps. At the first step every margin is zero up to rounding, and its sign says nothing."""
    assert [line["step"] for line in got] == [line["step"] for line in wanted]
    for line, other in zip(got[1:], wanted[1:], strict=True):
        assert line == pytest.approx(other, rel=tolerance, abs=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", [*scenarios.EXACT, *scenarios.OTHERS], ids=lambda scenario: scenario.name)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_pair_trains_as_one_process(strategy: str, scenario: Any, results: Path) -> None:
    """20 steps (10 of what is no headline) in float64: weights to 1e-9 (they move by more than 1e-3) and every metric too, also
    where a step has fewer rows than ranks, rows of very different length, or micro-batches of unequal numbers of rows."""
    one, two = results / "single" / scenario.name, results / strategy / scenario.name
    assert furthest(weights(two), weights(one)) < 1e-9
    setting = scenarios.algorithms.get(scenario.algorithm).setting(**scenarios.MORE.get(scenario.algorithm, {}))
    start = scenarios.build(scenario, setting)[0].trainable_state()
    assert furthest(weights(one), start) > 1e-3
    assert len(lines(one)) >= 5  # PPO leaves out updates by stop_kl
    check_lines(lines(two), lines(one), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", scenarios.FLOAT32, ids=lambda scenario: scenario.name)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_loss_curves_in_float32(strategy: str, scenario: Any, results: Path) -> None:
    one, two = lines(results / "single" / scenario.name), lines(results / strategy / scenario.name)
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-4, abs=1e-5)


@pytest.mark.slow
@pytest.mark.fault(4)
@pytest.mark.parametrize("algorithm", scenarios.HEADLINE)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_goes_on_with_another_number_of_processes(strategy: str, algorithm: str, results: Path, tmp_path: Path) -> None:
    """One to two and two to one: the rest of the run is that of one process, and it says so."""
    whole = results / "single" / scenarios.Scenario(algorithm).name
    check_lines(lines(results / strategy / f"{algorithm}-one-to-two"), lines(whole), 1e-9)
    assert furthest(weights(results / strategy / f"{algorithm}-one-to-two"), weights(whole)) < 1e-9
    folder = tmp_path / "run"
    shutil.copytree(results / strategy / f"{algorithm}-whole", folder)
    scenarios.cut(folder)
    assert [path.name for path in checkpoint.list_checkpoints(folder)] == ["checkpoint-8"]
    with (tmp_path / "said").open("w") as file:
        console = Console(file=file, width=200)
        policy, result = scenarios.run(scenarios.Scenario(algorithm), Strategy(), folder=folder, resume=True, console=console)
    check_lines(result.lines, lines(whole), 1e-9)
    assert furthest(policy.trainable_state(), weights(whole)) < 1e-9
    assert (
        "the checkpoint was written by 2 processes, this run has 1 process: the order of rows"
        in (tmp_path / "said").read_text()
    )


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", scenarios.HEADLINE)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_pair_that_goes_on_is_bitwise_the_pair_that_was_not_interrupted(strategy: str, algorithm: str, results: Path) -> None:
    parts = weights(results / strategy / f"{algorithm}-two-to-two")
    _, tree = checkpoint.load(checkpoint.list_checkpoints(results / strategy / f"{algorithm}-whole")[-1])
    assert furthest(parts, Strategy().own(tree["policy"], {})) == 0
    texts = [(results / strategy / f"{algorithm}-{name}" / "metrics.jsonl").read_text() for name in ("whole", "cut")]
    whole, cut = ([line.split(', "time/')[0] for line in text.splitlines()] for text in texts)
    assert whole == cut
    assert len(whole) > 8


@pytest.mark.slow
def test_under_fsdp2_every_rank_writes_its_own_part(results: Path) -> None:
    """Half of weights and of both moments each, in a checkpoint without pickle, whose every file the manifest names."""
    path = checkpoint.list_checkpoints(results / "fsdp2" / "dpo-whole")[-1]
    sizes = {found.name: found.stat().st_size for found in path.iterdir()}
    parts = [size for name, size in sizes.items() if name.startswith("shard-")]
    assert len(parts) == 2
    whole = 3 * sum(value.nbytes for value in weights(results / "fsdp2" / "dpo-two-to-two").values())
    assert min(parts) == pytest.approx(whole / 2, rel=0.2)
    assert sizes["state.safetensors"] < min(parts)
    assert set(json.loads((path / "manifest.json").read_text())["files"]) == sizes.keys() - {"manifest.json"}


@pytest.mark.slow
@pytest.mark.fault(5)
def test_when_one_rank_cannot_write_its_part_no_rank_has_a_checkpoint(results: Path) -> None:
    """Rank 1 may write no file at the time of the first checkpoint: with on_failed_save continue that one is left out."""
    folder = results / "fsdp2" / "starved"
    assert [path.name for path in checkpoint.list_checkpoints(folder)] == ["checkpoint-16", "checkpoint-20"]
    assert not [*folder.glob(".tmp*")]
    said = (results / "fsdp2" / "starved-said").read_text()
    assert "rank 1: " in said
    assert "Going on without this checkpoint." in said
    assert furthest(weights(results / "fsdp2" / "starved-run"), weights(results / "fsdp2" / "dpo-full-float64")) == 0


@pytest.mark.slow
@pytest.mark.fault(6)
def test_a_damaged_part_is_found_and_the_run_falls_back(results: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(results / "fsdp2" / "dpo-whole", folder)
    before, newest = checkpoint.list_checkpoints(folder)[-2:]
    (part, *_) = newest.glob("shard-*")
    raw = bytearray(part.read_bytes())
    raw[-1] ^= 1
    part.write_bytes(raw)
    said: list[str] = []
    found = checkpoint.load_latest(folder, said.append)
    assert found is not None
    assert found[0] == int(before.name.removeprefix("checkpoint-"))
    assert part.name in said[0]
    # What no process vouches for is not read either: readers of parts look into every such file.
    shutil.copy(next(before.glob("shard-*")), before / "shard-more.safetensors")
    with pytest.raises(OutputError, match=r"what its manifest does not name: shard-more\.safetensors"):
        checkpoint.load(before)


@pytest.mark.slow
@pytest.mark.fault(9)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_signal_at_one_rank_stops_all_at_one_step(strategy: str, results: Path) -> None:
    told = [json.loads((results / strategy / f"signalled-rank-{rank}.json").read_text()) for rank in range(2)]
    assert told[0] == told[1]
    assert told[0] == {"step": 3, "number": signal.SIGUSR1}, "it came to rank 1 in the evaluation after step 3"
    assert furthest(weights(results / strategy / "signalled-resumed"), weights(results / "single" / "dpo-full-float64")) < 1e-9


@pytest.mark.slow
@pytest.mark.fault(28)
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("killed", "rank 1 has not been heard of for"),
        ("stuck", "rank 1 is alive but does not go on, since at step 3"),
        ("failing", "rank 1 ended: row 7 is spoilt"),
    ],
)
def test_a_rank_that_fails_ends_the_others_by_name(how: str, said: str, tmp_path: Path) -> None:
    begin = time.monotonic()
    (code, told), (other, _) = end_pair(start_pair(how, tmp_path), LIMIT)
    assert code not in (0, None), told
    assert other != 0
    assert said in told
    # One that is killed has last told of itself some time before.
    assert {"killed": "last seen", "stuck": "step 3", "failing": ""}[how] in told
    assert "killed by the test" not in told
    assert math.isfinite(time.monotonic() - begin)


@pytest.mark.slow
def test_torchrun_trains_as_one_process(tmp_path: Path) -> None:
    """The command line end to end: the same rows, steps and metrics, written and printed once."""
    environment = {
        **os.environ, "PREFOPT_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }  # fmt: skip
    command = [
        "-m", "prefopt", "train", "dpo", "--data", "exact", "--pairs", "64", "--batch-size", "16", "--max-steps", "4",
        "--eval-pairs", "32", "--checkpoints", "1", "--log-every", "1", "--learning-rate", "0.001",
    ]  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    said = {}
    for name, start, more in (
        (one, [sys.executable], []),
        (two, [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"], ["--strategy", "ddp"]),
    ):
        done = subprocess.run(
            [*start, *command, "--output-dir", str(name), *more], env=environment, capture_output=True, text=True, timeout=LIMIT
        )
        assert done.returncode == 0, done.stderr
        said[name] = done.stdout
    found = [[json.loads(line) for line in (name / "metrics.jsonl").read_text().splitlines()] for name in (one, two)]
    plain = [[{key: v for key, v in line.items() if not key.startswith("time/")} for line in own] for own in found]
    assert len(plain[0]) >= 4
    check_lines(plain[1], plain[0], 1e-4)
    final = [json.loads((name / "result.json").read_text())["cell"] for name in (one, two)]
    assert final[1]["final"] == pytest.approx(final[0]["final"], rel=1e-3, abs=1e-4)
    assert final[1]["ledger"] == final[0]["ledger"]
    assert said[two].count("policy: ") == 1
    assert (two / "policy").is_dir()
