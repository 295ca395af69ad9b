"""Every registered loss trains through the command line from its name alone, and moves what it declares."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import losses
from losses.types import VOCABULARY
from prefopt import algorithms
from prefopt.models.packed import head_names
from prefopt.stages import trains_reward_model

STEPS = 20
# Other tests register losses of their own in this process.
BUILT_IN = [name for name in losses.names() if losses.get(name).terms[0].function.__module__.startswith("losses.")]


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One start and one reward model for all losses, and no other: what a run began with can be looked up."""
    return tmp_path_factory.mktemp("own_cache")


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT_IN)
def test_trains_twenty_steps_from_its_name(
    name: str, cli: Any, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFOPT_CACHE", str(own_cache))
    run = tmp_path / "run"
    done = cli(
        "train", name, "--data", "exact", "--pairs", 128, "--batch-size", 8, "--epochs", 2, "--max-steps", STEPS,
        "--checkpoints", 1, "--save-every", 0, "--log-every", 1, "--output-dir", run,
    )  # fmt: skip
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in lines if "loss" in line}
    assert list(steps) == list(range(1, STEPS + 1))
    assert all(math.isfinite(line["loss"]) for line in steps.values())
    # Where a narrow range clips every ratio of a step, there is no gradient.
    assert all(line["grad_norm"] > 0 or line.get("clip_frac") == 1 for line in steps.values())
    assert sum(line["grad_norm"] > 0 for line in steps.values()) > STEPS / 2
    needs = algorithms.get(name).setting().loss.needs
    after = load_file(run / "policy" / "model.safetensors")
    if trains_reward_model(losses.get(name)):  # saved as a sequence classifier, whose score is its head
        trained = {"reward.weight": after.pop("score.weight")}
    elif heads := head_names(needs):
        trained = load_file(run / "policy" / "heads.safetensors")
        assert {f"{head}.weight" for head in heads} <= trained.keys()
    else:
        trained = {}
    assert all(float(value.abs().max()) > 0 for key, value in trained.items() if key.endswith("weight")), "heads start at zero"
    (start,) = (own_cache / "sft").glob("*/weights.safetensors")
    before = load_file(start)
    moved = {key: value for key, value in after.items() if not torch.equal(value, before[f"model.{key}"])}
    assert any(VOCABULARY[tensor].source == "policy" for tensor in needs)
    assert moved, "no weight of the model is another than at the start"
