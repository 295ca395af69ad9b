"""Where on-policy algorithms come to rest, exactly: those with the optimum of E[r] - beta KL, and those with another point.

A point of rest is a policy at which the expected gradient on its own samples is zero. Shapes: G prompts, C completions,
N prefixes, V next tokens. Every derivation is for free logits (`prefopt.models.tabular`); write pi* for the optimum
(`solve.optimal_logps`), where R(y) = r(y) - beta log(pi(y)/ref(y)) is the same number for every completion of a prompt.

- KL in the reward (k1), any advantage that is zero when all rewards are equal: REINFORCE, PPO, A2C, RLOO and GRPO with every
  `scale`, a division by a completion's own length included. The expected gradient in the log-prob of y is
  pi(y) (w(y) E[A | y] - its mean), and at pi* all A are 0. So group-scaled GRPO rests at pi* too, although its noise does not
  vanish there: close to pi* it divides by a standard deviation close to 0.
- DPO on fresh pairs of the policy with Bradley-Terry labels: E over y' of sigma(r - r') - sigma(beta (d - d')), where
  d = log(pi/ref), is zero for every y at pi*.
- k3 in the loss: `k3_in_loss`, another point, with or without group scaling.
- DPO on fresh pairs ranked by the reward itself: no point of rest short of the best completion alone, `best_completion`.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from prefopt.data.exact_world.layout import Layout
from prefopt.data.exact_world.solve import expected
from prefopt.errors import ConfigError, DataError

# Completions and their advantages depend on one another; half steps, so that the two do not swing.
_DAMPING = 0.5
_ROUNDS = 400
_SETTLED = 1e-10
# Of an interval, until nothing is left of it in float64.
_HALVINGS = 64


def k3_in_loss(
    layout: Layout,
    reference_next_logps: Tensor,
    rewards: Tensor,
    beta: float,
    *,
    samples: int,
    scale: Literal["none", "group"] = "none",
    length_mean: bool = True,
) -> Tensor:
    """Where GRPO with beta*k3 in its loss comes to rest: [G, N, V], [G, C] -> log-probs of all completions [G, C].

    On the policy's own samples the gradient of k3 at a prefix s is that of the forward KL(ref(.|s) || pi(.|s)); the prefixes
    come from the policy, so it is not KL(ref || pi) of completions. With w = 1/|y| (or 1), u(s, a) = E[w A | s, a] and
    v(s, a) = E[w | s, a], the gradient in the logits after s vanishes where

        pi(a|s) = beta v ref(a|s) / (c(s) + beta v - u),    c(s) such that it sums to one:

    a heavier tail than the exponential tilt of pi*. u and v at a prefix depend on later ones, so prefixes are solved from
    the longest back; A depends on the policy, so that is repeated until it settles.

    Args:
        beta: of the loss.
        samples: K of a group, whose mean includes the sample itself: A = (1 - 1/K)(r - E[r]) in expectation.
        scale: "group" divides by the group's standard deviation. For K = 2 that leaves the sign: A = +-1/sqrt(2), but for the
            1e-4 beside the standard deviation, which is left out here.
        length_mean: GRPO's mean over a completion's tokens; False is a sum, as in `dr_grpo` (up to a factor).

    Raises:
        ConfigError: beta is not positive, or group scaling with K other than 2, for which there is no closed form.
        DataError: it did not settle.
    """
    if not beta > 0 or samples < 2 or (scale == "group" and samples != 2):
        raise ConfigError(
            f"k3_in_loss: expected beta > 0 and at least 2 samples, exactly 2 with scale 'group'; got beta {beta}, {samples} "
            f"samples, scale {scale!r}."
        )
    weights = 1 / layout.lengths.double() if length_mean else torch.ones(layout.completions, dtype=torch.float64)
    next_logps = reference_next_logps
    advantages = torch.zeros_like(rewards)
    for _ in range(_ROUNDS):
        logps = layout.path_sums(next_logps)
        wanted = _win_margin(rewards, logps) / math.sqrt(2) if scale == "group" else rewards - expected(rewards, logps)[:, None]
        if scale == "none":
            wanted = (1 - 1 / samples) * wanted
        moved = float((wanted - advantages).abs().max())
        if moved < _SETTLED:
            return logps
        advantages = advantages + (wanted - advantages) * _DAMPING
        next_logps = _backward(layout, reference_next_logps, weights * advantages, weights.expand_as(rewards), beta)
    raise DataError(f"k3_in_loss: advantages still move by {moved:.1e} after {_ROUNDS} rounds; raise beta.")


def best_completion(rewards: Tensor) -> Tensor:
    """Where hard-ranked online DPO heads: all mass on the best completion [G, C], -inf elsewhere; ties share it.

    The pull on y is E over y' of 1[r > r'] + 1[r = r']/2 - sigma(beta (d - d')); on the best completion it is positive while
    any other one has mass, whatever beta: labels without noise say that no margin is enough. Beta only slows it.
    """
    best = rewards == rewards.amax(-1, keepdim=True)
    return torch.where(best, 0.0, -math.inf).to(rewards.dtype).log_softmax(-1)


def _win_margin(rewards: Tensor, logps: Tensor) -> Tensor:
    """P(r > r') - P(r < r') for r' from the policy [G, C]."""
    rows = []
    for row, probability in zip(rewards, logps.exp(), strict=True):
        level = row.unique(return_inverse=True)[1]
        mass = torch.zeros(int(level.max()) + 1, dtype=logps.dtype).index_add(0, level, probability)
        up_to = mass.cumsum(0)
        rows.append((2 * up_to - mass - up_to[-1])[level])
    return torch.stack(rows)


def _backward(layout: Layout, reference: Tensor, signal: Tensor, weights: Tensor, beta: float) -> Tensor:
    """[G, N, V] next log-probs that balance `signal` = w A [G, C] and beta k3, weighted by `weights` = w [G, C]."""
    found = torch.empty_like(reference)
    pull, price = signal[:, layout.prefixes :], weights[:, layout.prefixes :]
    for length in reversed(range(layout.limit)):
        block = slice(layout.starts[length], layout.starts[length + 1])
        u = torch.cat([pull.unflatten(1, (-1, layout.symbols)), signal[:, block, None]], dim=-1)
        v = torch.cat([price.unflatten(1, (-1, layout.symbols)), weights[:, block, None]], dim=-1)
        found[:, block] = _balance(u, beta * v, reference[:, block].exp()).log()
        probability = found[:, block].exp()
        pull, price = (probability * u).sum(-1), (probability * v).sum(-1)
    return found


def _balance(pull: Tensor, price: Tensor, reference: Tensor) -> Tensor:
    """p = price ref / (c + price - pull) that sums to one over the last dimension, by bisection in c."""
    floor = (pull - price).amax(-1, keepdim=True)
    slack = price - pull + floor  # >= 0, and 0 where the pull is strongest
    # With all of the numerator over the smallest and over the largest slack, c lies between these two.
    low = torch.zeros_like(floor)
    high = (price * reference).sum(-1, keepdim=True)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        above = (price * reference / (middle + slack)).sum(-1, keepdim=True) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    probability = price * reference / ((low + high) / 2 + slack)
    return probability / probability.sum(-1, keepdim=True)
