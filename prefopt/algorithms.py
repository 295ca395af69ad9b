"""An algorithm is (stream, advantage function, loss): derived from the loss's signature, never listed.

The stream follows from the tensors that the loss names; the advantage function from its registration; the algorithm's flags
are the union of the three functions' keyword-only parameters. `online_<loss>` is an offline loss whose rows are sampled from
the policy and ordered by the reward.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import losses
from losses.declaration import HyperParameter, RegistrationError, read_options, read_signature
from losses.registry import BoundLoss, Loss
from losses.types import VOCABULARY
from prefopt.errors import ConfigError
from prefopt.rollouts import online, rollouts

ONLINE = "online_"
"""Before a loss's name (or a sum): its stream is filled with fresh samples of the policy."""


@dataclass(frozen=True)
class Algorithm:
    """A loss with the stream and the advantage function that it calls for.

    Args:
        name: the loss's name.
        loss: the registered loss.
        stream: "pairs", "completions", "labelled", "groups" or "rollouts".
        flags: every hyper-parameter of loss, stream and advantage function, with this algorithm's defaults.
        online: the stream's rows are sampled from the policy.
    """

    name: str
    loss: Loss
    stream: str
    flags: Mapping[str, HyperParameter]
    online: bool = False

    @property
    def on_policy(self) -> bool:
        return self.online or self.stream == "rollouts"

    @property
    def data(self) -> str:
        """What it learns from, for tables."""
        return f"online {self.stream}" if self.online else self.stream

    def setting(self, **hyper: Any) -> Setting:
        """The algorithm with hyper-parameters; those not named keep their defaults.

        Raises:
            ConfigError: an option that this algorithm does not have, with a suggestion.
        """
        parts: dict[str, dict[str, Any]] = {"loss": {}, "stream": {}, "advantage": {}}
        signatures = _parts(self.loss, self.stream, self.online)
        for name, value in hyper.items():
            owner = next((part for part, flags in signatures.items() if name in flags), "loss")
            parts[owner][name] = value
        try:
            bound = self.loss.bind(**parts["loss"])
        except losses.UnknownName as error:
            raise ConfigError(f"{error} All options of {self.name}: {', '.join(self.flags) or 'none'}.") from error
        values = {name: hyper.get(name, flag.default) for name, flag in self.flags.items()}
        stream = {name: values[name] for name in signatures["stream"]}
        advantage = {name: values[name] for name in signatures["advantage"]}
        return Setting(self, bound, stream, advantage, values)


@dataclass(frozen=True)
class Setting:
    """An algorithm with all its numbers: what a cell trains."""

    algorithm: Algorithm
    loss: BoundLoss
    stream_options: Mapping[str, Any] = field(default_factory=dict)
    advantage_options: Mapping[str, Any] = field(default_factory=dict)
    hyper: Mapping[str, Any] = field(default_factory=dict)

    @property
    def policy_needs(self) -> frozenset[str]:
        """Tensors that the policy's forward pass has to provide."""
        return frozenset(name for name in self.loss.needs if VOCABULARY[name].source == "policy")

    @property
    def needs_reference(self) -> bool:
        return any(VOCABULARY[name].source == "reference" for name in self.loss.needs)


def get(name: str) -> Algorithm:
    """The algorithm of a registered loss, or of `online_` and an offline one.

    Raises:
        ConfigError: unknown name, with a suggestion; a loss whose tensors no stream provides; or `online_` before a loss that
            learns from rollouts already, or that trains a reward model.
        RegistrationError: two parts have one flag, or the loss gives a default to a flag that none of them has.
    """
    inner, fresh = split_online(name)
    try:
        loss = losses.get(inner)
    except (losses.UnknownName, RegistrationError) as error:
        raise ConfigError(str(error)) from error
    stream = stream_of(loss)
    if fresh and (stream == "rollouts" or family(loss) == "rewards"):
        what = "learns from rollouts already" if stream == "rollouts" else "trains a reward model"
        raise ConfigError(
            f"{name!r}: {inner!r} {what}; {ONLINE} goes before losses on pairs, lists, labelled or single completions."
        )
    flags: dict[str, HyperParameter] = {}
    parts = _parts(loss, stream, fresh)
    for part, options in parts.items():
        for flag, parameter in options.items():
            if flag in flags:
                raise RegistrationError(f"{name}: flag {flag!r} of its {part} is also a flag of another part; rename one.")
            flags[flag] = parameter
    others = [*parts["stream"], *parts["advantage"]]
    for flag, default in loss.defaults.items():
        if flag not in others:
            raise RegistrationError(
                f"{name}: defaults name {flag!r}, but its {stream} and its advantage function have no such option; they have: "
                f"{', '.join(others) or 'none'}."
            )
        flags[flag] = flags[flag]._replace(default=default)
    return Algorithm(name, loss, stream, flags, fresh)


def split_online(name: str) -> tuple[str, bool]:
    """The loss in an algorithm's name, and whether it is trained on fresh samples. A registered name means itself."""
    fresh = name.startswith(ONLINE) and name not in losses.names()
    return (name.removeprefix(ONLINE), True) if fresh else (name, False)


def trainable_names() -> list[str]:
    """Losses that can be trained by themselves: those whose tensors a stream provides."""
    return [name for name in losses.names() if _obstacle(losses.get(name)) is None]


def stream_of(loss: Loss) -> str:
    """Which stream provides the tensors that a loss names.

    Raises:
        ConfigError: none does, or its advantage function needs what nothing provides: the loss is a part of others (`compose`).
    """
    obstacle = _obstacle(loss)
    if obstacle is not None:
        raise ConfigError(f"{loss.name!r} cannot be trained alone: {obstacle}.")
    return _stream(loss_tensors(loss))


# The letters of the tensors that each stream provides.
_LETTERS = {"pairs": "PT", "completions": "PT", "labelled": "NMT", "groups": "GKT", "rollouts": "NT"}


def _stream(names: frozenset[str]) -> str:
    letters = {letter for name in names for letter in VOCABULARY[name].shape}
    if any(VOCABULARY[name].source in ("old", "rollout") for name in names):
        return "rollouts"
    if "desirable" in names:
        return "labelled"
    if "G" in letters:
        return "groups"
    if "P" in letters:
        return "pairs" if any("rejected" in name for name in names) else "completions"
    return "rollouts"


def _obstacle(loss: Loss) -> str | None:
    """What keeps a loss from being trained; None when nothing does."""
    names = loss_tensors(loss)
    stream = _stream(names)
    foreign = sorted(
        name
        for name in names
        if not {*VOCABULARY[name].shape} <= {*_LETTERS[stream]} or (name == "desirable" and stream != "labelled")
    )
    if foreign:
        return f"no stream provides {', '.join(sorted(names))} together; its {stream} have no {', '.join(foreign)}"
    if stream != "rollouts":
        return None
    made = sorted(names & {"advantages", "returns"})
    if made and loss.advantage is None:
        return f"it needs {', '.join(made)}, but names no advantage function: @register(..., advantage=gae)"
    wanted = () if loss.advantage is None else read_signature(loss.advantage, f"advantage of {loss.name!r}").required
    if "old_values" in wanted and "values" not in names:
        function = getattr(loss.advantage, "__name__", "its advantage function")
        return f"{function} needs old_values, but no term of the loss trains a value head (values)"
    return None


def family(loss: Loss) -> str:
    """What a loss learns from, for tables: "pairs with a reference", "pairs without a reference", "completions", "unpaired",
    "lists", "policy gradient" or "rewards" (a trained reward head).

    Raises:
        ConfigError: as `stream_of`.
    """
    names, stream = loss_tensors(loss), stream_of(loss)
    if any(VOCABULARY[name].source == "policy" and name.endswith("rewards") for name in names):
        return "rewards"
    if stream == "pairs":
        referenced = any(VOCABULARY[name].source == "reference" or name.endswith("token_kls") for name in names)
        return f"pairs {'with' if referenced else 'without'} a reference"
    return {"labelled": "unpaired", "groups": "lists", "rollouts": "policy gradient"}.get(stream, stream)


def loss_tensors(loss: Loss) -> frozenset[str]:
    """Every tensor that a loss requires, all terms together."""
    return frozenset(name for term in loss.terms for name in term.signature.required)


def _parts(loss: Loss, stream: str, fresh: bool) -> dict[str, dict[str, HyperParameter]]:
    own: dict[str, HyperParameter] = {}
    if stream == "rollouts":
        own = read_options(rollouts, "the rollout stream")
    elif fresh:
        own = read_options(online, "the online stream")
    return {
        "loss": loss.hyper,
        "stream": own,
        "advantage": {} if loss.advantage is None else read_options(loss.advantage, f"advantage of {loss.name!r}"),
    }


def import_files(paths: Iterable[str | Path]) -> list[str]:
    """Imports users' files, whose losses register themselves; the names that are new.

    Raises:
        ConfigError: a file is missing or fails to import.
    """
    before = set(losses.names())
    for path in map(Path, paths):
        if not path.is_file():
            raise ConfigError(f"--import {path}: no such file. It should be a Python file that registers losses.")
        name = f"prefopt_import_{path.stem}_{abs(hash(path.resolve()))}"
        if name in sys.modules:
            continue
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise ConfigError(f"--import {path} failed: {type(error).__name__}: {error}") from error
    return sorted(set(losses.names()) - before)
