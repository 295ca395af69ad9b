"""Closed forms and exact measures on tables of completions.

Shapes: G prompts, C completions. `logps` are natural-log probabilities of all completions of a prompt [G, C] in float64
(they sum to one), `rewards` the hidden reward [G, C]. Prompts are drawn uniformly: an average over prompts is `.mean()`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prefopt.errors import ConfigError, DataError

# Probabilities come from float64 log-softmaxes; what is lost in adding up 10^4 of them is far below this.
_SUM_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Frontier:
    """The best reward for each price of KL: optimal policies at `betas`, averaged over prompts; all fields [B]."""

    betas: Tensor
    kl: Tensor
    reward: Tensor


def check_normalised(logps: Tensor) -> None:
    """Raises DataError unless every row of [G, C] log-probs sums to one."""
    total = logps.logsumexp(-1)
    worst = int(total.abs().nan_to_num(math.inf).argmax())
    if not bool(total.abs().max() <= _SUM_TOLERANCE):
        raise DataError(
            f"log-probs of all completions must sum to one: prompt {worst} sums to {math.exp(float(total[worst])):.9f}. "
            f"Pass `sequence_logps(next_logps(model))`, in float64."
        )


def expected(values: Tensor, logps: Tensor) -> Tensor:
    """E[values] under exp(logps): [G, C] or [C], and [G, C] -> [G]."""
    return (logps.exp() * values).sum(-1)


def kl(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """KL(policy || reference) of whole completions in nats [G]; completions of probability 0 count 0."""
    log_ratio = torch.where(logps > -math.inf, logps - reference_logps, 0.0)
    return expected(log_ratio, logps)


def entropy(logps: Tensor) -> Tensor:
    """Entropy of whole completions in nats [G]."""
    return -kl(logps, torch.zeros_like(logps))


def log_partition(reference_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """log Z(x) = log sum_y ref(y|x) exp(r(x, y) / beta)  (Rafailov et al. 2023 [rafailov2023dpo], below eq. 4) [G].

    Raises:
        ConfigError: beta is not positive.
    """
    if not beta > 0:
        raise ConfigError(f"beta must be positive, got {beta}; without a KL price the optimum is the best completion alone.")
    return torch.logsumexp(reference_logps + rewards / beta, dim=-1)


def optimal_logps(reference_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """log of ref(y|x) exp(r(x, y) / beta) / Z(x), the maximiser of E[r] - beta KL  (Rafailov et al. 2023, eq. 4) [G, C]."""
    return reference_logps + rewards / beta - log_partition(reference_logps, rewards, beta)[:, None]


def objective(logps: Tensor, reference_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """J = E[r] - beta KL(policy || reference)  (Rafailov et al. 2023, eq. 3) [G]."""
    return expected(rewards, logps) - beta * kl(logps, reference_logps)


def regret(logps: Tensor, reference_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """J of the optimal policy less J of this one [G]; >= 0. The best J is beta log Z, so it is beta KL(policy || optimum)."""
    best = beta * log_partition(reference_logps, rewards, beta)
    return best - objective(logps, reference_logps, rewards, beta)


def frontier(reference_logps: Tensor, rewards: Tensor, betas: Sequence[float]) -> Frontier:
    """KL and reward of the optimal policies at several betas, sorted by rising KL."""
    points = []
    for beta in sorted(betas, reverse=True):
        policy = optimal_logps(reference_logps, rewards, beta)
        points.append((beta, float(kl(policy, reference_logps).mean()), float(expected(rewards, policy).mean())))
    columns = torch.tensor(points, dtype=torch.float64).reshape(-1, 3).T
    return Frontier(*columns)


def beta_at_kl(reference_logps: Tensor, rewards: Tensor, target: float) -> float:
    """The beta whose optimal policy is `target` nats from the reference on average over prompts, by bisection.

    With it `frontier` answers what the best policy at a measured KL would have earned.

    Raises:
        ConfigError: no policy of this family is that far from the reference, or the target is not positive.
    """

    def reached(beta: float) -> float:
        return float(kl(optimal_logps(reference_logps, rewards, beta), reference_logps).mean())

    # At these prices the optimum is the best completion alone, and the reference, to 1e-6 nats.
    spread = float((rewards.amax(-1) - rewards.amin(-1)).max())
    low, high = math.log(spread * 1e-5), math.log(spread * 1e4)
    largest = reached(math.exp(low))
    if not reached(math.exp(high)) < target < largest:
        raise ConfigError(f"no optimal policy has KL {target}: expected more than 0 and less than {largest:.4f} nats.")
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if reached(math.exp(middle)) > target else (low, middle)
    return math.exp((low + high) / 2)


def best_of_n_logps(reference_logps: Tensor, rewards: Tensor, n: int) -> Tensor:
    """The policy that keeps the best of n samples from the reference, a tie broken by a fair draw [G, C].

    p(y) = ref(y) (F(r)^n - F(<r)^n) / ref(r(y) = r), with F the reference's distribution of rewards. Its KL is at most
    log n - (n-1)/n, less with ties  (Beirami et al. 2024 [beirami2024bestofn], theorem 1).
    """
    if n < 1:
        raise ConfigError(f"best of n needs n >= 1, got {n}.")
    rows = []
    for logps, row in zip(reference_logps, rewards, strict=True):
        _, level = row.unique(return_inverse=True)
        mass = torch.zeros(int(level.max()) + 1, dtype=logps.dtype).index_add(0, level, logps.exp())
        up_to = mass.cumsum(0)
        # F^n - (F - mass)^n as a product, so that a level of tiny mass keeps its digits.
        below = torch.log1p(-(mass / up_to).clamp(max=1.0))
        log_kept = n * up_to.log() + torch.log(-torch.expm1(n * below))
        rows.append(logps + (log_kept - mass.log())[level])
    return torch.stack(rows).log_softmax(-1)


def pair_accuracy(logps: Tensor, reference_logps: Tensor, rewards: Tensor) -> Tensor:
    """How often log(policy / reference) ranks a pair as the hidden reward does [G].

    Exact under the distribution of pairs: two different completions from the reference. Pairs of equal reward have no order
    and do not count; a tie of the log-ratio on a pair that has one counts one half (so the reference itself has 0.5).
    """
    # Sums of log-probs that are equal on paper differ in their last digits; without rounding they would not tie.
    scores = (logps - reference_logps).round(decimals=9)
    shares = []
    for score, probability, reward in zip(scores, reference_logps.exp(), rewards, strict=True):
        agree = _rising_mass(score, probability, reward)
        disagree = _rising_mass(-score, probability, reward)
        level = reward.unique(return_inverse=True)[1]
        mass = torch.zeros(len(reward), dtype=probability.dtype).index_add(0, level, probability)
        ordered = (mass.sum().square() - mass.square().sum()) / 2
        shares.append(0.5 + 0.5 * (agree - disagree) / ordered)
    return torch.stack(shares)


def _rising_mass(score: Tensor, probability: Tensor, reward: Tensor) -> Tensor:
    """Sum of p_i p_j over pairs with r_j < r_i and score_j < score_i; all [C], C log^2 C by merging sorted halves."""
    ranks = score.unique(return_inverse=True)[1]
    # By reward; equal rewards by falling score, so that none of their pairs rises.
    order = (-ranks).argsort(stable=True)
    order = order[reward[order].argsort(stable=True)]
    # Padded to a power of two with mass 0. Even keys and odd keys: at equal score a right element comes before a left one.
    size = 1 << (len(reward) - 1).bit_length()
    keys = torch.nn.functional.pad(2 * ranks[order], (0, size - len(reward)))
    weights = torch.nn.functional.pad(probability[order], (0, size - len(reward)))
    total = probability.new_zeros(())
    half = 1
    while half < size:
        left = torch.arange(2 * half) < half
        sorted_keys, place = (keys.view(-1, 2 * half) + left).sort(-1)
        is_left = left[place]
        merged = weights.view(-1, 2 * half).gather(-1, place)
        lower = (merged * is_left).cumsum(-1)
        total += (merged * ~is_left * lower).sum()
        keys, weights = sorted_keys - is_left.long(), merged
        half *= 2
    return total
