"""The zoo's study: it covers the registry, tunes all losses alike, resumes, and hides nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

import losses
from benchmarks import zoo, zoo_cells, zoo_gradients, zoo_tuning
from benchmarks.zoo_cells import CellResult, CellSpec, Runner, World
from benchmarks.zoo_config import Part, Trial, Zoo, load, offline_policy_losses
from benchmarks.zoo_report import Report, blocks, equal_losses, everything_table, markdown, ranked, readme_block, unreached
from prefopt.data.exact_world import ExactWorld, WorldConfig
from prefopt.errors import ConfigError
from prefopt.tasks import exact

CONFIG = Path(zoo.HERE / "zoo.yaml")


@pytest.fixture(scope="module")
def own() -> list[str]:
    """Offline policy losses of losses/; other tests register more in this process."""
    files = {path.stem for path in Path(losses.__file__).parent.glob("*.py")}
    modules = {name: losses.get(name).terms[0].function.__module__ for name in offline_policy_losses()}
    return [name for name, module in modules.items() if module.removeprefix("losses.") in files]


@pytest.fixture(scope="module")
def study(own: list[str]) -> Zoo:
    """The committed study."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.zoo_config.offline_policy_losses", lambda: own)
        return load(CONFIG)


@pytest.fixture
def raw() -> dict[str, Any]:
    return yaml.safe_load(CONFIG.read_text())


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: list[str]) -> Callable[..., Zoo]:
    """Loads a changed study."""
    monkeypatch.setattr("benchmarks.zoo_config.offline_policy_losses", lambda: own)

    def read(raw: dict[str, Any], **options: Any) -> Zoo:
        (tmp_path / "zoo.yaml").write_text(yaml.safe_dump(raw))
        return load(tmp_path / "zoo.yaml", **options)

    return read


def test_the_study_covers_the_offline_policy_losses(study: Zoo, own: list[str]) -> None:
    """All but those that are newer than the study, which it names."""
    known = {*study.sweeps, *study.left_out}
    assert known <= set(own) <= known | {*study.unswept}  # other tests register losses, which it names too
    assert len(study.sweeps) >= 36
    assert {"dpo", "ipo", "cpl", "sft"} <= set(own)
    assert not {"ppo", "bradley_terry", "value", "entropy"} & set(own)


def test_a_study_names_what_it_misses_and_refuses_what_does_not_exist(
    read: Callable[..., Zoo], raw: dict[str, Any], study: Zoo
) -> None:
    entry = raw["losses"].pop("hinge")
    assert read(raw).unswept == sorted(["hinge", *study.unswept])
    raw["losses"]["hinge"] = entry
    raw["losses"]["no_such_loss"] = {}
    with pytest.raises(ConfigError, match="unknown: no_such_loss"):
        read(raw)


def test_only_terms_of_others_may_be_left_out(read: Callable[..., Zoo], raw: dict[str, Any]) -> None:
    del raw["losses"]["hinge"]
    raw["left_out"]["hinge"] = "too slow"
    with pytest.raises(ConfigError, match="hinge is a loss of its own"):
        read(raw)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["losses"]["dpo"].update(beta=[0.1, 0.3]), r"losses.dpo: 6 trials, but every loss gets 9"),
        (lambda raw: raw["losses"]["dpo"].update(beta=["1e-1", 0.3, 1.0]), "YAML reads 1e-3 as text"),
        (lambda raw: raw["losses"]["dpo"].update(betta=0.3), "betta"),
        (lambda raw: raw["losses"]["cpl"].update(bias=[0.5, 1.0]), "one strength is swept, got alpha, bias"),
        (lambda raw: raw["tuning"].update(worlds=[0, 101]), "that the final study never uses"),
        (lambda raw: raw["tuning"].update(seed=0), "that the final study never uses"),
        (lambda raw: raw["final"].update(primary=0.7), "must be one of final.targets"),
        (lambda raw: raw["final"]["headline"].update(losses=["dpo", "ppo"]), "headline losses ppo"),
        (lambda raw: raw.pop("cell"), "the entry 'cell' is missing"),
    ],
)
def test_unfair_or_broken_studies_are_refused(
    read: Callable[..., Zoo], raw: dict[str, Any], change: Callable[[Any], Any], message: str
) -> None:
    change(raw)
    with pytest.raises(ConfigError, match=message):
        read(raw)


def test_every_loss_gets_the_same_trials(study: Zoo) -> None:
    for sweep in study.sweeps.values():
        trials = sweep.trials()
        assert len(trials) == len({json.dumps([t.learning_rate, t.hyper]) for t in trials}) == study.tuning.trials


def test_a_joined_strength_sets_both_flags_and_knows_its_border(study: Zoo) -> None:
    sweep = study.sweeps["ppo_offline"]
    first = sweep.trials()[0]
    assert first.hyper["clip_low"] == first.hyper["clip_high"] == min(sweep.values)
    assert sweep.border(first) == ["learning_rate", "clip_low+clip_high"]
    assert sweep.border(sweep.trials()[4]) == []
    assert first.text(sweep.border(first)) == "clip_low 0.3*, clip_high 0.3*, lr 0.0003*"


def test_quick_is_a_part_of_the_full_study(study: Zoo, read: Callable[..., Zoo], raw: dict[str, Any]) -> None:
    chosen = {name: sweep.trials()[0] for name, sweep in study.sweeps.items()}
    full = [spec.file for spec in study.cells(chosen)]
    quick = {spec.file for spec in read(raw, quick=True).cells(chosen)}
    assert len(full) == len(set(full))
    assert quick < set(full)


def test_a_changed_sweep_or_budget_has_another_key_and_others_keep_theirs(
    study: Zoo, read: Callable[..., Zoo], raw: dict[str, Any]
) -> None:
    keys = {name: study.key(sweep) for name, sweep in study.sweeps.items()}
    raw["losses"]["dpo"]["beta"] = [0.1, 0.3, 0.9]
    changed = read(raw)
    assert {name for name in keys if changed.key(changed.sweeps[name]) != keys[name]} == {"dpo"}
    raw["final"]["everything"]["worlds"] = [7, 8, 9]
    raw["cell"]["checkpoints"] = 5
    assert read(raw).key(read(raw).sweeps["ipo"]) == keys["ipo"]
    raw["cell"]["steps"] += 1
    assert read(raw).key(read(raw).sweeps["ipo"]) != keys["ipo"]


def fake_result(spec: CellSpec) -> CellResult:
    """KL 0, 1.5 and 3. Reward falls with the distance of log(lr * strength) from that of the sweep's middle."""
    strength = next((value for value in spec.hyper.values() if isinstance(value, float)), 1.0)
    reward = 2 - 0.2 * abs(np.log(spec.learning_rate / 1e-3)) - 0.1 * abs(np.log(strength / 0.3)) + 0.1 * (spec.world % 3)
    points = [{"step": i, "kl": 1.5 * i, "reward": i * reward / 2, "regret": 3 - i * reward / 2} for i in range(3)]
    return CellResult(spec, tuple(points), 2.0)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[CellSpec]:
    """Cells without training; the specs that ran."""
    ran: list[CellSpec] = []

    def run(spec: CellSpec, cache: Path) -> CellResult:
        ran.append(spec)
        if spec.loss == "ipo" and spec.learning_rate > 2e-3:
            return CellResult(spec, error="TrainingError: the loss is not finite")
        return fake_result(spec)

    monkeypatch.setattr(zoo_cells, "run_spec", run)
    monkeypatch.setattr(
        zoo_cells, "describe_world", lambda seed, targets, cache: World(seed, 0.0, 0.5, 3.0, dict.fromkeys(targets, 4.0))
    )
    return ran


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    with Runner(tmp_path / "cache", 0, Console(quiet=True)) as made:
        yield made


def test_tuning_chooses_the_lowest_regret_and_keeps_every_trial(
    study: Zoo, fake: list[CellSpec], runner: Runner, tmp_path: Path
) -> None:
    assert not zoo_tuning.tune(study, ["dpo", "ipo", "sft"], tmp_path / "tuned.json", runner, tmp_path / "cells")
    tuned = zoo_tuning.current(study, zoo_tuning.read(tmp_path / "tuned.json"))
    assert {name: entry.chosen for name, entry in tuned.items()} == {
        "dpo": Trial(1e-3, {"beta": 0.3}),
        "ipo": Trial(1e-3, {"tau": 0.3}),
        "sft": Trial(1e-3, {}),
    }
    assert len(tuned["dpo"].trials) == study.tuning.trials
    assert tuned["dpo"].border == ()
    failed = [trial for trial in tuned["ipo"].trials if trial["error"]]
    assert {trial["learning_rate"] for trial in failed} == {3e-3}
    assert all(trial["criterion"] is None for trial in failed)
    assert {spec.world for spec in fake} == {*study.tuning.worlds}
    assert {spec.seed for spec in fake} == {study.tuning.seed}


def test_tuning_again_runs_what_is_missing_only(study: Zoo, fake: list[CellSpec], runner: Runner, tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    zoo_tuning.tune(study, ["dpo", "sft"], path, runner, tmp_path / "cells")
    wider = replace(study.sweeps["dpo"], values=(0.3, 1.0, 3.0))
    changed = replace(study, sweeps={**study.sweeps, "dpo": wider})
    reasons = zoo_tuning.missing(changed, zoo_tuning.read(path), ["dpo", "sft", "cpl"])
    assert reasons == {"dpo": "its sweep or budget has changed since it was tuned", "cpl": "never tuned"}
    before = len(fake)
    zoo_tuning.tune(changed, ["dpo"], path, runner, tmp_path / "cells")
    assert len(fake) - before == 3 * len(study.tuning.worlds), "trials that both sweeps have were finished before"
    assert zoo_tuning.missing(changed, zoo_tuning.read(path), ["dpo", "sft"]) == {}


def test_a_loss_whose_trials_all_fail_is_not_tuned(study: Zoo, fake: list[CellSpec], runner: Runner, tmp_path: Path) -> None:
    hot = replace(study.sweeps["ipo"], learning_rates=(3e-3, 1e-2, 3e-2))
    failed = zoo_tuning.tune(
        replace(study, sweeps={**study.sweeps, "ipo": hot}), ["ipo"], tmp_path / "tuned.json", runner, tmp_path / "cells"
    )
    assert "every trial failed" in failed["ipo"]
    assert "not finite" in failed["ipo"]
    assert zoo_tuning.read(tmp_path / "tuned.json") == {}


def test_a_damaged_file_of_settings_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "tuned.json").write_text('{"losses": {"dpo": {}}}')
    with pytest.raises(ConfigError, match="delete it and tune again"):
        zoo_tuning.read(tmp_path / "tuned.json")


def test_finished_cells_are_kept_and_failed_ones_run_again(
    study: Zoo, fake: list[CellSpec], runner: Runner, tmp_path: Path
) -> None:
    chosen = {"dpo": Trial(1e-3, {"beta": 0.3}), "ipo": Trial(3e-3, {"tau": 0.3})}
    specs = [study.cell_spec(name, trial, world, "bt") for name, trial in chosen.items() for world in (0, 1)]
    first = runner.cells(specs, tmp_path, "cells")
    assert [bool(first[spec.file].error) for spec in specs] == [False, False, True, True]
    del fake[:]
    again = runner.cells(specs, tmp_path, "cells")
    assert fake == specs[2:]
    assert again[specs[0].file].path == first[specs[0].file].path
    slower = replace(specs[0], budget=replace(specs[0].budget, steps=999))
    runner.cells([slower], tmp_path, "cells")
    assert fake[-1] == slower


@pytest.fixture
def report(study: Zoo) -> Report:
    """Six losses in four worlds: two alike, one far worse, one that stops at KL 0.4, one that failed once."""
    chosen = {name: study.sweeps[name].trials()[4] for name in ("dpo", "pl_dpo", "simpo", "sft", "ipo", "hinge")}
    lower = {"dpo": 0.0, "pl_dpo": 0.0, "simpo": 1.0, "sft": 0.5, "ipo": 0.0, "hinge": 0.05}
    rng = np.random.default_rng(0)
    results = {}
    for world in range(4):
        noise = dict(zip(chosen, rng.normal(0, 0.02, len(chosen)), strict=True))
        noise["pl_dpo"] = noise["dpo"]
        for name, trial in chosen.items():
            spec = study.cell_spec(name, trial, world, "bt")
            top = 0.2 if name == "sft" else 1.5
            points = [
                {"step": i, "kl": top * i, "reward": i * (2 - lower[name] + noise[name] + world), "regret": 3 - i + noise[name]}
                for i in range(3)
            ]
            error = "TrainingError: not finite" if (name, world) == ("ipo", 2) else ""
            results[spec.file] = CellResult(spec, tuple(points), 2.0, error)
    part = Part(tuple(chosen), (0, 1, 2, 3), ("bt",))
    worlds = {seed: World(seed, 0.0, 0.5, 8.0, dict.fromkeys(study.targets, 9.0)) for seed in part.worlds}
    facts = {
        "date": "2026-01-01", "command": "make bench-zoo", "machine": "2-core CPU", "torch": "2", "workers": 2, "cells": 24,
        "cell_seconds": 2.0, "cpu_minutes": 0.8,
    }  # fmt: skip
    found = blocks(study, part, chosen, results)
    return Report(study.targets, 1.0, found, found, worlds, {"cpl": "not tuned: never tuned"}, {"dpo": ["beta"]}, 9, facts)


def test_the_read_out_tells_apart_what_differs_and_lists_the_rest(report: Report) -> None:
    (block,) = report.everything
    assert ranked(report, block)[-1] == "simpo"
    assert [row.loss for row in unreached(report, block)] == ["sft"]
    assert equal_losses(block) == [["dpo", "pl_dpo"]]
    assert list(block.failed) == ["ipo"]
    standing = {s.name: s for s in block.at[1.0].standings}
    assert set(standing) == {"dpo", "pl_dpo", "simpo", "hinge"}
    assert (standing["simpo"].best_rank, standing["simpo"].worst_rank) == (4, 4)
    assert standing["dpo"].letters == standing["pl_dpo"].letters != standing["simpo"].letters


def test_the_page_hides_nothing(report: Report) -> None:
    for page in (markdown(report), readme_block(report)):
        assert "`ipo`, 1 of 4 cells: TrainingError: not finite" in page
        assert "cpl (not tuned: never tuned)" in page
        assert "Not reached: 1 nat" in page
        assert "| `sft` | completions |" in page
        assert "`dpo`, `pl_dpo`" in page
        assert "degrees of freedom" in page
        assert "independent from cell to cell" in page
    assert "beta 0.3*, lr 0.001" in everything_table(report, report.everything[0])
    assert "make bench-zoo" in readme_block(report)


def test_regret_at_the_target_charges_the_target(report: Report) -> None:
    """J* = 8; reward of dpo at KL 1 is r sqrt(1/1.5), r = 2 + noise + world; regret = 8 - (reward - 0.5)."""
    (block,) = report.everything
    row = next(row for row in block.rows if row.loss == "dpo")
    mean = sum(row.rewards(1.0)) / 4
    line = next(text for text in everything_table(report, block).splitlines() if text.startswith("| `dpo` "))
    assert f"| {8 - (mean - 0.5):.3f} |" in line


def test_tables_have_one_width(report: Report) -> None:
    lines = [line for line in markdown(report).splitlines() if line.startswith("| ")]
    head: list[int] = []
    for line in lines:
        if line.startswith("| loss"):
            head = [line.count("|")]
        assert line.count("|") == head[0], line


def test_both_pictures_are_drawn(report: Report, study: Zoo, tmp_path: Path) -> None:
    zoo.write_report(report, study, tmp_path, tmp_path / "figures")
    for name in ("zoo.png", "gradients.png"):
        assert (tmp_path / "figures" / name).read_bytes().startswith(b"\x89PNG")
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["everything"][0]["failed"]["ipo"].startswith("1 of 4")


def test_the_gradient_of_dpo_is_that_of_the_paper() -> None:
    """dL/dlogp(y_w) = -beta sigma(-beta m), and its negative for y_l (Rafailov 2023, section 4)."""
    beta, margins = 0.3, torch.tensor(zoo_gradients.MARGINS)
    found = zoo_gradients.coefficients(losses.get("dpo").bind(beta=beta))
    expected = (-beta * torch.sigmoid(-beta * margins)).numpy()
    np.testing.assert_allclose(found.chosen, expected, atol=1e-12)
    np.testing.assert_allclose(found.rejected, -expected, atol=1e-12)


def test_a_token_level_loss_is_moved_as_a_whole() -> None:
    """SFT is the mean over 4 tokens, so dL/dlogp is -1/4 for chosen and nothing for rejected."""
    found = zoo_gradients.coefficients(losses.get("sft").bind())
    np.testing.assert_allclose(found.chosen, -1 / zoo_gradients.TOKENS)
    assert not found.rejected.any()


def test_prefixes_level_by_level_give_the_plain_forwards_table() -> None:
    from transformers import AutoModelForCausalLM

    world = ExactWorld(WorldConfig.tabular(seed=3))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(world.model_config()).eval()
    torch.testing.assert_close(zoo_cells.next_logps_by_depth(world, model), world.next_logps(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nonsense"], "nonsense: not in the study"),
        (["--config", "no/such.yaml"], "No such file"),
        (["--tuned", "no/such.json", "--only", "dpo"], "tune them first: --tune"),
    ],
)
def test_bad_options_say_what_to_do(
    arguments: list[str], message: str, study: Zoo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(zoo, "load", lambda path, quick: study if path == CONFIG else load(path, quick=quick))
    assert zoo.main([*arguments, "--workers", "0", "--output-dir", str(tmp_path)]) == 2
    assert message in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_a_cell_that_fails_in_a_worker_is_a_result(study: Zoo, tmp_path: Path) -> None:
    spec = study.cell_spec("no_such_loss", Trial(1e-3, {}), 0, "bt")
    with Runner(tmp_path / "cache", 1, Console(quiet=True)) as made:
        result = made.cells([spec], tmp_path / "cells", "cells")[spec.file]
    assert "unknown algorithm 'no_such_loss'" in result.error
    assert not (tmp_path / "cells").exists()


@pytest.mark.slow
def test_a_tiny_study_from_end_to_end(
    read: Callable[..., Zoo], raw: dict[str, Any], tmp_path: Path, shared_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tunes two losses, runs them in three worlds, and resumes with nothing left to do."""
    raw["cell"].update(steps=4, pairs=256, checkpoints=2)
    raw["learning_rates"] = {"grid": [1e-3], "without_strength": [3e-4, 1e-3, 3e-3]}
    raw["tuning"].update(worlds=[100], trials=3, checkpoints=2)
    raw["final"].update(targets=[0.001, 2.0], primary=0.001)
    raw["final"]["everything"]["worlds"] = raw["final"]["headline"]["worlds"] = [0, 1, 2]
    read(raw)
    monkeypatch.setenv("PREFOPT_CACHE", str(shared_cache))
    # Any reference will do; a hundred times less of its training.
    monkeypatch.setattr(exact, "START_BUDGET", replace(exact.START_BUDGET, max_steps=3))
    monkeypatch.setattr(exact, "START_SAMPLES", 768)
    zoo_cells._task.cache_clear()
    common = ["--config", str(tmp_path / "zoo.yaml"), "--tuned", str(tmp_path / "tuned.json")]
    common += ["--output-dir", str(tmp_path / "out"), "--only", "dpo", "sft", "--workers", "0"]
    assert zoo.main([*common, "--tune"]) == 0
    assert set(json.loads((tmp_path / "tuned.json").read_text())["losses"]) == {"dpo", "sft"}
    assert zoo.main([*common, "--figures", str(tmp_path / "figures")]) == 0
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    (block,) = stored["everything"]
    assert [row["loss"] for row in block["rows"]] == ["dpo", "sft"]
    assert len(block["rows"][0]["reward"]["0.001"]) == 3
    assert {s["name"] for s in block["regret"]["standings"]} == {"dpo", "sft"}
    assert len(stored["headline"]) == 4
    cells = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()}
    assert len(cells) == 2 * 3 * 4
    assert zoo.main(common) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()} == cells
