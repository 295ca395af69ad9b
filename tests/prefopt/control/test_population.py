"""CPL on infinitely many pairs: all segments are listed, and the figures of the module's docstring are computed."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from losses.cpl import cpl_loss
from prefopt.control import population as module
from prefopt.control.gridworld import gridworld
from prefopt.control.mdp import TabularMDP, policy_kl, regret, sample_steps, soft_optimal, visitation
from prefopt.control.population import (
    Population,
    enumerate_segments,
    population_loss,
    population_optimum,
    preference_scores,
)
from prefopt.errors import ConfigError, DataError

SMALL = gridworld(3, traps=1)
GRID = gridworld()
ALPHA, GAMMA = SMALL.temperature, SMALL.discount
PER_STEP = {"regret": lambda mdp: soft_optimal(mdp).advantages, "return": lambda mdp: mdp.rewards}


def segments(mdp: TabularMDP) -> Population:
    return enumerate_segments(mdp, mdp.uniform_logps, 2)


def labels(mdp: TabularMDP, population: Population, name: str) -> Tensor:
    return preference_scores(population, PER_STEP[name](mdp), mdp.discount)


@cache
def optimum(mdp_name: str, label: str, bias: float, start: int | None = None, behaviour_power: float = 0.0) -> Tensor:
    """The optimum on segments of softmax(power * A* / alpha), from a random policy if `start` is its seed."""
    mdp = {"small": SMALL, "grid": GRID}[mdp_name]
    population = enumerate_segments(mdp, (behaviour_power * soft_optimal(mdp).logps).log_softmax(-1), 2)
    scores = labels(mdp, population, label)
    initial = None if start is None else random_logps(mdp, start, scale=2.0)
    return population_optimum(population, scores, mdp, alpha=ALPHA, bias=bias, gamma=GAMMA, initial=initial)


def random_logps(mdp: TabularMDP, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(mdp.states, mdp.actions, generator=generator, dtype=torch.float64)).log_softmax(-1)


def kl(policy: Tensor, other: Tensor) -> float:
    return float(policy_kl(policy, other, torch.ones(len(policy), dtype=torch.float64)))


def cpl_on_all_pairs(logps: Tensor, population: Population, scores: Tensor, **hyper: float) -> Tensor:
    """The registered loss on every ordered pair, with soft labels and the probability of the pair."""
    first, second = (index.flatten() for index in torch.meshgrid(*[torch.arange(len(population))] * 2, indexing="ij"))
    token_logps = logps[population.states, population.actions]
    mask = torch.ones_like(token_logps)
    output = cpl_loss(
        token_logps[first],
        token_logps[second],
        mask[first],
        mask[second],
        soft_labels=torch.sigmoid(scores[first] - scores[second]),
        **hyper,
    )
    return (output.loss * population.probabilities[first] * population.probabilities[second]).sum()


def label_entropy(population: Population, scores: Tensor) -> float:
    preferred = torch.sigmoid(scores[:, None] - scores)
    pairs = population.probabilities[:, None] * population.probabilities
    return float((pairs * (torch.special.entr(preferred) + torch.special.entr(1 - preferred))).sum())


def test_segments_are_all_there_once_and_their_probabilities_sum_to_one() -> None:
    for length in (1, 2, 3):
        found = enumerate_segments(SMALL, random_logps(SMALL, 0), length)
        assert found.states.shape == found.actions.shape == (len(found), length)
        assert abs(float(found.probabilities.sum()) - 1) < 1e-12
        assert len(torch.cat([found.states, found.actions], dim=1).unique(dim=0)) == len(found)
        assert len(found) == module._count(SMALL, SMALL.uniform_states, SMALL.uniform_logps.exp(), length)


def test_the_probability_of_a_segment_is_the_product_of_its_draws() -> None:
    behaviour = random_logps(SMALL, 1)
    found = enumerate_segments(SMALL, behaviour, 3, start=SMALL.start)
    for row in (0, 500, len(found) - 1):
        (s, t, u), (a, b, c) = found.states[row].tolist(), found.actions[row].tolist()
        policy, moves = behaviour.exp(), SMALL.transitions
        expected = SMALL.start[s] * policy[s, a] * moves[s, a, t] * policy[t, b] * moves[t, b, u] * policy[u, c]
        assert float(found.probabilities[row]) == pytest.approx(float(expected), rel=1e-12)


def test_states_of_listed_segments_are_visited_as_the_solved_mdp_says() -> None:
    """Visits of the discounted kind, cut off at 3 steps, from the listed segments and from powers of the transition matrix."""
    behaviour = random_logps(SMALL, 2)
    found = enumerate_segments(SMALL, behaviour, 3, start=SMALL.start)
    powers = GAMMA ** torch.arange(3, dtype=torch.float64)
    listed = torch.zeros(9, dtype=torch.float64).index_add(
        0, found.states.flatten(), (found.probabilities[:, None] * powers).flatten()
    )
    # What is missing after 3 steps is gamma^3 of visits that start where the third step leads.
    moved = SMALL.start
    for _ in range(3):
        moved = torch.einsum("s,sa,sat->t", moved, behaviour.exp(), SMALL.transitions)
    later = TabularMDP(SMALL.transitions, SMALL.rewards, GAMMA, ALPHA, moved)
    expected = (visitation(SMALL, behaviour) - GAMMA**3 * visitation(later, behaviour)) / (1 - GAMMA)
    torch.testing.assert_close(listed, expected, rtol=1e-10, atol=1e-12)


def test_sampled_segments_occur_as_often_as_listed() -> None:
    """Pearson's statistic over all 464 segments: mean 463 and standard deviation 30 if sampler and list agree."""
    behaviour = random_logps(SMALL, 3)
    found = enumerate_segments(SMALL, behaviour, 2)
    number, count = 40_000, len(found)
    steps = sample_steps(SMALL, behaviour, number, 2, seed=0)
    base = np.array([9 * 4 * 4, 4 * 4, 4, 1])  # of (state, state, action, action)
    key = torch.cat([steps.observations.argmax(-1).view(-1, 2), steps.actions.view(-1, 2)], dim=1).numpy() @ base
    listed = torch.cat([found.states, found.actions], dim=1).numpy() @ base
    assert np.isin(key, listed).all()
    times = np.bincount(key, minlength=9 * 9 * 16)[listed]
    expected = number * found.probabilities.numpy()
    statistic = ((times - expected) ** 2 / expected).sum()
    assert abs(statistic - (count - 1)) < 4 * math.sqrt(2 * (count - 1))


def bootstrapped_return(mdp: TabularMDP, population: Population) -> Tensor:
    """sum_t gamma^t r + gamma^L E[V(s_L)] - V(s_0): what the regret of a segment would be without luck [C]."""
    v = soft_optimal(mdp).v
    length = population.states.shape[1]
    after = mdp.transitions[population.states[:, -1], population.actions[:, -1]] @ v
    return labels(mdp, population, "return") + mdp.discount**length * after - v[population.states[:, 0]]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_advantages_telescope_on_average_and_not_on_a_path(length: int) -> None:
    """E[sum gamma^t A*] = E[sum gamma^t r] + gamma^L E[V(s_L)] - E[V(s_0)]; on one path luck is the difference."""
    behaviour = random_logps(SMALL, 4)
    found = enumerate_segments(SMALL, behaviour, length)
    luck = labels(SMALL, found, "regret") - bootstrapped_return(SMALL, found)
    assert abs(float(luck @ found.probabilities)) < 1e-12
    if length == 1:
        assert float(luck.abs().max()) < 1e-12
    else:
        assert float(luck.abs() @ found.probabilities) > 0.1


def test_without_slips_the_advantages_telescope_on_each_path() -> None:
    mdp = gridworld(3, traps=1, slip=0.0)
    found = enumerate_segments(mdp, mdp.uniform_logps, 3)
    luck = labels(mdp, found, "regret") - bootstrapped_return(mdp, found)
    goal = int((mdp.transitions > 0).sum((1, 2)).argmax())  # where chance is left: it leads anywhere
    at_goal = (found.states[:, :-1] == goal).any(-1)
    assert float(luck[~at_goal].abs().max()) < 1e-12
    assert float(luck[at_goal].abs().max()) > 1


def test_the_two_labellers_disagree() -> None:
    for mdp in (SMALL, GRID):
        found = segments(mdp)
        gaps = [score[:, None] - score for score in (labels(mdp, found, "regret"), labels(mdp, found, "return"))]
        pairs = found.probabilities[:, None] * found.probabilities
        assert float(pairs[gaps[0].sign() * gaps[1].sign() < 0].sum()) > 0.25
        assert float((pairs * (gaps[0].sigmoid() - gaps[1].sigmoid()).abs()).sum()) > 0.15


def test_scores_discount_from_the_first_step_of_the_segment() -> None:
    made = Population(torch.tensor([[0, 1, 0]]), torch.tensor([[1, 0, 0]]), torch.ones(1, dtype=torch.float64))
    per_step = torch.tensor([[3.0, 5.0], [7.0, 9.0]])
    assert float(preference_scores(made, per_step, 0.5)) == 5 + 0.5 * 7 + 0.25 * 3


@pytest.mark.parametrize("label", ["regret", "return"])
def test_the_objective_is_the_registered_loss_on_all_pairs(label: str) -> None:
    found = segments(SMALL)
    scores = labels(SMALL, found, label)
    hyper = {"alpha": 0.3, "bias": 0.7, "gamma": 0.8}
    values, slopes = [], []
    for objective in (population_loss, cpl_on_all_pairs):
        logps = random_logps(SMALL, 5).requires_grad_()
        values.append(objective(logps, found, scores, **hyper))
        slopes.append(torch.autograd.grad(3 * values[-1], logps)[0])
    torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-10, atol=1e-14)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = segments(SMALL)
    scores = labels(SMALL, found, "return")
    whole = population_loss(random_logps(SMALL, 6), found, scores, alpha=1.0, bias=0.5, gamma=0.9)
    monkeypatch.setattr(module, "_BLOCK", 7 * len(found) + 3)
    in_blocks = population_loss(random_logps(SMALL, 6), found, scores, alpha=1.0, bias=0.5, gamma=0.9)
    torch.testing.assert_close(in_blocks, whole, rtol=1e-13, atol=0)


def test_the_gradient_of_the_objective_is_that_of_finite_differences() -> None:
    found = enumerate_segments(SMALL, SMALL.uniform_logps, 1)
    scores = labels(SMALL, found, "regret")
    logits = random_logps(SMALL, 7).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: population_loss(x.log_softmax(-1), found, scores, alpha=0.5, bias=0.4, gamma=1.0), (logits,)
    )


@pytest.mark.parametrize("start", [None, 0, 1])
def test_regret_labels_and_bias_1_lead_to_the_soft_optimal_policy(start: int | None) -> None:
    assert kl(optimum("small", "regret", 1.0, start), soft_optimal(SMALL).logps) < 1e-10


def test_the_soft_optimal_policy_leaves_the_entropy_of_the_labels() -> None:
    found = segments(SMALL)
    scores = labels(SMALL, found, "regret")
    left = population_loss(soft_optimal(SMALL).logps, found, scores, alpha=ALPHA, bias=1.0, gamma=GAMMA)
    assert float(left) == pytest.approx(label_entropy(found, scores), rel=1e-12)


@pytest.mark.parametrize("behaviour_power", [0.5, 1.0])
def test_bias_1_forgets_the_behaviour(behaviour_power: float) -> None:
    assert kl(optimum("small", "regret", 1.0, behaviour_power=behaviour_power), soft_optimal(SMALL).logps) < 1e-9


@pytest.mark.parametrize(("alpha", "gamma"), [(2 * ALPHA, GAMMA), (ALPHA, 0.5)])
def test_another_temperature_or_discount_than_the_labellers_leads_elsewhere(alpha: float, gamma: float) -> None:
    found = segments(SMALL)
    policy = population_optimum(found, labels(SMALL, found, "regret"), SMALL, alpha=alpha, bias=1.0, gamma=gamma)
    assert kl(policy, soft_optimal(SMALL).logps) > 0.002


def test_without_one_action_in_the_data_only_the_ratios_of_the_others_are_known() -> None:
    """d = alpha log pi - A* may then be any constant: every such policy leaves the entropy of the labels, and no other does."""
    behaviour = torch.full((9, 4), -math.log(3), dtype=torch.float64)
    behaviour[:, 3] = -math.inf
    found = enumerate_segments(SMALL, behaviour, 2)
    scores = labels(SMALL, found, "regret")
    least = label_entropy(found, scores)
    for shift in (0.0, -0.1, -1.0):
        taken = soft_optimal(SMALL).logps[:, :3] + shift
        policy = torch.cat([taken, torch.log1p(-taken.exp().sum(-1, keepdim=True))], dim=1)
        for other, gap in ((policy, 0.0), ((policy + 0.1 * random_logps(SMALL, 9)).log_softmax(-1), 1e-5)):
            excess = float(population_loss(other, found, scores, alpha=ALPHA, bias=1.0, gamma=GAMMA)) - least
            assert abs(excess) < 1e-12 if gap == 0 else excess > gap


def test_a_state_of_no_segment_keeps_its_row() -> None:
    start = torch.zeros(9, dtype=torch.float64)
    start[0] = 1.0
    found = enumerate_segments(SMALL, SMALL.uniform_logps, 2, start=start)
    initial = random_logps(SMALL, 8)
    scores = labels(SMALL, found, "regret")
    policy = population_optimum(found, scores, SMALL, alpha=ALPHA, bias=1.0, gamma=GAMMA, initial=initial)
    seen = found.states.unique()
    unseen = [state for state in range(9) if state not in seen]
    assert unseen
    torch.testing.assert_close(policy[unseen], initial[unseen], rtol=1e-12, atol=1e-12)
    assert kl(policy[seen], soft_optimal(SMALL).logps[seen]) < 1e-9


@pytest.mark.parametrize("label", ["regret", "return"])
def test_with_bias_below_1_every_start_leads_to_one_stationary_point_off_the_optimum(label: str) -> None:
    found = segments(SMALL)
    scores = labels(SMALL, found, label)
    policy = optimum("small", label, 0.5)
    logits = policy.clone().requires_grad_()
    objective = cpl_on_all_pairs(logits.log_softmax(-1), found, scores, alpha=ALPHA, bias=0.5, gamma=GAMMA)
    (slope,) = torch.autograd.grad(objective, logits)
    assert float(slope.abs().max()) < 2e-8
    assert kl(policy, soft_optimal(SMALL).logps) > 0.1
    for start in (0, 1, 2):
        assert kl(optimum("small", label, 0.5, start), policy) < 1e-9


def test_lower_bias_stays_nearer_to_the_behaviour() -> None:
    """The figures of the docstring, for regret labels."""
    truth = soft_optimal(GRID).logps
    found = [
        (kl(policy, truth), kl(policy, GRID.uniform_logps))
        for policy in (optimum("grid", "regret", b) for b in (0.75, 0.5, 0.25))
    ]
    np.testing.assert_allclose(found, [(0.029, 0.316), (0.116, 0.194), (0.246, 0.101)], atol=6e-4)
    assert kl(truth, GRID.uniform_logps) == pytest.approx(0.448, abs=6e-4)


def test_returns_lead_to_the_myopic_policy_where_all_states_offer_the_same() -> None:
    """r less Z(s) = alpha logsumexp(r / alpha) is alpha times the log-probs of the myopic policy, which then is the optimum."""
    myopic = (SMALL.rewards / ALPHA).log_softmax(-1)
    found = segments(SMALL)
    scores = preference_scores(found, ALPHA * myopic, GAMMA)
    policy = population_optimum(found, scores, SMALL, alpha=ALPHA, bias=1.0, gamma=GAMMA)
    assert kl(policy, myopic) < 1e-9
    assert kl(optimum("small", "return", 1.0), myopic) > 0.3


def test_returns_lead_away_from_the_optimum_and_from_the_myopic_policy() -> None:
    """The figures of the docstring, for return labels."""
    policy, myopic = optimum("grid", "return", 1.0), (GRID.rewards / ALPHA).log_softmax(-1)
    found = segments(GRID)
    scores = labels(GRID, found, "return")
    left = float(population_loss(policy, found, scores, alpha=ALPHA, bias=1.0, gamma=GAMMA))
    assert [kl(policy, soft_optimal(GRID).logps), kl(policy, myopic)] == pytest.approx([0.417, 0.187], abs=6e-4)
    assert [left, label_entropy(found, scores)] == pytest.approx([0.598, 0.558], abs=6e-4)
    regrets = [float(regret(GRID, logps)) for logps in (policy, myopic, GRID.uniform_logps)]
    assert regrets == pytest.approx([1.70, 1.56, 3.53], abs=6e-3)
    # Beside the goal, where every action earns much, the policy is flatter than the myopic one.
    rich = torch.logsumexp(GRID.rewards, -1).topk(2).indices
    entropies = [torch.special.entr(logps.exp()).sum(-1)[rich] for logps in (policy, myopic)]
    assert bool((entropies[0] > 10 * entropies[1]).all())


def test_return_labels_undo_a_good_behaviour() -> None:
    policy = optimum("grid", "return", 1.0, behaviour_power=0.5)
    behaviour = (0.5 * soft_optimal(GRID).logps).log_softmax(-1)
    assert [float(regret(GRID, behaviour)), float(regret(GRID, policy))] == pytest.approx([0.53, 3.65], abs=6e-3)


def test_return_labels_have_several_minima() -> None:
    """In a corner of SMALL up and left mirror each other, yet each minimum favours one; the start decides which."""
    found = segments(SMALL)
    scores = labels(SMALL, found, "return")
    assert float(SMALL.rewards[0].std()) < 1e-12
    values, shares = [], []
    for start in (None, 1, 2):
        policy = optimum("small", "return", 1.0, start)
        values.append(float(population_loss(policy, found, scores, alpha=ALPHA, bias=1.0, gamma=GAMMA)))
        shares.append(policy[0, [0, 3]].exp().tolist())
        for seed in range(5):
            near = (policy + 0.02 * random_logps(SMALL, seed)).log_softmax(-1)
            assert float(population_loss(near, found, scores, alpha=ALPHA, bias=1.0, gamma=GAMMA)) > values[-1]
    assert values == pytest.approx([0.61951, 0.61958, 0.61964], abs=6e-6)
    assert min(shares[0][0], shares[1][1]) > 3 * max(shares[0][1], shares[1][0])


def test_too_many_segments_are_refused_before_they_are_listed() -> None:
    with pytest.raises(ConfigError, match=r"segments of 8 steps, expected at most 50,000"):
        enumerate_segments(GRID, GRID.uniform_logps, 8)
    with pytest.raises(ConfigError, match="one step"):
        enumerate_segments(GRID, GRID.uniform_logps, 0)


def test_an_optimum_that_did_not_settle_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ITERATIONS", 3)
    found = segments(SMALL)
    with pytest.raises(DataError, match="derivative of"):
        population_optimum(found, labels(SMALL, found, "regret"), SMALL, alpha=ALPHA, bias=1.0, gamma=GAMMA)
