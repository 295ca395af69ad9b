"""The fused adapter product against peft's own forward: values, gradients, saved names, and where it must step aside."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from prefopt.models.lora import LoRA, _AdaptedProduct, add_lora

CONFIG = transformers.LlamaConfig(
    vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    attention_bias=True,
)  # fmt: skip


def adapted(lora: LoRA, *, fused: bool, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(CONFIG)).double()
    with monkeypatch.context() as patch:
        if not fused:
            patch.setattr("prefopt.models.lora.fuse_adapters", lambda model: None)
        model = add_lora(base, lora).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def test_equals_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and every adapter's gradient agree with peft's own layers in float64, and so does the model without adapters."""
    ids = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(0))
    results = []
    for fused in (True, False):
        model = adapted(LoRA(r=3, alpha=5), fused=fused, monkeypatch=monkeypatch)
        names = {type(module).__name__ for module in model.modules()}
        assert ("FusedLinear" in names) == fused
        logits = model(input_ids=ids).logits
        logits.square().sum().backward()
        with model.disable_adapter():
            plain = model(input_ids=ids).logits
        results.append((logits, plain, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    torch.testing.assert_close(results[0], results[1], atol=1e-9, rtol=1e-11)


def test_gradcheck() -> None:
    """The hand-written backward is the derivative, in the input and in both adapter matrices."""
    generator = torch.Generator().manual_seed(0)
    x, first, second = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 5, 4), (2, 4), (3, 2))
    )
    weight, bias = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (3,)))
    assert torch.autograd.gradcheck(lambda *t: _AdaptedProduct.apply(t[0], weight, bias, t[1], t[2], 0.7), (x, first, second))


def test_steps_aside_for_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout in training peft's own forward runs, draw for draw."""
    ids = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(0))
    outputs = []
    for fused in (True, False):
        model = adapted(LoRA(r=3, alpha=5, dropout=0.5), fused=fused, monkeypatch=monkeypatch).train()
        torch.manual_seed(7)
        outputs.append(model(input_ids=ids).logits)
    torch.testing.assert_close(*outputs, atol=0, rtol=0)
