"""P-IQL in parts against numbers by hand, and whole on a chain whose better action is known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from benchmarks.piql import (
    IqlNetworks,
    Learner,
    PiqlOptions,
    Replay,
    advantage_weights,
    expectile_loss,
    follow,
    ordering_accuracy,
    segment_steps,
    step_rewards,
    train_iql,
    train_piql,
    train_reward,
)
from prefopt.control.policies import Actor, ActorConfig
from prefopt.control.segments import Comparisons, Labelling, admissible_starts, compare_segments
from prefopt.control.steps import Steps
from prefopt.data.exact_world.labels import LabelModel
from prefopt.errors import ConfigError, DataError

SMALL = PiqlOptions(updates=20, batch_size=16, reward_updates=10, reward_batch_size=4, hidden=(8,))


def vectors(episodes: int = 6, length: int = 20, seed: int = 0) -> Steps:
    """Random steps whose reward is linear in observation and action."""
    generator = torch.Generator().manual_seed(seed)
    count = episodes * length
    observations, actions = (torch.randn(count, size, generator=generator) for size in (3, 2))
    rewards = observations @ torch.tensor([1.0, -0.5, 0.0]) + actions @ torch.tensor([0.0, 2.0])
    return Steps(observations, actions, rewards, torch.zeros(count), length * torch.arange(1, episodes + 1))


def compared(steps: Steps, pairs: int, seed: int = 0) -> Comparisons:
    labelling = Labelling("return", LabelModel("deterministic", 0.0))
    return compare_segments(steps, labelling, pairs=pairs, length=4, seed=seed, segments=40)


def actor_of(family: str = "mean_squared", observations: int = 3, actions: int = 2, dropout: float = 0.0) -> Actor:
    torch.manual_seed(0)
    return Actor(ActorConfig(family, observations, actions, (8,), dropout))


def chain(states: int, episodes: int, length: int, seed: int) -> Steps:
    """Random walks from random states; action 1 goes right, 0 left, the ends hold; a step taken in the last state pays 1."""
    generator = torch.Generator().manual_seed(seed)
    at = torch.randint(states, (episodes,), generator=generator)
    found: list[tuple[Tensor, Tensor]] = []
    for _ in range(length):
        actions = torch.randint(2, (episodes,), generator=generator)
        found.append((at, actions))
        at = (at + 2 * actions - 1).clamp(0, states - 1)
    positions, taken = (torch.stack(column, dim=1).reshape(-1) for column in zip(*found, strict=True))
    rewards = (positions == states - 1).float()
    eye = torch.eye(states)
    return Steps(eye[positions], taken, rewards, torch.zeros_like(rewards), length * torch.arange(1, episodes + 1))


@pytest.mark.parametrize("expectile", [0.5, 0.7, 0.9])
def test_the_expectile_of_two_numbers(expectile: float) -> None:
    """Of {0, 1} the e-expectile v solves e*(1 - v) = (1 - e)*v, so v = e: there the loss of both has no slope."""
    value = torch.tensor([expectile, expectile], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0.0, 1.0], dtype=torch.float64)
    losses = expectile_loss(value, targets, expectile)
    (slopes,) = torch.autograd.grad(losses.sum(), value)
    assert float(slopes.sum()) == pytest.approx(0, abs=1e-12)
    assert losses.tolist() == pytest.approx([(1 - expectile) * expectile**2, expectile * (1 - expectile) ** 2])
    assert torch.autograd.gradcheck(lambda v: expectile_loss(v, targets, expectile), value)


def test_weights_are_exponentials_that_end_at_the_largest() -> None:
    weights = advantage_weights(torch.tensor([-1.0, 0.0, 0.5, 9.0, 1e6]), 0.5, 100.0)
    assert weights.tolist() == pytest.approx([math.exp(-2), 1, math.e, 100, 100])


def test_targets_follow_by_their_share() -> None:
    target, source = nn.Linear(2, 1), nn.Linear(2, 1)
    nn.init.constant_(target.weight, 1.0)
    nn.init.constant_(source.weight, 3.0)
    follow(target, source, 0.005)
    assert target.weight.flatten().tolist() == pytest.approx([1.01, 1.01])
    assert source.weight.flatten().tolist() == [3.0, 3.0]


def test_an_update_moves_every_network_and_targets_by_polyak() -> None:
    steps, actor = vectors(), actor_of()
    learner = Learner(IqlNetworks(actor, (8,)), PiqlOptions(updates=5, batch_size=16, polyak=0.25))
    replay = Replay(steps, actor.config, steps.rewards, admissible_starts(steps, 2), torch.zeros(()))
    before = {name: value.clone() for name, value in learner.networks.named_parameters()}
    learner.update(replay.draw(16, torch.Generator().manual_seed(0)))
    after = dict(learner.networks.named_parameters())
    assert all(not torch.equal(before[name], after[name]) for name in after)
    for name in (name for name in after if name.startswith("targets.")):
        critic = name.replace("targets.", "critics.")
        torch.testing.assert_close(before[name], before[critic])
        torch.testing.assert_close(after[name], 0.75 * before[name] + 0.25 * after[critic])


def test_iql_goes_to_the_reward() -> None:
    """The data walk at random; a reward at the right end turns every state to the right, one at the left end to the left."""
    steps = chain(4, episodes=30, length=20, seed=0)
    numbers, states = admissible_starts(steps, 2), torch.eye(4)
    options = PiqlOptions(updates=150, batch_size=128, learning_rate=1e-2, hidden=(16,), discount=0.9, polyak=0.1)
    actor = actor_of("categorical", 4, 2)
    for rewards, better in ((steps.rewards, 1), (steps.observations[:, 0], 0)):
        taught = train_iql(actor, steps, rewards, numbers, options, seed=0)[0].actor
        assert taught.act(states).tolist() == 4 * [better]
        assert float(taught(states).softmax(-1)[:, better].min().detach()) > 0.65


def test_a_constant_on_every_reward_changes_nothing() -> None:
    steps, actor = vectors(), actor_of()
    numbers = admissible_starts(steps, 2)
    one, other = (train_iql(actor, steps, steps.rewards.double() + c, numbers, SMALL, seed=0)[0].actor for c in (0.0, 7.0))
    torch.testing.assert_close(one.state_dict(), other.state_dict())


def test_last_steps_are_never_drawn() -> None:
    """Episodes of 1, 2 and 3 steps have 0, 1 and 2 successors, each the very next step; observations number the steps."""
    observations = torch.arange(6.0).unsqueeze(-1)
    steps = Steps(observations, torch.zeros(6, 1), observations[:, 0], torch.zeros(6), torch.tensor([1, 3, 6]))
    config = ActorConfig("mean_squared", 1, 1)
    replay = Replay(steps, config, steps.rewards, admissible_starts(steps, 2), torch.zeros(()))
    drawn = replay.draw(200, torch.Generator().manual_seed(0))
    assert sorted(set(drawn.observations.flatten().tolist())) == [1, 3, 4]
    assert torch.equal(drawn.following, drawn.observations + 1)
    torch.testing.assert_close(drawn.rewards, drawn.observations[:, 0] - 8 / 3)  # centred over the steps that are drawn from
    with pytest.raises(DataError, match="no step has a successor"):
        Replay(steps, config, steps.rewards, admissible_starts(steps, 4), torch.zeros(()))


def test_segments_lose_their_last_step_too() -> None:
    pairs = Comparisons(torch.tensor([4, 2]), torch.tensor([9, 2]), 3, torch.zeros(2, 2), None, "pair")
    assert segment_steps(pairs).tolist() == [2, 3, 4, 5, 9, 10]


def test_a_linear_reward_is_learned() -> None:
    """Held-out pairs are ordered, and the steps' rewards are the true ones up to scale and constant."""
    steps = vectors(episodes=20)
    options = PiqlOptions(reward_updates=100, reward_batch_size=32, learning_rate=1e-2, hidden=(16,))
    model = train_reward(actor_of().config, steps, compared(steps, 300), options, 0)
    rewards = step_rewards(model, steps)
    assert ordering_accuracy(rewards, compared(steps, 300, seed=5)) > 0.9
    assert float(torch.corrcoef(torch.stack([rewards, steps.rewards]))[0, 1]) > 0.9


def test_orders_are_counted_and_ties_are_half() -> None:
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.0, 5.0])
    pairs = Comparisons(torch.tensor([1, 0, 0]), torch.tensor([0, 1, 2]), 2, torch.zeros(3, 2), None, "pair")
    assert ordering_accuracy(rewards, pairs) == pytest.approx(0.5)  # sums 2 > 1, 1 < 2, 1 = 1
    assert ordering_accuracy(rewards, Comparisons(pairs.chosen[:1], pairs.rejected[:1], 2, torch.zeros(1, 2), None, "")) == 1


@pytest.mark.parametrize("data", ["episodes", "segments"])
def test_a_run_is_repeated_by_its_seed(data: Literal["episodes", "segments"]) -> None:
    """Evaluations look on: they see the policy at their step without dropout, and change nothing."""
    steps, actor = vectors(), actor_of(dropout=0.5)
    options = replace(SMALL, data=data)
    seen: list[Tensor] = []

    def evaluate(policy: Actor) -> dict[str, float]:
        assert not policy.training
        torch.rand(3)  # a simulator's draws
        seen.append(policy.act(steps.observations))
        return {"success": 0.5}

    start, generator = actor.state_dict(), torch.get_rng_state()
    pairs = compared(steps, 20)
    one = train_piql(actor, steps, pairs, options, seed=1, held_out=pairs, evaluate=evaluate, evaluate_at=(0, 20))
    two, three = (train_piql(actor, steps, pairs, options, seed=seed) for seed in (1, 2))
    torch.testing.assert_close(one.actor.state_dict(), two.actor.state_dict(), rtol=0, atol=0)
    assert not torch.equal(one.actor.act(steps.observations), three.actor.act(steps.observations))
    assert one.lines == [{"step": 0, "success": 0.5}, {"step": 20, "success": 0.5}]
    assert torch.equal(seen[0], actor.eval().act(steps.observations))
    assert torch.equal(seen[1], one.actor.act(steps.observations))
    assert one.reward_accuracy is not None
    assert two.reward_accuracy is None
    torch.testing.assert_close(actor.state_dict(), start)
    assert torch.equal(torch.get_rng_state(), generator)


def test_parameters_are_counted_by_role() -> None:
    """Layers of 8: actor 3-8-2, reward and each critic 5-8-1, value 3-8-1, biases included."""
    steps = vectors()
    result = train_piql(actor_of(), steps, compared(steps, 20), SMALL, seed=0)
    assert result.parameters == {"reward": 57, "actor": 50, "critics": 114, "targets": 114, "value": 41}
    assert 0 < result.reward_seconds < result.seconds


@pytest.mark.parametrize(
    ("option", "value"), [("expectile", 1.0), ("discount", 1.0), ("updates", 0), ("temperature", 0.0), ("data", "all")]
)
def test_options_out_of_range_are_refused(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match="P-IQL"):
        replace(PiqlOptions(), **{option: value})
