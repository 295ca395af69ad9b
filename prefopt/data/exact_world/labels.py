"""Preference pairs and the models that label them.

Shapes: G prompts, C completions, P pairs. A pair is two different completions of a uniformly drawn prompt, independent samples
from the reference given that they differ (equal draws are rejected together, so the two places are exchangeable).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prefopt.data.exact_world.layout import Layout
from prefopt.data.exact_world.nature import LABELS, PAIR_PROMPTS, PAIRS, generator
from prefopt.data.exact_world.solve import check_normalised
from prefopt.errors import ConfigError, DataError

# Name -> (default parameter, its range, what it means); None where the model has no parameter.
_MODELS: dict[str, tuple[float, Callable[[float], bool], str] | None] = {
    "bt": None,
    "soft": None,
    "deterministic": None,
    "flipped": (0.1, lambda p: 0 <= p <= 0.5, "flip probability in [0, 0.5]"),
    "length_biased": (0.5, math.isfinite, "reward per token that the labeller adds"),
    "shifted": (2.0, lambda t: t > 0, "temperature > 0 that flattens the reference"),
}
# Rejecting equal draws needs this much chance of two different ones; any reference that is not collapsed has far more.
_MINIMUM_DISTINCT = 1e-4
_LARGEST_POPULATION = 5_000_000


@dataclass(frozen=True)
class LabelModel:
    """How a pair gets its label.

    Args:
        name: `bt` Bradley-Terry on the hidden reward; `soft` the higher reward first with its Bradley-Terry probability as soft
            label; `deterministic` the higher reward first; `flipped` that, flipped with probability `parameter`;
            `length_biased` Bradley-Terry on reward + `parameter` * tokens; `shifted` Bradley-Terry on pairs from the reference
            flattened to temperature `parameter`.
        parameter: as above; 0 where the model has none.
        temperature: of Bradley-Terry: P(a over b) = sigma((r_a - r_b) / temperature).
    """

    name: str
    parameter: float
    temperature: float = 1.0

    def probability(self, reward_gap: Tensor, length_gap: Tensor) -> Tensor:
        """P(first preferred) from the gaps first - second in reward and in tokens, elementwise; equal rewards toss a coin."""
        if self.name in ("deterministic", "flipped"):
            return 0.5 + (0.5 - self.parameter) * reward_gap.sign()
        if self.name == "length_biased":
            reward_gap = reward_gap + self.parameter * length_gap
        return torch.sigmoid(reward_gap / self.temperature)

    def pair_logps(self, reference_logps: Tensor) -> Tensor:
        """The distribution that completions of pairs come from [G, C]."""
        return (reference_logps / self.parameter).log_softmax(-1) if self.name == "shifted" else reference_logps


def parse_labels(text: str, temperature: float = 1.0) -> LabelModel:
    """Reads `bt`, `soft`, `deterministic`, `flipped:0.2`, `length_biased:0.5` or `shifted:2.0`; the number may be left out.

    Raises:
        ConfigError: an unknown model, a parameter that it does not have or out of range, or a temperature that is not positive.
    """
    name, colon, number = text.partition(":")
    if name not in _MODELS:
        near = difflib.get_close_matches(name, _MODELS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown label model {name!r}{hint}. Known: {', '.join(_MODELS)}.")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ConfigError(
            f"label model {text!r}: expected a temperature > 0, got {temperature}; use 'deterministic' for no noise."
        )
    declared = _MODELS[name]
    if declared is None:
        if colon:
            raise ConfigError(f"label model {name!r} has no parameter, got {text!r}.")
        return LabelModel(name, 0.0, temperature)
    default, allowed, meaning = declared
    try:
        parameter = float(number) if colon else default
    except ValueError:
        parameter = math.nan
    if not (math.isfinite(parameter) and allowed(parameter)):
        raise ConfigError(f"label model {text!r}: expected {name}:<{meaning}>, for example {name}:{default}.")
    return LabelModel(name, parameter, temperature)


@dataclass(frozen=True)
class SampledPairs:
    """Pairs as indices, all [P]: prompt, chosen and rejected completion; `soft_labels` where the label model gives them."""

    prompt: Tensor
    chosen: Tensor
    rejected: Tensor
    soft_labels: Tensor | None


@dataclass(frozen=True)
class PopulationPairs:
    """Every unordered pair of a world, so that a loss's population objective is `(loss * weight).sum()`; all fields [P].

    Args:
        prompt, chosen, rejected: indices. "Chosen" is the place only: `soft_labels` says how often it is preferred.
        soft_labels: P(chosen preferred), float64.
        weight: probability of drawing the pair in either order; sums to one.
    """

    prompt: Tensor
    chosen: Tensor
    rejected: Tensor
    soft_labels: Tensor
    weight: Tensor


def sample_completions(logps: Tensor, prompts: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """A completion's index for each prompt index and uniform number, by inverting the cumulated probabilities."""
    cumulated = logps.exp().cumsum(-1).numpy()
    drawn = np.empty(len(prompts), dtype=np.int64)
    for g in np.unique(prompts):
        rows = prompts == g
        # Scaling by the last entry absorbs the rounding of the sum: an index past the end cannot come out.
        drawn[rows] = np.searchsorted(cumulated[g], uniforms[rows] * cumulated[g, -1], side="right")
    return drawn


def sample_pairs(
    layout: Layout, rewards: Tensor, reference_logps: Tensor, n: int, labels: LabelModel, seeds: tuple[int, int]
) -> SampledPairs:
    """`n` labelled pairs. The first m of them are the m that `n=m` gives; label models (but `shifted`) see the same pairs.

    `seeds` are the pairs' own and the world's: one seed in two worlds gives independent pairs.

    Raises:
        DataError: the reference is not normalised, or has a prompt with practically one completion.
    """
    check_normalised(reference_logps)
    source = labels.pair_logps(reference_logps)
    distinct = -torch.expm1(torch.logsumexp(2 * source, dim=-1))
    if float(distinct.min()) < _MINIMUM_DISTINCT:
        raise DataError(
            f"prompt {int(distinct.argmin())}: two samples of the reference differ with probability "
            f"{float(distinct.min()):.1e}; expected at least {_MINIMUM_DISTINCT}. The reference has collapsed: train it less, "
            f"or use 'shifted'."
        )
    seed, world_seed = seeds
    prompts = generator(seed, PAIR_PROMPTS, world_seed).integers(len(reference_logps), size=n)
    first, second = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
    attempt = 0
    while (same := first == second).any():
        # Numbers for all rows in each attempt: a row's draws do not depend on its neighbours', so samples nest.
        uniforms = generator(seed, PAIRS, world_seed, attempt).random((n, 2))[same]
        first[same] = sample_completions(source, prompts[same], uniforms[:, 0])
        second[same] = sample_completions(source, prompts[same], uniforms[:, 1])
        attempt += 1
    prompt, a, b = (torch.from_numpy(column) for column in (prompts, first, second))
    gap = rewards[prompt, a] - rewards[prompt, b]
    coins = torch.from_numpy(generator(seed, LABELS, world_seed).random(n))
    if labels.name == "soft":
        first_wins = gap >= 0
    else:
        first_wins = coins < labels.probability(gap, (layout.lengths[a] - layout.lengths[b]).double())
    soft = labels.probability(gap.abs(), torch.zeros_like(gap)) if labels.name == "soft" else None
    return SampledPairs(prompt, torch.where(first_wins, a, b), torch.where(first_wins, b, a), soft)


def exact_soft_pairs(layout: Layout, rewards: Tensor, reference_logps: Tensor, labels: LabelModel) -> PopulationPairs:
    """The population that `sample_pairs` samples, for worlds small enough to list every pair.

    Raises:
        ConfigError: the world has more than 5 million pairs.
    """
    check_normalised(reference_logps)
    prompts, completions = reference_logps.shape
    count = prompts * completions * (completions - 1) // 2
    if count > _LARGEST_POPULATION:
        raise ConfigError(
            f"this world has {count:,} pairs; at most {_LARGEST_POPULATION:,} can be listed. Use WorldConfig.tabular()."
        )
    logps = labels.pair_logps(reference_logps)
    first, second = torch.triu_indices(completions, completions, offset=1)
    joint = (logps[:, first] + logps[:, second]).log_softmax(-1).exp() / prompts
    gap = rewards[:, first] - rewards[:, second]
    soft = labels.probability(gap, (layout.lengths[first] - layout.lengths[second]).double())
    which = torch.arange(prompts).repeat_interleave(len(first))
    return PopulationPairs(which, first.repeat(prompts), second.repeat(prompts), soft.flatten(), joint.flatten())
