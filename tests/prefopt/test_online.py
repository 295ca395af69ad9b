"""Offline losses on fresh samples: names, orders from Bradley-Terry, rows and their reference, state, and what they reach."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prefopt import algorithms, checkpoint
from prefopt.errors import ConfigError
from prefopt.models.causal_lm import CausalLMPolicy, FrozenReference, build_policy
from prefopt.optimization import Logging, Optimization
from prefopt.packing import flat_roles, pack
from prefopt.rollouts import OnlineStream, online
from prefopt.rollouts.online import rank
from prefopt.streams import Budget
from prefopt.trainer import fit
from tests.prefopt.test_rollouts import WORLD, build_model, build_pair, count_a, workshop


@pytest.fixture(scope="module")
def pair() -> tuple[CausalLMPolicy, FrozenReference]:
    return build_pair()


def make(pair: tuple[CausalLMPolicy, FrozenReference], name: str, options: dict[str, Any], **changes: Any) -> OnlineStream:
    setting = algorithms.get(name).setting(**options)
    return online(workshop(setting, *pair, **changes), setting.algorithm.stream, **setting.stream_options)


def test_a_name_is_online_and_an_offline_loss() -> None:
    algorithm = algorithms.get("online_dpo")
    assert (algorithm.stream, algorithm.data, algorithm.on_policy) == ("pairs", "online pairs", True)
    assert {"beta", "rollout_size", "ranking"} <= {*algorithm.flags}
    assert "ranking" not in algorithms.get("dpo").flags
    kinds = {name: algorithms.get(f"online_{name}").stream for name in ("sft", "kto", "pl_dpo", "dpo:1.0+sft:0.2")}
    assert kinds == {"sft": "completions", "kto": "labelled", "pl_dpo": "groups", "dpo:1.0+sft:0.2": "pairs"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("online_ppo", "'ppo' learns from rollouts already"),
        ("online_bradley_terry", "trains a reward model"),
        ("online_dpoo", "did you mean 'dpo'"),
    ],
)
def test_names_that_mean_nothing(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        algorithms.get(name)


def test_orders_follow_bradley_terry() -> None:
    """Of 20,000 orders of scores (1, 0) at temperature 2, sigmoid(1/2) = 0.622 put the first ahead (4 s.e.: 0.014)."""
    scores = torch.tensor([[1.0, 0.0]]).repeat(20_000, 1)
    order = rank(scores, "bt", 2.0, torch.Generator().manual_seed(0))
    assert float((order[:, 0] == 0).double().mean()) == pytest.approx(torch.sigmoid(torch.tensor(0.5)).item(), abs=0.014)


def test_orders_of_three_follow_plackett_luce() -> None:
    """The first is drawn by a softmax over the scores, the second by one over the others."""
    scores = torch.tensor([[0.5, 0.0, -1.0]]).repeat(40_000, 1)
    order = rank(scores, "bt", 1.0, torch.Generator().manual_seed(1))
    first = order[:, 0].bincount(minlength=3).double() / len(order)
    torch.testing.assert_close(first, scores[0].double().softmax(0), atol=0.012, rtol=0)
    then = order[order[:, 0] == 0, 1].bincount(minlength=3).double()
    torch.testing.assert_close(then[1:] / then.sum(), scores[0, 1:].double().softmax(0), atol=0.015, rtol=0)


def test_hard_orders_sort() -> None:
    assert rank(torch.tensor([[0.0, 2.0, 1.0, 2.0]]), "hard", 1.0, torch.Generator()).tolist() == [[1, 3, 2, 0]]


def test_pairs_are_fresh_ordered_by_the_reward_and_priced_by_the_reference(
    pair: tuple[CausalLMPolicy, FrozenReference],
) -> None:
    stream = make(pair, "online_dpo", {"ranking": "hard", "rollout_size": 16}, budget=Budget(batch_size=4))
    assert stream.total_steps == 6  # 24 prompts
    metrics = {}
    for step in stream:
        metrics |= stream.metrics()
        (batch,) = step
        found = batch.tensors({"chosen_scores", "rejected_scores", "reference_chosen_logps", "chosen_mask"})
        assert (found["chosen_scores"] >= found["rejected_scores"]).all()
        assert len(batch.ids) == 4
        again = pack([*stream._rows[(stream._step - 1) % 2 * 4 :][:4]], roles=flat_roles, dtype=torch.float64)
        torch.testing.assert_close(batch.rows["reference_token_logps"], pair[1].token_logps(again).detach())
        texts = [WORLD.tokenizer.decode(ids, skip_special_tokens=True) for row in stream._rows for ids in row.completion_ids]
        asked = [WORLD.layout.text(row.prompt_ids) for row in stream._rows for _ in row.completion_ids]
        scores = [score for row in stream._rows for score in row.labels.scores or ()]
        torch.testing.assert_close(count_a(asked, texts), torch.tensor(scores))
    assert stream.collector.sampled == 48
    assert {"score", "kl", "eos_share", "entropy/sampled"} <= metrics.keys()


@pytest.mark.parametrize(("loss", "completions"), [("sft", 1), ("pl_dpo", 4), ("dpo", 2), ("kto", 5)])
def test_rows_have_what_the_loss_learns_from(pair: tuple[CausalLMPolicy, FrozenReference], loss: str, completions: int) -> None:
    """Of four samples: the best, all in order, the best and the worst, all and another prompt's for KTO's baseline."""
    options = {"samples_per_prompt": 4, "ranking": "hard", "rollout_size": 16}
    stream = make(pair, f"online_{loss}", options, budget=Budget(batch_size=4))
    (batch,) = next(iter(stream))
    assert {len(row.completion_ids) for row in stream._rows} == {completions}
    assert stream._shop.needs - batch.tensors(stream._shop.needs, {"policy_token_logps": batch.mask}).keys() == set()
    for row in stream._rows:
        scores = row.labels.scores
        assert scores is None or list(scores) == sorted(scores, reverse=True)


def test_the_policys_log_probs_are_those_at_temperature_1(pair: tuple[CausalLMPolicy, FrozenReference]) -> None:
    """Samples may be hot or cut; the loss compares the two models themselves."""
    stream = make(pair, "online_dpo", {"temperature": 0.7, "top_p": 0.8, "rollout_size": 8}, budget=Budget(batch_size=4))
    (batch,) = next(iter(stream))
    plain = pack(stream._rows, roles=flat_roles, dtype=torch.float64)
    torch.testing.assert_close(batch.rows["reference_token_logps"], pair[1].token_logps(plain).detach())
    assert batch.sampling.temperature == 1
    assert batch.sampling.support is None


def test_state_in_the_middle_of_a_collection(pair: tuple[CausalLMPolicy, FrozenReference], tmp_path: Any) -> None:
    options = {"rollout_size": 12, "samples_per_prompt": 3}
    stream = make(pair, "online_pl_dpo", options, budget=Budget(batch_size=2))
    steps = iter(stream)
    for _ in range(3):
        next(steps)
    path = checkpoint.save(tmp_path, 3, {"stream": stream.state_dict()})
    rest = [(batch.ids, batch.input_ids, batch.rows, batch.data) for step in steps for batch in step]
    other = make(pair, "online_pl_dpo", options, budget=Budget(batch_size=2))
    other.load_state_dict(checkpoint.load(path)[1]["stream"])
    again = [(batch.ids, batch.input_ids, batch.rows, batch.data) for step in other for batch in step]
    assert len(rest) == len(again) == 9
    for one, two in zip(rest, again, strict=True):
        assert one[0] == two[0]
        assert torch.equal(one[1], two[1])
        for mine, theirs in zip(one[2:], two[2:], strict=True):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"samples_per_prompt": 1}, "at least 2 samples a prompt"),
        ({"samples_per_prompt": 5}, "must be a multiple of samples_per_prompt"),
        ({"ranking": "soft"}, "ranking one of bt, hard"),
        ({"ranking_temperature": 0.0}, "ranking_temperature must be positive"),
        ({"ranking": "hard", "ranking_temperature": 0.5}, "a hard ranking sorts"),
        ({"top_p": 0.0}, r"top_p in \(0, 1\]"),
    ],
)
def test_numbers_out_of_range(pair: tuple[CausalLMPolicy, FrozenReference], options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make(pair, "online_dpo", options)


@pytest.mark.parametrize("name", ["online_dpo", "online_sft"])
def test_training_raises_the_reward(name: str) -> None:
    """A few updates of an offline loss on the policy's own samples: the mean score rises."""
    policy, reference = build_policy(build_model(0), WORLD.tokenizer)
    setting = algorithms.get(name).setting(rollout_size=32, **({"beta": 0.3} if name == "online_dpo" else {}))
    shop = workshop(setting, policy, reference, budget=Budget(batch_size=8, max_steps=24, epochs=50.0))
    stream = online(shop, setting.algorithm.stream, **setting.stream_options)
    result = fit(policy, setting.loss, stream, Optimization(learning_rate=5e-3), logging=Logging(log_every=1))
    scores = [line["score"] for line in result.lines if "score" in line]
    assert sum(scores[-2:]) / 2 > sum(scores[:2]) / 2 + 0.1
