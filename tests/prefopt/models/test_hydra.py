"""Four roles on one base: adapters off is the base bit for bit, gradients stay in adapters and heads, roles do not leak."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from losses.registry import get
from prefopt import algorithms
from prefopt.data.exact_world import ExactWorld, WorldConfig
from prefopt.data.records import Example
from prefopt.errors import ConfigError
from prefopt.generate import Decoding, generate
from prefopt.hydra import check_hydra, hydra_base
from prefopt.models import causal_lm
from prefopt.models.causal_lm import CausalLMPolicy, FrozenReference
from prefopt.models.hydra import HydraPolicy, SeparateCritic, build_roles
from prefopt.models.lora import LoRA
from prefopt.optimization import Logging, Optimization
from prefopt.options import ModelOptions, Options, RewardOptions, SupervisedOptions
from prefopt.packing import flat_roles, pack
from prefopt.rewards import RewardModelScorer
from prefopt.rollouts import Workshop, rollouts
from prefopt.streams import Budget
from prefopt.trainer import FitResult, fit

WORLD = ExactWorld(WorldConfig(seed=1, prompts=5, symbols=5, max_completion_length=6))
MODES = ("joined", "split")
PPO = algorithms.get("ppo").setting(rollout_size=8, ppo_epochs=2, kl_coef=0.1)
HEADS = ("value",)


def build_model(seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(seed)
    config = WORLD.model_config()
    config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads = 24, 32, 2, 1
    config.head_dim, config.max_position_embeddings = 12, 64
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def reward_head(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {"weight": torch.randn(1, 24, generator=generator, dtype=dtype)}


def roles(mode: Any, dtype: torch.dtype = torch.float64, **more: Any) -> tuple[CausalLMPolicy, FrozenReference]:
    given: dict[str, Any] = {"lora": LoRA(r=3, alpha=6), "heads": HEADS, "reward_head": reward_head(dtype), **more}
    return build_roles(mode, build_model(dtype=dtype), WORLD.tokenizer, **given)


def examples(count: int = 12) -> list[Example]:
    generator = torch.Generator().manual_seed(1)

    def symbols(longest: int) -> tuple[int, ...]:
        length = int(torch.randint(1, longest + 1, (), generator=generator))
        return tuple(torch.randint(0, 5, (length,), generator=generator).tolist())

    return [Example(f"row:{i}", symbols(5), (symbols(6),)) for i in range(count)]


BATCH = pack(examples(), roles=flat_roles, dtype=torch.float64)


def score_a(prompts: Any, completions: Any) -> Tensor:
    return torch.tensor([text.count("a") - 0.3 * len(text) for text in completions])


def train(policy: CausalLMPolicy, reference: FrozenReference, steps: int, scorer: Any = score_a, **more: Any) -> FitResult:
    """PPO through the same stream and loop as a cell's."""
    prompts = [Example(f"prompt:{i}", WORLD.prompt_ids[i % len(WORLD.prompt_ids)], ()) for i in range(8)]
    workshop = Workshop(
        policy=policy, reference=reference, scorer=scorer, examples=prompts,
        texts={e.id: WORLD.layout.text(e.prompt_ids) for e in prompts},
        budget=Budget(batch_size=4, micro_batch_size=3, epochs=100, max_steps=steps), eos_ids=(WORLD.layout.eos,),
        max_new_tokens=6, needs=PPO.loss.needs, advantage=partial(PPO.algorithm.loss.advantage, **PPO.advantage_options),
        dtype=policy.dtype,
    )  # fmt: skip
    optimization = Optimization(learning_rate=3e-2, schedule="constant", warmup=0.0)
    return fit(policy, PPO.loss, rollouts(workshop, **PPO.stream_options), optimization, **more)


def values_of(policy: Any, *names: str) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in policy.named_parameters() if any(part in name for part in names)}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert one
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adapters_off_is_the_base_bit_for_bit_after_training(mode: str, dtype: torch.dtype) -> None:
    """Against a model that never saw an adapter: states, log-probs and rewards, with dirty adapters and while they are on."""
    policy, reference = roles(mode, dtype)
    assert train(policy, reference, 4).steps == 4
    plain = CausalLMPolicy(build_model(dtype=dtype), WORLD.tokenizer, heads=("reward",))
    plain.heads["reward"].load_state_dict(reward_head(dtype))
    batch = pack(examples(), roles=flat_roles, dtype=dtype)
    wanted = ["token_logps", "rewards"]
    with torch.no_grad():
        moved = policy.rows(batch, ["token_logps"])["token_logps"]
        states, expected = plain.hidden(batch), plain.rows(batch, wanted)
        with policy.adapter(None):
            assert torch.equal(policy.hidden(batch), states)
            found = policy.rows(batch, wanted)
    assert all(torch.equal(found[name], expected[name]) for name in wanted)
    assert torch.equal(reference.token_logps(batch), expected["token_logps"])
    assert torch.equal(reference.hidden(batch), states)
    assert float((moved - expected["token_logps"]).abs().max()) > 1e-3, "training changed nothing"
    assert torch.equal(policy.rows(batch, ["token_logps"])["token_logps"].detach(), moved), "the actor is back in force"


@pytest.mark.parametrize("mode", ["off", *MODES])
def test_the_actor_starts_at_its_reference(mode: str) -> None:
    """B = 0: every log-ratio is zero, so DPO would start at log 2, and values are zero."""
    policy, reference = roles(mode)
    rows = policy.rows(BATCH, ["token_logps", "values"])
    assert torch.equal(rows["token_logps"], reference.token_logps(BATCH))
    assert not rows["values"].any()
    kls = policy.rows(BATCH, ["policy_kls"], reference=reference)["policy_kls"]
    assert float(kls.detach().abs().max()) < 1e-12


def dirty(policy: Any) -> None:
    """Adapters and heads that are not zero anywhere."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def gradients_of(policy: CausalLMPolicy, *quantities: str) -> dict[str, Tensor]:
    policy.zero_grad(set_to_none=True)
    rows = policy.rows(BATCH, list(quantities))
    torch.stack([rows[name].square().sum() for name in quantities]).sum().backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", MODES)
def test_gradients_reach_adapters_and_the_value_head_alone(mode: str) -> None:
    policy, _ = roles(mode)
    dirty(policy)
    found = gradients_of(policy, "token_logps", "values")
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert found.keys() == trained == policy.trainable_state().keys()
    assert all(".lora_" in name or name.startswith("heads.value") for name in found)
    assert sum(".critic." in name for name in found) == (len(found) - 2) / 2 * (mode == "split")
    assert all(gradient.any() for gradient in found.values())
    assert {id(p) for group in policy.parameter_groups() for p in group["params"]} == {
        id(p) for p in policy.parameters() if p.requires_grad
    }


@pytest.mark.parametrize(("trained", "own", "other"), [("token_logps", "default", "critic"), ("values", "critic", "default")])
def test_split_one_role_s_step_leaves_the_other_s_adapter_bitwise(trained: str, own: str, other: str) -> None:
    policy, _ = roles("split")
    dirty(policy)
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    before, still = values_of(policy, f".{own}."), values_of(policy, f".{other}.")
    gradients_of(policy, trained)
    optimizer.step()
    assert_same(values_of(policy, f".{other}."), still)
    assert all(not torch.equal(value, before[name]) for name, value in values_of(policy, f".{own}.").items())


def count_passes(policy: Any, monkeypatch: pytest.MonkeyPatch, *quantities: str) -> int:
    passes = 0
    for model in (policy, getattr(policy, "critic", None)):
        if model is not None:
            inner = model.hidden

            def hidden(batch: Any, inner: Callable[..., Tensor] = inner) -> Tensor:
                nonlocal passes
                passes += 1
                return inner(batch)

            monkeypatch.setattr(model, "hidden", hidden)
    policy.rows(BATCH, list(quantities))
    return passes


@pytest.mark.parametrize(("mode", "passes"), [("trunk", 1), ("joined", 1), ("split", 2), ("off", 2)])
def test_passes_of_the_backbone(mode: str, passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Joined actor and critic share a pass; each mode makes one where only one role is asked."""
    assert count_passes(roles(mode)[0], monkeypatch, "token_logps", "values") == passes
    assert count_passes(roles(mode)[0], monkeypatch, "values") == 1
    assert count_passes(roles(mode)[0], monkeypatch, "token_logps") == 1


@pytest.mark.parametrize("mode", ["off", *MODES])
def test_values_are_taken_without_the_lm_head(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, _ = roles(mode)
    dirty(policy)
    monkeypatch.setattr(causal_lm, "token_quantities", lambda *_, **__: pytest.fail("the LM head was computed"))
    assert policy.rows(BATCH, ["values"])["values"].any()


def test_split_values_are_those_of_the_critic_s_adapter() -> None:
    """Beside log-probs, alone, and asked of the adapter by name; with the critic in force log-probs are its too."""
    policy, _ = roles("split")
    dirty(policy)
    both = policy.rows(BATCH, ["token_logps", "values"])
    with policy.adapter("critic"):
        alone = policy.rows(BATCH, ["token_logps", "values"])
    assert torch.equal(both["values"], alone["values"])
    assert not torch.equal(both["token_logps"], alone["token_logps"])
    with policy.adapter("actor"):
        assert torch.equal(policy.rows(BATCH, ["token_logps"])["token_logps"], both["token_logps"])
    with policy.adapter(None):  # the base's states under the value head: nobody switches the critic on behind None
        assert not torch.equal(policy.rows(BATCH, ["values"])["values"], both["values"])
    needed = policy.evaluate(BATCH, {"policy_token_logps", "values"})
    assert torch.equal(needed["values"], both["values"])
    with pytest.raises(ConfigError, match="no adapter 'judge'; it has 'policy', 'critic', 'actor'"), policy.adapter("judge"):
        pass


@pytest.mark.parametrize("mode", ["off", "split"])
def test_samples_are_the_actor_s(mode: str) -> None:
    """Another critic draws the same samples; the actor's change shows."""

    def drawn() -> list[tuple[int, ...]]:
        generator = torch.Generator().manual_seed(5)
        found = generate(policy, WORLD.prompt_ids, Decoding(6), generator, eos_ids=(WORLD.layout.eos,), samples_per_prompt=8)
        return [sample.ids for sample in found]

    policy, _ = roles(mode)
    first = drawn()
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad and "critic" in name:
                parameter.add_(1.0)
    assert drawn() == first
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B.default" in name and "critic" not in name.split(".lora_B")[0]:
                parameter.add_(1.0)
    assert drawn() != first


@pytest.mark.parametrize("mode", MODES)
def test_recomputed_layers_use_the_adapter_of_their_forward_pass(mode: str) -> None:
    """Backward computes checkpointed layers again when all switches are back: each under the adapter it ran with."""
    found = []
    for checkpointing in (False, True):
        policy, _ = roles(mode, checkpointing=checkpointing)
        dirty(policy)
        found.append(gradients_of(policy, "values", "token_logps"))
    torch.testing.assert_close(found[1], found[0], atol=1e-10, rtol=1e-10)


def test_off_holds_four_models_and_trains_two_of_them() -> None:
    """Full fine-tuning and LoRA copies: no storage of actor, critic and reference is shared; the reference stays."""
    for lora in (None, LoRA(r=3, alpha=6)):
        policy, reference = roles("off", lora=lora)
        assert isinstance(policy, SeparateCritic)
        frozen = reference._policy
        places = [{p.data_ptr() for p in model.parameters()} for model in (policy.model, policy.critic, frozen)]
        assert sum(map(len, places)) == len(set.union(*places))
        actor, critic, still = (values_of(m, "") for m in (policy.model, policy.critic, frozen))
        train(policy, reference, 2)
        assert_same(values_of(frozen, ""), still)
        for before, model in ((actor, policy.model), (critic, policy.critic)):
            moved = [name for name, value in values_of(model, "").items() if not torch.equal(value, before[name])]
            assert moved
            assert lora is None or all("lora_" in name or "heads" in name for name in moved)


@pytest.mark.parametrize("mode", ["off", *MODES])
@pytest.mark.fault(3)
def test_a_resumed_run_is_the_uninterrupted_one(mode: str, tmp_path: Path) -> None:
    logging = Logging(log_every=1, save_every=3)
    whole, reference = roles(mode)
    train(whole, reference, 6)
    first, reference = roles(mode)
    calls: list[int] = []

    def killed(prompts: Any, completions: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return score_a(prompts, completions)

    with pytest.raises(KeyboardInterrupt):
        train(first, reference, 6, killed, folder=tmp_path, logging=logging)
    second, reference = roles(mode)
    train(second, reference, 6, folder=tmp_path, logging=logging, resume=True)
    assert_same(second.trainable_state(), whole.trainable_state())


@pytest.mark.parametrize("mode", MODES)
def test_the_saved_actor_is_an_adapter_of_the_saved_base(mode: str, tmp_path: Path) -> None:
    """By peft's and transformers' own loading: the base that no other file holds, the actor on it, the critic beside it."""
    from peft import AutoPeftModelForCausalLM, PeftModel

    policy, reference = roles(mode, torch.float32)
    train(policy, reference, 2)
    policy.save(tmp_path / "policy")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "policy" / "base")
    ids = torch.tensor([[3, 4, 0, 1, 3]])
    with torch.no_grad(), policy.plain_attention() as live:
        expected = live(input_ids=ids).logits
        with policy.adapter(None):
            assert torch.equal(base(input_ids=ids).logits, live(input_ids=ids).logits)
        loaded = PeftModel.from_pretrained(base, tmp_path / "policy")
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
        named = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "policy")
        torch.testing.assert_close(named(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert (tmp_path / "policy" / "critic" / "adapter_config.json").exists() == (mode == "split")
    heads = load_file(tmp_path / "policy" / "heads.safetensors")
    assert torch.equal(heads["reward.weight"], reward_head(torch.float32)["weight"])
    assert heads["value.weight"].any()


@pytest.mark.parametrize("mode", MODES)
def test_the_reward_is_read_off_the_base_and_does_not_move(mode: str) -> None:
    """The scorer on the very policy that is trained: its scores stay bitwise, and are the frozen head on the base's states."""
    policy, reference = roles(mode)
    scorer = RewardModelScorer(policy, max_length=20, adapter=None, offset=0.5)
    rows = examples()
    before = scorer.score(rows)
    train(policy, reference, 4, scorer)
    assert torch.equal(scorer.score(rows), before)
    head = reward_head()
    states = CausalLMPolicy(build_model(), WORLD.tokenizer).hidden(BATCH)[BATCH.last].detach()
    torch.testing.assert_close(before[:, 0], states @ head["weight"][0] - 0.5)
    assert not torch.equal(RewardModelScorer(policy, max_length=20, offset=0.5).score(rows), before)


def test_without_values_split_has_one_adapter_and_a_trained_reward_head_is_the_loss_s() -> None:
    policy, _ = roles("split", heads=())
    assert not values_of(policy, ".critic.")
    with policy.adapter("critic"):
        assert policy.in_force == "default"
    policy, _ = roles("joined", heads=("reward",))
    assert "heads.reward.weight" in policy.trainable_state()
    assert isinstance(policy, HydraPolicy)


def make_pairs(count: int, seed: int) -> list[Example]:
    """The completion with more of symbol 3 is preferred."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    while len(found) < count:
        one, other = (tuple(torch.randint(0, 5, (4,), generator=generator).tolist()) for _ in range(2))
        if one.count(3) != other.count(3):
            found.append(
                Example(f"pair:{seed}.{len(found)}", (4, 2), tuple(sorted((one, other), key=lambda ids: -ids.count(3))))
            )
    return found


def test_the_base_speaks_and_judges_and_comes_from_the_cache(tmp_path: Path) -> None:
    """Joint SFT lowers the likelihood's loss and learns to judge; scores of training pairs are centred; a second call loads."""
    make = partial(
        hydra_base, tokenizer=WORLD.tokenizer, train=make_pairs(256, 0), held_out=make_pairs(64, 1), micro_batch_tokens=4096,
        options=Options(supervised=SupervisedOptions(reward_epochs=8, reward_learning_rate=3e-3, reward_batch_size=32)),
        max_length=20, max_completion_length=None, cache=tmp_path,
    )  # fmt: skip
    start, model, again = build_model(dtype=torch.float32), build_model(dtype=torch.float32), build_model(dtype=torch.float32)
    base = make(model)
    assert len(base.stage.facts["right"]) / 64 > 0.9

    def nll(model: Any) -> float:
        rows = [Example(e.id, e.prompt_ids, e.completion_ids[:1]) for e in make_pairs(64, 1)]
        policy = CausalLMPolicy(copy.deepcopy(model), None)
        return -float(policy.rows(pack(rows, roles=flat_roles), ["token_logps"])["token_logps"].detach().mean())

    assert nll(model) < nll(start) - 0.2
    policy, _ = build_roles("joined", model, WORLD.tokenizer, lora=LoRA(r=2), heads=HEADS, reward_head=base.reward_head)
    scorer: Any = base.reward(policy).scorer
    assert float(scorer.score(make_pairs(256, 0)).mean()) == pytest.approx(0, abs=1e-5)
    loaded = make(again)
    assert loaded.stage.cached
    assert json.dumps(loaded.stage.facts) == json.dumps(base.stage.facts)
    assert_same(dict(loaded.reward_head), dict(base.reward_head))
    policy_again, _ = build_roles("joined", again, WORLD.tokenizer, lora=LoRA(r=2), heads=HEADS, reward_head=loaded.reward_head)
    scorer_again: Any = loaded.reward(policy_again).scorer
    assert torch.equal(scorer_again.score(make_pairs(8, 2)), scorer.score(make_pairs(8, 2)))


@pytest.mark.parametrize(
    ("model", "reward", "message"),
    [
        ({"hydra": "joined"}, {}, "--hydra joined trains adapters over a frozen base: add --lora 16"),
        ({"hydra": "split", "lora": 4, "init": "sft-both"}, {}, "leave --init sft-both out"),
        ({"hydra": "split", "lora": 4}, {"reward": "true"}, "but reward is 'true'. Leave it out"),
        ({"hydra": "joined", "lora": 4}, {"reward_members": 3}, "but reward_members is 3. Leave it out"),
    ],
)
def test_options_that_do_not_go_together(model: dict[str, Any], reward: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_hydra(Options(model=ModelOptions(**model), reward=RewardOptions(**reward)))


def test_the_weight_of_a_base_that_is_not_made() -> None:
    with pytest.raises(ConfigError, match="--hydra-reward-coef is of the base"):
        check_hydra(Options(supervised=SupervisedOptions(hydra_reward_coef=0.5)))


def test_missing_peft_is_said_before_a_base_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefopt.hydra.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--hydra joined needs the 'peft' extra"):
        check_hydra(Options(model=ModelOptions(hydra="joined", lora=4)))
    check_hydra(Options(model=ModelOptions(hydra="off")))


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "mode"), [("ppo", "split"), ("ppo", "off"), ("dpo", "joined")])
def test_command_line(algorithm: str, mode: str, cli: Any, tmp_path: Path) -> None:
    """Whole runs in the exact world; offline algorithms start at the Hydra base as well."""
    done = cli(
        "train", algorithm, "--data", "exact", "--pairs", 64, "--hydra", mode, "--lora", 4, "--max-steps", 2, "--batch-size", 8,
        "--checkpoints", 1, "--save-every", 0, "--log-every", 1, "--output-dir", tmp_path / "run",
    )  # fmt: skip
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    saved = {
        str(path.relative_to(tmp_path / "run" / "policy")) for path in (tmp_path / "run" / "policy").rglob("*.safetensors")
    }
    critic = {"critic/adapter_model.safetensors"} if algorithm == "ppo" else set()
    own = {"critic/heads.safetensors"} if mode == "off" else {"heads.safetensors", "base/model.safetensors"}
    assert saved == {"adapter_model.safetensors", *critic, *own}


@pytest.mark.slow
def test_a_comparison_on_text_shares_one_base(
    cli: Any, jsonl: Any, pairs: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PPO and DPO start at the same base, which is trained once and is PPO's reward model."""
    cache, data = tmp_path / "cache", jsonl(pairs)
    monkeypatch.setenv("PREFOPT_CACHE", str(cache))
    done = cli(
        "compare", "ppo", "dpo", "--data", data, "--model", tiny_model, "--hydra", "split", "--lora", 2, "--seeds", 1,
        "--max-length", 16, "--max-steps", 2, "--batch-size", 4, "--eval-pairs", 4, "--eval-prompts", 2, "--eval-tokens", 4,
        "--checkpoints", 1, "--workers", 0, "--device", "cpu", "--save-policies", "--output-dir", tmp_path / "study",
    )  # fmt: skip
    assert done.code == 0, done.err
    results = json.loads((tmp_path / "study" / "results.json").read_text())
    assert {cell["label"]: cell["status"] for cell in results["cells"]} == {"ppo": "ok", "dpo": "ok"}
    assert "Hydra base: trained tokens" in results["shared_ledger"]
    assert not any("reward model: trained" in name for name in results["shared_ledger"])
    bases = [load_file(folder / "base" / "model.safetensors") for folder in (tmp_path / "study").rglob("policy")]
    assert len(bases) == 2
    assert_same(*bases)
    start = load_file(tiny_model / "model.safetensors")
    assert any(not torch.equal(value, start[name]) for name, value in bases[0].items())
    stages = list((cache / "reward").iterdir())
    assert len(stages) == 2, "the base and the judge"


def test_command_line_refuses_before_it_trains(cli: Any, tmp_path: Path) -> None:
    refused = cli("train", "ppo", "--data", "exact", "--hydra", "joined", "--output-dir", tmp_path / "run")
    assert refused.code != 0
    assert "add --lora 16" in refused.err


def test_offline_losses_start_at_log_two_on_the_base() -> None:
    """The same policy object serves DPO: its first loss is that of policy = reference."""
    from prefopt.packing import pair_roles

    policy, reference = roles("joined", heads=())
    batch = pack(make_pairs(6, 3), roles=pair_roles, dtype=torch.float64)
    logps = reference.token_logps(batch)
    tensors = batch.tensors(get("dpo").bind().needs, {"reference_token_logps": logps})
    tensors |= policy.evaluate(batch, {"policy_chosen_logps", "policy_rejected_logps"})
    assert get("dpo").bind()(tensors)["dpo"].mean().item() == pytest.approx(0.6931471805599453)
