"""What tasks of text have in common: the model by name, the shared start, and the columns that any sampled policy has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from prefopt.data.records import Example
from prefopt.models.causal_lm import CausalLMPolicy
from prefopt.models.fingerprint import fingerprint
from prefopt.models.loading import Loaded, load_model
from prefopt.optimization import Optimization
from prefopt.options import ModelOptions, Options
from prefopt.report.schema import Baseline, Judge, Metric
from prefopt.stages import Stage, supervised_start
from prefopt.streams import Budget

# Samples for KL and scores use the same draws in every cell of a study seed.
SAMPLING_SEED = 7_919

SAMPLE_METRICS = (
    Metric("kl", "KL to reference", None, ".2f", note="nats per sampled completion at temperature 1, exact per token"),
    Metric("kl_k1", "KL (k1)", None, ".2f", diagnostic=True, note="log-ratio of the sampled tokens: a check of the KL"),
    Metric("nats_per_token", "nats/token", None, ".4f"),
    Metric("length", "length", None, ".1f", note="sampled tokens, cut at the limit"),
    Metric("truncated", "truncated", None, ".0%", note="samples that reached the limit without ending"),
    Metric("distinct_2", "distinct-2", None, ".3f", diagnostic=True, note="different token pairs over all of the samples"),
    Metric("repetition", "repetition", "down", ".1%", diagnostic=True, note="4-grams that stand earlier in the same sample"),
)
"""Columns of `prefopt.evaluate.Samples`."""

PAIR_METRICS = (
    Metric(
        "own_accuracy",
        "accuracy (own score)",
        "up",
        ".1%",
        diagnostic=True,
        note="held-out pairs, the algorithm's own implicit reward",
    ),
    Metric(
        "accuracy",
        "accuracy (log-ratio)",
        "up",
        ".1%",
        diagnostic=True,
        note="held-out pairs, log-ratio sum for all algorithms",
    ),
    Metric("margin", "margin", None, "+.2f", diagnostic=True, note="log-ratio of chosen minus rejected, nats"),
    Metric(
        "chosen_log_ratio",
        "chosen log-ratio",
        None,
        "+.2f",
        diagnostic=True,
        note="log(policy/reference) of chosen completions",
    ),
)
"""Columns of `prefopt.evaluate.measure_pairs`."""


def load_named(asked: ModelOptions, cache: Path) -> Loaded:
    """The model that `--model` names, on the device asked for."""
    return load_model(asked.model, cache=cache, device=asked.device, trust_remote_code=asked.trust_remote_code)


def shared_start(
    options: Options, model: Any, tokenizer: Any, examples: Sequence[Example], cache: Path, console: Console | None
) -> Stage | None:
    """Makes `model` the shared start of `options`: as it is (None), or after SFT in place on `examples`."""
    init = options.model.init
    if init == "as-is":
        return None
    supervised, budget = options.supervised, options.budget
    return supervised_start(
        CausalLMPolicy(model, tokenizer), fingerprint(model), examples, both=init == "sft-both",
        budget=Budget(budget.batch_size, budget.micro_batch_size, budget.micro_batch_tokens, supervised.sft_epochs),
        optimization=Optimization(learning_rate=supervised.sft_learning_rate), cache=cache, console=console,
    )  # fmt: skip


def place(device: str) -> str:
    """Where `--device` puts a model: auto is cuda where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def length_baselines(pairs: Sequence[Example]) -> tuple[Baseline, Baseline]:
    """What length alone says about pairs, chosen first: accuracy of "longer wins" and "shorter wins", a tie counts half."""
    gaps = torch.tensor([len(pair.completion_ids[0]) - len(pair.completion_ids[1]) for pair in pairs])
    share = float((0.5 + 0.5 * gaps.sign()).mean())
    return Baseline("longer wins", "accuracy", share), Baseline("shorter wins", "accuracy", 1 - share)


def reward_model_record(name: str, stage: Stage, rows: str, error_correlation: float | None = None) -> Judge:
    """What a reward model trained here is worth on held-out pairs; `rows` says on which rows it was trained."""
    facts, found = stage.facts, stage.facts["quality"]
    return Judge(
        name, found["accuracy"], found["low"], found["high"], found["pairs"], length_bias=found["length_correlation"],
        error_correlation=error_correlation, same_backbone=True, ece=found["ece"],
        note=f"a reward model on {facts['train_rows']} {rows}, {facts['steps']} updates",
    )  # fmt: skip


def end_ids(tokenizer: Any, model: Any) -> tuple[int, ...]:
    """Tokens that end a completion: the tokenizer's EOS, and those that the model's generation settings add."""
    more = getattr(model.generation_config, "eos_token_id", None)
    listed = more if isinstance(more, list) else [more]
    return tuple(dict.fromkeys(i for i in (tokenizer.eos_token_id, *listed) if i is not None))
