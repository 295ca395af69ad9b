"""Supervised stages that all cells share, cached by content: the SFT start and reward models.

Each is `fit` with another loss; the cache key is the weights it starts from, the token ids it sees and its options.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from rich.console import Console
from safetensors.torch import load_file, save_file

import losses
from losses.registry import BoundLoss, Loss
from losses.types import VOCABULARY
from prefopt import algorithms
from prefopt.data.records import Example, Labels
from prefopt.errors import ConfigError
from prefopt.models.causal_lm import CausalLMPolicy
from prefopt.models.fingerprint import fingerprint
from prefopt.models.lora import LoRA
from prefopt.models.packed import PackedPolicy
from prefopt.optimization import Optimization
from prefopt.reference import completion_keys
from prefopt.rewards import RewardModelScorer
from prefopt.rewards.quality import measure_quality, ordered_pairs
from prefopt.streams import Budget, OfflineStream
from prefopt.trainer import fit

_FACTS, _WEIGHTS = "stage.json", "weights.safetensors"


@dataclass(frozen=True)
class Stage:
    """What a shared stage was: its cost, and facts about its result.

    Args:
        key: content address.
        tokens: encoded with gradient.
        seconds: of training, 0 when it came from the cache.
        cached: it was not trained in this run.
        facts: plain numbers (accuracy, offset).
    """

    key: str
    tokens: int
    seconds: float
    cached: bool
    facts: dict[str, Any]


def content_key(*parts: Any) -> str:
    """sha256 over JSON, 16 hex digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def examples_key(examples: Sequence[Example], *, labels: bool = False) -> str:
    """Content of a data set: token ids and order, and, for what learns from them, labels."""
    digest = hashlib.sha256()
    for example in examples:
        keys = completion_keys(example)
        digest.update(len(keys).to_bytes(8, "little") + b"".join(keys))
        if labels:
            digest.update(repr(example.labels).encode())
    return digest.hexdigest()[:16]


def supervised_start(
    policy: PackedPolicy,
    weights: str,
    examples: Sequence[Example],
    *,
    both: bool,
    budget: Budget,
    optimization: Optimization,
    cache: Path,
    console: Console | None = None,
) -> Stage:
    """SFT of `policy` in place, or the weights of an earlier equal run: the shared start and reference.

    Args:
        weights: content address of the policy and of what its token ids stand for (`fingerprint` of a causal LM).
        examples: the completion that stands first is imitated; with `both`, every completion.
        budget, optimization: of the stage.
    """
    if both:
        examples = _EveryCompletion(examples)
    key = content_key("sft", weights, examples_key(examples), both, asdict(budget), asdict(optimization))
    folder = cache / "sft" / key
    with _known_stage(folder, policy) as known:
        if known is not None:
            return known
        stream = OfflineStream(examples, kind="completions", budget=budget, dtype=policy.dtype)
        result = fit(policy, losses.get("sft").bind(), stream, optimization, console=console, title="SFT of the shared start")
        loss = next((line["loss"] for line in reversed(result.lines) if "loss" in line), float("nan"))
        return _write_stage(
            folder,
            policy.trainable_state(),
            Stage(key, result.tokens, result.seconds, False, {"loss": loss, "steps": result.steps}),
        )


# How many training rows centre a reward model's scores.
_CENTRING_ROWS = 256


def reward_model(
    model: Any,
    tokenizer: Any,
    train: Sequence[Example],
    held_out: Sequence[Example],
    *,
    loss: BoundLoss,
    lora: LoRA | None,
    budget: Budget,
    optimization: Optimization,
    max_length: int,
    max_completion_length: int | None,
    cache: Path,
    console: Console | None = None,
    title: str = "reward model",
) -> tuple[RewardModelScorer, Stage]:
    """A reward model trained on pairs or ranked lists, or the weights of an earlier equal run.

    Scores are shifted so that the mean over the first 256 training rows is zero; their scale is left alone, because a
    Bradley-Terry reward is in log-odds and `kl_coef` then has the meaning of DPO's beta.

    Args:
        model: used in place; its LM head is not.
        train: pairs, chosen first, or lists with ranks, as the loss needs.
        held_out: pairs for what is said of it.
        loss: on rewards, hyper-parameters set.
        lora: adapters, or None to train the whole backbone.
    """
    # "1": the format of the facts and of the head.
    key = content_key(
        "reward 1",
        fingerprint(model),
        examples_key(train, labels=True),
        examples_key(held_out, labels=True),
        (loss.name, dict(loss.hyper)),
        lora and asdict(lora),
        asdict(budget),
        asdict(optimization),
    )
    folder = cache / "reward" / key
    torch.manual_seed(budget.seed)
    policy = CausalLMPolicy(model, tokenizer, lora=lora, heads=("reward",))
    scorer = RewardModelScorer(
        policy, max_length=max_length, max_completion_length=max_completion_length, micro_batch_tokens=budget.micro_batch_tokens
    )
    with _known_stage(folder, policy) as known:
        if known is not None:
            scorer.offset = known.facts["offset"]
            return scorer, known
        begin = time.perf_counter()
        stream = OfflineStream(train, kind=algorithms.stream_of(losses.get(loss.name)), budget=budget, dtype=policy.dtype)
        result = fit(policy, loss, stream, optimization, console=console, title=title)
        scorer.centre(train[:_CENTRING_ROWS])
        facts = {"offset": scorer.offset, "steps": result.steps, "train_rows": len(train), **held_out_facts(scorer, held_out)}
        stage = Stage(key, result.tokens, time.perf_counter() - begin, False, facts)
        return scorer, _write_stage(folder, policy.trainable_state(), stage)


def reward_loss(name: str, **hyper: Any) -> BoundLoss:
    """The loss that trains a reward model, its hyper-parameters set where they differ from 0.

    Raises:
        ConfigError: no such loss, one that trains no reward head alone, or one without such a hyper-parameter.
    """
    loss = algorithms.get(name).loss
    if not trains_reward_model(loss):
        known = ", ".join(other for other in algorithms.trainable_names() if trains_reward_model(losses.get(other)))
        raise ConfigError(f"reward_loss {name!r} does not train a reward model; these do: {known}.")
    try:
        return loss.bind(**{key: value for key, value in hyper.items() if value})
    except losses.UnknownName as error:
        raise ConfigError(f"reward_loss {name}: {error}") from error


def trains_reward_model(loss: Loss) -> bool:
    """True when a reward head is all that a loss asks of the policy: what it trains is no language model any more."""
    asked = [name for name in algorithms.loss_tensors(loss) if VOCABULARY[name].source == "policy"]
    return bool(asked) and all(name.endswith("rewards") for name in asked)


def trained_reward_model(policy: PackedPolicy, loss: Loss, train: Sequence[Example], **limits: Any) -> RewardModelScorer | None:
    """A trained policy as a scorer of text, centred as `reward_model`; None when it is no language model or stayed one.

    Args:
        limits: `max_length`, `max_completion_length` and `micro_batch_tokens` of scoring.
    """
    if not (isinstance(policy, CausalLMPolicy) and trains_reward_model(loss)):
        return None
    scorer = RewardModelScorer(policy, **limits)
    scorer.centre(train[:_CENTRING_ROWS])
    return scorer


def held_out_facts(scorer: RewardModelScorer, examples: Sequence[Example]) -> dict[str, Any]:
    """Which held-out rows a reward model orders rightly (a tie is not), and its record on their pairs."""
    if not examples:
        return {"right": [], "quality": None}
    right = [
        example.id
        for example, scores in zip(examples, scorer.lists(examples), strict=True)
        if all(scores[better] > scores[worse] for better, worse in ordered_pairs(example))
    ]
    return {"right": right, "quality": measure_quality(scorer, examples).as_dict()}


class _EveryCompletion(Sequence[Example]):
    """Each completion as an example of its own, read when it is asked for."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples
        self._ends = np.cumsum([len(example.completion_ids) for example in examples])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = int(np.searchsorted(self._ends, index, side="right"))
        example = self._examples[row]
        k = index - int(self._ends[row]) + len(example.completion_ids)
        return replace(example, id=f"{example.id}/{k}", completion_ids=(example.completion_ids[k],), labels=Labels())


@contextlib.contextmanager
def _known_stage(folder: Path, policy: PackedPolicy) -> Iterator[Stage | None]:
    """As `_load_stage`; None where this process is to train the stage, while others that need it wait for the end of the block.

    Without the lock every process of a run on several would train it.
    """
    known = _load_stage(folder, policy)
    if known is not None:
        yield known
        return
    locks = folder.parent.parent / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / f"{folder.parent.name}-{folder.name}"):
        yield _load_stage(folder, policy)


def _load_stage(folder: Path, policy: PackedPolicy) -> Stage | None:
    """The stage, its weights copied into `policy`; None when there is none. A damaged one is set aside."""
    if not (folder / _FACTS).exists():
        return None
    try:
        stored = json.loads((folder / _FACTS).read_text())
        if stored.get("sha256") != _sha256(folder / _WEIGHTS):
            raise ValueError(f"{_WEIGHTS} is not the file that was written")
    except (OSError, ValueError) as error:
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            os.replace(folder, folder.with_name(f".damaged-{folder.name}-{uuid.uuid4().hex[:8]}"))
        warnings.warn(f"{folder}: a damaged stage in the cache ({error}); set aside, it is trained again.", stacklevel=3)
        return None
    policy.load_trainable_state(load_file(folder / _WEIGHTS, device=str(policy.device)))
    return Stage(stored["key"], stored["tokens"], 0.0, True, stored["facts"])


def _write_stage(folder: Path, weights: dict[str, torch.Tensor], stage: Stage) -> Stage:
    staged = folder.parent / f".tmp-{uuid.uuid4().hex}"
    staged.mkdir(parents=True)
    save_file({name: value.contiguous().cpu() for name, value in weights.items()}, staged / _WEIGHTS)
    (staged / _WEIGHTS).chmod(0o644)  # safetensors takes 0600, but users may share a cache
    facts = {"key": stage.key, "tokens": stage.tokens, "facts": stage.facts, "sha256": _sha256(staged / _WEIGHTS)}
    (staged / _FACTS).write_text(json.dumps(facts))
    try:
        os.replace(staged, folder)
    except OSError:
        shutil.rmtree(staged)  # another process finished the same stage first: the content is equal
        if not (folder / _FACTS).exists():
            raise
    return stage


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
