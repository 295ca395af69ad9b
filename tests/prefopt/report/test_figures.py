from __future__ import annotations

import io
import math
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.image import imread

from prefopt.report.figures import cost_bars, draw_all, final_values, learning_curves
from prefopt.report.plane import plane_metric, reward_kl_plane
from prefopt.report.plotting import looks, mean_path, points, smooth, styled, to_png
from prefopt.report.schema import Ledger, Timings

NAMES = ["forest", "reward_kl", "learning_curves", "final_values", "cost"]


def texts_of(figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts] + [text.get_text() for text in figure.texts]


def pixels(png: bytes) -> np.ndarray:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    return imread(io.BytesIO(png), format="png")


@pytest.mark.parametrize(("task", "seeds"), [("exact", 1), ("exact", 3), ("text", 3)])
def test_every_figure_is_a_picture_of_sensible_size(task: str, seeds: int, make_exact, make_text, make_timings) -> None:
    results = (make_exact if task == "exact" else make_text)(seeds)
    pictures = draw_all(results, make_timings(results))
    assert [picture.name for picture in pictures] == NAMES
    for picture in pictures:
        height, width, _ = pixels(picture.png).shape
        assert 900 <= width <= 2200
        assert 300 <= height <= 2200
        assert pixels(picture.png)[..., :3].std() > 0.05
        assert picture.caption.endswith(".")
        assert picture.caption.count(". ") == 0


def test_equal_results_give_equal_pictures_and_leave_matplotlib_alone(make_exact) -> None:
    before = dict(mpl.rcParams)
    results = make_exact(1, ("dpo", "ipo"))
    assert draw_all(results) == draw_all(results)
    assert dict(mpl.rcParams) == before


def test_plane_starts_at_the_reference_and_ends_at_the_mean_over_seeds(make_exact) -> None:
    results = make_exact(3, ("dpo", "ipo"))
    with styled():
        (axes,) = reward_kl_plane(results).axes
    curves = [line.get_xydata() for line in axes.lines]
    for label in ("dpo", "ipo"):
        last = [cell.path[-1] for cell in results.cells if cell.label == label]
        end = (np.mean([point["kl"] for point in last]), np.mean([point["reward"] for point in last]))
        assert any(len(curve) > 2 and np.allclose(curve[0], (0, 0.11)) and np.allclose(curve[-1], end) for curve in curves)


def test_plane_labels_directly_and_shows_the_frontier_only_where_it_is_known(make_exact, make_text) -> None:
    with styled():
        exact, text = reward_kl_plane(make_exact(3)), reward_kl_plane(make_text(3))
    assert {"exact optimum", "reference", "dpo", "dpo beta=0.5", "75%"} <= set(texts_of(exact))
    assert "exact optimum" not in texts_of(text)
    assert exact.axes[0].get_legend() is None
    assert text.axes[0].get_ylabel() == "score, big-rm"
    assert len(exact.axes[0].collections) == 4
    assert len(text.axes[0].collections) == 0


def test_labels_of_the_plane_do_not_cover_each_other(make_exact) -> None:
    results = make_exact(3)
    with styled():
        figure = reward_kl_plane(results)
        to_png(figure)
    names = {setting.label for setting in results.settings} | {"reference"}
    renderer = figure.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.axes[0].texts if text.get_text() in names]
    assert len(boxes) == len(names)
    overlapping = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert not overlapping


def test_plane_turns_to_a_root_scale_for_a_far_run(make_exact, make_text) -> None:
    with styled():
        near, far = reward_kl_plane(make_exact(1)), reward_kl_plane(make_text(1))
    assert near.axes[0].get_xscale() == "linear"
    assert far.axes[0].get_xscale() == "function"
    assert "square-root scale" in far.axes[0].get_xlabel()


def test_smoke_runs_are_stamped(make_exact) -> None:
    with styled():
        for seeds, stamped in ((1, True), (3, False)):
            for draw in (reward_kl_plane, learning_curves, final_values, cost_bars):
                assert ("smoke run: no ranking" in texts_of(draw(make_exact(seeds)))) == stamped


def test_figures_cope_with_failures_nan_and_missing_metrics(make_exact, fail) -> None:
    results = make_exact(3, ("dpo", "ipo", "cpl", "kto"))
    for seed in results.seeds:
        results = fail(results, "ipo", seed, "boom")
    results = fail(results, "dpo", 1, "boom")
    broken = {"step": 75.0, "kl": math.nan, "reward": 0.4}
    cells = []
    for cell in results.cells:
        if cell.label == "cpl":
            cell = replace(cell, path=(broken,), curve=(), final={"reward": math.nan})
        if cell.label == "kto":
            cell = replace(cell, path=({"step": 0.0}, {"step": 5.0, "kl": 0.2, "reward": 0.3}), ledger=Ledger())
        cells.append(cell)
    results = replace(results, cells=tuple(cells))
    assert [picture.name for picture in draw_all(results)] == NAMES
    with styled():
        plane, dots = reward_kl_plane(results), final_values(results)
    assert {"dpo", "kto"} <= set(texts_of(plane))
    assert not {"ipo", "cpl"} & set(texts_of(plane))
    assert {"failed", "not measured"} <= set(texts_of(dots))


def test_nothing_to_draw_is_no_figure(make_exact, fail) -> None:
    results = make_exact(1, ("dpo",))
    results = fail(results, "dpo", 0, "boom")
    assert draw_all(results, Timings()) == ()


def test_intervals_are_drawn_from_three_seeds_on(make_exact) -> None:
    with styled():
        assert not final_values(make_exact(2)).axes[0].containers
        assert len(final_values(make_exact(3)).axes[0].containers) == len(make_exact(3).settings)


def test_plane_metric_is_the_reward_of_the_frontier_or_the_primary_one(make_exact, make_text) -> None:
    exact = make_exact(1)
    regret_first = tuple(replace(metric, primary=metric.key == "regret") for metric in exact.metrics)
    assert plane_metric(replace(exact, metrics=regret_first)) == "reward"
    assert plane_metric(make_text(1)) == "score/big-rm"


def test_thirty_settings_all_look_different(make_exact) -> None:
    results = make_exact(1, ("dpo",))
    many = replace(results, settings=tuple(replace(results.settings[0], label=f"s{i}") for i in range(30)))
    assert len({(look.colour, str(look.dash)) for look in looks(many).values()}) == 30


def test_paths_are_averaged_where_every_seed_has_a_step() -> None:
    first = points([{"step": 0, "kl": 0.0, "reward": 1.0}, {"step": 5, "kl": 2.0, "reward": 3.0}], "kl", "reward")
    second = points(
        [{"step": 5, "kl": 4.0, "reward": 5.0}, {"step": 9, "kl": math.inf, "reward": 1.0}, {"step": 7}], "kl", "reward"
    )
    assert second == {5: (4.0, 5.0)}
    assert mean_path([first, second]) == [(3.0, 4.0)]
    assert mean_path([]) == []


def test_a_long_legend_stays_inside_of_its_figure(make_exact) -> None:
    results = make_exact(1)
    names = {s.label: f"{s.label} with a long name" for s in results.settings}
    results = replace(
        results, settings=tuple(replace(s, label=names[s.label]) for s in results.settings),
        cells=tuple(replace(cell, label=names[cell.label]) for cell in results.cells),
    )  # fmt: skip
    with styled():
        figure = learning_curves(results)
        to_png(figure)
    (legend,) = figure.legends
    assert len(legend.get_texts()) == len(names)
    assert legend.get_window_extent().x1 <= figure.bbox.x1


def test_running_mean_shortens_at_the_ends() -> None:
    assert smooth([0, 3, 6, 3], 3).tolist() == [1.5, 3.0, 4.0, 4.5]
    assert smooth([1, 2], 1).tolist() == [1.0, 2.0]
