"""Reward collapse: the exact program against its conditions, closed forms and other solutions; training that ends there."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.polynomial import legendre
from transformers import AutoTokenizer

from benchmarks import collapse
from benchmarks.collapse import LIMITS, SIGMOIDS
from benchmarks.collapse_exact import Array, Optimum, asymmetry, closed_form, end_mass, ks_distance, solve, w1_distance
from benchmarks.collapse_training import OFFSET, read_lists, small_llama, train_network, train_reward_model, train_table
from losses.rank_utility import parse_utility
from prefopt.errors import DataError

SLOPES: dict[str, Callable[[Array], Array]] = {
    "power:0.5": lambda x: 0.5 / np.sqrt(x),
    "log": lambda x: 1 / x,
    "inverse_power:0.5": lambda x: 0.5 * x**-1.5,
    "inverse": lambda x: x**-2.0,
    "log_sigmoid:1": lambda x: 1 / (1 + np.exp(x)),
    "log_sigmoid:20": lambda x: 20 / (1 + np.exp(20 * x)),
}


@cache
def optimum(utility: str, n: int = 120, offset: float = 0.0) -> Optimum:
    return solve(utility, n, offset=offset)


@pytest.mark.parametrize("utility", SLOPES)
def test_no_block_of_rewards_gains_by_moving(utility: str) -> None:
    """First-order conditions with slopes written out here: lifting the best k rewards together gains the same for every k whose
    gap to the next is open, and no more where it is closed."""
    rewards = optimum(utility).rewards
    slope = SLOPES[utility]
    gains = np.array([slope(rewards[:k, None] - rewards[None, k:]).sum() for k in range(1, 120)])
    gaps = -np.diff(rewards)
    open_gaps = gaps > 1e-9
    assert open_gaps.all() == (not utility.startswith("log_sigmoid"))
    assert gains[open_gaps] == pytest.approx(gains.max(), rel=1e-6)
    assert gaps.min() >= 0
    assert gaps.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("utility", [*LIMITS, *SIGMOIDS])
def test_the_bound_holds_against_other_rewards(utility: str) -> None:
    found = optimum(utility, 20)
    function = parse_utility(utility)
    better, worse = np.triu_indices(20, 1)
    generator = np.random.default_rng(0)
    for scale in (0.3, 0.01):
        gaps = -np.diff(found.rewards) * np.exp(scale * generator.standard_normal(19)) + 1e-6
        other = np.append(np.cumsum(gaps[::-1])[::-1], 0) / gaps.sum()
        assert function(torch.tensor(other[better] - other[worse])).mean().item() < found.value + found.gap
    assert found.gap <= 1e-10


def test_log_has_its_optimum_at_the_gauss_lobatto_points() -> None:
    """Fekete's points of [-1, 1] are the ends and the zeros of P'_{n-1} (Stieltjes)."""
    inner = np.real(legendre.legroots(legendre.legder([0] * 119 + [1])))
    points = (np.sort([-1, *inner, 1])[::-1] + 1) / 2
    np.testing.assert_allclose(optimum("log").rewards, points, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("utility", "offset", "second"),
    [
        ("linear", 0.0, 1.0),
        ("linear", 0.1, 1.0),
        ("log", 0.0, (5 + math.sqrt(5)) / 10),  # 5a^2 - 5a + 1 = 0
        ("log", 0.1, 1.1 - (6.2 - math.sqrt(6.2**2 - 31.2)) / 10),  # 5u^2 - 6.2u + 1.56 = 0, u = a + 0.1
        ("log_sigmoid:1", 0.0, 1.0),
    ],
)
def test_four_completions_on_paper(utility: str, offset: float, second: float) -> None:
    """Rewards 1, 1-a, a, 0: 2U(1-a) + 2U(a) + U(1-2a) is highest where U'(a) = U'(1-a) + U'(1-2a), or at a = 0."""
    assert optimum(utility, 4, offset).rewards == pytest.approx([1, second, 1 - second, 0], abs=1e-8)


@pytest.mark.parametrize("utility", ["power:0.5", "inverse_power:0.5", "inverse"])
@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_four_completions_balance(utility: str, offset: float) -> None:
    a = optimum(utility, 4, offset).rewards[2]
    slope = SLOPES[utility]
    assert slope(a + offset) == pytest.approx(slope(1 - a + offset) + slope(1 - 2 * a + offset), rel=1e-6)


@pytest.mark.parametrize("utility", LIMITS)
def test_120_rewards_are_near_the_closed_form(utility: str) -> None:
    rewards, law = optimum(utility).rewards, closed_form(utility)
    if utility == "linear":
        assert w1_distance(rewards, law) < 1e-9
    else:
        assert ks_distance(rewards, law) < 0.03
        by_law = {other: ks_distance(rewards, closed_form(other)) for other in LIMITS if other != "linear"}
        assert min(by_law, key=lambda other: by_law[other]) == utility, "each goes to a limit of its own"
    assert (rewards[0], rewards[-1]) == pytest.approx((1, 0), abs=1e-12)
    assert asymmetry(rewards) < 1e-12


def test_closed_forms() -> None:
    """Beta by the exponent: arcsine for log, uniform for -1/x, two points for x; beyond and for log sigma(kx) none."""
    assert closed_form("log").cdf(0.25) == pytest.approx(2 / math.pi * math.asin(0.5))
    assert closed_form("inverse").cdf(0.3) == pytest.approx(0.3)
    assert closed_form("linear").ppf([0.25, 0.75]).tolist() == [0, 1]
    assert closed_form("power:0.2").args == pytest.approx((0.4, 0.4))
    assert closed_form("inverse_power:0.2").args == pytest.approx((0.6, 0.6))
    assert closed_form("log_sigmoid:4") is None
    assert closed_form("inverse_power:2") is None


@pytest.mark.parametrize(("scale", "share"), [(1, 0.77), (4, 0.42), (20, 0.13), (100, 0.05)])
def test_log_sigmoid_ends_hold_less_as_it_gets_steeper(scale: int, share: float) -> None:
    assert end_mass(optimum(f"log_sigmoid:{scale}").rewards) == pytest.approx(share, abs=0.005)


def test_log_sigmoid_of_a_small_scale_has_atoms_and_an_even_bulk() -> None:
    """For small k the bulk has density k/4, and each end what is left: (1 - k/4)/2. At k = 0.4 and n = 400: 0.45."""
    rewards = optimum("log_sigmoid:0.4", 400).rewards
    assert (rewards > 1 - 1e-6).mean() == pytest.approx(0.45, abs=0.01)
    bulk = rewards[(rewards > 1e-6) & (rewards < 1 - 1e-6)]
    assert -np.diff(bulk) == pytest.approx(1 / (len(bulk) + 1), rel=0.1)


def test_solver_errors() -> None:
    with pytest.raises(ValueError, match="n is 1; expected at least 2"):
        solve("log", 1)
    with pytest.raises(ValueError, match="'log' with n = 9 has not converged in 2 steps"):
        solve("log", 9, limit=2)


@pytest.mark.parametrize("utility", ["power:0.5", "inverse"])
def test_free_rewards_are_trained_to_the_optimum(utility: str) -> None:
    trained = train_table(utility, completions=20, steps=400)
    exact = optimum(utility, 20, OFFSET).rewards
    assert max(w1_distance(rewards, exact) for rewards in trained.rewards) < 0.03
    assert w1_distance(*trained.rewards) < 0.01
    best, last = trained.rewards[:, :10], trained.rewards[:, 10:]
    assert best.min() > last.max(), "in the order of the ranks"


def test_prompts_of_one_network_differ_only_by_their_utility() -> None:
    """With one utility all prompts end alike; with one for each kind, those of different kinds end further apart."""
    small = partial(train_network, prompts=4, completions=20, steps=400)
    shared, aware = small("log").rewards, small("linear,inverse")
    assert max(w1_distance(shared[0], other) for other in shared[1:]) < 0.04
    linear, inverse = aware.of(0), aware.of(1)
    assert (len(linear), len(inverse)) == (2, 2)
    within = max(w1_distance(*linear), w1_distance(*inverse))
    across = min(w1_distance(one, other) for one in linear for other in inverse)
    assert within < 0.05
    assert across > 0.15


@pytest.fixture
def lists(jsonl: Callable[..., Path]) -> Path:
    """Six good lists of four, and before them one with a tie and one whose completions are equal once they are cut."""
    words = [[*"abcd"], [*"dcba"], [*"bdac"], [*"cadb"], [*"adcb"], [*"bcad"]]
    rows = [
        {"prompt": f"{word[0]} {word[1]} ", "responses": [f"{one} {i}" for one in word], "ranks": [1, 2, 3, 4]}
        for i, word in zip("abcdab", words, strict=True)
    ]
    tie = {"prompt": "a ", "responses": [*"abcd"], "ranks": [1, 2, 2, 3]}
    long = {"prompt": "b ", "responses": ["a " * 70 + word for word in "abcd"], "ranks": [1, 2, 3, 4]}
    return jsonl([tie, long, *rows], "lists.jsonl")


def test_lists_without_ties_take_turns(lists: Path, tiny_model: Path, jsonl: Callable[..., Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    found = read_lists(str(lists), tokenizer, 6, utilities=2)
    assert [example.id.rsplit(":")[-1] for example in found] == [*"345678"]
    assert [example.labels.utility_id for example in found] == [0, 1, 0, 1, 0, 1]
    with pytest.raises(DataError, match="7 lists of 4 without ties are needed, 6 were found"):
        read_lists(str(lists), tokenizer, 7)
    rows = [json.loads(line) for line in lists.read_text().splitlines()]
    named = jsonl([{**row, "utility_id": 1} for row in rows], "named.jsonl")
    assert {example.labels.utility_id for example in read_lists(str(named), tokenizer, 6, utilities=2)} == {1}


def test_reward_model_on_lists_ends_at_the_optimum(lists: Path, tiny_model: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    examples = read_lists(str(lists), tokenizer, 6)
    model = small_llama(len(tokenizer))
    trained = train_reward_model(model, tokenizer, examples, "inverse", learning_rate=1e-3, epochs=100)
    expected = np.broadcast_to(optimum("inverse", 4, OFFSET).rewards, (6, 4))
    np.testing.assert_allclose(trained.rewards, expected, rtol=0, atol=0.08)


def test_the_benchmark_prints_writes_and_draws(
    lists: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(collapse, "QUICK", collapse.Scale(table=3, network=3, lists=4, epochs=1))
    written = tmp_path / "collapse.json"
    collapse.main(
        ["--quick", "--lists", str(lists), "--model", str(tiny_model), "--figures", str(tmp_path), "--json", str(written)]
    )
    found = json.loads(written.read_text())
    exact, trained, reward_model, ranks = (table["rows"] for table in found["tables"])
    assert {row["utility"]: row["limit"] for row in exact}["log"] == "arcsine"
    assert [row["utility"] for row in trained] == [*LIMITS, "log", "linear", "inverse"]
    assert [row["prompts"] for row in reward_model] == [4, 2, 2]
    assert [row["rank"] for row in ranks] == [1, 2, 3, 4] * 3
    assert {name: [*runs] for name, runs in found["rewards"].items()} == {
        "free": [*LIMITS], "network": ["log", "linear,inverse"], "lists": ["log", "linear,inverse"],
    }  # fmt: skip
    assert "Reward model on ranked lists" in capsys.readouterr().out
    assert (tmp_path / "collapse.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(collapse, "QUICK", collapse.Scale(table=3, network=3, lists=9, epochs=1))
    with pytest.raises(SystemExit, match=r"error: .*9 lists of 4"):
        collapse.main(["--quick", "--lists", str(lists), "--model", str(tiny_model)])


def test_lists_name_their_utilities_on_the_command_line(
    cli: Any, jsonl: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    """The utility that a row names reaches the loss: with only `linear` used, the logged losses are those of `linear` alone."""
    rows = [
        {"prompt": f"{' '.join(word)} ", "responses": ["a", "b b", "c"], "ranks": [0, 1, 2]}
        for word in product("abcd", repeat=3)
    ]
    logged = {}
    for utility, number in (("linear", 0), ("linear,inverse", 0), ("linear,inverse", 1)):
        path = jsonl([{**row, "utility_id": number} for row in rows], f"{number}.jsonl")
        folder = tmp_path / f"{utility}{number}"
        done = cli(
            "train", "rank_utility", "--utility", utility, "--data", path, "--model", tiny_model, "--output-dir", folder,
            "--max-steps", 2, "--batch-size", 8, "--log-every", 1, "--learning-rate", 0.01, "--eval-pairs", 4,
            "--eval-prompts", 2, "--eval-tokens", 2, "--judge-pairs", 0,
        )  # fmt: skip
        assert done.code == 0, done.err
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        logged[utility, number] = [line["loss"] for line in lines if "loss" in line]
    assert len(logged["linear", 0]) == 2
    assert logged["linear,inverse", 0] == logged["linear", 0]
    assert logged["linear,inverse", 1][1] != logged["linear", 0][1]
