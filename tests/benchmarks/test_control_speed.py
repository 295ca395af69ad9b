"""The plain side of bench-control-speed against numbers by hand, and both sides of a small setting against each other."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import control_speed, plain_cpl
from benchmarks.control_speed import TOLERANCE, Contest, Setting, disagreement


def small(dropout: float = 0.0) -> Setting:
    return Setting(dropout, pairs=4, length=3, hidden=(8, 8), updates=3)


def test_the_plain_loss_is_the_one_on_paper() -> None:
    """One pair of two steps. The mean is 0; chosen actions 1 and 0 give S = -0.1, rejected ones 1 and -1 give S = -0.2: with
    bias 0.5 the argument is -0.1 + 0.1 = 0, with bias 1 it is 0.1."""
    observations, actions = torch.zeros(2, 2, 3), torch.tensor([[[1.0], [0.0]], [[1.0], [-1.0]]])
    network = plain_cpl.build_network(3, 1, (2,), 0.0)
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    found = [plain_cpl.cpl_objective(network, observations, actions, alpha=0.1, bias=bias).item() for bias in (0.5, 1.0)]
    assert found == pytest.approx([math.log(2), math.log1p(math.exp(-0.1))])


def test_segments_are_cut_where_they_begin() -> None:
    table = torch.arange(20.0).view(10, 2)
    data = plain_cpl.stack_pairs(table, -table[:, :1], torch.tensor([4, 0]), torch.tensor([1, 7]), 3)
    observations, actions = data.batch([1, 0])
    assert observations[:, :, 0].tolist() == [[0, 2, 4], [8, 10, 12], [14, 16, 18], [2, 4, 6]]  # chosen, then rejected
    assert torch.equal(actions.squeeze(-1), -observations[:, :, 0])


def test_both_sides_have_one_loss_and_one_gradient() -> None:
    contest = Contest(small())
    found = contest.gradients()
    assert all(float(gradient.norm()) > 0 for gradient in found["plain"][1])
    assert max(disagreement(found)) < TOLERANCE
    # The same pairs in the same order: the mean over three updates from one start is one number.
    turns = contest.play(rounds=1)
    assert [len(turns[side]) for side in turns] == [1, 1]
    assert turns["plain"][0].loss == pytest.approx(turns["prefopt"][0].loss, rel=1e-5)


def test_another_gradient_is_noticed() -> None:
    found = Contest(small()).gradients()
    loss, gradients = found["prefopt"]
    assert disagreement({**found, "prefopt": (1.01 * loss, gradients)})[0] == pytest.approx(0.01, rel=1e-3)
    assert disagreement({**found, "prefopt": (loss, [*gradients[:-1], 1.1 * gradients[-1]])})[1] == pytest.approx(0.1, rel=1e-3)


def test_dropout_is_on_at_both_sides() -> None:
    """Equal pairs and weights, so only masks can move the losses of the turns away from those without dropout."""
    without, with_dropout = Contest(small()), Contest(small(dropout=0.5))
    for side in control_speed.SIDES:
        assert with_dropout.turn(side).loss != pytest.approx(without.turn(side).loss, rel=1e-6)


def test_the_script_prints_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_speed, "keep_freed_memory", lambda: True)  # it would stay in force for later tests
    monkeypatch.setattr("benchmarks.measuring.BUSY_LIMIT", 2.0)  # the tests' own neighbours disturb nothing here
    sizes = ["--pairs", "4", "--length", "3", "--hidden", "8", "--updates", "2", "--rounds", "1", "--threads", "1"]
    assert control_speed.main([*sizes, "--json", str(tmp_path / "speed.json")]) == 0
    assert "dropout 0.25, 1 thread" in capsys.readouterr().out
    written = json.loads((tmp_path / "speed.json").read_text())
    assert [row["side"] for row in written["tables"][0]["rows"]] == 2 * list(control_speed.SIDES)
    assert written["failures"] == []


def test_a_disagreement_fails_the_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(control_speed, "keep_freed_memory", lambda: True)
    monkeypatch.setattr("benchmarks.measuring.BUSY_LIMIT", 2.0)
    monkeypatch.setattr(plain_cpl, "cpl_objective", lambda network, o, a, **_: torch.square(network(o) - a).mean())
    sizes = ["--pairs", "4", "--length", "3", "--hidden", "8", "--updates", "2", "--rounds", "1", "--threads", "1"]
    assert control_speed.main([*sizes, "--dropout", "0"]) == 1
    assert "FAILED" in capsys.readouterr().out
