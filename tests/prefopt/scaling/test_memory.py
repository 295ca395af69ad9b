"""Predicted bytes against counted ones, on a CPU: parameters, gradients, AdamW's states, and what backward keeps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from prefopt.data.records import Example
from prefopt.errors import ConfigError
from prefopt.models.causal_lm import CausalLMPolicy, build_policy
from prefopt.models.lora import LoRA
from prefopt.optimization import Optimization, build_optimizer
from prefopt.packing import PackedBatch, pack, pair_roles
from prefopt.scaling import Precision, Setup, Shape, Workload, footprint
from prefopt.scaling.memory import activation_bytes, head_bytes

PAIRS, LENGTH = 4, 128
COMMON = {"vocab_size": 300, "num_attention_heads": 4, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
CONFIGS = {
    "deep": LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=6, num_key_value_heads=2, tie_word_embeddings=True, **COMMON
    ),
    "wide": MistralConfig(
        hidden_size=160, intermediate_size=640, num_hidden_layers=2, num_key_value_heads=4, sliding_window=None, **COMMON
    ),
    "narrow_attention": Qwen2Config(
        hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_key_value_heads=1, **COMMON
    ),
}  # fmt: skip
CASES = [
    pytest.param(name, lora, checkpointing, id=f"{name}-{'lora' if lora else 'full'}-{'again' if checkpointing else 'kept'}")
    for name, lora, checkpointing in [("deep", 0, False), ("wide", 0, False), ("narrow_attention", 0, False),
                                      ("wide", 8, False), ("deep", 4, False), ("deep", 0, True), ("wide", 8, True)]
]  # fmt: skip


def build(name: str, lora: int, checkpointing: bool) -> CausalLMPolicy:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]))
    adapters = LoRA(r=lora, alpha=2 * lora) if lora else None
    return build_policy(model, None, lora=adapters, checkpointing=checkpointing)[0]


def batch() -> PackedBatch:
    """Pairs of which every prompt and completion is half of the length."""
    ids = torch.randint(0, 300, (PAIRS, 3, LENGTH // 2), generator=torch.Generator().manual_seed(0)).tolist()
    return pack([Example(f"row:{i}", tuple(a), (tuple(b), tuple(c))) for i, (a, b, c) in enumerate(ids)], roles=pair_roles)


def kept_bytes(policy: CausalLMPolicy, packed: PackedBatch) -> tuple[int, Tensor]:
    """Storages that autograd keeps between forward and backward, weights left out; and a loss."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        rows = policy.rows(packed, ["token_logps"])
    return sum(storage.nbytes() for storage in found.values()), rows["token_logps"].sum()


def bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(("name", "lora", "checkpointing"), CASES)
def test_predictions_are_what_is_counted(name: str, lora: int, checkpointing: bool) -> None:
    """Exact for weights, gradients and states; within a hundredth for what is kept for backward."""
    policy, packed = build(name, lora, checkpointing), batch()
    shape = Shape.of(CONFIGS[name])
    workload = Workload("dpo", rows=PAIRS, batch=PAIRS, length=LENGTH)
    setup = Setup("single", 1, 10**6, checkpointing, lora, Precision.FLOAT32)
    predicted = footprint(shape, setup, workload)
    assert packed.tokens == PAIRS * workload.tokens
    assert predicted.weights == bytes_of(policy.parameters())
    kept, loss = kept_bytes(policy, packed)
    expected = activation_bytes(shape, setup, packed.tokens) + head_bytes(shape, PAIRS * workload.scored)
    if checkpointing:  # the layer that is computed again is not there yet, and hooks do not see the angles
        plain = Setup("single", 1, 10**6, False, lora, Precision.FLOAT32)
        one, two = (activation_bytes(shape_of(shape, layers), plain, packed.tokens) for layers in (1, 2))
        expected -= two - one + 2 * 4 * packed.tokens * shape.head_size
    assert kept == pytest.approx(expected, rel=0.01)
    loss.backward()
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    assert predicted.gradients == bytes_of(parameter.grad for parameter in trained)
    optimizer = build_optimizer(policy, Optimization())
    optimizer.step()
    states = [v for state in optimizer.state.values() for k, v in state.items() if k != "step"]
    assert predicted.optimizer == bytes_of(states)
    assert predicted.reference == (0 if lora else predicted.weights)


def shape_of(shape: Shape, layers: int) -> Shape:
    return Shape(**{**vars(shape), "layers": layers})


def test_parts_are_shared_out_by_fsdp2_alone() -> None:
    shape, workload = Shape.of(CONFIGS["wide"]), Workload("dpo", batch=64, length=LENGTH)
    ddp, fsdp2 = (footprint(shape, Setup(kind, 4, 1024), workload) for kind in ("ddp", "fsdp2"))
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(fsdp2, part) * 4 == getattr(ddp, part)
    assert fsdp2.reference == ddp.reference
    assert (fsdp2.whole, ddp.whole) == (ddp.weights, 0)
    assert (ddp.gathered, fsdp2.casts) == (0, 0)
    assert fsdp2.gathered > 0
    assert ddp.activations == fsdp2.activations
    with pytest.raises(ConfigError, match="ddp or fsdp2 spread"):
        Setup("single", 2)


def test_bf16_halves_products_and_not_norms() -> None:
    """Of a layer without width in anything but its MLP, nearly a half; the total lies between a half and one."""
    shape = Shape.of(CONFIGS["wide"])
    narrow, wide = (activation_bytes(shape, Setup(precision=kind), 1024) for kind in (Precision.AUTOCAST, Precision.FLOAT32))
    assert wide / 2 < narrow < wide


def test_sampling_and_updates_take_turns() -> None:
    """Keys and values do not meet activations; gradients meet them only where they accumulate."""
    shape = Shape.of(CONFIGS["wide"])
    one = footprint(
        shape, Setup(micro_batch_tokens=10**6), Workload("ppo", batch=2, length=LENGTH, sampled=True, completions=4)
    )
    several = footprint(
        shape, Setup(micro_batch_tokens=1), Workload("ppo", batch=2, length=LENGTH, sampled=True, completions=4)
    )
    assert (one.accumulated, several.accumulated) == (False, True)
    assert one.total == one.held + max(one.gradients, one.casts + one.activations + one.head, one.cache)
    assert several.total == several.held + several.gradients + several.casts + several.activations + several.head
    assert one.reward_model == 4 * shape.parameters


def test_tied_weights_count_once_and_layers_are_equal() -> None:
    shape = Shape.of(CONFIGS["deep"])
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["deep"]))
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.outside == 300 * 64 + 64
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    assert shape.linear == sum(module.weight.numel() for module in linear)
