"""PPO's four roles on as few models as asked for: actor, critic, reference and reward model (Santacroce 2023, Hydra-RLHF).

    trunk    actor and critic share all weights; reference: a frozen copy, or the weights with adapters off
    off      actor and critic are models of their own, and so is the reference
    joined   one base with an LM head and a reward head, one adapter for actor and critic
    split    the same base, an adapter for the actor and another one for the critic

In `joined` and `split` the reference and the reward model are the base with adapters off: no weight is held twice.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from prefopt.models.causal_lm import CausalLMPolicy, FrozenReference, build_policy
from prefopt.models.fingerprint import fingerprint
from prefopt.models.lora import FIRST, LoRA
from prefopt.packing import PackedBatch

Hydra = Literal["trunk", "off", "joined", "split"]
BASED = ("joined", "split")
"""Those that train adapters over a Hydra base."""
CRITIC = "critic"
BASE_FOLDER = "base"
"""Where a saved Hydra policy keeps the model that its adapters belong to."""


class SeparateCritic(CausalLMPolicy):
    """An actor whose values come from a model of their own.

    Args:
        critic: a policy with a value head; trained along.
        more: as `CausalLMPolicy`.
    """

    def __init__(self, model: Any, tokenizer: Any, *, critic: CausalLMPolicy, **more: Any) -> None:
        super().__init__(model, tokenizer, **more)
        self.critic = critic

    def rows(
        self, batch: PackedBatch, quantities: Collection[str], *, reference: FrozenReference | None = None
    ) -> dict[str, Tensor]:
        """See `CausalLMPolicy.rows`: values are the critic's, all else the actor's."""
        batch = batch.to(self.device)
        own = [name for name in quantities if name != "values"]
        found = self.critic.rows(batch, ["values"]) if "values" in quantities else {}
        return {**found, **super().rows(batch, own, reference=reference)} if own else found

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The actor's and the critic's."""
        return [*super().parameter_groups(), *self.critic.parameter_groups()]

    def save(self, folder: Path) -> None:
        """See `CausalLMPolicy.save`; the critic in a folder of its name."""
        super().save(folder)
        self.critic.save(folder / CRITIC)


class HydraPolicy(CausalLMPolicy):
    """Adapters over a frozen base that can speak and judge.

    Args:
        model: the base.
        reward_head: state of its reward head, which stays frozen unless the loss trains one ("reward" among `heads`).
        split: values get an adapter of their own, "critic"; otherwise one adapter serves all.
        heads: that the loss calls for.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        lora: LoRA,
        reward_head: Mapping[str, Tensor],
        split: bool,
        heads: Collection[str] = (),
        checkpointing: bool = False,
    ) -> None:
        self._split = split and "value" in heads
        super().__init__(
            model, tokenizer, lora=lora, more_adapters=(CRITIC,) if self._split else (), heads={*heads, "reward"},
            checkpointing=checkpointing,
        )  # fmt: skip
        self._adapters["actor"] = FIRST
        self._adapters.setdefault(CRITIC, FIRST)
        self.heads["reward"].load_state_dict(dict(reward_head))
        self.heads["reward"].requires_grad_("reward" in heads)

    def rows(
        self, batch: PackedBatch, quantities: Collection[str], *, reference: FrozenReference | None = None
    ) -> dict[str, Tensor]:
        """See `CausalLMPolicy.rows`. With split adapters and the actor in force, values are the critic's: a second pass."""
        if not (self._split and "values" in quantities and self.in_force == FIRST):
            return super().rows(batch, quantities, reference=reference)
        batch = batch.to(self.device)
        with self.adapter(CRITIC):
            found = super().rows(batch, ["values"])
        own = [name for name in quantities if name != "values"]
        return {**found, **super().rows(batch, own, reference=reference)} if own else found

    def save(self, folder: Path) -> None:
        """The actor's adapter, the critic's in a folder of its name, and the base, which exists nowhere else."""
        from prefopt.engines import save_merged

        with self.adapter(None):
            save_merged(self, str(folder / BASE_FOLDER))
        for config in self.model.peft_config.values():
            config.base_model_name_or_path = str(folder / BASE_FOLDER)
        super().save(folder)


def build_roles(
    hydra: Hydra,
    model: Any,
    tokenizer: Any,
    *,
    lora: LoRA | None = None,
    heads: Collection[str] = (),
    reward_head: Mapping[str, Tensor] | None = None,
    checkpointing: bool = False,
) -> tuple[CausalLMPolicy, FrozenReference]:
    """A policy that starts at `model`, and its reference.

    Args:
        hydra: which roles share weights. A loss without values has no critic: then `split` is `joined`.
        model: used in place; a Hydra base for `joined` and `split`.
        lora: adapters; `joined` and `split` need them.
        heads: that the loss calls for (`head_names`).
        reward_head: of the Hydra base.
        checkpointing: as `CausalLMPolicy`.
    """
    if hydra == "trunk":
        return build_policy(model, tokenizer, lora=lora, heads=heads, checkpointing=checkpointing)
    weights = fingerprint(model)
    if hydra == "off":
        frozen = CausalLMPolicy(copy.deepcopy(model), tokenizer)
        frozen.requires_grad_(False)
        more: dict[str, Any] = {"lora": lora, "checkpointing": checkpointing}
        if "value" in heads:
            critic = CausalLMPolicy(copy.deepcopy(model), tokenizer, heads=("value",), **more)
            policy: CausalLMPolicy = SeparateCritic(model, tokenizer, critic=critic, heads={*heads} - {"value"}, **more)
        else:
            policy = CausalLMPolicy(model, tokenizer, heads=heads, **more)
        policy.reference = FrozenReference(frozen, weights)
        return policy, policy.reference
    if lora is None or reward_head is None:
        raise ValueError(f"{hydra!r} needs adapters and the reward head of a Hydra base; got {lora} and {reward_head}.")
    policy = HydraPolicy(
        model, tokenizer, lora=lora, reward_head=reward_head, split=hydra == "split", heads=heads, checkpointing=checkpointing
    )
    policy.reference = FrozenReference(policy, weights)
    return policy, policy.reference
