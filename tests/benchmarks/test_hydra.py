"""bench-hydra: what is held is counted once, the micro-batch at equal memory is worked out, and a table comes out of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from benchmarks import hydra
from benchmarks.hydra import table_of, tokens_within
from benchmarks.hydra_roles import FOUR_COPIES, FOUR_MODELS, SETTINGS, Reached, Trained, Workload, held_mb, train
from benchmarks.measuring import Peak, Spread

MB = 2**20 // 4
"""float32 numbers of a MB."""
WORK = Workload("tiny", ((1, 2, 3),), 2, 4, "cpu")


def made(mb: float, held: float) -> Peak:
    return Peak(mb, None, Trained(Spread.of([1.5]), 0.0, held))


def test_held_memory_counts_a_shared_weight_once_and_a_trained_one_four_times() -> None:
    frozen, trained = nn.Linear(MB, 3, bias=False), nn.Linear(MB, 2, bias=False)
    frozen.requires_grad_(False)
    tied = nn.Linear(MB, 2, bias=False)
    tied.weight = trained.weight
    assert held_mb([frozen, trained, tied, nn.ModuleList([frozen])]) == pytest.approx(3 + 4 * 2)


def test_the_micro_batch_at_equal_memory_is_a_line_through_what_is_held() -> None:
    """400 MB of libraries and 600 held; 800 tokens add 800 MB: 3000 MB hold 2000 tokens, 12 samples of 160."""
    assert tokens_within(3000, made(1800, 600), 400, 800, 160) == 12 * 160
    assert tokens_within(1100, made(1800, 600), 400, 800, 160) == 0
    assert tokens_within(900, made(1800, 600), 400, 800, 160) == 0


def test_the_table_has_a_row_for_each_setting_and_says_what_failed() -> None:
    equal = {
        FOUR_MODELS: made(6000, 4000),
        FOUR_COPIES: Peak(math.nan, None, None, "does not fit"),
        SETTINGS[-1]: made(2000, 600),
    }
    within = {SETTINGS[-1]: (1600, made(5000, 600)), FOUR_MODELS: (0, None)}
    table = table_of(WORK, 800, Peak(400, None, None), equal, within, {FOUR_MODELS: Reached(0.5, 0.25, 0.125)})
    rows = {row["roles"]: row for row in table.rows}
    assert list(rows) == ["runtime, no model", "off, all weights", "off, LoRA", "joined, LoRA"]
    assert rows["runtime, no model"]["peak MB"] == 400
    assert rows["joined, LoRA"]["below four"] == 3
    assert rows["joined, LoRA"]["tokens at equal"] == 1600
    assert rows["off, LoRA"]["peak MB"] == "does not fit"
    assert rows["off, all weights"]["tokens at equal"] == "does not fit"
    assert rows["off, all weights"]["gain"] == 0.25
    table.print()


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model's tokenizer under weights that weigh something: a quarter of a MB a layer."""
    folder = tmp_path_factory.mktemp("hydra") / "model"
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(tiny_model)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.head_dim = 64, 256, 2, 32
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def test_settings_hold_what_their_roles_ask_for(longer: Path) -> None:
    """In this process: four models of which two are trained hold 10 weights a weight, trunk 6, LoRA copies about 4, Hydra 1."""
    work = Workload(str(longer), tuple((2, 3, 4, i) for i in (2, 3, 4, 5)), 3, 1, "cpu")
    held = {}
    for roles in SETTINGS:
        done = train(roles, work, micro_batch_tokens=14, samples=2, updates=1)
        assert done.seconds_per_sample.count == 1
        held[roles.name] = done.held_mb
    model = transformers.AutoModelForCausalLM.from_pretrained(longer)
    one = held_mb([model.requires_grad_(False)])
    assert held["off, all weights"] / one == pytest.approx(10, rel=0.01)
    assert held["trunk, all weights"] / one == pytest.approx(6, rel=0.01)
    # Rank 1 of 64: an adapter is about a fortieth of the weights, and four times that with gradient and moments.
    assert 4.0 < held["off, LoRA"] / one < 4.4
    assert 2.0 < held["trunk, LoRA"] / one < 2.3
    assert 1.0 < held["joined, LoRA"] / one < held["split, LoRA"] / one < 1.4


@pytest.mark.slow
def test_the_script_measures_in_processes_of_their_own(longer: Path, tmp_path: Path) -> None:
    out = tmp_path / "hydra.json"
    arguments = ["--model", longer, "--settings", "off", "joined", "--tokens", 36, "--prompt-tokens", 9, "--new-tokens", 3]
    arguments += ["--updates", 1, "--no-reward", "--device", "cpu", "--json", out]
    # A tiny model's roles weigh nothing beside the libraries, so the target is missed.
    assert hydra.main([str(argument) for argument in arguments]) == 1
    written = json.loads(out.read_text())
    rows = {row["roles"]: row for row in written["tables"][0]["rows"]}
    assert set(rows) == {"runtime, no model", "off, all weights", "off, LoRA", "joined, LoRA"}
    assert rows["joined, LoRA"]["peak MB"] > rows["runtime, no model"]["peak MB"] > 0
    assert any("target 2.5" in failure for failure in written["failures"])
