"""benchmarks.sentiment: paired gains, early stopping and tables by hand; figures of made-up results; plans that can be run."""

from __future__ import annotations

import pytest
from PIL import Image
from rich.console import Console

from benchmarks import sentiment
from benchmarks.sentiment_figures import draw_frontier, draw_overoptimisation
from benchmarks.sentiment_report import early_stopping, frontier_table, gains_table, labels_table, paired_gains, show
from prefopt.report.schema import SCHEMA_VERSION, Cell, PromptRow, Results, Setting
from prefopt.tasks.sentiment import SentimentTask


def cell(label: str, seed: int, golds: tuple[float, ...]) -> Cell:
    """A path of gold rewards at steps 10, 20, ...; the proxy rises by 1 a checkpoint, the KL by 2 nats."""
    path = tuple(
        {"step": 10.0 * k, "score/gold": gold, "score/proxy": float(k), "kl": 2.0 * k, "perplexity": 100.0 + k}
        for k, gold in enumerate(golds, start=1)
    )
    return Cell(label, label, seed, "ok", None, path[-1], path)


def results(paths: dict[str, list[tuple[float, ...]]]) -> Results:
    cells = tuple(cell(label, seed, golds) for label, own in paths.items() for seed, golds in enumerate(own))
    seeds = tuple(range(max(map(len, paths.values()))))
    settings = tuple(Setting(label, label) for label in paths)
    reference = {"score/gold": 0.0, "score/proxy": 0.0, "kl": 0.0}
    return Results(
        SCHEMA_VERSION, "made up", "sentiment", settings, seeds, tuple(SentimentTask.metrics), cells, reference=reference
    )


def rows(label: str, scores: dict[tuple[int, str], float]) -> list[PromptRow]:
    return [PromptRow(label, seed, prompt, "gold", score) for (seed, prompt), score in scores.items()]


def test_gains_are_paired_by_prompt_and_seed() -> None:
    """Two seeds, two prompts: gains 1, 3 and 2, 6; seeds gain 2 and 4 in the mean, prompts 1.5 and 4.5."""
    before = rows("", {(0, "a"): 1.0, (0, "b"): 2.0, (1, "a"): 0.0, (1, "b"): -1.0})
    after = rows("dpo", {(0, "a"): 2.0, (0, "b"): 5.0, (1, "a"): 2.0, (1, "b"): 5.0})
    others = [PromptRow("dpo", 0, "a", "lexicon", 9.0), *rows("ipo", {(0, "a"): 7.0})]
    assert paired_gains([*after, *others], before, "dpo") == ({0: 2.0, 1: 4.0}, {"a": 1.5, "b": 4.5})


@pytest.mark.parametrize(("lift", "bound", "raised"), [(1.0, 20.0, True), (0.0, 20.0, False), (1.0, 3.0, False)])
def test_a_gain_is_one_when_both_intervals_lie_above_0_at_a_kl_below_the_bound(lift: float, bound: float, raised: bool) -> None:
    """Noise of +-0.1 over seeds and prompts; the run ends at 4 nats."""
    made = results({"dpo": [(0.0, lift)] * 3})
    noise = {(seed, f"p{i}"): 0.1 * (-1) ** (seed + i) for seed in range(3) for i in range(6)}
    before = rows("", dict.fromkeys(noise, 0.0))
    after = rows("dpo", {key: lift + value for key, value in noise.items()})
    (row,) = gains_table(made, after, before, ["dpo"], bound)
    assert row["raised"] is raised
    assert row["gain"][0] == pytest.approx(lift, abs=1e-12)
    assert (row["seeds"], row["prompts"], row["KL"][0]) == (3, 6, 4.0)
    (alone,) = gains_table(made, [row for row in after if row.seed == 0], before, ["dpo"], bound)
    assert alone["raised"] is False  # one seed has no interval over seeds


def test_each_seed_is_stopped_where_the_others_are_highest() -> None:
    """Seed 0 alone would stop at 10; the others' mean is highest at 20, so that is where it is read."""
    made = results({"ppo": [(5.0, 1.0, 0.0), (0.0, 2.0, 1.0), (0.0, 3.0, 1.0)]})
    (row,) = early_stopping(made)
    # Seed 1: of seeds 0 and 2 the sums are 5, 4, 1, so it stops at 10, with 0; seed 2 likewise.
    assert row["updates"] == "20/10/10"
    assert row["stopped"][0] == pytest.approx((1.0 + 0.0 + 0.0) / 3)
    assert row["at the end"][0] == pytest.approx((0.0 + 1.0 + 1.0) / 3)


def test_one_seed_or_one_checkpoint_is_not_stopped() -> None:
    assert early_stopping(results({"ppo": [(1.0, 2.0)]})) == []
    assert early_stopping(results({"ppo": [(1.0,), (2.0,)]})) == []


def test_the_frontier_begins_with_the_reference() -> None:
    table = frontier_table(results({"dpo": [(0.5, 1.0), (0.5, 2.0), (0.5, 3.0)], "ppo": [(0.1, 0.2)] * 3}))
    assert [row["setting"] for row in table] == ["reference", "dpo", "ppo"]
    mean, half = table[1]["gold"]
    # t(0.975, 2) = 4.303 times 1/sqrt(3).
    assert (mean, half) == (pytest.approx(2.0), pytest.approx(2.4841, abs=1e-4))
    assert table[0]["gold"] == [0.0, None]


def test_labels_are_averaged_over_seeds() -> None:
    keys = {"score/lexicon": 0.1, "kl": 3.0, "distinct_2": 0.9, "perplexity": 100.0}
    found = [{"label": "sft", "seed": seed, "score/gold": float(seed), **keys} for seed in range(3)]
    (row,) = labels_table(found)
    assert row["gold"][0] == 1.0
    assert row["KL"] == [3.0, pytest.approx(0.0)]


def test_figures_are_pictures_of_every_setting(tmp_path) -> None:
    made = results({"dpo": [(0.5, 1.0)] * 3, "ppo": [(0.5, 0.3)] * 3})
    curve = [{"seed": seed, "n": n, "kl": n / 4, "proxy": n / 2, "gold": n / 3} for seed in range(3) for n in (1, 2, 4)]
    for name, png in (
        ("a", draw_frontier(made)),
        ("b", draw_overoptimisation(made, curve)),
        ("c", draw_overoptimisation(made, [])),
    ):
        (tmp_path / f"{name}.png").write_bytes(png)
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 500
            assert len(picture.convert("RGB").getcolors(1 << 20) or ()) > 50


def test_tables_are_shown_with_their_intervals() -> None:
    console = Console(record=True, width=120)
    show({"gains": [{"setting": "dpo", "gain": [1.0, 0.25], "raised": True}], "nothing": []}, console)
    text = console.export_text()
    assert "1 ± 0.25" in text
    assert "yes" in text
    assert "nothing" not in text


@pytest.mark.parametrize("plan", [sentiment.small_plan("sentiment:reviews"), sentiment.model_plan("sentiment:reviews", "m")])
def test_plans_name_algorithms_and_options_that_exist(plan: sentiment.Plan) -> None:
    settings = plan.study.settings()
    assert {*plan.gains} <= {entry.label for entry in plan.study.entries}
    assert len(settings) == len(plan.study.entries)
    assert len(plan.study.seeds) == 3
    assert plan.study.options.evaluation.eval_prompts == 256
    short = sentiment.quick(plan)
    assert short.study.seeds == (0,)
    assert short.study.options.budget.max_steps < plan.study.options.budget.max_steps
