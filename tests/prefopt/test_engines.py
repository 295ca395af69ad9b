"""Engines: the project's own, one handed in through the protocol, and the calls that the vLLM adapter makes.

vLLM itself does not run here: a module with the same calls stands in for it, and draws with transformers.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from prefopt import algorithms
from prefopt.data.exact_world import ExactWorld, WorldConfig
from prefopt.data.records import Example
from prefopt.engines import OwnEngine, build_engine, merged_weights, save_merged
from prefopt.errors import ConfigError, TrainingError
from prefopt.generate import Decoding, Sample, generate
from prefopt.models.causal_lm import CausalLMPolicy, build_policy
from prefopt.models.lora import LoRA
from prefopt.models.packed import head_names
from prefopt.rollouts import RolloutStream, Workshop, rollouts
from prefopt.rollouts.collect import Collector
from prefopt.rollouts.shaping import Shaper, ShapingOptions
from prefopt.streams import Budget

WORLD = ExactWorld(WorldConfig.tabular())
EOS = WORLD.layout.eos


def build_model(seed: int = 0) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(WORLD.model_config()).double()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def trained_adapters() -> CausalLMPolicy:
    policy = CausalLMPolicy(build_model(), WORLD.tokenizer, lora=LoRA(r=4, alpha=8))
    move(policy)
    return policy


def move(policy: CausalLMPolicy, seed: int = 5) -> None:
    """An update of everything that trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.tensor([[1, 2, 3, 0, 1]]), use_cache=False).logits
    return found


def test_the_own_engine_draws_as_generate_does() -> None:
    policy = CausalLMPolicy(build_model(), WORLD.tokenizer)
    engine = OwnEngine([EOS])
    engine.sync(policy)
    decoding = Decoding(3, temperature=0.8)
    expected = generate(
        policy, WORLD.prompt_ids, decoding, torch.Generator().manual_seed(7), eos_ids=[EOS], samples_per_prompt=3
    )
    assert engine.generate(WORLD.prompt_ids, decoding, 7, 3) == expected
    assert engine.generate(WORLD.prompt_ids, decoding, 8, 3) != expected


def test_an_engine_without_weights_says_so() -> None:
    with pytest.raises(ConfigError, match=r"call sync\(policy\) before generate"):
        OwnEngine([EOS]).generate([[1]], Decoding(2), 0)


def test_an_unknown_engine_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="unknown engine 'sglang'; known: 'own', 'vllm'"):
        build_engine("sglang", [EOS], Decoding())


@dataclass
class Shouting:
    """An engine of a user's own: it answers every prompt with the same tokens, and writes down what it was asked."""

    answer: Sample
    calls: list[str] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)

    def sync(self, policy: CausalLMPolicy) -> None:
        self.calls.append("sync")
        self.weights.append(policy.head.weight.detach().clone())

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        seed: int,
        samples_per_prompt: int = 1,
        only: Sequence[int] | None = None,
    ) -> list[Sample]:
        assert only == [*range(len(prompts))]
        self.calls.append(f"{len(prompts)} prompts, {decoding.max_new_tokens} tokens at {decoding.temperature}")
        self.seeds.append(seed)
        return [self.answer] * len(prompts) * samples_per_prompt


def workshop(policy: CausalLMPolicy, reference: Any) -> Workshop:
    setting = algorithms.get("ppo").setting()
    advantage = setting.algorithm.loss.advantage
    assert advantage is not None
    examples = [Example(f"p:{i}", WORLD.prompt_ids[i % 4], ()) for i in range(8)]
    return Workshop(
        policy, reference, lambda prompts, texts: torch.tensor([float(len(text)) for text in texts]), examples,
        {e.id: WORLD.layout.text(e.prompt_ids) for e in examples}, Budget(batch_size=4, epochs=2), (EOS,), 3,
        setting.loss.needs, partial(advantage, **setting.advantage_options), policy.dtype,
    )  # fmt: skip


def test_a_rollout_stream_takes_any_engine_and_syncs_it_before_every_buffer() -> None:
    """Two buffers of eight: weights are handed over anew for the second, after the updates made since."""
    heads = head_names(algorithms.get("ppo").setting().loss.needs)
    policy, reference = build_policy(build_model(), WORLD.tokenizer, heads=heads)
    engine = Shouting(Sample((0, 1, EOS), True, None))
    shop = workshop(policy, reference)
    shaping = ShapingOptions(0.05, "k1", 0.0, 1.0, "none", 0.0, 1.0)
    stream = RolloutStream(shop, Collector(shop, Decoding(3, 0.7), 8, 1, 0.0, engine), Shaper(shaping), 1, 0.0)
    for batches in stream:
        for batch in batches:
            assert batch.mask.sum(-1).tolist() == [3.0] * 4
            assert batch.targets.view(-1, 3).tolist() == [[0, 1, EOS]] * 4
        with torch.no_grad():
            policy.head.weight.add_(1.0)
    assert engine.calls == ["sync", "8 prompts, 3 tokens at 0.7"] * 2
    # Two minibatches, so two updates of 1.0, lie between the buffers.
    torch.testing.assert_close(engine.weights[1] - engine.weights[0], torch.full_like(engine.weights[0], 2.0))
    assert engine.seeds[0] != engine.seeds[1]


def test_merged_weights_are_those_of_the_merged_model_and_leave_the_policy_alone() -> None:
    policy = trained_adapters()
    before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    found = dict(merged_weights(policy))
    with policy.plain_attention() as model:
        merged = dict(copy.deepcopy(model).merge_and_unload().named_parameters())
    assert found.keys() == merged.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(found[name], weight.detach(), atol=1e-12, rtol=0)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(found[name], dict(build_model().named_parameters())[name])
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, before[name])


def test_adapters_that_are_off_are_not_merged() -> None:
    policy = trained_adapters()
    with policy.adapter(None):
        found = dict(merged_weights(policy))
    for name, weight in build_model().named_parameters():
        assert torch.equal(found[name], weight)


@pytest.mark.parametrize("adapters", [False, True])
def test_a_saved_merged_model_is_the_policy(adapters: bool, tmp_path: Any) -> None:
    policy = trained_adapters() if adapters else CausalLMPolicy(build_model(), WORLD.tokenizer)
    save_merged(policy, str(tmp_path))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    with policy.plain_attention() as model:
        torch.testing.assert_close(logits(loaded), logits(model), atol=1e-10, rtol=0)


class StandIn:
    """The calls of `vllm.LLM` that the adapter makes, answered by transformers on the folder that it is given."""

    def __init__(self, model: str, *, dtype: str, gpu_memory_utilization: float, generation_config: str) -> None:
        assert (dtype, generation_config) == ("float64", "vllm")
        assert 0 < gpu_memory_utilization < 1
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
        self.model.load_weights = self._load
        self.asked: list[tuple[Any, Any]] = []
        self.resets = 0

    def _load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.model.load_state_dict(dict(weights), strict=not self.model.config.tie_word_embeddings)

    def apply_model(self, function: Callable[[Any], Any]) -> list[Any]:
        return [function(self.model)]

    def reset_prefix_cache(self) -> None:
        self.resets += 1

    def generate(self, prompts: Any, *, sampling_params: Any, use_tqdm: bool) -> list[Any]:
        self.asked += list(zip(prompts, sampling_params, strict=True))
        policy = CausalLMPolicy(copy.deepcopy(self.model), None)
        answers = []
        for prompt, wanted in zip(prompts, sampling_params, strict=True):
            samples = generate(
                policy, [prompt["prompt_token_ids"]], Decoding(wanted.max_tokens, wanted.temperature),
                torch.Generator().manual_seed(wanted.seed), eos_ids=wanted.stop_token_ids, samples_per_prompt=wanted.n,
            )  # fmt: skip
            outputs = [SimpleNamespace(token_ids=s.ids, finish_reason="stop" if s.finished else "length") for s in samples]
            answers.append(SimpleNamespace(outputs=outputs))
        return answers


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("vllm")
    module.LLM = StandIn  # type: ignore[attr-defined]
    module.SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    return module


def greedy(policy: CausalLMPolicy) -> list[Sample]:
    return generate(policy, WORLD.prompt_ids, Decoding(3, 0.0), torch.Generator(), eos_ids=[EOS])


@pytest.mark.parametrize("adapters", [False, True])
def test_the_adapter_hands_over_new_weights_and_drops_old_prefixes(stand_in: ModuleType, adapters: bool) -> None:
    policy = trained_adapters() if adapters else CausalLMPolicy(build_model(), WORLD.tokenizer)
    engine: Any = build_engine("vllm", [EOS], Decoding(3))
    engine.sync(policy)
    before = engine.generate(WORLD.prompt_ids, Decoding(3, 0.0), 0)
    assert before == greedy(policy)
    assert engine._llm.resets == 0
    move(policy, seed=6)
    engine.sync(policy)
    assert engine._llm.resets == 1
    with policy.plain_attention() as model:
        torch.testing.assert_close(logits(engine._llm.model), logits(model), atol=1e-10, rtol=0)


def test_the_adapter_asks_for_independent_samples_in_order(stand_in: ModuleType) -> None:
    """No two samples of a call share a seed, equal prompts included: vLLM gives the k-th sample of a prompt seed + k."""
    engine: Any = build_engine("vllm", [EOS], Decoding(3))
    engine.sync(CausalLMPolicy(build_model(), WORLD.tokenizer))
    prompts = [WORLD.prompt_ids[0], WORLD.prompt_ids[1], WORLD.prompt_ids[0]]
    found = engine.generate(prompts, Decoding(3, 0.9), 40, 4)
    assert [prompt["prompt_token_ids"] for prompt, _ in engine._llm.asked] == [list(ids) for ids in prompts]
    seeds = [wanted.seed + k for _, wanted in engine._llm.asked for k in range(wanted.n)]
    assert len(set(seeds)) == 12
    assert len(found) == 12
    for sample in found:
        assert sample.finished == (sample.ids[-1] == EOS)
    assert {(w.temperature, w.max_tokens, w.n, tuple(w.stop_token_ids), w.ignore_eos) for _, w in engine._llm.asked} == {
        (0.9, 3, 4, (EOS,), True)
    }
    assert engine.generate(prompts, Decoding(3, 0.9), 40, 4) == found


def test_an_end_without_eos_is_refused(stand_in: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = build_engine("vllm", [EOS], Decoding(3))
    engine.sync(CausalLMPolicy(build_model(), WORLD.tokenizer))
    cut = SimpleNamespace(outputs=[SimpleNamespace(token_ids=(0, 1), finish_reason="stop")])
    monkeypatch.setattr(engine._llm, "generate", lambda *_, **__: [cut])
    with pytest.raises(TrainingError, match=r"its last token \(1,\) is none of the EOS tokens"):
        engine.generate([[1]], Decoding(3), 0)


def test_a_nucleus_is_refused_before_anything_is_loaded(stand_in: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"top_p must be 1, got 0\.9"):
        build_engine("vllm", [EOS], Decoding(top_p=0.9))
    engine: Any = build_engine("vllm", [EOS], Decoding())
    with pytest.raises(ConfigError, match=r"top_p must be 1, got 0\.5"):
        engine.generate([[1]], Decoding(top_p=0.5), 0)


def test_the_absent_extra_is_named_when_the_flag_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    policy, reference = build_policy(build_model(), WORLD.tokenizer, heads=("value",))
    setting = algorithms.get("ppo").setting(engine="vllm")
    with pytest.raises(ConfigError, match=r"needs the 'vllm' extra.*--engine own"):
        rollouts(workshop(policy, reference), **setting.stream_options)
