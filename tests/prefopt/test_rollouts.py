"""Rollouts: old log-probs are those of the sampling distribution, rewards and advantages are what can be worked out by hand,
and PPO through `fit` does not depend on micro-batches, survives SIGKILL and raises the exact expected reward."""

from __future__ import annotations

import itertools
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor

from prefopt import algorithms, checkpoint
from prefopt.algorithms import Setting
from prefopt.data.exact_world import ExactWorld, WorldConfig, expected
from prefopt.data.records import Example, Message
from prefopt.errors import ConfigError, DataError, TrainingError
from prefopt.models.causal_lm import CausalLMPolicy, FrozenReference, build_policy
from prefopt.models.fingerprint import fingerprint
from prefopt.models.packed import head_names
from prefopt.optimization import Logging, Optimization
from prefopt.packing import PackedBatch
from prefopt.reference import ReferenceCache
from prefopt.rewards import RewardModelScorer, check_scores
from prefopt.rollouts import Rollouts, RolloutStream, Workshop, rollouts
from prefopt.rollouts.collect import Collector
from prefopt.runlog import read_lines
from prefopt.streams import Budget, OfflineStream, Stream
from prefopt.trainer import FitResult, fit

WORLD = ExactWorld(WorldConfig(seed=1, prompts=5, symbols=5, max_completion_length=6))
EOS = WORLD.layout.eos


def build_model(seed: int, dtype: torch.dtype = torch.float64) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    config = WORLD.model_config()
    config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads = 24, 32, 2, 1
    config.head_dim, config.max_position_embeddings = 12, 64
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def build_pair(dtype: torch.dtype = torch.float64) -> tuple[CausalLMPolicy, FrozenReference]:
    """A policy with a value head that is not zero, and a reference of other weights, so that nothing is zero by luck."""
    policy = CausalLMPolicy(build_model(0, dtype), WORLD.tokenizer, heads=("value",))
    torch.nn.init.normal_(policy.heads["value"].weight, std=0.3)
    reference = CausalLMPolicy(build_model(1, dtype), WORLD.tokenizer)
    return policy, FrozenReference(reference, fingerprint(reference.model))


def count_a(prompts: Sequence[Any], completions: Sequence[str]) -> Tensor:
    """More a and shorter is better; depends on the prompt too."""
    return torch.tensor(
        [text.count("a") - 0.3 * len(text) + 0.1 * len(p) for p, text in zip(prompts, completions, strict=True)]
    )


def prompts(count: int) -> list[Example]:
    return [Example(f"prompt:{i + 1}", WORLD.prompt_ids[i % len(WORLD.prompt_ids)], ()) for i in range(count)]


def workshop(setting: Setting, policy: CausalLMPolicy, reference: FrozenReference, **changes: Any) -> Workshop:
    """As a comparison's cell builds it."""
    advantage = setting.algorithm.loss.advantage
    examples = changes.pop("examples", prompts(24))
    given: dict[str, Any] = {
        "policy": policy,
        "reference": reference,
        "scorer": count_a,
        "examples": examples,
        "texts": {e.id: WORLD.layout.text(e.prompt_ids) for e in examples},
        "budget": Budget(batch_size=8),
        "eos_ids": (EOS,),
        "max_new_tokens": WORLD.config.max_completion_length,
        "needs": setting.loss.needs,
        "advantage": None if advantage is None else partial(advantage, **setting.advantage_options),
        "dtype": policy.dtype,
    }
    return Workshop(**{**given, **changes})


def make_stream(policy: CausalLMPolicy, reference: FrozenReference, hyper: dict[str, Any], **changes: Any) -> RolloutStream:
    setting = algorithms.get("ppo").setting(**hyper)
    return rollouts(workshop(setting, policy, reference, **changes), **setting.stream_options)


RAW = frozenset({"old_token_logps", "rewards", "mask", "old_values", "max_completion_length"})


def raw_batch(
    policy: CausalLMPolicy, reference: FrozenReference, changes: dict[str, Any] | None = None, **hyper: Any
) -> PackedBatch:
    """All rollouts of one buffer in one batch, with `rewards` in place of advantages."""
    hyper = {"ppo_epochs": 1, "rollout_size": 24, **hyper}
    changes = {"budget": Budget(batch_size=24), "needs": RAW, "advantage": None, **(changes or {})}
    stream = make_stream(policy, reference, hyper, **changes)
    ((batch,),) = list(stream)
    return batch


def texts_of(batch: PackedBatch) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) of each rollout."""
    found = []
    for group in batch.groups:
        ids = batch.input_ids[group.start : group.start + group.length].tolist()
        found.append((ids[: group.starts[0]], ids[group.starts[0] :]))
    return found


def plain_logits(seed: int, prompt: list[int], completion: list[int]) -> Tensor:
    """[length, V] float64 logits that predict the completion, by transformers alone on one row."""
    with torch.no_grad():
        logits: Tensor = build_model(seed)(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
    return logits[len(prompt) - 1 : len(prompt) + len(completion) - 1]


def sampling_logps(logits: Tensor, keep: Tensor, temperature: float, targets: list[int]) -> Tensor:
    """log of softmax(logits / temperature) over the kept tokens, at the targets."""
    weights = (logits / temperature).softmax(-1) * keep
    return (weights / weights.sum(-1, keepdim=True)).log()[torch.arange(len(targets)), torch.tensor(targets)]


def nucleus(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    keep = torch.zeros_like(logits, dtype=torch.bool)
    for row, values in enumerate((logits / temperature).softmax(-1).tolist()):
        mass = 0.0
        for token in sorted(range(len(values)), key=lambda t: -values[t]):
            if mass < top_p:
                keep[row, token] = True
            mass += values[token]
    return keep


SAMPLING = [(1.0, 1.0), (0.7, 1.0), (1.0, 0.9), (0.7, 0.9), (1.6, 0.6)]


@pytest.mark.parametrize(("temperature", "top_p"), SAMPLING)
def test_old_logps_and_penalty_are_of_the_sampling_distribution(temperature: float, top_p: float) -> None:
    """Against a softmax by hand, under temperature and inside the nucleus: the policy's own log-probs, and the KL penalty as
    its log-ratio to the reference at the same temperature inside the same nucleus."""
    batch = raw_batch(*build_pair(), temperature=temperature, top_p=top_p, kl_coef=0.5)
    old, rewards = batch.rows["old_token_logps"], batch.rows["rewards"]
    assert any(len(completion) < 6 for _, completion in texts_of(batch))
    for row, (prompt, completion) in enumerate(texts_of(batch)):
        length = len(completion)
        logits = plain_logits(0, prompt, completion)
        keep = nucleus(logits, temperature, top_p)
        own = sampling_logps(logits, keep, temperature, completion)
        torch.testing.assert_close(old[row, :length], own, atol=1e-10, rtol=0)
        log_ratio = own - sampling_logps(plain_logits(1, prompt, completion), keep, temperature, completion)
        score = count_a([WORLD.layout.text(prompt)], [WORLD.tokenizer.decode(completion, skip_special_tokens=True)])[0].double()
        wanted = -0.5 * log_ratio
        wanted[-1] += score
        torch.testing.assert_close(rewards[row, :length], wanted, atol=1e-6, rtol=0)
        assert (old[row, length:] == 0).all()
        assert (rewards[row, length:] == 0).all()


@pytest.mark.parametrize(("temperature", "top_p"), SAMPLING)
@pytest.mark.parametrize("micro", [0, 3])
def test_the_ratio_is_one_in_the_first_minibatch(temperature: float, top_p: float, micro: int) -> None:
    """policy / old is 1 at every token, and the trainer, which compares the first loss with that of policy := old, starts."""
    hyper = {"temperature": temperature, "top_p": top_p, "rollout_size": 16}
    policy, reference = build_pair()
    stream = make_stream(policy, reference, hyper, budget=Budget(batch_size=8, micro_batch_size=micro))
    first = next(iter(stream))
    assert len(first) == (3 if micro else 1)
    for batch in first:
        logps = policy.evaluate(batch, {"policy_token_logps"})["policy_token_logps"]
        ratio = (logps - batch.rows["old_token_logps"]).exp()
        torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-10, rtol=0)
        assert (logps[batch.mask.bool()] < 0).any()
    _, result = ppo_run(steps=1, hyper=hyper, micro=micro)
    assert result.lines[0]["ratio/max"] == pytest.approx(1, abs=1e-10)
    assert result.lines[0]["clip_frac"] == 0


def test_a_wrong_sampling_distribution_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old log-probs without the temperature, as if a rollout engine had returned them: the first step is refused."""
    token_logps = Collector.token_logps

    def untempered(self: Collector, found: Rollouts) -> tuple[dict[str, Tensor], Tensor]:
        tensors, mask = token_logps(self, found)
        return {**tensors, "old_token_logps": 0.7 * tensors["old_token_logps"]}, mask

    monkeypatch.setattr(Collector, "token_logps", untempered)
    with pytest.raises(TrainingError, match="the first loss is"):
        ppo_run(steps=1, hyper={"temperature": 0.7})


def test_the_score_sits_at_the_last_token_and_unfinished_rollouts_pay() -> None:
    batch = raw_batch(*build_pair(), kl_coef=0.0, missing_eos_penalty=10.0)
    ends = set()
    for row, (prompt, completion) in enumerate(texts_of(batch)):
        text = WORLD.tokenizer.decode(completion, skip_special_tokens=True)
        score = count_a([WORLD.layout.text(prompt)], [text])[0].double() - 10.0 * (completion[-1] != EOS)
        wanted = torch.zeros_like(batch.rows["rewards"][row])
        wanted[len(completion) - 1] = score
        torch.testing.assert_close(batch.rows["rewards"][row], wanted, atol=1e-6, rtol=0)
        assert EOS not in completion[:-1]
        ends.add(completion[-1] == EOS)
    assert ends == {True, False}
    assert batch.data["max_completion_length"] == 6


def test_metrics_are_of_the_buffer() -> None:
    """Score (penalty included), whole-completion KL, length and share of EOS, once, at the first step after sampling."""
    policy, reference = build_pair()
    stream = make_stream(
        policy, reference, {"rollout_size": 24, "kl_coef": 1.0}, budget=Budget(batch_size=24), needs=RAW, advantage=None
    )
    (batch,) = next(iter(stream))
    means = {name: float((values * weight).sum() / weight.sum()) for name, (values, weight) in stream.metrics().items()}  # type: ignore[misc]
    completions = [completion for _, completion in texts_of(batch)]
    assert means["completion_length"] == pytest.approx(sum(map(len, completions)) / 24)
    assert means["eos_share"] == pytest.approx(sum(c[-1] == EOS for c in completions) / 24)
    # With a price of 1 the rewards of a completion sum to score - log-ratio.
    assert means["score"] - means["kl"] == pytest.approx(float(batch.rows["rewards"].sum()) / 24, abs=1e-5)
    assert stream.metrics() == {}
    assert (stream.collector.sampled, stream.collector.generated_tokens) == (24, sum(map(len, completions)))
    assert stream.collector.reference_tokens == batch.tokens


@pytest.mark.parametrize("options", [{}, {"discount": 0.9, "gae_lambda": 0.5, "whiten_advantages": False}])
def test_advantages_and_returns_equal_gae_by_hand(options: dict[str, Any]) -> None:
    """The recursion written out per rollout over its own tokens; whitening over all tokens of the buffer."""
    setting = algorithms.get("ppo").setting(**options)
    policy, reference = build_pair()
    needs = RAW | {"advantages", "returns", "values"}
    stream = make_stream(
        policy, reference, {"rollout_size": 24, "ppo_epochs": 1, **options}, budget=Budget(batch_size=24), needs=needs
    )
    ((batch,),) = list(stream)
    discount, trace = setting.hyper["discount"], setting.hyper["gae_lambda"]
    rows = []
    for row, (prompt, completion) in enumerate(texts_of(batch)):
        length = len(completion)
        rewards, values = batch.rows["rewards"][row].tolist(), batch.rows["old_values"][row].tolist()
        with torch.no_grad():
            states = build_model(0).model(input_ids=torch.tensor([[*prompt, *completion]])).last_hidden_state[0]
            by_hand = policy.heads["value"](states).squeeze(-1)[len(prompt) - 1 : -1].tolist()
        assert values[:length] == pytest.approx(by_hand, abs=1e-10)
        advantages = [0.0] * length
        following = 0.0
        for t in reversed(range(length)):
            next_value = values[t + 1] if t + 1 < length else 0.0
            following = rewards[t] + discount * next_value - values[t] + discount * trace * following
            advantages[t] = following
        returns = [a + v for a, v in zip(advantages, values, strict=False)]
        assert batch.rows["returns"][row, :length].tolist() == pytest.approx(returns, abs=1e-10)
        rows.append(advantages)
    every = [a for row in rows for a in row]
    mean = sum(every) / len(every)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in every) / len(every) + 1e-8)
    for row, advantages in enumerate(rows):
        wanted = [(a - mean) / deviation for a in advantages] if setting.hyper["whiten_advantages"] else advantages
        assert batch.rows["advantages"][row, : len(wanted)].tolist() == pytest.approx(wanted, abs=1e-10)


def test_ids_are_unique_where_a_prompt_comes_twice() -> None:
    """5 prompts (two of one id), 4 a buffer, over passes: a buffer crosses the end of a pass and repeats a prompt; each
    rollout still has the log-probs of its own tokens."""
    examples = [*prompts(4), prompts(1)[0]]
    policy, reference = build_pair()
    stream = make_stream(
        policy, reference, {"rollout_size": 4, "ppo_epochs": 1}, examples=examples, budget=Budget(batch_size=4, epochs=6),
        needs=RAW, advantage=None,
    )  # fmt: skip
    seen: list[str] = []
    repeated = 0
    for (batch,) in stream:
        assert len(set(batch.ids)) == 4
        repeated += len({identity.split("#")[0] for identity in batch.ids}) < 4
        seen.extend(batch.ids)
        logps = policy.evaluate(batch, {"policy_token_logps"})["policy_token_logps"]
        torch.testing.assert_close(logps, batch.rows["old_token_logps"], atol=1e-10, rtol=0)
    assert repeated > 0
    assert len(set(seen)) == len(seen) == 32


def test_every_rollout_is_used_once_an_epoch() -> None:
    policy, reference = build_pair()
    stream = make_stream(policy, reference, {"rollout_size": 10, "ppo_epochs": 3}, budget=Budget(batch_size=4))
    steps = [[identity for batch in step for identity in batch.ids] for step in stream]
    assert stream.total_steps == len(steps) == 3 * 3 * 3
    for begin in range(0, len(steps), 3):
        assert [len(step) for step in steps[begin : begin + 3]] == [4, 4, 2]
    for begin in range(0, len(steps), 9):
        epochs = [[i for step in steps[first : first + 3] for i in step] for first in range(begin, begin + 9, 3)]
        assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
        assert epochs[0] != epochs[1]
        assert len(set(epochs[0])) == 10


GROUPED = RAW | {"advantages", "reference_token_logps"}


def less_group_mean(rewards: Tensor, mask: Tensor, group_ids: Tensor) -> dict[str, Tensor]:
    """A rollout's return less the mean of its prompt's rollouts."""
    returns = (rewards * mask).sum(-1)
    means = torch.stack([returns[group_ids == group].mean() for group in group_ids])
    return {"advantages": (returns - means).unsqueeze(-1) * mask}


def number_of(identity: str) -> int:
    """A rollout's place in its buffer."""
    return int(identity.rpartition(".")[2])


def test_rollouts_of_one_prompt_stand_together_and_are_compared_over_the_whole_buffer() -> None:
    """12 rollouts are 3 samples of 4 prompts. Advantages are worked out by hand from the rewards of the buffer, although a
    step holds 5 of its rollouts."""
    policy, reference = build_pair()
    stream = make_stream(
        policy, reference, {"rollout_size": 12, "samples_per_prompt": 3, "ppo_epochs": 1}, budget=Budget(batch_size=5),
        needs=GROUPED, advantage=less_group_mean,
    )  # fmt: skip
    steps = list(stream)
    assert stream.total_steps == len(steps) == 6 * 3, "24 prompts are 6 buffers of 4"
    assert stream.collector.sampled == 6 * 12
    for begin in range(0, len(steps), 3):
        buffer = [batch for step in steps[begin : begin + 3] for batch in step]
        assert sorted(len(batch.ids) for step in steps[begin : begin + 3] for batch in step) == [2, 5, 5]
        returns, advantages, asked = {}, {}, {}
        for batch in buffer:
            for row, identity in enumerate(batch.ids):
                number = number_of(identity)
                returns[number] = float(batch.rows["rewards"][row].sum())
                advantages[number] = batch.rows["advantages"][row, 0].item()
                asked[number] = identity.split("#")[0]
        assert sorted(returns) == list(range(12))
        for first in range(0, 12, 3):
            group = range(first, first + 3)
            assert len({asked[i] for i in group}) == 1
            mean = sum(returns[i] for i in group) / 3
            assert [advantages[i] for i in group] == pytest.approx([returns[i] - mean for i in group], abs=1e-9)
        assert len({asked[i] for i in range(12)}) == 4
    seen = {identity.split("#")[0] for step in steps for batch in step for identity in batch.ids}
    assert len(seen) == 24, "an epoch is every prompt once"


def test_samples_of_one_prompt_differ() -> None:
    batch = raw_batch(*build_pair(), {"examples": prompts(1)}, samples_per_prompt=24)
    assert len({tuple(prompt) for prompt, _ in texts_of(batch)}) == 1
    assert len({tuple(completion) for _, completion in texts_of(batch)}) > 4


@pytest.mark.parametrize(("advantage", "prompts_asked"), [(less_group_mean, 6), (None, 24)])
def test_by_default_a_prompt_has_four_rollouts_where_they_are_compared(advantage: Any, prompts_asked: int) -> None:
    batch = raw_batch(*build_pair(), {"advantage": advantage, "examples": prompts(prompts_asked)})
    assert len(batch.ids) == 24
    assert len({identity.split("#")[0] for identity in batch.ids}) == prompts_asked


def test_reference_log_probs_are_kept_for_losses_that_name_them() -> None:
    """Tokens, or their sum, as the reference gives them; otherwise they are let go."""
    policy, reference = build_pair()
    for needs in (RAW | {"reference_token_logps"}, RAW | {"reference_logps"}):
        batch = raw_batch(policy, reference, {"needs": needs}, temperature=0.7)
        wanted = reference.token_logps(batch)
        torch.testing.assert_close(batch.rows["reference_token_logps"], wanted, atol=1e-10, rtol=0)
        torch.testing.assert_close(batch.tensors({"reference_logps"})["reference_logps"], wanted.sum(-1), atol=1e-9, rtol=0)
    assert "reference_token_logps" not in raw_batch(policy, reference).rows


def test_a_loss_without_advantages_trains_on_rollouts() -> None:
    """The entropy bonus by itself: the policy becomes more random."""
    setting = algorithms.get("entropy").setting(rollout_size=16)
    policy, reference = build_pair()
    stream = rollouts(workshop(setting, policy, reference, budget=Budget(batch_size=16, epochs=10)), **setting.stream_options)
    result = fit(policy, setting.loss, stream, Optimization(learning_rate=1e-2), logging=Logging(log_every=1))
    assert result.lines[-1]["entropy"] > result.lines[0]["entropy"] + 0.1


def flatten(step: list[PackedBatch]) -> list[Any]:
    found: list[Any] = []
    for batch in step:
        found += [batch.ids, batch.input_ids, batch.scatter, *(batch.rows[name] for name in sorted(batch.rows))]
        found.append(torch.zeros(0) if batch.sampling.support is None else batch.sampling.support)
    return found


@pytest.mark.parametrize("made", [1, 3, 4])
@pytest.mark.parametrize(("top_p", "samples"), [(1.0, 1), (0.8, 1), (0.8, 3)])
@pytest.mark.fault(2)
def test_state_in_the_middle_of_a_buffer(made: int, top_p: float, samples: int, tmp_path: Path) -> None:
    """Saved to disk after 1, 3 or 4 of the 4 steps on a buffer: what follows, later buffers included, is equal bit for bit."""
    hyper = {"rollout_size": 12, "ppo_epochs": 2, "top_p": top_p, "samples_per_prompt": samples}
    policy, reference = build_pair()
    stream = make_stream(policy, reference, hyper, budget=Budget(batch_size=6))
    steps = iter(stream)
    for _ in range(made):
        next(steps)
    path = checkpoint.save(tmp_path, made, stream.state_dict())
    rest = list(steps)
    other = make_stream(policy, reference, hyper, budget=Budget(batch_size=6))
    other.load_state_dict(checkpoint.load(path)[1])
    other_rest = list(other)
    assert len(rest) == len(other_rest) == 4 * 2 * samples - made
    for one, two in zip(rest, other_rest, strict=True):
        for left, right in zip(flatten(one), flatten(two), strict=True):
            assert torch.equal(left, right) if isinstance(left, Tensor) else left == right
    mine, theirs = stream.collector, other.collector
    assert (theirs.sampled, theirs.generated_tokens) == (mine.sampled, mine.generated_tokens)


@pytest.mark.fault(30)
def test_scorer_errors_name_the_prompt() -> None:
    policy, reference = build_pair()
    examples = prompts(3)

    def scores_nan(asked: Sequence[Any], completions: Sequence[str]) -> Tensor:
        return torch.tensor([0.0, math.nan, 1.0])

    stream = make_stream(policy, reference, {}, examples=examples, scorer=scores_nan)
    with pytest.raises(TrainingError, match=r"failed at prompt prompt:[123] \(index 1 .*returned nan"):
        next(iter(stream))
    stream = make_stream(policy, reference, {}, examples=examples, scorer=lambda asked, completions: torch.zeros(3, 1))
    with pytest.raises(TrainingError, match=r"shape \[3, 1\] for 3 completions, the first .*expected \[3\]"):
        next(iter(stream))
    with pytest.raises(TrainingError, match=r"failed at prompt b \(index 1 .*returned inf"):
        check_scores(torch.tensor([0.0, math.inf]), ["a", "b"])


@pytest.mark.parametrize(
    "hyper",
    [
        {"temperature": 0.0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"rollout_size": 0},
        {"ppo_epochs": 0},
        {"samples_per_prompt": -1},
        {"samples_per_prompt": 5},
        {"rollout_size": 4, "samples_per_prompt": 8},
    ],
)
def test_options_that_sample_nothing_are_refused(hyper: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="rollouts: "):
        make_stream(*build_pair(), hyper)


def test_gae_without_a_value_head_is_refused_before_anything_is_sampled() -> None:
    setting = algorithms.get("ppo").setting(vf_coef=0.0)
    with pytest.raises(ConfigError, match=r"needs old_values, but no term of the loss trains a value head.*vf_coef"):
        rollouts(workshop(setting, *build_pair()), **setting.stream_options)


def test_no_prompt_is_an_error() -> None:
    with pytest.raises(DataError, match="no prompt to sample from"):
        make_stream(*build_pair(), {}, examples=[])


def foreign_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Letters in another order, with a token for `ab` and an EOS id of its own: nothing of the policy's ids fits."""
    core = Tokenizer(WordLevel({"<end>": 0, "e": 1, "d": 2, "c": 3, "b": 4, "a": 5, "ab": 6}))
    core.pre_tokenizer = Split(Regex(r"ab|[\s\S]"), "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


def reward_scorer(tokenizer: Any, vocabulary: int, **options: Any) -> RewardModelScorer:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.AutoModelForCausalLM.from_config(config).double()
    return RewardModelScorer(CausalLMPolicy(model, tokenizer, heads=("reward",)), max_length=20, **options)


def test_a_reward_model_reads_text_with_its_own_tokenizer() -> None:
    """Scores equal its head on the last token (its own EOS) of its own tokenisation, shifted by the offset, whatever the
    other rows are."""
    scorer = reward_scorer(foreign_tokenizer(), 7, offset=0.25, micro_batch_tokens=10)
    asked, answers = ["ab", "cdeab", "a"], ["bab", "", "eeeeee"]
    got = scorer(asked, answers)
    ids = {"ab": [6], "cdeab": [3, 2, 1, 6], "a": [5], "bab": [4, 6], "": [], "eeeeee": [1] * 6}
    for row, (prompt, answer) in enumerate(zip(asked, answers, strict=True)):
        with scorer.policy.plain_attention() as model, torch.no_grad():
            states = model.model(input_ids=torch.tensor([[*ids[prompt], *ids[answer], 0]])).last_hidden_state
            wanted = scorer.policy.heads["reward"](states[0, -1]) - 0.25
        torch.testing.assert_close(got[row], wanted[0], atol=1e-10, rtol=0)
    assert scorer.tokens == sum(len(ids[text]) for text in (*asked, *answers)) + 3


def test_rollouts_with_a_reward_model_of_another_vocabulary() -> None:
    scorer = reward_scorer(foreign_tokenizer(), 7)
    batch = raw_batch(*build_pair(), {"scorer": scorer}, kl_coef=0.0)
    for row, (prompt, completion) in enumerate(texts_of(batch)):
        text = WORLD.tokenizer.decode(completion, skip_special_tokens=True)
        wanted = scorer([WORLD.layout.text(prompt)], [text])[0]
        torch.testing.assert_close(batch.rows["rewards"][row].sum(), wanted, atol=1e-10, rtol=0)


def test_conversations_are_scored_as_conversations() -> None:
    """A prompt of messages is answered by an assistant's turn, rendered by the reward model's template."""
    tokenizer = foreign_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'c' if m.role == 'assistant' else 'd' }}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}c{% endif %}"
    )
    scorer = reward_scorer(tokenizer, 7)
    got = scorer([(Message(role="user", content="ab"),)], ["ea"])
    torch.testing.assert_close(got, scorer(["dabc"], ["ea"]))


# ---- PPO through fit


class Watched:
    """A stream that calls `each_step` before it yields a step."""

    def __init__(self, stream: Stream, each_step: Callable[[], None]) -> None:
        self._stream, self._each_step = stream, each_step

    def __iter__(self) -> Iterator[Any]:
        for step in self._stream:
            self._each_step()
            yield step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def ppo_run(
    *,
    micro: int = 0,
    steps: int = 5,
    hyper: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
    folder: Path | None = None,
    each_step: Callable[[], None] = lambda: None,
    watch: Callable[[CausalLMPolicy], None] = lambda policy: None,
) -> tuple[CausalLMPolicy, FitResult]:
    setting = algorithms.get("ppo").setting(**{"rollout_size": 16, "entropy_coef": 0.01, **(hyper or {})})
    policy, reference = build_pair(dtype)
    watch(policy)
    budget = Budget(batch_size=8, micro_batch_size=micro, max_steps=steps, epochs=10)
    stream = Watched(rollouts(workshop(setting, policy, reference, budget=budget), **setting.stream_options), each_step)
    logging = Logging(log_every=1, save_every=2 if folder else 0)
    optimization = Optimization(learning_rate=5e-3)
    return policy, fit(policy, setting.loss, stream, optimization, logging=logging, folder=folder, resume=folder is not None)


@pytest.mark.parametrize("hyper", [{}, {"top_p": 0.9, "temperature": 0.7}])
def test_ppo_accumulation_does_not_change_the_update(hyper: dict[str, Any]) -> None:
    """8x1, 4x2 and 1x8: the same parameters after 5 steps (two buffers, policy, value and entropy terms) to 1e-10."""
    whole, whole_result = ppo_run(micro=8, hyper=hyper)
    start = build_pair()[0].trainable_state()
    assert max(float((value - start[key]).abs().max()) for key, value in whole.trainable_state().items()) > 1e-3
    for micro in (4, 2, 1):
        parts, parts_result = ppo_run(micro=micro, hyper=hyper)
        for key, value in whole.trainable_state().items():
            torch.testing.assert_close(parts.trainable_state()[key], value, atol=1e-10, rtol=0)
        for one, other in zip(whole_result.lines, parts_result.lines, strict=True):
            assert one == pytest.approx(other, rel=1e-6, abs=1e-9)


def test_ppo_accumulation_gradient_in_float32() -> None:
    """float32: the gradient of the first update, policy, value and entropy terms together, agrees to 1e-5 relative."""
    found: list[torch.Tensor] = []
    for micro in (8, 4, 1):
        grads: dict[str, torch.Tensor] = {}

        def watch(policy: CausalLMPolicy, grads: dict[str, torch.Tensor] = grads) -> None:
            for key, parameter in policy.named_parameters():
                parameter.register_post_accumulate_grad_hook(lambda p, key=key: grads.__setitem__(key, p.grad.clone()))

        ppo_run(micro=micro, steps=1, dtype=torch.float32, watch=watch)
        found.append(torch.cat([grad.flatten() for _, grad in sorted(grads.items())]))
    for other in found[1:]:
        assert (other - found[0]).norm() <= 1e-5 * found[0].norm()


RESUMABLE = """
    import sys, time
    from pathlib import Path
    import torch
    sys.path.insert(0, {tests!r})
    import test_rollouts as t
    torch.set_num_threads(1)
    t.ppo_run(steps=12, dtype=torch.float32, folder=Path({folder!r}), each_step=lambda: time.sleep(0.1))
"""


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums over threads may come in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.fault(2)
def test_kill_9_and_resume_ppo_equals_the_uninterrupted_run(tmp_path: Path) -> None:
    """SIGKILL of another process between two samplings; this process goes on: metrics and weights equal bit for bit."""
    ppo_run(steps=12, dtype=torch.float32, folder=tmp_path / "whole")
    code = textwrap.dedent(RESUMABLE).format(tests=str(Path(__file__).parent), folder=str(tmp_path / "cut"))
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while not [p for p in checkpoint.list_checkpoints(tmp_path / "cut") if int(p.name.split("-")[1]) >= 6]:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    resumed_from = int(checkpoint.list_checkpoints(tmp_path / "cut")[-1].name.split("-")[1])
    assert 6 <= resumed_from < 12
    ppo_run(steps=12, dtype=torch.float32, folder=tmp_path / "cut")
    assert read_lines(tmp_path / "cut") == read_lines(tmp_path / "whole")
    assert [line["step"] for line in read_lines(tmp_path / "cut")] == list(range(1, 13))
    (_, whole), (_, cut) = (checkpoint.load(tmp_path / run / "checkpoint-12") for run in ("whole", "cut"))
    for key, value in whole["policy"].items():
        assert cut["policy"][key].equal(value)


class Interrupted(Exception):
    """Stands for a crash."""


@pytest.mark.fault(2)
def test_dpo_with_dropout_resumes_on_the_same_masks(tmp_path: Path) -> None:
    """Attention and residual dropout draw from torch's generator: its state is part of the checkpoint."""
    config = transformers.GPT2Config(
        vocab_size=6, n_embd=24, n_layer=2, n_head=2, n_positions=64, attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.0,
        bos_token_id=EOS, eos_token_id=EOS,
    )  # fmt: skip

    def run(folder: Path, crash_at: int | None = None, noise: int = 0) -> FitResult:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        policy, reference = build_policy(model, None, dropout=True)
        pairs = [Example(f"row:{i}", (i % 5, 1), ((i % 3, 2, EOS), (4, i % 4))) for i in range(12)]
        stream = OfflineStream(pairs, kind="pairs", budget=Budget(batch_size=4, epochs=4), reference=ReferenceCache(reference))
        setting = algorithms.get("dpo").setting()
        torch.manual_seed(100 + noise)

        steps = itertools.count()

        def perhaps_crash() -> None:
            if next(steps) == crash_at:
                raise Interrupted

        logging, optimization = Logging(log_every=1, save_every=3), Optimization(learning_rate=1e-2)
        return fit(
            policy, setting.loss, Watched(stream, perhaps_crash), optimization, logging=logging, folder=folder, resume=True
        )

    whole = run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", crash_at=7)
    # The second process starts its generator elsewhere: only the checkpoint can bring it back.
    assert run(tmp_path / "cut", noise=1).lines == whole.lines
    (_, one), (_, two) = (checkpoint.load(tmp_path / name / "checkpoint-12") for name in ("whole", "cut"))
    for key, value in one["policy"].items():
        assert two["policy"][key].equal(value)
    assert run(tmp_path / "other", noise=1).lines != whole.lines, "dropout should be on"


def test_ppo_raises_the_exact_expected_reward() -> None:
    """An enumerable world with its hidden reward as scorer: the expectation over all completions rises, not only the sample's
    score, and a higher price of KL keeps the policy nearer to the reference."""
    world = ExactWorld(WorldConfig.tabular())
    kls, rises = [], []
    for kl_coef in (0.05, 2.0):
        torch.manual_seed(0)
        setting = algorithms.get("ppo").setting(rollout_size=128, ppo_epochs=2, kl_coef=kl_coef)
        model = transformers.AutoModelForCausalLM.from_config(world.model_config())
        policy, reference = build_policy(model, world.tokenizer, heads=head_names(setting.loss.needs))

        def exact(policy: CausalLMPolicy = policy) -> Tensor:
            with policy.plain_attention() as plain:
                return world.sequence_logps(world.next_logps(plain))

        def hidden(asked: Sequence[Any], completions: Sequence[str]) -> Tensor:
            return torch.tensor([world.reward_text(p, c) for p, c in zip(asked, completions, strict=True)])

        examples = [Example(f"p:{i}", world.prompt_ids[i % 4], ()) for i in range(128)]
        texts = {e.id: world.layout.text(e.prompt_ids) for e in examples}
        shop = workshop(
            setting, policy, reference, scorer=hidden, examples=examples, texts=texts, eos_ids=(world.layout.eos,),
            budget=Budget(batch_size=64, epochs=10), max_new_tokens=3,
        )  # fmt: skip
        before = exact()
        stream = rollouts(shop, **setting.stream_options)
        result = fit(
            policy, setting.loss, stream, Optimization(learning_rate=3e-3, schedule="constant"), logging=Logging(log_every=4)
        )
        after = exact()
        rises.append(float((expected(world.rewards, after) - expected(world.rewards, before)).mean()))
        kls.append(float((after.exp() * (after - before)).sum(-1).mean()))
        assert result.lines[-1]["score"] == pytest.approx(float(expected(world.rewards, after).mean()), abs=0.4)
    best = float((world.rewards.amax(-1) - expected(world.rewards, before)).mean())
    assert rises[0] > 0.5 * best
    assert rises[1] > 0
    assert kls[1] < 0.5 * kls[0]
