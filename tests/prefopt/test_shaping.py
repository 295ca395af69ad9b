"""Shaping of rewards in the stream: scaling and clipping, the controller of kl_coef, early stop, credit, and their state."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from losses.types import Metric
from prefopt import algorithms, checkpoint
from prefopt.errors import ConfigError
from prefopt.models.causal_lm import CausalLMPolicy, FrozenReference
from prefopt.optimization import Logging, Optimization
from prefopt.rollouts import rollouts
from prefopt.streams import Budget
from prefopt.trainer import FitResult, fit
from tests.prefopt.test_rollouts import build_pair, make_stream, raw_batch, workshop


@pytest.fixture(scope="module")
def pair() -> tuple[CausalLMPolicy, FrozenReference]:
    return build_pair()


def read(metrics: Any, name: str) -> float:
    values, weight = metrics[name]
    return float((values * weight).sum() / weight.sum())


def test_batch_scaling_gives_scores_mean_0_and_deviation_1(pair: tuple[CausalLMPolicy, FrozenReference]) -> None:
    plain = raw_batch(*pair, kl_coef=0.0).rows["rewards"].sum(-1)
    scaled = raw_batch(*pair, kl_coef=0.0, scale_scores="batch").rows["rewards"].sum(-1)
    torch.testing.assert_close(scaled, (plain - plain.mean()) / plain.std())


def test_running_scaling_divides_by_the_deviation_of_all_scores_so_far(pair: tuple[CausalLMPolicy, FrozenReference]) -> None:
    """The second buffer is divided by the deviation over both; no mean is taken off."""
    options = {"kl_coef": 0.0, "ppo_epochs": 1, "rollout_size": 12}
    plain, scaled = (
        [
            torch.cat([batch.rows["rewards"].sum(-1) for batch in step])
            for step in make_stream(*pair, {**options, "scale_scores": scale}, budget=Budget(batch_size=12), needs=RAW_NEEDS)
        ]
        for scale in ("none", "running")
    )
    assert len(plain) == 2
    torch.testing.assert_close(scaled[0], plain[0] / plain[0].std(correction=0))
    torch.testing.assert_close(scaled[1], plain[1] / torch.cat(plain).std(correction=0))


RAW_NEEDS = frozenset({"old_token_logps", "rewards", "mask", "old_values", "values"})


def test_clipping_cuts_scores_and_counts_them(pair: tuple[CausalLMPolicy, FrozenReference]) -> None:
    plain = raw_batch(*pair, kl_coef=0.0).rows["rewards"].sum(-1)
    cut = raw_batch(*pair, kl_coef=0.0, clip_scores=0.5).rows["rewards"].sum(-1)
    torch.testing.assert_close(cut, plain.clamp(-0.5, 0.5))
    stream = make_stream(*pair, {"clip_scores": 0.5})
    next(iter(stream))
    assert 0 < read(stream.metrics(), "score/clip_frac") < 1


def test_uniform_credit_spreads_the_score_and_keeps_its_sum(pair: tuple[CausalLMPolicy, FrozenReference]) -> None:
    sparse = raw_batch(*pair, kl_coef=0.0)
    uniform = raw_batch(*pair, kl_coef=0.0, credit="uniform", credit_beta=0.5)
    rewards, mask = uniform.rows["rewards"], uniform.mask
    torch.testing.assert_close(rewards.sum(-1), sparse.rows["rewards"].sum(-1))
    share = 0.5 * sparse.rows["rewards"].sum(-1, keepdim=True) / mask.sum(-1, keepdim=True) * mask
    torch.testing.assert_close(rewards, share + 0.5 * sparse.rows["rewards"])


def test_other_estimators_price_every_token_otherwise(pair: tuple[CausalLMPolicy, FrozenReference]) -> None:
    """k2 = k1^2 / 2 and k3 = exp(-k1) - 1 + k1, so neither pays for a token that the reference likes better."""
    found = {name: raw_batch(*pair, kl_coef=1.0, kl_estimator=name) for name in ("k1", "k2", "k3")}
    before = torch.arange(found["k1"].mask.shape[1]) < found["k1"].mask.sum(-1, keepdim=True) - 1  # no score there
    k1, k2, k3 = (-batch.rows["rewards"][before] for batch in found.values())
    torch.testing.assert_close(k2, k1.square() / 2)
    torch.testing.assert_close(k3, torch.exp(-k1) - 1 + k1)


@pytest.mark.parametrize(("target", "rises"), [(1e-3, True), (1e3, False)], ids=["KL above", "KL below"])
def test_the_controller_moves_the_price_after_each_buffer(
    pair: tuple[CausalLMPolicy, FrozenReference], target: float, rises: bool
) -> None:
    """12 rollouts with a horizon of 24 and an error cut to 0.2: a tenth, up or down, per buffer."""
    options = {"kl_target": target, "kl_horizon": 24.0, "kl_coef": 0.1, "ppo_epochs": 1, "rollout_size": 12}
    stream = make_stream(*pair, options, budget=Budget(batch_size=12))
    prices = []
    for _ in stream:
        prices.append(read(stream.metrics(), "kl_coef"))
    assert prices == pytest.approx([0.1, 0.11 if rises else 0.09])


def test_a_policy_that_moved_too_far_leaves_its_buffer() -> None:
    """With a limit below what an update moves, a buffer of 3 epochs x 2 updates makes those up to the first that moved: two,
    since the first is taken at the sampling policy itself."""

    def run(limit: float) -> FitResult:
        setting = algorithms.get("ppo").setting(rollout_size=12, ppo_epochs=3, stop_kl=limit)
        policy, reference = build_pair()
        stream = rollouts(workshop(setting, policy, reference, budget=Budget(batch_size=6)), **setting.stream_options)
        return fit(policy, setting.loss, stream, Optimization(learning_rate=5e-3), logging=Logging(log_every=100))

    result = run(1e-12)
    assert result.steps == 2 * 2
    assert result.lines[-1]["step"] == 4  # the end is logged, though more updates were planned than made
    assert run(100.0).steps == 2 * 6


def test_early_stop_goes_by_the_mean_over_micro_batches(pair: tuple[CausalLMPolicy, FrozenReference]) -> None:
    stream = make_stream(*pair, {"stop_kl": 0.1, "rollout_size": 24, "ppo_epochs": 2}, budget=Budget(batch_size=12))
    steps = iter(stream)
    next(steps)

    def told(*values: float) -> dict[str, list[Metric]]:
        return {"approx_kl": [(torch.full((2,), value), torch.tensor([1.0, 3.0])) for value in values]}

    stream.after_update(told(0.0, 0.19))  # mean 0.095
    assert stream.total_steps == 4
    next(steps)
    stream.after_update(told(0.0, 0.21))
    assert stream.total_steps == 2
    assert read(stream.metrics(), "stopped_updates") == 2
    with pytest.raises(StopIteration):
        next(steps)


def test_early_stop_needs_a_loss_that_says_how_far_it_moved(pair: tuple[CausalLMPolicy, FrozenReference]) -> None:
    stream = make_stream(*pair, {"stop_kl": 0.1})
    next(iter(stream))
    with pytest.raises(ConfigError, match="reports no approx_kl"):
        stream.after_update({})


def test_the_shapers_state_survives_a_checkpoint(pair: tuple[CausalLMPolicy, FrozenReference], tmp_path: Any) -> None:
    """Price and running moments: the rest of the run is the same."""
    options = {"kl_target": 0.1, "kl_horizon": 50.0, "scale_scores": "running", "rollout_size": 6, "ppo_epochs": 1}
    stream = make_stream(*pair, options, budget=Budget(batch_size=6), needs=RAW_NEEDS)
    steps = iter(stream)
    next(steps)
    next(steps)
    path = checkpoint.save(tmp_path, 2, {"stream": stream.state_dict()})
    rest = [batch.rows["rewards"] for step in steps for batch in step]
    other = make_stream(*pair, options, budget=Budget(batch_size=6), needs=RAW_NEEDS)
    other.load_state_dict(checkpoint.load(path)[1]["stream"])
    again = [batch.rows["rewards"] for step in other for batch in step]
    assert len(rest) == len(again) == 2
    assert all(torch.equal(one, two) for one, two in zip(rest, again, strict=True))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kl_estimator": "k4"}, "kl_estimator is one of k1, k2, k3"),
        ({"scale_scores": "std"}, "scale_scores one of none, running, batch"),
        ({"kl_target": -1.0}, "must not be negative"),
        ({"kl_target": 1.0, "kl_coef": 0.0}, "kl_coef must start above 0"),
        ({"credit_beta": 1.5}, r"in \[0, 1\]; got 1.5"),
        ({"credit": "late"}, "unknown credit 'late'"),
        ({"credit_beta": 0.5}, "credit 'sparse' spreads nothing"),
        ({"kl_horizon": 100.0}, "the controller that kl_target switches on"),
        ({"stop_kl": -1.0}, "stop_kl not negative"),
    ],
)
def test_numbers_out_of_range(pair: tuple[CausalLMPolicy, FrozenReference], options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_stream(*pair, options)


def test_what_people_watch_is_reported(pair: tuple[CausalLMPolicy, FrozenReference]) -> None:
    stream = make_stream(*pair, {"rollout_size": 24, "samples_per_prompt": 2})
    next(iter(stream))
    watched = {
        "kl", "kl_coef", "score", "score/spread", "score/flat_groups", "reward", "entropy/sampled", "value/explained_variance",
        "completion_length", "eos_share",
    }  # fmt: skip
    assert watched <= {*stream.metrics()}
    assert stream.metrics() == {}
