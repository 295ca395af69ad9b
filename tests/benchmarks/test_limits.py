"""Needed operations against hand-counted numbers and against what torch counts; the limits script on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import limits, step_profile
from benchmarks.flops import Shape, Work, needed, visible_pairs
from benchmarks.measuring import Peak
from benchmarks.workloads import SHAPES, exact_rows, harmless_rows, random_llama, random_rows
from prefopt.data.records import Example
from prefopt.errors import ConfigError, DataError
from prefopt.models.causal_lm import CausalLMPolicy
from prefopt.models.lora import LoRA
from prefopt.packing import Group, flat_roles, pack

TINY = (4, 6, 2, 2, 1, 10)  # hidden, intermediate, layers, heads, key-value heads, vocabulary
# A prompt of 3 tokens with completions of 2 and 1.
ROW = Example("row", (1, 2, 3), ((4, 5), (6,)))


def tiny_shape() -> Shape:
    return Shape.of(random_llama(*TINY).config)


def test_full_training_equals_the_count_by_hand() -> None:
    """One layer's matrices: q 16, k 8, v 8, o 16, MLP 3 x 24 = 120 weights; 6 tokens; 2 layers; 2 operations a weight.

    Visible: the prompt 1+2+3; the branches 4+5 and 4; in all 19 a layer. Both completions begin at the same state, so the
    head sees 2 states for 3 scored tokens.
    """
    assert needed(tiny_shape(), [pack([ROW], roles=flat_roles)]) == Work(
        prompt_tokens=3,
        completion_tokens=3,
        states=2,
        visible=38,
        body_forward=2 * 240 * 6,
        body_backward=4 * 240 * 6,
        attention_forward=2 * (2 * 2 * 2) * 38,
        attention_backward=4 * (2 * 2 * 2) * 38,
        head_forward=2 * (4 * 10) * 2,
        head_backward=4 * (4 * 10) * 2,
    )


def test_lora_equals_the_count_by_hand() -> None:
    """Rank 1: a layer's factors have 8+6+6+8+10+10+10 = 58 weights. Frozen weights cost no gradient of their own (240), and
    the first layer's q, k, v (32 weights) and their first factors (3 x 4) pass none on to the embeddings."""
    work = needed(tiny_shape(), [pack([ROW], roles=flat_roles)], lora=1)
    assert work.body_forward == 2 * (240 + 116) * 6
    assert work.body_backward == 2 * ((240 - 32) + (2 * 116 - 12)) * 6
    assert work.head_backward == work.head_forward == 2 * (4 * 10) * 2
    assert work.attention_backward == 2 * work.attention_forward


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's, which policies silence themselves
@pytest.mark.parametrize("rank", [0, 2])
def test_matrix_products_are_those_that_torch_counts(rank: int) -> None:
    """transformers' own forward and backward of one sequence, its head on the scored states: the same matrix products."""
    torch.manual_seed(0)
    model = random_llama(8, 12, 3, 4, 2, 20, device="cpu")
    shape = Shape.of(model.config)
    if rank:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    base = model.get_base_model() if rank else model
    batch = pack([Example("row", (1, 2, 3, 4), ((5, 6, 7),))], roles=flat_roles)
    with FlopCounterMode(display=False) as counted:
        hidden = base.model(input_ids=batch.input_ids.unsqueeze(0)).last_hidden_state[0]
        base.lm_head(hidden[batch.predict]).sum().backward()
    products = sum(count for name, count in counted.get_flop_counts()["Global"].items() if name in PRODUCTS)
    work = needed(shape, [batch], lora=rank)
    assert work.body + work.head == products


PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_visible_pairs_are_those_of_the_mask(window: int | None) -> None:
    """Counted one by one: same branch or prompt, not later, and within the window of positions."""
    prompt, branches = 5, (4, 1, 7)
    tokens = [(0, i) for i in range(prompt)] + [(k, prompt + i) for k, n in enumerate(branches, 1) for i in range(n)]
    count = sum(
        (branch in (0, own)) and position <= at and (window is None or at - position < window)
        for own, at in tokens
        for branch, position in tokens
    )
    starts = (5, 9, 10, 17)
    assert visible_pairs(Group(100, starts), window) == count


def test_windows_follow_the_configuration() -> None:
    sliding = transformers.MistralConfig(num_hidden_layers=2, sliding_window=7)
    mixed = transformers.Qwen2Config(
        num_hidden_layers=3, use_sliding_window=True, sliding_window=5, max_window_layers=1, num_attention_heads=4
    )
    assert Shape.of(sliding).windows == (7, 7)
    assert Shape.of(mixed).windows == (None, 5, 5)
    assert tiny_shape().windows == (None, None)


def test_another_family_is_refused() -> None:
    with pytest.raises(ConfigError, match="gpt2"):
        Shape.of(transformers.GPT2Config())


def test_micro_batches_add_up() -> None:
    """The work of a step does not depend on how it is cut into forward passes."""
    rows = random_rows(6, (1, 9), (1, 5), vocabulary=10)
    whole = needed(tiny_shape(), [pack(rows, roles=flat_roles)])
    assert whole == needed(tiny_shape(), [pack(rows[:2], roles=flat_roles), pack(rows[2:], roles=flat_roles)])
    assert whole.total == whole.forward + whole.backward == whole.body + whole.attention + whole.head
    assert whole.tokens == sum(row.tokens for row in rows)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Command lines on a model of two layers, in this process."""
    monkeypatch.setitem(limits.SHAPES, "small", (32, 48, 2, 4, 2, 600, True))
    monkeypatch.setattr(limits, "peak_memory_of", lambda function, *given: Peak(1.0, None, function(*given)))
    threads = torch.get_num_threads()
    yield lambda *more: limits.main(["--shape", "small", "--device", "cpu", "--pairs", "2", "--calibration", "0.01", *more])
    torch.set_num_threads(threads)


def test_limits_measures_both_trainings(small: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each row's achieved rate is its own operations over its own seconds, and the bound is never under what was reached."""
    small("--steps", "2", "--lora", "0", "2", "--json", str(tmp_path / "limits.json"))
    written = json.loads((tmp_path / "limits.json").read_text())
    steps, summary = written["tables"]
    assert [row["training"] for row in steps["rows"]] == ["all weights"] * 2 + ["LoRA, rank 2"] * 2
    for row in steps["rows"]:
        assert row["achieved_GFLOPs"] == pytest.approx(1e3 * row["needed_TFLOP"] / row["seconds"])
        assert row["of_matmul"] == pytest.approx(row["achieved_GFLOPs"] / row["matmul_GFLOPs"])
    for row in summary["rows"]:
        assert row["steps"] + row["dropped"] == 2
    totals = [work["body_forward"] for work in written["needed"]["all weights"]]
    assert len(totals) == 2
    assert min(totals) > 0
    assert "of matmul" in capsys.readouterr().out


def test_a_profile_accounts_for_the_whole_step(small: Callable[..., Any], tmp_path: Path) -> None:
    """The profiled step is no timing, and its page names every group."""
    small("--steps", "1", "--lora", "0", "--profile", str(tmp_path / "p.txt"), "--json", str(tmp_path / "l.json"))
    page = (tmp_path / "p.txt").read_text()
    assert all(group in page for group in step_profile.GROUPS)
    assert "aten::mm" in page
    assert len(json.loads((tmp_path / "l.json").read_text())["tables"][0]["rows"]) == 1


@pytest.mark.parametrize("lora", [None, LoRA(r=2, alpha=4)])
def test_operators_are_attributed_forward_and_backward(lora: LoRA | None) -> None:
    """One forward and backward pass: each part has time of its own, groups add up to the step, and the marks are gone."""
    policy = CausalLMPolicy(random_llama(64, 96, 2, 4, 2, 5000), None, lora=lora)
    batch = pack(exact_rows(2, 20, 20, vocabulary=5000), roles=flat_roles)
    recorder = step_profile.StepRecorder(policy)
    own = policy.evaluate
    with recorder.recording():
        policy.evaluate(batch, ["policy_logps"])["policy_logps"].sum().backward()
    found = recorder.profile
    assert found is not None
    assert all(found.by_group[group] > 0 for group in ("matmul body", "LM head", "attention", "elementwise"))
    assert sum(found.by_group.values()) == pytest.approx(found.seconds, rel=0.02)
    assert found.elementwise_bytes > 0
    assert policy.evaluate == own
    assert not any(module._forward_hooks for module in policy.modules())


def test_random_rows_have_the_lengths_asked_for() -> None:
    rows = random_rows(20, (3, 5), (1, 2), vocabulary=7, completions=3)
    assert {len(row.prompt_ids) for row in rows} == {3, 4, 5}
    assert {len(ids) for row in rows for ids in row.completion_ids} == {1, 2}
    assert all(row.labels.ranks == (0, 1, 2) for row in rows)


def test_too_few_pairs_are_named(tmp_path: Path, tiny_model: Path) -> None:
    rows = [{"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    assert len(harmless_rows(str(tmp_path), tokenizer, 1, max_length=64)) == 1
    with pytest.raises(DataError, match="2 pairs are needed, 1 were found"):
        harmless_rows(str(tmp_path), tokenizer, 2, max_length=64)


def test_shapes_are_the_published_ones() -> None:
    """Parameters of the layers and embeddings, in millions, as published: 135, 1236, 8030."""
    for name, millions in (("135m", 135), ("1b", 1236), ("8b", 8030)):
        hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SHAPES[name]
        shape = Shape(hidden, intermediate, vocabulary, heads, kv_heads, hidden // heads, (None,) * layers)
        body = layers * sum(a * b for a, b in shape.matrices)
        assert (body + (1 if tied else 2) * hidden * vocabulary) / 1e6 == pytest.approx(millions, rel=0.005)
