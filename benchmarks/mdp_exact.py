"""What is known of CPL in a decision process without training. C segments, S states, A actions; policies are log-probs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from prefopt.control.mdp import TabularMDP, policy_kl, regret, soft_optimal, value
from prefopt.control.population import (
    Population,
    enumerate_segments,
    population_loss,
    population_optimum,
    preference_scores,
)
from prefopt.control.segments import Preferences

LENGTH = 2
"""Steps of a segment: short, so that all of them can be listed and the loss on infinitely many pairs is exact."""

_STARTS = 4
_SAME = 1e-6  # nats between two findings of one minimum


@dataclass(frozen=True)
class Limit:
    """Where CPL can end on infinitely many pairs: a minimum [S, A] of the loss on all of them, and the loss there."""

    logps: Tensor
    loss: float


class Exact:
    """A decision process whose segments follow a uniform policy from every state equally often, as those of `GridworldTask`.

    Attributes:
        best: the soft-optimal policy.
        myopic: softmax(r / alpha), soft-optimal if the world ended with every step.
        behaviour: uniform.
    """

    def __init__(self, mdp: TabularMDP) -> None:
        self.mdp = mdp
        self.best = soft_optimal(mdp).logps
        self.myopic = (mdp.rewards / mdp.temperature).log_softmax(-1)
        self.behaviour = mdp.uniform_logps
        self._limits: dict[tuple[Preferences, float, float], tuple[Limit, ...]] = {}

    @cached_property
    def population(self) -> Population:
        """All segments that the data are drawn from."""
        return enumerate_segments(self.mdp, self.behaviour, LENGTH)

    def scores(self, preferences: Preferences) -> Tensor:
        """[C] what the labeller sees of each segment."""
        advantages = self.mdp.temperature * self.best
        return preference_scores(
            self.population, advantages if preferences == "regret" else self.mdp.rewards, self.mdp.discount
        )  # fmt: skip

    def limits(self, preferences: Preferences, bias: float, gamma: float | None = None) -> tuple[Limit, ...]:
        """The minima of CPL's loss that the uniform policy and a few random ones lead to; lowest first. On returns there may
        be several.

        Args:
            gamma: None is the labeller's; the temperature is always the labeller's.
        """
        key = (preferences, bias, self.mdp.discount if gamma is None else gamma)
        if key not in self._limits:
            self._limits[key] = tuple(sorted(self._minima(*key), key=lambda limit: limit.loss))
        return self._limits[key]

    def to_limit(self, logps: Tensor, preferences: Preferences, bias: float) -> float:
        """KL(policy || the nearest of `limits`)."""
        return to_nearest(logps, (limit.logps for limit in self.limits(preferences, bias)))

    def measures(self, logps: Tensor) -> dict[str, float]:
        """Where a policy stands."""
        return {
            "KL_to_optimum": kl(logps, self.best),
            "KL_to_myopic": kl(logps, self.myopic),
            "KL_to_behaviour": kl(logps, self.behaviour),
            "regret": abs(float(regret(self.mdp, logps))),  # rounding leaves -1e-13 of the optimum's 0
            "return": float(self.mdp.start @ value(self.mdp, logps)),
        }

    def constant(self) -> float:
        """C of KL(estimate || pi*) ~ C / n for CPL with bias 1 on n pairs labelled by regret: the theory of maximum likelihood.

        There the loss is the negative log-likelihood of the labels, so sqrt(n) (estimate - truth) of the logits goes to a
        normal with covariance F^+, F the Fisher information of a pair. Near the truth the KL is half a quadratic form K of the
        logits, so its mean goes to trace(K F^+) / 2n. A state's logits may be shifted together, hence the pseudo-inverse.
        """
        mdp, listed, scores = self.mdp, self.population, self.scores("regret")
        policy = self.best.exp()
        # d log pi(a | s) / d logits [s]: one-hot a minus pi(. | s); with it the slope of each segment's score, [C, S * A].
        slopes = torch.zeros(len(listed), mdp.states, mdp.actions, dtype=torch.float64)
        rows = torch.arange(len(listed))
        for step in range(LENGTH):
            states, actions = listed.states[:, step], listed.actions[:, step]
            weight = mdp.temperature * mdp.discount**step
            slopes[rows, states] -= weight * policy[states]
            slopes[rows, states, actions] += weight
        slopes = slopes.view(len(listed), -1)
        preferred = torch.sigmoid(scores[:, None] - scores)
        # [C, C] variance of a pair's label times the pair's chance; F = E[variance (slope_i - slope_j)(slope_i - slope_j)^T].
        spread = preferred * (1 - preferred) * listed.probabilities[:, None] * listed.probabilities
        information = 2 * (slopes.T @ (spread.sum(1)[:, None] * slopes) - slopes.T @ spread @ slopes)
        curvature = torch.block_diag(*[torch.diag(row) - torch.outer(row, row) for row in policy]) / mdp.states
        return 0.5 * float(torch.trace(curvature @ torch.linalg.pinv(information, rtol=1e-10, hermitian=True)))

    def _minima(self, preferences: Preferences, bias: float, gamma: float) -> list[Limit]:
        scores, found = self.scores(preferences), list[Limit]()
        hyper = {"alpha": self.mdp.temperature, "bias": bias, "gamma": gamma}
        for number in range(_STARTS + 1):
            drawn = torch.randn(self.best.shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
            initial = drawn.log_softmax(-1) if number else self.behaviour
            logps = population_optimum(self.population, scores, self.mdp, initial=initial, **hyper)
            if all(kl(logps, other.logps) > _SAME for other in found):
                found.append(Limit(logps, float(population_loss(logps, self.population, scores, **hyper))))
        return found


def kl(logps: Tensor, other: Tensor) -> float:
    """KL(policy || other), nats a step, mean over states."""
    return float(policy_kl(logps, other, torch.ones(len(logps), dtype=torch.float64)))


def to_nearest(logps: Tensor, others: Iterable[Tensor]) -> float:
    """KL(policy || the nearest of the others)."""
    return min(kl(logps, other) for other in others)
