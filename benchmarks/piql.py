"""Preference-IQL: a reward model on segments, then offline reinforcement learning on its rewards.

The baseline of Hejna et al. 2023, section 4 [hejna2023cpl]: implicit Q-learning (Kostrikov et al. 2021 [kostrikov2021iql]) on
rewards by Bradley and Terry. The reward model goes through the product's own stream and trainer; IQL has critics, targets and
several optimizers, so its loop is here. The policy is the one that all other algorithms train: only what teaches it differs.

Differences from the authors' code: (1) IQL learns from transitions drawn one by one, theirs from whole segments of the pairs.
(2) By default it sees every step of its episodes, not only those of the pairs (`data="segments"` is theirs). (3) Rewards are
learned before, not meanwhile. (4) Rewards are centred: sums over segments of one length leave a constant a step free, which IQL
would first have to learn as constant / (1 - discount), and which moves no advantage where no step is terminal. Their scale is
left alone, as theirs: it is in log-odds, and the temperature is in units of it. (5) Far fewer updates: theirs are 500,000 of 96
pairs; `PiqlOptions` sizes a run for minutes of one core.

C steps of a batch, M of the table, N with a successor, O numbers of an observation, A of an action.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import losses
from prefopt.control.perceptron import Perceptron
from prefopt.control.policies import Actor, ActorConfig, ControlPolicy
from prefopt.control.segments import Comparisons, admissible_starts
from prefopt.control.steps import Steps
from prefopt.errors import ConfigError, DataError
from prefopt.optimization import Optimization
from prefopt.streams import Budget, OfflineStream
from prefopt.trainer import fit

# Steps whose rewards are computed at one time.
_REWARD_CHUNK = 8192


@dataclass(frozen=True)
class PiqlOptions:
    """The authors' configuration for states, but for the sizes of a run.

    Args:
        updates: of IQL's networks.
        batch_size: steps of one such update.
        reward_updates: of the reward model.
        reward_batch_size: pairs of one such update.
        learning_rate: Adam's, of every network; the policy's falls to zero by a cosine.
        hidden: widths of reward model, critics and value; the policy has its own.
        discount: of IQL's returns.
        expectile: in [0.5, 1): 0.5 is the value of the data's policy, towards 1 that of its best actions.
        temperature: of the policy's weights exp(advantage / temperature); lower trusts the critics more.
        largest_weight: they are cut off at it.
        polyak: share of the critics that enters the target networks at every update.
        data: IQL sees all steps of its episodes, or those that the pairs' segments hold.
    """

    updates: int = 4000
    batch_size: int = 256
    reward_updates: int = 1000
    reward_batch_size: int = 32
    learning_rate: float = 3e-4
    hidden: tuple[int, ...] = (256, 256)
    discount: float = 0.99
    expectile: float = 0.7
    temperature: float = 0.3333
    largest_weight: float = 100.0
    polyak: float = 0.005
    data: Literal["episodes", "segments"] = "episodes"

    def __post_init__(self) -> None:
        sizes = (self.updates, self.batch_size, self.reward_updates, self.reward_batch_size)
        shares = 0 <= self.discount < 1 and 0.5 <= self.expectile < 1 and 0 < self.polyak <= 1
        if min(sizes) < 1 or not shares or min(self.temperature, self.largest_weight, self.learning_rate) <= 0:
            raise ConfigError(
                "P-IQL: expected sizes of at least 1, discount in [0, 1), expectile in [0.5, 1), polyak in (0, 1], and "
                f"temperature, largest_weight and learning_rate above 0; got {self}."
            )
        if self.data not in ("episodes", "segments"):
            raise ConfigError(f"P-IQL: data must be 'episodes' or 'segments', got {self.data!r}.")


@dataclass(frozen=True)
class PiqlResult:
    """What a run leaves behind.

    Args:
        actor: the policy.
        parameters: of each role's network: actor, reward, critics, targets, value.
        reward_seconds: of training the reward model.
        seconds: of all training, evaluations left out.
        reward_accuracy: share of held-out pairs whose chosen segment has the higher reward, ties counting half; None without.
        lines: a step count and `evaluate`'s numbers, for each of `evaluate_at`.
    """

    actor: Actor
    parameters: Mapping[str, int]
    reward_seconds: float
    seconds: float
    reward_accuracy: float | None
    lines: Sequence[Mapping[str, float]]


def train_piql(
    actor: Actor,
    steps: Steps,
    pairs: Comparisons,
    options: PiqlOptions,
    *,
    seed: int,
    episodes: Collection[int] | None = None,
    held_out: Comparisons | None = None,
    evaluate: Callable[[Actor], Mapping[str, float]] | None = None,
    evaluate_at: Collection[int] = (),
) -> PiqlResult:
    """Reward model, then IQL; `actor` stays as it is, and global generators too.

    Args:
        actor: what the policy starts from.
        steps: the table that pairs and episodes are of. Its own rewards and advantages are not looked at.
        pairs: labelled segments of one length.
        seed: of networks, order and dropout.
        episodes: those that IQL learns from; None is all.
        held_out: pairs for `reward_accuracy`.
        evaluate: called with the policy after the updates in `evaluate_at`; 0 is before the first.

    Raises:
        DataError: no step has a successor.
    """
    begin = time.perf_counter()
    model = train_reward(actor.config, steps, pairs, options, seed)
    rewards = step_rewards(model, steps)
    reward_seconds = time.perf_counter() - begin
    numbers = admissible_starts(steps, 2, episodes) if options.data == "episodes" else segment_steps(pairs)
    networks, seconds, lines = train_iql(
        actor, steps, rewards, numbers, options, seed=seed, evaluate=evaluate, evaluate_at=evaluate_at
    )
    parameters = {"reward": model.heads["reward"], **dict(networks.named_children())}
    return PiqlResult(
        networks.actor,
        {role: sum(weight.numel() for weight in network.parameters()) for role, network in parameters.items()},
        reward_seconds,
        reward_seconds + seconds,
        None if held_out is None else ordering_accuracy(rewards, held_out),
        lines,
    )


def train_reward(config: ActorConfig, steps: Steps, pairs: Comparisons, options: PiqlOptions, seed: int) -> ControlPolicy:
    """A policy that has learned nothing but a reward head, by the product's loss, stream and trainer.

    Args:
        config: of the policy that is to be taught: kind and sizes of observations and actions. Its dropout is not the head's.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        shell = Actor(replace(config, hidden=options.hidden, dropout=0.0)).requires_grad_(False)
        model = ControlPolicy(shell, steps, heads=("reward",))
        # Epochs enough for all updates; max_steps ends them.
        epochs = 1 + options.reward_updates * options.reward_batch_size / len(pairs)
        budget = Budget(options.reward_batch_size, epochs=epochs, max_steps=options.reward_updates, seed=seed)
        optimization = Optimization(options.learning_rate, schedule="constant", warmup=0.0, clip_norm=0.0)
        fit(model, losses.get("bradley_terry").bind(), OfflineStream(pairs, kind="pairs", budget=budget), optimization)
    return model


@torch.no_grad()
def step_rewards(model: ControlPolicy, steps: Steps) -> Tensor:
    """[M] the reward head's of every step."""
    chunks = torch.cat(state_actions(steps, model.actor.config), dim=-1).split(_REWARD_CHUNK)
    return torch.cat([model.heads["reward"](chunk).squeeze(-1) for chunk in chunks])


def ordering_accuracy(rewards: Tensor, pairs: Comparisons) -> float:
    """Share of pairs whose chosen segment has the higher sum of [M] rewards; ties count half."""
    sums = rewards.double().unfold(0, pairs.length, 1)
    margins = sums[pairs.chosen].sum(-1) - sums[pairs.rejected].sum(-1)
    return float((0.5 + 0.5 * margins.sign()).mean())


def segment_steps(pairs: Comparisons) -> Tensor:
    """[N] the steps of the pairs' segments, each once and in order, without each segment's last."""
    starts = torch.cat([pairs.chosen, pairs.rejected])
    return (starts.unsqueeze(-1) + torch.arange(pairs.length - 1)).unique()


def state_actions(steps: Steps, config: ActorConfig) -> tuple[Tensor, Tensor]:
    """[M, O] observations and [M, A] actions, numbered ones one-hot: what a critic takes."""
    if steps.actions.dim() == 1:
        return steps.observations, F.one_hot(steps.actions, config.action_size).to(steps.observations)
    return steps.observations, steps.actions


class IqlNetworks(nn.Module):
    """What IQL trains, and the targets that follow its critics. It works on a copy of the actor."""

    def __init__(self, actor: Actor, hidden: Sequence[int]) -> None:
        super().__init__()
        observations, actions = actor.config.observation_size, actor.config.action_size
        self.actor = copy.deepcopy(actor)
        self.critics = nn.ModuleList(Perceptron(observations + actions, hidden, 1) for _ in range(2))
        self.targets = copy.deepcopy(self.critics).requires_grad_(False)
        self.value = Perceptron(observations, hidden, 1)


@dataclass(frozen=True)
class Transitions:
    """Steps with what came of them.

    Args:
        observations, following: [C, O] before and after the action.
        actions: [C, A] or [C].
        inputs: [C, O+A] of a critic.
        rewards: [C].
    """

    observations: Tensor
    following: Tensor
    actions: Tensor
    inputs: Tensor
    rewards: Tensor


class Replay:
    """Transitions of a table, to be drawn at random.

    An episode's last step has no successor, so it is left out. Episodes end at a limit of time, not in a terminal state: a
    bootstrap of zero there would say that nothing comes after, and the constant that centring removes would matter.

    Args:
        rewards: [M]; centred here.
        numbers: [N] steps to draw from; each is followed by another one of its episode.
        like: its type and device are the networks'.

    Raises:
        DataError: N is 0.
    """

    def __init__(self, steps: Steps, config: ActorConfig, rewards: Tensor, numbers: Tensor, like: Tensor) -> None:
        if not len(numbers):
            raise DataError("P-IQL: no step has a successor: expected episodes (or segments) of at least two steps.")
        observations, vectors = state_actions(steps, config)
        self._numbers = numbers.to(like.device)
        self._observations = observations.to(like)
        self._actions = steps.actions.to(like.device) if steps.actions.dim() == 1 else steps.actions.to(like)
        self._inputs = torch.cat([observations, vectors], dim=-1).to(like)
        self._rewards = (rewards - rewards[numbers].mean()).to(like)

    def draw(self, size: int, generator: torch.Generator) -> Transitions:
        """C = `size` of them, with replacement."""
        rows = self._numbers[torch.randint(len(self._numbers), (size,), generator=generator).to(self._numbers.device)]
        observations, following = self._observations[rows], self._observations[rows + 1]
        return Transitions(observations, following, self._actions[rows], self._inputs[rows], self._rewards[rows])


def train_iql(
    actor: Actor,
    steps: Steps,
    rewards: Tensor,
    numbers: Tensor,
    options: PiqlOptions,
    *,
    seed: int,
    evaluate: Callable[[Actor], Mapping[str, float]] | None = None,
    evaluate_at: Collection[int] = (),
) -> tuple[IqlNetworks, float, list[dict[str, float]]]:
    """IQL on [M] given rewards; `numbers` as in `Replay`, the rest as in `train_piql`.

    Returns:
        The networks, the seconds of training, and the evaluations.
    """
    weight = next(actor.parameters())
    replay = Replay(steps, actor.config, rewards, numbers, weight)
    order = torch.Generator().manual_seed(seed)
    seconds, lines = 0.0, []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        learner = Learner(IqlNetworks(actor, options.hidden).to(weight), options)
        for number in range(options.updates + 1):
            if number:
                begin = time.perf_counter()
                learner.update(replay.draw(options.batch_size, order))
                seconds += time.perf_counter() - begin
            if evaluate is not None and number in evaluate_at:
                lines.append({"step": number, **learner.evaluated(evaluate)})
    learner.networks.eval()
    return learner.networks, seconds, lines


class Learner:
    """The networks, each with its optimizer, and the updates that `options.updates` batches make of them."""

    def __init__(self, networks: IqlNetworks, options: PiqlOptions) -> None:
        self.networks, self.options = networks.train(), options
        self._optimizers = {
            name: torch.optim.Adam(getattr(networks, name).parameters(), options.learning_rate, fused=True)
            for name in ("actor", "critics", "value")
        }
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizers["actor"], options.updates)

    def update(self, batch: Transitions) -> None:
        """Value, policy, critics, targets, in the order of the authors' code."""
        networks, options = self.networks, self.options
        with torch.no_grad():
            optimistic = evaluate_critics(networks.targets, batch.inputs)
        lowest = optimistic.amin(0)
        values = networks.value(batch.observations).squeeze(-1)
        self._step("value", expectile_loss(values, lowest, options.expectile).mean())
        weights = advantage_weights(lowest - values.detach(), options.temperature, options.largest_weight)
        logps = networks.actor.family.logps(networks.actor(batch.observations), batch.actions)
        self._step("actor", -(weights * logps).mean())
        self._schedule.step()
        with torch.no_grad():
            returns = batch.rewards + options.discount * networks.value(batch.following).squeeze(-1)
        found = evaluate_critics(networks.critics, batch.inputs)
        self._step("critics", F.mse_loss(found, returns.expand_as(found)))
        follow(networks.targets, networks.critics, options.polyak)

    def evaluated(self, evaluate: Callable[[Actor], Mapping[str, float]]) -> Mapping[str, float]:
        """The policy's numbers, without dropout and without a trace in the generators."""
        self.networks.eval()
        with torch.no_grad(), torch.random.fork_rng():
            found = evaluate(self.networks.actor)
        self.networks.train()
        return found

    def _step(self, name: str, loss: Tensor) -> None:
        self._optimizers[name].zero_grad(set_to_none=True)
        loss.backward()
        self._optimizers[name].step()


def expectile_loss(values: Tensor, targets: Tensor, expectile: float) -> Tensor:
    """[C] |expectile - 1(target < value)| * (target - value)^2 (Kostrikov et al. 2021, eq. 5)."""
    error = targets - values
    return (expectile - (error < 0).to(error)).abs() * error.square()


def advantage_weights(advantages: Tensor, temperature: float, largest: float) -> Tensor:
    """[C] exp(advantage / temperature), at most `largest`."""
    return (advantages / temperature).clamp(max=math.log(largest)).exp()


def evaluate_critics(critics: Any, inputs: Tensor) -> Tensor:
    """[2, C] Q by critic."""
    return torch.stack([critic(inputs).squeeze(-1) for critic in critics])


@torch.no_grad()
def follow(targets: nn.Module, sources: nn.Module, rate: float) -> None:
    """target += rate * (source - target), weight by weight."""
    for target, source in zip(targets.parameters(), sources.parameters(), strict=True):
        target.lerp_(source, rate)
