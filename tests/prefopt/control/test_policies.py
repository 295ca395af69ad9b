"""Control policies behind the policy protocol: named tensors by hand, losses through the trainer, saving."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import losses
from prefopt import algorithms
from prefopt.control.policies import Actor, ActorConfig, ControlPolicy, actor_fingerprint, build_control, load_actor
from prefopt.control.segments import Comparisons, Labelling, compare_segments
from prefopt.control.steps import Steps, steps_key
from prefopt.data.exact_world.labels import parse_labels
from prefopt.errors import ConfigError, DataError
from prefopt.models.packed import Reference, head_names
from prefopt.optimization import Optimization
from prefopt.reference import ReferenceCache
from prefopt.streams import Budget, OfflineStream
from prefopt.trainer import fit

LENGTH = 4
CONFIG = ActorConfig("mean_squared", 3, 2, (8,))


def table(discrete: bool = False, episodes: int = 30) -> Steps:
    """Advantages say that the first number of an action should be the first of the observation (or that action 0 is right)."""
    generator = torch.Generator().manual_seed(0)
    count = 10 * episodes
    observations = torch.rand(count, 3, generator=generator) - 0.5
    if discrete:
        actions = torch.randint(0, 2, (count,), generator=generator)
        advantages = -actions.float()
    else:
        actions = 2 * torch.rand(count, 2, generator=generator) - 1
        advantages = -(actions[:, 0] - observations[:, 0]).square()
    return Steps(observations, actions, torch.randn(count, generator=generator), advantages, 10 * torch.arange(1, episodes + 1))


def pairs(steps: Steps, count: int = 40) -> Comparisons:
    labelling = Labelling("regret", parse_labels("deterministic"))
    return compare_segments(steps, labelling, pairs=count, length=LENGTH, seed=0)


def build(steps: Steps, config: ActorConfig = CONFIG, heads: tuple[str, ...] = ()) -> tuple[ControlPolicy, Reference]:
    torch.manual_seed(0)
    return build_control(Actor(config).double(), steps, steps_key(steps), heads=heads)


def stream(
    steps: Steps, needs: frozenset[str] = frozenset(), reference: Reference | None = None, epochs: float = 1
) -> OfflineStream:
    budget = Budget(batch_size=8, micro_batch_tokens=1 << 12, epochs=epochs)
    cache = None if reference is None else ReferenceCache(reference, None)
    return OfflineStream(pairs(steps), kind="pairs", budget=budget, needs=needs, reference=cache, dtype=torch.float64)


def test_named_tensors_are_those_of_the_segments() -> None:
    steps = table()
    policy, reference = build(steps)
    (batch,) = next(iter(stream(steps, reference=reference)))
    found = policy.evaluate(batch, ["policy_chosen_token_logps", "policy_rejected_logps"])
    given = batch.tensors(["chosen_mask", "reference_rejected_logps", "chosen_lengths"])
    assert found["policy_chosen_token_logps"].shape == given["chosen_mask"].shape == (8, LENGTH)
    assert given["chosen_lengths"].tolist() == [LENGTH] * 8
    rows = {example.id: example for example in pairs(steps)}
    for row, name in enumerate(batch.ids):
        chosen, rejected = (list(side) for side in rows[name].completion_ids)
        for side, value in ((chosen, found["policy_chosen_token_logps"][row]), (rejected, found["policy_rejected_logps"][row])):
            mean = torch.tanh(policy.actor.net(steps.observations[side].double()))
            logps = -(steps.actions[side] - mean).square().sum(-1)
            torch.testing.assert_close(value, logps if value.dim() else logps.sum())
    torch.testing.assert_close(given["reference_rejected_logps"], found["policy_rejected_logps"].detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["mean_squared", "gaussian", "categorical"])
@pytest.mark.parametrize("name", ["cpl", "cpl_bc", "cpl_kl", "dpo", "ipo", "sft", "tdpo", "bradley_terry"])
def test_losses_of_language_train_control(name: str, family: str) -> None:
    """The loss falls, through the same trainer and streams."""
    discrete = family == "categorical"
    steps = table(discrete)
    setting = algorithms.get(name).setting()
    policy, reference = build(steps, replace(CONFIG, family=family), head_names(setting.loss.needs))
    kind = setting.algorithm.stream
    cache = ReferenceCache(reference, None) if setting.needs_reference else None
    budget = Budget(batch_size=40, micro_batch_tokens=1 << 12, epochs=40)
    batches = OfflineStream(
        pairs(steps), kind=kind, budget=budget, needs=setting.loss.needs, reference=cache, dtype=torch.float64
    )
    result = fit(policy, setting.loss, batches, Optimization(learning_rate=0.01))
    assert result.lines[-1]["loss"] < result.lines[0]["loss"] - 0.01


def test_cpl_finds_the_mean_that_explains_the_labels() -> None:
    """Labels are Bradley-Terry on -||a - s||^2 / T; the model is alpha log pi = -alpha ||a - mean||^2, so mean(s) = s."""
    temperature = 0.25
    steps = table(episodes=400)
    steps = replace(steps, advantages=-(steps.actions - steps.observations[:, :2]).square().sum(-1))
    policy, _ = build(steps, replace(CONFIG, hidden=(32,)))
    data = compare_segments(steps, Labelling("regret", parse_labels("bt", temperature)), pairs=2000, length=1, seed=0)
    batches = OfflineStream(data, kind="pairs", budget=Budget(batch_size=200, epochs=20), dtype=torch.float64)
    fit(policy, losses.get("cpl").bind(alpha=1 / temperature, bias=1.0), batches, Optimization(learning_rate=0.01))
    states = torch.tensor([[-0.4, 0.3, 0.0], [0.0, 0.2, 0.1], [0.4, -0.3, 0.2]])
    assert (policy.actor.act(states) - states[:, :2].double()).abs().max() < 0.15


def test_a_reward_head_sums_over_the_steps_of_a_segment() -> None:
    steps = table()
    policy, _ = build(steps, heads=("reward",))
    (batch,) = next(iter(stream(steps)))
    rewards = policy.evaluate(batch, ["chosen_rewards"])["chosen_rewards"]
    example = next(example for example in pairs(steps) if example.id == batch.ids[0])
    side = list(example.completion_ids[0])
    inputs = torch.cat([steps.observations[side], steps.actions[side]], dim=-1).double()
    torch.testing.assert_close(rewards[0], policy.heads["reward"](inputs).sum())


def test_kls_to_the_live_reference() -> None:
    steps = table(discrete=True)
    policy, reference = build(steps, replace(CONFIG, family="categorical"))
    with torch.no_grad():
        policy.actor.net[-1].bias += torch.tensor([1.0, 0.0])
    (batch,) = next(iter(stream(steps)))
    kls = policy.rows(batch, ["policy_kls", "token_kls"], reference=reference)
    with reference.frozen() as frozen:
        own, other = (model.actor(steps.observations[batch.targets].double()).log_softmax(-1) for model in (policy, frozen))
    torch.testing.assert_close(kls["policy_kls"].flatten(), (own.exp() * (own - other)).sum(-1))
    torch.testing.assert_close(kls["token_kls"].flatten(), (other.exp() * (other - own)).sum(-1))


def test_the_reference_stays_where_the_policy_started() -> None:
    steps = table()
    policy, reference = build(steps)
    (batch,) = next(iter(stream(steps)))
    before = reference.token_logps(batch)
    fit(policy, losses.get("sft").bind(), _completions(steps), Optimization(learning_rate=0.01))
    assert torch.equal(reference.token_logps(batch), before)
    assert (policy.rows(batch, ["token_logps"])["token_logps"] - before).abs().max() > 1e-3


def test_dropout_is_on_in_training_alone_and_never_in_the_reference() -> None:
    steps = table()
    policy, reference = build(steps, replace(CONFIG, hidden=(64,), dropout=0.5))
    (batch,) = next(iter(stream(steps)))
    still = policy.rows(batch, ["token_logps"])["token_logps"]
    assert torch.equal(still, policy.rows(batch, ["token_logps"])["token_logps"])
    policy.train(True)
    assert not torch.equal(policy.rows(batch, ["token_logps"])["token_logps"], still)
    torch.testing.assert_close(reference.token_logps(batch), still.detach())


def test_reference_weights_name_network_and_steps() -> None:
    steps = table()
    same, other_steps = build(steps)[1].weights, build(table(episodes=31))[1].weights
    torch.manual_seed(1)
    other_actor = build_control(Actor(CONFIG), steps, steps_key(steps))[1].weights
    assert len({same, other_steps, other_actor}) == 3
    assert same == build(steps)[1].weights


def test_a_saved_policy_acts_the_same(tmp_path: Path) -> None:
    policy, _ = build(table(), replace(CONFIG, dropout=0.5), heads=("reward",))
    policy.save(tmp_path)
    loaded = load_actor(tmp_path)
    states = torch.rand(5, 3)
    torch.testing.assert_close(loaded.act(states), policy.actor.act(states).float(), atol=1e-5, rtol=1e-5)
    assert loaded.config == policy.actor.config
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(DataError, match="expected a control policy"):
        load_actor(tmp_path)


@pytest.mark.parametrize(
    ("config", "discrete", "message"),
    [
        (replace(CONFIG, family="categorical"), False, "actions are vectors; for these: gaussian"),
        (CONFIG, True, "actions are numbered; for these: categorical"),
        (replace(CONFIG, observation_size=4), False, "takes 4 observed numbers and 2 of an action; the data have 3 and 2"),
        (replace(CONFIG, family="categorical", action_size=1), True, "action 1: the policy has 1"),
    ],
)
def test_a_policy_that_does_not_fit_the_data_is_refused(config: ActorConfig, discrete: bool, message: str) -> None:
    with pytest.raises(DataError, match=message):
        build(table(discrete), config)


def test_what_a_control_policy_has_not() -> None:
    steps = table()
    policy, _ = build(steps)
    (batch,) = next(iter(stream(steps)))
    with pytest.raises(ConfigError, match="built without a reward head"):
        policy.rows(batch, ["rewards"])
    with pytest.raises(ConfigError, match="belongs to the vocabulary"):
        policy.rows(batch, ["token_log_sum_sq"])
    with pytest.raises(ConfigError, match="no head 'value'"):
        build(steps, heads=("value",))
    with pytest.raises(ConfigError, match="no control policy 'normal'"):
        replace(CONFIG, family="normal")
    with pytest.raises(ConfigError, match="no adapter None"), policy.adapter(None):
        pass


def test_hidden_layers_start_orthogonal() -> None:
    torch.manual_seed(0)
    weight: Tensor = Actor(ActorConfig("gaussian", 16, 2, (16, 16))).net[2].weight
    torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(16), atol=1e-5, rtol=1e-5)
    assert actor_fingerprint(Actor(CONFIG)) != actor_fingerprint(Actor(CONFIG))


def _completions(steps: Steps) -> OfflineStream:
    return OfflineStream(pairs(steps), kind="completions", budget=Budget(batch_size=8), dtype=torch.float64)
