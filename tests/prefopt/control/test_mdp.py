"""The exact MDP: its equations, its optimum from several sides, and its samples."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from prefopt.control.gridworld import ACTIONS, ARROWS, draw_layout, gridworld, render
from prefopt.control.mdp import TabularMDP, policy_kl, regret, sample_steps, soft_optimal, soft_value, value, visitation
from prefopt.errors import ConfigError, DataError

GRID = gridworld()
OPTIMUM = soft_optimal(GRID)


def random_mdp(seed: int, states: int = 4, actions: int = 3, discount: float = 0.8, temperature: float = 0.7) -> TabularMDP:
    generator = torch.Generator().manual_seed(seed)
    transitions = torch.rand(states, actions, states, generator=generator, dtype=torch.float64).square()
    start = torch.rand(states, generator=generator, dtype=torch.float64)
    rewards = torch.randn(states, actions, generator=generator, dtype=torch.float64)
    return TabularMDP(transitions / transitions.sum(-1, keepdim=True), rewards, discount, temperature, start / start.sum())


def random_logps(mdp: TabularMDP, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(mdp.states, mdp.actions, generator=generator, dtype=torch.float64).log_softmax(-1)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_one_state_by_hand() -> None:
    """One state, rewards log 1 and log 3, temperature 1, discount 1/2: V = log 4 + V/2, pi* = 1/4 and 3/4, A* = log pi*."""
    one = torch.ones(1, dtype=torch.float64)
    mdp = TabularMDP(torch.ones(1, 2, 1, dtype=torch.float64), torch.tensor([[0.0, math.log(3)]]).double(), 0.5, 1.0, one)
    found = soft_optimal(mdp)
    close(found.v, 2 * math.log(4) * one, 1e-7)
    close(found.logps.exp(), torch.tensor([[0.25, 0.75]]).double(), 1e-7)


@pytest.mark.parametrize("mdp", [GRID, random_mdp(0), random_mdp(1, discount=0.99, temperature=0.2)])
def test_the_optimum_satisfies_its_equations(mdp: TabularMDP) -> None:
    found = soft_optimal(mdp)
    close(found.q, mdp.rewards + mdp.discount * torch.einsum("sat,t->sa", mdp.transitions, found.v))
    close(found.v, mdp.temperature * (found.q / mdp.temperature).exp().sum(-1).log())
    close(found.advantages, found.q - found.v[:, None])
    close(found.advantages, mdp.temperature * found.logps)
    close(found.logps.exp().sum(-1), torch.ones(mdp.states, dtype=torch.float64))
    assert float(found.advantages.max()) < 0


@pytest.mark.parametrize("mdp", [GRID, random_mdp(2)])
def test_plain_value_iteration_comes_to_the_same_values(mdp: TabularMDP) -> None:
    v = torch.zeros(mdp.states, dtype=torch.float64)
    for _ in range(400):
        v = mdp.temperature * torch.logsumexp((mdp.rewards + mdp.discount * mdp.transitions @ v) / mdp.temperature, -1)
    close(soft_optimal(mdp).v, v)


def test_a_cold_optimum_is_that_of_plain_value_iteration() -> None:
    """The price of entropy gone, V = max_a Q, up to temperature * log A / (1 - discount)."""
    mdp = random_mdp(3, temperature=1e-4)
    v = torch.zeros(mdp.states, dtype=torch.float64)
    for _ in range(400):
        q = mdp.rewards + mdp.discount * mdp.transitions @ v
        v = q.amax(-1)
    found = soft_optimal(mdp)
    assert float((found.v - v).abs().max()) <= 1e-4 * math.log(mdp.actions) / (1 - mdp.discount)
    assert torch.equal(found.logps.argmax(-1), q.argmax(-1))


def test_values_are_those_of_a_long_rollout_of_distributions() -> None:
    mdp = random_mdp(4)
    logps = random_logps(mdp, 0)
    policy = logps.exp()
    moves = torch.einsum("sa,sat->st", policy, mdp.transitions)
    income = (policy * mdp.rewards).sum(-1)
    bonus = -mdp.temperature * (policy * logps).sum(-1)
    occupied = torch.eye(mdp.states, dtype=torch.float64)
    plain, soft, visits = 0.0, 0.0, 0.0
    for step in range(300):
        weighted = mdp.discount**step * occupied
        plain, soft, visits = plain + weighted @ income, soft + weighted @ (income + bonus), visits + mdp.start @ weighted
        occupied = occupied @ moves
    assert isinstance(plain, Tensor)
    assert isinstance(soft, Tensor)
    close(value(mdp, logps), plain)
    close(soft_value(mdp, logps), soft)
    close(visitation(mdp, logps), (1 - mdp.discount) * visits)
    close(visitation(mdp, logps).sum(), torch.tensor(1.0, dtype=torch.float64))


def test_the_optimum_maximises_soft_value_in_every_state() -> None:
    for seed in range(10):
        for mixture in (0.01, 0.3, 1.0):
            other = (OPTIMUM.logps + mixture * torch.randn(25, 4, generator=torch.Generator().manual_seed(seed))).log_softmax(
                -1
            )
            assert bool((soft_value(GRID, other) < OPTIMUM.v).all())
    close(soft_value(GRID, OPTIMUM.logps), OPTIMUM.v)


def test_the_policy_gradient_of_soft_value_vanishes_at_the_optimum_and_not_elsewhere() -> None:
    for mdp in (GRID, random_mdp(5)):
        for logps, still in ((soft_optimal(mdp).logps, True), (mdp.uniform_logps, False)):
            logits = logps.clone().requires_grad_()
            (slope,) = torch.autograd.grad((mdp.start * soft_value(mdp, logits.log_softmax(-1))).sum(), logits)
            assert (float(slope.abs().max()) < 1e-12) == still


def test_regret_is_the_kl_to_the_optimum_where_the_policy_goes() -> None:
    """regret = temperature / (1 - discount) * sum_s d(s) KL(pi(. | s) || pi*(. | s)), d the policy's visits."""
    mdp = random_mdp(6)
    logps = random_logps(mdp, 1)
    divergence = policy_kl(logps, soft_optimal(mdp).logps, visitation(mdp, logps))
    close(regret(mdp, logps), mdp.temperature / (1 - mdp.discount) * divergence)
    assert float(regret(mdp, logps)) > 0.1
    close(regret(mdp, soft_optimal(mdp).logps), torch.tensor(0.0, dtype=torch.float64))


def test_kl_by_hand_and_with_an_action_never_taken() -> None:
    policy = torch.tensor([[1.0, 0.0], [0.5, 0.5]]).double().log()
    other = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).double().log()
    close(policy_kl(policy, other, torch.tensor([3.0, 1.0]).double()), torch.tensor(0.75 * math.log(4)).double(), 1e-7)
    assert float(policy_kl(other, policy, torch.ones(2).double())) == math.inf


def test_an_action_never_taken_adds_nothing_to_value_or_entropy() -> None:
    mdp = random_mdp(7)
    hard = torch.full((4, 3), -math.inf, dtype=torch.float64)
    hard[:, 1] = 0.0
    by_hand = torch.linalg.inv(torch.eye(4, dtype=torch.float64) - mdp.discount * mdp.transitions[:, 1]) @ mdp.rewards[:, 1]
    close(value(mdp, hard), by_hand)
    close(soft_value(mdp, hard), by_hand)


@pytest.mark.parametrize("change", [{"discount": 1.0}, {"discount": 0.0}, {"temperature": 0.0}, {"temperature": math.inf}])
def test_numbers_out_of_range_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="discount in"):
        dataclasses.replace(GRID, **change)


def test_tables_that_are_no_mdp_are_refused() -> None:
    short = GRID.transitions.clone()
    short[3, 2] *= 0.9
    with pytest.raises(DataError, match=r"transitions, row 14: .* sum of 0\.900000000"):
        dataclasses.replace(GRID, transitions=short)
    negative = GRID.start.clone()
    negative[:2] = torch.tensor([-0.5, 0.5]) + negative[:2].sum() / 2
    with pytest.raises(DataError, match="start, row 0"):
        dataclasses.replace(GRID, start=negative)
    with pytest.raises(DataError, match="float64"):
        dataclasses.replace(GRID, rewards=GRID.rewards.float())
    with pytest.raises(DataError, match="finite"):
        dataclasses.replace(GRID, rewards=GRID.rewards * math.nan)
    with pytest.raises(DataError, match=r"rewards \[S, A\]"):
        dataclasses.replace(GRID, rewards=GRID.rewards[:, :3])


def test_tables_that_are_no_policy_are_refused() -> None:
    with pytest.raises(DataError, match="state 0 sum to 4"):
        soft_value(GRID, torch.zeros(25, 4))
    with pytest.raises(DataError, match=r"expected log-probs \[25, 4\]"):
        value(GRID, GRID.uniform_logps[:5])
    with pytest.raises(DataError, match="state 7"):
        visitation(GRID, torch.where(torch.arange(25)[:, None] == 7, math.nan, GRID.uniform_logps))


def test_float32_policies_are_measured_in_float64() -> None:
    found = soft_value(GRID, OPTIMUM.logps.float())
    assert found.dtype == torch.float64
    close(found, OPTIMUM.v, 1e-9)  # second order in the rounding


def test_moves_slip_to_both_sides_and_stop_at_walls() -> None:
    """3x3, slip 0.2, from the middle: up 0.8, left and right 0.1; from the corner (0, 0) up: 0.8 + 0.1 stay, 0.1 right."""
    layout = draw_layout(3, traps=0, seed=1)
    assert layout.goal not in (0, 4)
    mdp = gridworld(3, traps=0, seed=1)
    up = ACTIONS.index("up")
    expected = torch.zeros(2, 9, dtype=torch.float64)
    expected[0, [1, 3, 5]] = torch.tensor([0.8, 0.1, 0.1]).double()
    expected[1, [0, 1]] = torch.tensor([0.9, 0.1]).double()
    close(mdp.transitions[[4, 0], up], expected, 1e-7)


def test_the_goal_leads_anywhere_and_rewards_are_those_of_entering() -> None:
    layout = draw_layout()
    assert GRID.states == 25
    assert len(layout.ordinary) == 21
    assert float(GRID.transitions[layout.goal][:, [layout.goal, *layout.traps]].sum()) == 0
    assert torch.equal(GRID.transitions[layout.goal], GRID.start.expand(4, -1))
    assert torch.equal(GRID.rewards[layout.goal], torch.zeros(4, dtype=torch.float64))
    elsewhere = [cell for cell in range(25) if cell != layout.goal]
    into_goal, into_trap = GRID.transitions[..., layout.goal], GRID.transitions[..., list(layout.traps)].sum(-1)
    close(GRID.rewards[elsewhere], (4.0 * into_goal - 2.0 * into_trap - 0.1)[elsewhere])


def test_a_grid_follows_from_its_seed() -> None:
    assert torch.equal(gridworld(seed=3).rewards, gridworld(seed=3).rewards)
    assert len({draw_layout(seed=seed) for seed in range(10)}) > 5
    for wrong in ({"size": 1}, {"size": 2, "traps": 3}, {"slip": 1.5}):
        with pytest.raises(ConfigError, match="gridworld: expected"):
            gridworld(**wrong)


def test_arrows_lead_to_the_goal() -> None:
    layout = draw_layout()
    rows = [line.split(" ") for line in render(layout, OPTIMUM.logps).splitlines()]
    assert len(rows) == 5
    arrows = "".join("".join(row) for row in rows)
    assert arrows.count("G") == 1
    assert arrows.count("x") == 3
    # Followed without slips, from every cell.
    for cell in layout.ordinary:
        for _ in range(25):
            action = int(OPTIMUM.logps[cell].argmax())
            cell = int(GRID.transitions[cell, action].argmax())
            if cell == layout.goal:
                break
        assert cell == layout.goal
    assert arrows[0] == ARROWS[int(OPTIMUM.logps[0].argmax())]


def test_sampled_steps_are_a_table_of_equal_episodes() -> None:
    steps = sample_steps(GRID, OPTIMUM.logps, segments=50, length=4, seed=1)
    assert steps.ends.tolist() == list(range(4, 201, 4))
    assert steps.observations.dtype == torch.float32
    assert torch.equal(steps.observations.sum(-1), torch.ones(200))
    states = steps.observations.argmax(-1)
    assert torch.equal(steps.rewards, GRID.rewards[states, steps.actions].float())
    assert torch.equal(steps.advantages, OPTIMUM.advantages[states, steps.actions].float())
    # Every move of an episode is possible; the step after its last belongs to another.
    inside = torch.arange(200)[torch.arange(200) % 4 < 3]
    assert bool((GRID.transitions[states[inside], steps.actions[inside], states[inside + 1]] > 0).all())


def test_more_segments_go_on_where_fewer_end() -> None:
    few, many = (sample_steps(GRID, GRID.uniform_logps, segments=n, length=3, seed=5) for n in (10, 1000))
    assert torch.equal(few.observations, many.observations[:30])
    assert torch.equal(few.actions, many.actions[:30])
    other = sample_steps(GRID, GRID.uniform_logps, segments=10, length=3, seed=6)
    assert not torch.equal(few.actions, other.actions)


def test_episodes_start_where_they_are_told() -> None:
    start = torch.zeros(25, dtype=torch.float64)
    start[7] = 1.0
    steps = sample_steps(GRID, GRID.uniform_logps, segments=20, length=2, seed=0, start=start)
    assert set(steps.observations[steps.starts].argmax(-1).tolist()) == {7}
    with pytest.raises(DataError, match="start: expected"):
        sample_steps(GRID, GRID.uniform_logps, segments=20, length=2, seed=0, start=start[:5])
    with pytest.raises(ConfigError, match="one segment"):
        sample_steps(GRID, GRID.uniform_logps, segments=0, length=2, seed=0)
