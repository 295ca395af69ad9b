"""A language-model world small enough to be solved: every completion is enumerated, so nothing has to be estimated.

Shapes: G prompts, C completions of a prompt, T tokens, V = symbols + 1 next tokens. `world` draws a world and scores models in
it, `layout` orders completions and prefixes, `solve` holds closed forms and measures, `labels` makes preference pairs.
"""

from __future__ import annotations

from prefopt.data.exact_world.labels import LabelModel, PopulationPairs, SampledPairs, parse_labels
from prefopt.data.exact_world.layout import Layout
from prefopt.data.exact_world.solve import (
    Frontier,
    best_of_n_logps,
    beta_at_kl,
    check_normalised,
    entropy,
    expected,
    frontier,
    kl,
    log_partition,
    objective,
    optimal_logps,
    pair_accuracy,
    regret,
)
from prefopt.data.exact_world.world import ExactEvaluation, ExactWorld, WorldConfig

__all__ = [
    "ExactEvaluation",
    "ExactWorld",
    "Frontier",
    "LabelModel",
    "Layout",
    "PopulationPairs",
    "SampledPairs",
    "WorldConfig",
    "best_of_n_logps",
    "beta_at_kl",
    "check_normalised",
    "entropy",
    "expected",
    "frontier",
    "kl",
    "log_partition",
    "objective",
    "optimal_logps",
    "pair_accuracy",
    "parse_labels",
    "regret",
]
