"""The packed shared forward against the plain padded forward of transformers, on random models of several architectures."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch.nn import functional as F

from prefopt.data.records import Example
from prefopt.forward import log_softmax, pack_bits, token_quantities, unpack_bits
from prefopt.models.causal_lm import CausalLMPolicy, build_policy
from prefopt.models.lora import LoRA
from prefopt.packing import Sampling, flat_roles, pack, pair_roles

VOCABULARY = 61

CONFIGS = {
    "llama": transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "gpt2": transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256),
    "qwen2": transformers.Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, tie_word_embeddings=False,
    ),
    "mistral": transformers.MistralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=16,
    ),
}  # fmt: skip


def build_model(name: str, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).to(dtype)
    # The default initialisation gives nearly uniform predictions, which would hide attention mistakes.
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def random_examples(count: int, branches: int, seed: int = 0, longest: int = 40) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return tuple(torch.randint(0, VOCABULARY, (length,), generator=generator).tolist())

    return [Example(f"row:{i}", ids(1, longest), tuple(ids(1, longest // 2) for _ in range(branches))) for i in range(count)]


def padded_token_logps(
    model: transformers.PreTrainedModel, examples: list[Example], temperature: float = 1.0
) -> list[torch.Tensor]:
    """The reference: every prompt + completion a right-padded row of its own, all logits in full."""
    rows = [(e.prompt_ids, c) for e in examples for c in e.completion_ids]
    width = max(len(p) + len(c) for p, c in rows)
    ids = torch.tensor([[*p, *c, *([0] * (width - len(p) - len(c)))] for p, c in rows])
    attention = torch.tensor([[1] * (len(p) + len(c)) + [0] * (width - len(p) - len(c)) for p, c in rows])
    logits = model(input_ids=ids, attention_mask=attention).logits / temperature
    logps = F.log_softmax(logits, dim=-1)
    return [
        logps[row, len(p) - 1 : len(p) + len(c) - 1].gather(-1, torch.tensor(c).unsqueeze(-1)).squeeze(-1)
        for row, (p, c) in enumerate(rows)
    ]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("branches", [1, 2, 3])
def test_packed_equals_padded(name: str, branches: int) -> None:
    """In float32 per-token log-probs agree to 1e-4, and every parameter's gradient to 2e-5 of its largest component."""
    examples = random_examples(6, branches)
    model = build_model(name)
    weights = torch.randn(6 * branches, 40, generator=torch.Generator().manual_seed(1))
    expected = padded_token_logps(model, examples)
    sum((value * weights[row, : len(value)]).sum() for row, value in enumerate(expected)).backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    policy = CausalLMPolicy(model, tokenizer=None)
    batch = pack(examples, roles=flat_roles)
    got = policy.evaluate(batch, {"policy_token_logps"})["policy_token_logps"]
    for row, value in enumerate(expected):
        torch.testing.assert_close(got[row, : len(value)], value, atol=1e-4, rtol=1e-4)
        assert got[row, len(value) :].eq(0).all()
    (got * weights[:, : got.shape[1]]).sum().backward()
    for key, parameter in model.named_parameters():
        if key in gradients:
            largest = float(gradients[key].abs().max())
            torch.testing.assert_close(
                parameter.grad, gradients[key], atol=2e-5 * largest, rtol=0, msg=lambda m, key=key: f"{key}: {m}"
            )


def test_packed_equals_padded_exactly_in_float64() -> None:
    examples = random_examples(9, 2, seed=3, longest=100)
    model = build_model("llama", torch.float64)
    expected = padded_token_logps(model, examples)
    got = CausalLMPolicy(model, tokenizer=None).evaluate(pack(examples, roles=flat_roles), {"policy_token_logps"})[
        "policy_token_logps"
    ]
    for row, value in enumerate(expected):
        torch.testing.assert_close(got[row, : len(value)], value, atol=1e-11, rtol=0)


QUANTITIES = ("token_logps", "entropies", "token_log_sum_sq", "token_kls", "policy_kls", "reference_token_logps")


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("nucleus", [False, True])
@pytest.mark.parametrize(("chunk", "keep"), [(1, 0), (3, 4), (100, 100)])
def test_hand_written_head_equals_autograd(temperature: float, nucleus: bool, chunk: int, keep: int) -> None:
    """Values and gradients of every quantity, alone and together: chunked, kept and recomputed against plain autograd."""
    generator = torch.Generator().manual_seed(0)
    tokens, size, vocabulary = 8, 5, 11
    hidden, other = (torch.randn(tokens, size, generator=generator, dtype=torch.float64) for _ in range(2))
    head = torch.nn.Linear(size, vocabulary, dtype=torch.float64)
    frozen = torch.nn.Linear(size, vocabulary, dtype=torch.float64).requires_grad_(False)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    support = None
    if nucleus:
        inside = torch.rand(tokens, vocabulary, generator=generator) < 0.6
        support = pack_bits(inside.scatter(-1, targets.unsqueeze(-1), True))
    sampling = Sampling(temperature, support)
    weights = torch.randn(len(QUANTITIES), tokens, generator=generator, dtype=torch.float64)
    for wanted in (*((name,) for name in QUANTITIES), QUANTITIES):
        results = []
        for plain in (True, False):
            leaf = hidden.clone().requires_grad_()
            if plain:
                got = plain_quantities(leaf, other, targets, head, frozen, sampling)
            else:
                got = token_quantities(
                    leaf, targets, head, names=wanted, sampling=sampling, reference=(other, frozen),
                    chunk_logits=chunk * vocabulary, keep_logits=keep * vocabulary,
                )  # fmt: skip
            total = sum((weights[i] * got[name]).sum() for i, name in enumerate(QUANTITIES) if name in wanted)
            inputs = (leaf, head.weight, head.bias)
            flat = wanted == ("reference_token_logps",)
            assert not (flat and total.requires_grad)
            results.append(({name: got[name] for name in wanted}, () if flat else torch.autograd.grad(total, inputs)))
        torch.testing.assert_close(results[0][0], results[1][0], atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(results[0][1], results[1][1], atol=1e-11, rtol=1e-11)


def plain_quantities(
    hidden: torch.Tensor,
    other: torch.Tensor,
    targets: torch.Tensor,
    head: torch.nn.Linear,
    frozen: torch.nn.Linear,
    sampling: Sampling,
) -> dict[str, torch.Tensor]:
    """All quantities from full log-probs, differentiated by autograd."""
    logps = log_softmax(head(hidden), sampling.temperature, sampling.support, targets)
    reference = log_softmax(frozen(other), sampling.temperature, sampling.support, targets)
    index = targets.unsqueeze(-1)
    return {
        "token_logps": logps.gather(-1, index).squeeze(-1),
        "entropies": -(logps.exp() * logps).sum(-1),
        "token_log_sum_sq": logps.exp().square().sum(-1).log(),
        "token_kls": (reference.exp() * (reference - logps)).sum(-1),
        "policy_kls": (logps.exp() * (logps - reference)).sum(-1),
        "reference_token_logps": reference.gather(-1, index).squeeze(-1),
    }


def test_head_keeps_a_bounded_number_of_log_probs() -> None:
    """What is saved for backward does not grow with the number of scored tokens."""
    head = torch.nn.Linear(4, 50)
    sizes = []
    for tokens in (10, 100):
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            token_quantities(
                torch.randn(tokens, 4, requires_grad=True), torch.zeros(tokens, dtype=torch.long), head,
                names=["token_logps"], sampling=Sampling(), chunk_logits=5 * 50, keep_logits=10 * 50,
            )  # fmt: skip
        sizes.append(sum(saved) - 4 * tokens)
    assert sizes[0] == sizes[1] == 10 * 50 + head.weight.numel() + head.bias.numel()


def test_branches_do_not_see_each_other() -> None:
    """Changing the rejected completion, or another group, leaves the chosen log-probs alone."""
    policy = CausalLMPolicy(build_model("qwen2"), tokenizer=None)
    a, b = random_examples(2, 2)
    other = Example("x", b.prompt_ids[::-1], (b.completion_ids[0], (1, 2, 3)))
    changed = Example("y", a.prompt_ids, (a.completion_ids[0], (5,) * 7))
    needs = {"policy_chosen_logps"}
    first = policy.evaluate(pack([a, b], roles=pair_roles), needs)["policy_chosen_logps"][0]
    second = policy.evaluate(pack([changed, other], roles=pair_roles), needs)["policy_chosen_logps"][0]
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


def test_roles_name_the_rows() -> None:
    policy = CausalLMPolicy(build_model("llama"), tokenizer=None)
    batch = pack(random_examples(3, 2), roles=pair_roles)
    out = policy.evaluate(batch, {"policy_chosen_logps", "policy_rejected_token_logps"})
    rows = policy.rows(batch, ["token_logps"])["token_logps"]
    torch.testing.assert_close(out["policy_chosen_logps"], rows[0::2].sum(-1))
    torch.testing.assert_close(out["policy_rejected_token_logps"], rows[1::2])
    own = batch.tensors({"chosen_lengths", "rejected_mask"})
    assert own["chosen_lengths"].tolist() == [len(e.completion_ids[0]) for e in random_examples(3, 2)]
    assert own["rejected_mask"].sum().item() == sum(len(e.completion_ids[1]) for e in random_examples(3, 2))


def test_temperature_and_nucleus_make_the_sampling_distribution() -> None:
    """log-probs under temperature 0.7 and a nucleus equal a hand-made renormalised softmax."""
    logits = torch.randn(5, 19, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inside = torch.rand(5, 19, generator=torch.Generator().manual_seed(1)) < 0.5
    targets = torch.tensor([3, 1, 4, 1, 5])
    inside[torch.arange(5), targets] = True
    assert unpack_bits(pack_bits(inside), 19).equal(inside)
    got = log_softmax(logits, 0.7, pack_bits(inside), targets)
    scores = (logits / 0.7).exp() * inside
    torch.testing.assert_close(got.exp() * inside, scores / scores.sum(-1, keepdim=True))


def test_lora_starts_at_the_reference_and_switches_off() -> None:
    """Adapters off equals the base model bit for bit, before and after the adapters move; only they train."""
    examples = random_examples(3, 2)
    batch = pack(examples, roles=pair_roles)
    needs = {"policy_chosen_logps", "policy_rejected_logps"}
    base = CausalLMPolicy(build_model("llama"), tokenizer=None).evaluate(batch, needs)
    policy = CausalLMPolicy(build_model("llama"), tokenizer=None, lora=LoRA(r=4, alpha=8))
    for name, value in policy.evaluate(batch, needs).items():
        torch.testing.assert_close(value, base[name], atol=0, rtol=0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert not torch.allclose(policy.evaluate(batch, needs)["policy_chosen_logps"], base["policy_chosen_logps"])
    off = policy.evaluate(batch, needs, adapter=None)
    for name, value in off.items():
        torch.testing.assert_close(value, base[name], atol=0, rtol=0)
    assert all("lora" in name for name in policy.trainable_state())


def test_checkpointed_layers_give_the_same_gradients_and_save_less() -> None:
    """Layers computed twice: equal log-probs and gradients, with and without adapters, and fewer saved numbers."""
    batch = pack(random_examples(4, 2), roles=flat_roles)
    for lora in (None, LoRA(r=2)):
        results, sizes = [], []
        for checkpointing in (False, True):
            torch.manual_seed(0)
            policy = CausalLMPolicy(build_model("llama"), tokenizer=None, lora=lora, checkpointing=checkpointing)
            saved: list[int] = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
                logps = policy.evaluate(batch, {"policy_token_logps"})["policy_token_logps"]
            logps.square().sum().backward()
            results.append((logps, {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}))
            sizes.append(sum(saved))
            assert not any("forward" in vars(module) for module in policy.modules())
        torch.testing.assert_close(results[0], results[1], atol=0, rtol=0)
        assert sizes[1] < 0.5 * sizes[0]


def test_the_reference_has_no_dropout_while_the_policy_trains_with_it() -> None:
    """With adapters the two share a model; asked in the middle of training, the reference is still exact."""
    model = build_model("gpt2")
    assert model.config.resid_pdrop > 0
    policy, reference = build_policy(model, None, lora=LoRA(r=2), dropout=True)
    batch = pack(random_examples(3, 2), roles=flat_roles)
    quiet = reference.token_logps(batch)
    policy.train(True)
    assert not torch.equal(policy.evaluate(batch, {"policy_token_logps"})["policy_token_logps"], quiet)
    assert torch.equal(reference.token_logps(batch), quiet)
    assert policy.training
