"""KLs over the whole vocabulary against the live reference: TDPO's tensors, with all weights trained and with adapters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from prefopt.data.records import Example
from prefopt.errors import ConfigError
from prefopt.models.causal_lm import CausalLMPolicy, build_policy
from prefopt.models.lora import LoRA
from prefopt.packing import pack, pair_roles

SIZE = 31
NEEDS = {"chosen_token_kls", "rejected_token_kls", "policy_chosen_logps"}
LORAS = (None, LoRA(r=2, alpha=4))


def build_model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=SIZE, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.AutoModelForCausalLM.from_config(config).double()
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def pairs() -> list[Example]:
    generator = torch.Generator().manual_seed(1)

    def ids(longest: int) -> tuple[int, ...]:
        length = int(torch.randint(1, longest + 1, (), generator=generator))
        return tuple(torch.randint(0, SIZE, (length,), generator=generator).tolist())

    return [Example(f"row:{i}", ids(6), (ids(7), ids(7))) for i in range(5)]


BATCH = pack(pairs(), roles=pair_roles, dtype=torch.float64)


def perturb(policy: CausalLMPolicy) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def plain_kls(policy: Any, reference: Any, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Tensor:
    """[length] sum over the vocabulary of p (log p - log q) at each token of a completion, by transformers alone."""
    ids = torch.tensor([[*prompt, *completion]])
    ours, theirs = (model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for model in (policy, reference))
    theirs = theirs.detach()
    return (theirs.exp() * (theirs - ours)).sum(-1)


@pytest.mark.parametrize("lora", LORAS)
def test_kls_are_zero_at_the_start_and_those_of_plain_log_softmax_afterwards(lora: LoRA | None) -> None:
    start = build_model()
    policy, _ = build_policy(copy.deepcopy(start), None, lora=lora)
    for side in ("chosen", "rejected"):
        assert float(policy.evaluate(BATCH, NEEDS)[f"{side}_token_kls"].detach().abs().max()) < 1e-12
    perturb(policy)
    found = policy.evaluate(BATCH, NEEDS)
    with torch.no_grad(), policy.plain_attention() as model:
        for row, example in enumerate(pairs()):
            for side, completion in zip(("chosen", "rejected"), example.completion_ids, strict=True):
                wanted = plain_kls(model, start, example.prompt_ids, completion)
                got = found[f"{side}_token_kls"][row]
                torch.testing.assert_close(got[: len(completion)], wanted, atol=1e-10, rtol=0)
                assert (wanted > 1e-3).all()
                assert (got[len(completion) :] == 0).all()


@pytest.mark.parametrize("lora", LORAS)
def test_the_gradient_is_the_policys_alone(lora: LoRA | None) -> None:
    """Every trained weight's, as autograd gives it through transformers; the reference's log-probs stay what they were."""
    start = build_model()
    policy, reference = build_policy(copy.deepcopy(start), None, lora=lora)
    perturb(policy)
    before = reference.token_logps(BATCH)
    found = policy.evaluate(BATCH, NEEDS)
    (found["chosen_token_kls"].sum() + found["rejected_token_kls"].sum()).backward()
    got = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    with policy.plain_attention() as model:
        sums = [plain_kls(model, start, e.prompt_ids, ids).sum() for e in pairs() for ids in e.completion_ids]
        torch.stack(sums).sum().backward()
    assert got.keys() == policy.trainable_state().keys()
    for name, parameter in policy.named_parameters():
        if name in got:
            # transformers normalises in float32
            torch.testing.assert_close(got[name], parameter.grad, atol=1e-5 * float(got[name].abs().max()), rtol=0)
            assert got[name].abs().max() > 1e-3
    assert torch.equal(reference.token_logps(BATCH), before)


def test_a_policy_without_a_reference_says_so() -> None:
    policy = CausalLMPolicy(build_model(), tokenizer=None)
    policy.evaluate(BATCH, {"policy_chosen_logps"})
    with pytest.raises(ConfigError, match="no reference to take them against: build both by build_policy"):
        policy.evaluate(BATCH, NEEDS)
