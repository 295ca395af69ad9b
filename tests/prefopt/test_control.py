"""Control through the command line: the same trainer, losses and report as for text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from prefopt.errors import ConfigError
from prefopt.options import ControlOptions, DataOptions, EvaluationOptions, ModelOptions, Options
from prefopt.report.schema import load_results
from prefopt.tasks import build_task

ROOT = Path(__file__).parents[2]
GRID = ["--data", "control:gridworld", "--segment-length", "3", "--pairs", "60", "--batch-size", "20", "--eval-pairs", "8"]
GRID += ["--learning-rate", "0.05", "--max-steps", "4", "--seeds", "1", "--workers", "0", "--checkpoints", "2"]


def options(**changes: object) -> Options:
    parts: dict[str, object] = {"data": DataOptions(("control:gridworld",), pairs=40), "control": ControlOptions(3), **changes}
    return Options(**parts)  # type: ignore[arg-type]


def test_losses_and_trainer_know_nothing_of_control() -> None:
    """What a policy and a batch are is the policy's business: no word of it in the math or the loop."""
    shared = [*(ROOT / "losses").glob("**/*.py")]
    names = ("trainer", "optimization", "coupled", "metrics", "prefetch", "checkpoint", "streams")
    shared += [ROOT / "prefopt" / f"{name}.py" for name in names]
    words = re.compile(r"\b(control|gridworld|metaworld|mujoco|gymnasium|observations?)\b", re.IGNORECASE)
    for path in shared:
        assert not words.findall(path.read_text()), path


def test_compare_trains_five_losses_on_the_gridworld(cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "out"
    done = cli("compare", "cpl", "cpl_kl", "dpo", "ipo", "sft", *GRID, "--output-dir", str(out))
    assert done.code == 0, done.flat
    results = load_results(out)
    assert results.task == "control"
    assert [cell.status for cell in results.cells] == ["ok"] * 5
    assert results.primary is not None
    assert results.primary.key == "regret"
    start = results.reference["regret"]
    assert all(0 < results.values(label, "regret")[0] < start for label in ("cpl", "dpo", "ipo", "sft"))
    assert results.reference["kl"] == 0
    assert (out / "report.html").exists()
    assert "60 pairs of two segments of their own each (sparse), 3 steps long, labelled by regret" in done.flat


def test_the_gridworlds_preset_is_a_whole_study(cli) -> None:  # type: ignore[no-untyped-def]
    done = cli("compare", "--preset", "gridworld", "--dry-run")
    assert done.code == 0, done.flat
    assert "alpha 0.5, bias 1.0, gamma 0.9" in done.flat
    assert "15 cells" in done.flat
    assert cli("compare", "--preset", "metaworld", "--data", "control:folder", "--dry-run").code == 0


def test_behaviour_cloning_comes_first_where_asked_for(cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Two stages: the reference is the policy after the first, not a fresh one."""
    asked = ["--model", "categorical", "--hidden", "16", "--output-dir", str(tmp_path / "out")]
    done = cli("compare", "dpo", *GRID, *asked, "--init", "sft-both", "--sft-epochs", "5", "--sft-learning-rate", "0.05")
    assert done.code == 0, done.flat
    assert "behaviour cloning of the shared start" in done.flat
    results = load_results(tmp_path / "out")
    assert results.values("dpo", "kl")[0] > 0


def test_the_start_is_shared_by_the_cells_of_a_seed_and_no_others(tmp_path: Path) -> None:
    task = build_task(options(model=ModelOptions("categorical")), tmp_path)
    same, again, other = (task.own_policies((), seed)[1].weights for seed in (0, 0, 1))  # type: ignore[index]
    assert same == again != other
    pairs, more = task.training(0).examples, task.training(1).examples
    assert list(pairs) != list(more)


def test_test_pairs_are_of_other_episodes(tmp_path: Path) -> None:
    task = build_task(options(), tmp_path)
    steps = {step for example in task.training(0).examples for side in example.completion_ids for step in side}
    held = {step for example in task.held_out() for side in example.completion_ids for step in side}
    assert not steps & held


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ModelOptions("mean_squared")}, "the gridworld's policies are tabular or categorical"),
        ({"model": ModelOptions(lora=4)}, "--lora"),
        ({"data": DataOptions(("control:gridworld", "exact"))}, "stands alone"),
        ({"data": DataOptions(("control:gridworld",), pairs=40, labels="shifted:2")}, "segments take bt"),
        ({"control": ControlOptions(3, hidden=(4,))}, "a table has no hidden layers"),
        ({"evaluation": EvaluationOptions(eval_pairs=0)}, "--eval-pairs must be at least 1"),
        ({"control": ControlOptions(3), "data": DataOptions()}, "segment_length is an option of control, and data is exact"),
    ],
)
def test_options_that_do_not_fit_are_refused(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        build_task(options(**changes), tmp_path).own_policies((), 0)


def test_sampling_algorithms_are_refused_by_name(cli, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for name, why in (
        ("ppo", "learns from segments and has no head 'value'"),
        ("online_dpo", "completions of a language model"),
    ):
        done = cli("compare", name, *GRID, "--output-dir", str(tmp_path / name))
        assert f"{name} seed 0 failed" in done.flat
        assert why in done.flat
