"""Supervised stages that all cells share, cached by content: the SFT start and reward models.

Each is `fit` with another loss; the cache key is the weights it starts from, the token ids it sees and its options.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import losses
from prefopt.data.records import Example, Labels
from prefopt.models.causal_lm import CausalLMPolicy, LoRA, fingerprint
from prefopt.optimization import Optimization
from prefopt.rollouts import RewardModelScorer
from prefopt.streams import Budget, OfflineStream
from prefopt.trainer import fit


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


def examples_key(examples: Sequence[Example]) -> str:
    """Content of a data set: token ids and order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.prompt_ids, example.completion_ids)).encode())
    return digest.hexdigest()[:16]


def supervised_start(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    both: bool,
    budget: Budget,
    optimization: Optimization,
    cache: Path,
    console: Console | None = None,
) -> Stage:
    """SFT of `model` in place, or the weights of an earlier equal run: the shared start and reference.

    Args:
        examples: the completion that stands first is imitated; with `both`, every completion.
        budget, optimization: of the stage.
    """
    if both:
        examples = [
            replace(e, id=f"{e.id}/{k}", completion_ids=(ids,), labels=Labels())
            for e in examples
            for k, ids in enumerate(e.completion_ids)
        ]
    key = content_key("sft", fingerprint(model), examples_key(examples), both, asdict(budget), asdict(optimization))
    folder = cache / "sft" / key
    policy = CausalLMPolicy(model, tokenizer)
    if (folder / "stage.json").exists():
        policy.load_trainable_state(load_file(folder / "weights.safetensors", device=str(policy.device)))
        return _read_stage(folder)
    stream = OfflineStream(examples, kind="completions", budget=budget, dtype=policy.dtype)
    result = fit(policy, losses.get("sft").bind(), stream, optimization, console=console, title="SFT of the shared start")
    loss = next((line["loss"] for line in reversed(result.lines) if "loss" in line), float("nan"))
    return _write_stage(
        folder,
        policy.trainable_state(),
        Stage(key, result.tokens, result.seconds, False, {"loss": loss, "steps": result.steps}),
    )


def reward_model(
    model: Any,
    tokenizer: Any,
    train: Sequence[Example],
    held_out: Sequence[Example],
    *,
    lora: LoRA | None,
    budget: Budget,
    optimization: Optimization,
    max_length: int,
    max_completion_length: int | None,
    cache: Path,
    console: Console | None = None,
    title: str = "reward model",
) -> tuple[RewardModelScorer, Stage]:
    """A reward model trained with `bradley_terry` on pairs, or the weights of an earlier equal run.

    Scores are shifted so that the mean over the first 256 training pairs is zero; their scale is left alone, because a
    Bradley-Terry reward is in log-odds and `kl_coef` then has the meaning of DPO's beta.

    Args:
        model: used in place; its LM head is not.
        train: pairs, chosen first.
        held_out: pairs for the reported accuracy.
        lora: adapters, or None to train the whole backbone.
    """
    key = content_key(
        "reward",
        fingerprint(model),
        examples_key(train),
        examples_key(held_out),
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
    if (folder / "stage.json").exists():
        policy.load_trainable_state(load_file(folder / "weights.safetensors", device=str(policy.device)))
        stage = _read_stage(folder)
        scorer.offset = stage.facts["offset"]
        return scorer, stage
    begin = time.perf_counter()
    stream = OfflineStream(train, kind="pairs", budget=budget, dtype=policy.dtype)
    result = fit(policy, losses.get("bradley_terry").bind(), stream, optimization, console=console, title=title)
    scorer.offset = float(scorer.score(train[:256]).mean())
    facts: dict[str, Any] = {"offset": scorer.offset, "steps": result.steps, "train_pairs": len(train)}
    facts |= pair_record(scorer, held_out)
    stage = Stage(key, result.tokens, time.perf_counter() - begin, False, facts)
    return scorer, _write_stage(folder, policy.trainable_state(), stage)


def pair_record(scorer: RewardModelScorer, pairs: Sequence[Example]) -> dict[str, Any]:
    """Accuracy on held-out pairs, which of them it gets right, and how its preferences follow length."""
    if not pairs:
        return {"pairs": 0, "right": [], "margins": []}
    scores = scorer.score(pairs)
    margins = scores[:, 0] - scores[:, 1]
    return {
        "pairs": len(pairs),
        "right": [pair.id for pair, m in zip(pairs, margins, strict=True) if m > 0],
        "margins": margins.tolist(),
    }


def _read_stage(folder: Path) -> Stage:
    stored = json.loads((folder / "stage.json").read_text())
    return Stage(stored["key"], stored["tokens"], 0.0, True, stored["facts"])


def _write_stage(folder: Path, weights: dict[str, torch.Tensor], stage: Stage) -> Stage:
    staged = folder.parent / f".tmp-{uuid.uuid4().hex}"
    staged.mkdir(parents=True)
    save_file({name: value.contiguous().cpu() for name, value in weights.items()}, staged / "weights.safetensors")
    (staged / "stage.json").write_text(json.dumps({"key": stage.key, "tokens": stage.tokens, "facts": stage.facts}))
    try:
        os.replace(staged, folder)
    except OSError:
        shutil.rmtree(staged)  # another process finished the same stage first: the content is equal
        if not (folder / "stage.json").exists():
            raise
    return stage
