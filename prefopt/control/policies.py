"""Control policies behind the policy protocol: an MLP on observations. C scored steps; O and A as in steps.py."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prefopt.control.families import FAMILIES, Family
from prefopt.control.perceptron import Perceptron
from prefopt.control.steps import Steps
from prefopt.errors import ConfigError, DataError
from prefopt.files import write_json
from prefopt.forward import scatter_all
from prefopt.models.packed import PackedPolicy, Reference
from prefopt.packing import PackedBatch

_CONFIG, _WEIGHTS = "control_policy.json", "model.safetensors"


@dataclass(frozen=True)
class ActorConfig:
    """A network from observations to a distribution over actions.

    Args:
        family: of `FAMILIES`.
        observation_size: O.
        action_size: A, the numbers of an action, or how many numbered actions there are.
        hidden: widths of its layers; none makes it linear, which on one-hot states is a table.
        dropout: after each hidden layer, in training.
    """

    family: str
    observation_size: int
    action_size: int
    hidden: tuple[int, ...] = (256, 256)
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ConfigError(f"no control policy {self.family!r}; there are {', '.join(FAMILIES)}.")
        if not 0 <= self.dropout < 1 or any(width < 1 for width in self.hidden):
            raise ConfigError(f"dropout must be in [0, 1), hidden widths at least 1; got {self.dropout}, {self.hidden}.")


class Actor(nn.Module):
    """The network of an `ActorConfig`: orthogonal weights, rectified layers, a small last layer (as the CPL authors' code)."""

    def __init__(self, config: ActorConfig) -> None:
        super().__init__()
        self.config = config
        self.net = Perceptron(
            config.observation_size, config.hidden, self.family.outputs(config.action_size), dropout=config.dropout, gain=0.01
        )  # fmt: skip

    @property
    def family(self) -> Family:
        return FAMILIES[self.config.family]

    def forward(self, observations: Tensor) -> Tensor:
        """[C, O] -> [C, outputs] parameters of the distribution."""
        output: Tensor = self.net(observations)
        return output

    @torch.no_grad()
    def act(self, observations: Tensor) -> Tensor:
        """[C, O] -> the likeliest actions, [C, A] within [-1, 1] or [C] numbers."""
        return self.family.best(self(observations.to(next(self.parameters()))))


class ControlPolicy(PackedPolicy):
    """The policy protocol over a table of steps.

    Args:
        actor: used in place.
        steps: the table that token ids are numbers of; moved to the actor's device and type.
        heads: "reward", a reward of each step, summed over the segment (a model of partial returns), or none.

    Raises:
        ConfigError: another head: nothing here samples, so there is no value to learn.
        DataError: actions of the other kind, or of another size.
    """

    def __init__(self, actor: Actor, steps: Steps, *, heads: Collection[str] = ()) -> None:
        super().__init__()
        if unknown := sorted(set(heads) - {"reward"}):
            raise ConfigError(
                f"a control policy learns from segments and has no head {unknown[0]!r}: use an offline algorithm."
            )
        _check_fit(actor.config, steps)
        weight = next(actor.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.actor = actor
        self.lora = self.reference = None
        self.dropout = actor.config.dropout > 0
        self._observations = steps.observations.to(weight)
        self._actions = steps.actions.to(weight.device) if actor.family.discrete else steps.actions.to(weight)
        self.heads = nn.ModuleDict({"reward": _reward_head(actor.config).to(weight)} if "reward" in heads else {})
        self.train(False)

    def rows(self, batch: PackedBatch, quantities: Collection[str], *, reference: Any = None) -> dict[str, Tensor]:
        """See `PackedPolicy.rows`; `token_kls` are KL(reference || policy) over all actions, `policy_kls` the other way round.

        Raises:
            ConfigError: a quantity that only a vocabulary has.
        """
        batch = batch.to(self.device)
        observations = self._observations[batch.targets]
        found: dict[str, Tensor] = {}
        wanted = set(quantities)
        if "rewards" in wanted:
            wanted.remove("rewards")
            per_step = self._reward(observations, self._actions[batch.targets])
            found["rewards"] = batch.scatter_tokens(per_step).sum(-1)
        if not wanted:
            return found
        output, family = self.actor(observations), self.actor.family
        tokens: dict[str, Tensor] = {}
        for name in wanted:
            if name == "token_logps":
                tokens[name] = family.logps(output, self._actions[batch.targets])
            elif name == "entropies":
                tokens[name] = family.entropies(output)
            elif name in ("token_kls", "policy_kls"):
                other = _reference_output(reference, observations)
                tokens[name] = family.kls(other, output) if name == "token_kls" else family.kls(output, other)
            else:
                raise ConfigError(f"a control policy has no {name}: it belongs to the vocabulary of a language model.")
        return {**found, **scatter_all(batch, tokens)}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Matrices decay, vectors do not."""
        weights = [p for p in self.parameters() if p.requires_grad]
        return [
            {"params": [p for p in weights if p.dim() >= 2], "lr_scale": 1.0, "decay": True},
            {"params": [p for p in weights if p.dim() < 2], "lr_scale": 1.0, "decay": False},
        ]

    def save(self, folder: Path) -> None:
        """control_policy.json and model.safetensors, which `load_actor` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.actor.state_dict().items()}, folder / _WEIGHTS)
        if self.heads:
            save_file(
                {name: value.contiguous() for name, value in self.heads.state_dict().items()}, folder / "heads.safetensors"
            )
        write_json(folder / _CONFIG, asdict(self.actor.config))

    def _reward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """[C] reward of each step."""
        if "reward" not in self.heads:
            raise ConfigError("the loss needs 'rewards', but this policy was built without a reward head: heads=('reward',).")
        if self.actor.family.discrete:
            actions = nn.functional.one_hot(actions, self.actor.config.action_size).to(observations)
        reward: Tensor = self.heads["reward"](torch.cat([observations, actions], dim=-1)).squeeze(-1)
        return reward


def build_control(
    actor: Actor, steps: Steps, steps_key: str, *, heads: Collection[str] = ()
) -> tuple[ControlPolicy, Reference]:
    """A policy that starts at `actor` (a copy of it), and the reference that it starts from (another).

    Args:
        steps_key: content address of the steps: their numbers mean nothing without them.
    """
    policy = ControlPolicy(copy.deepcopy(actor), steps, heads=heads)
    frozen = ControlPolicy(copy.deepcopy(actor), steps).requires_grad_(False)
    policy.reference = Reference(frozen, f"{actor_fingerprint(actor)}-{steps_key}")
    return policy, policy.reference


def load_actor(folder: Path) -> Actor:
    """What `ControlPolicy.save` wrote, in evaluation mode: a policy that acts has no dropout.

    Raises:
        DataError: the folder holds no control policy.
    """
    try:
        stored = json.loads((folder / _CONFIG).read_text())
        actor = Actor(ActorConfig(**{**stored, "hidden": tuple(stored["hidden"])}))
        actor.load_state_dict(load_file(folder / _WEIGHTS))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{folder}: expected a control policy ({_CONFIG} and {_WEIGHTS}): {error}") from error
    return actor.eval()


def actor_fingerprint(actor: Actor) -> str:
    """sha256 over configuration and weights, 16 hex digits."""
    digest = hashlib.sha256(json.dumps(asdict(actor.config)).encode())
    for name, value in sorted(actor.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_fit(config: ActorConfig, steps: Steps) -> None:
    discrete = steps.actions.dim() == 1
    if FAMILIES[config.family].discrete != discrete:
        kinds = ", ".join(name for name, family in FAMILIES.items() if family.discrete == discrete)
        raise DataError(f"{config.family}: the data's actions are {'numbered' if discrete else 'vectors'}; for these: {kinds}.")
    sizes = (steps.observations.shape[1], config.action_size if discrete else steps.actions.shape[1])
    if sizes != (config.observation_size, config.action_size):
        raise DataError(
            f"the policy takes {config.observation_size} observed numbers and {config.action_size} of an action; "
            f"the data have {sizes[0]} and {sizes[1]}."
        )
    if discrete and int(steps.actions.max()) >= config.action_size:
        raise DataError(f"action {int(steps.actions.max())}: the policy has {config.action_size}, from 0.")


def _reference_output(reference: Reference | None, observations: Tensor) -> Tensor:
    if reference is None:
        raise ValueError("KLs need the live reference: pass `reference`.")
    with reference.frozen() as model:
        output: Tensor = model.actor(observations)
    return output


def _reward_head(config: ActorConfig) -> Perceptron:
    return Perceptron(config.observation_size + config.action_size, config.hidden, 1, dropout=config.dropout)
