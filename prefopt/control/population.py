"""The objective of CPL on infinitely many pairs of segments, and the policy that minimises it.

Shapes: C segments, L steps, S states, A actions. The C segments of a behaviour are listed with their probabilities; the two
segments of a pair are independent. All is float64. The figures below are for `gridworld()`, L = 2, with actions and starts
uniform, KL(policy || .) averaged evenly over states; the tests compute them.

**Regret labels, bias 1: pi*, and pi* alone.** The loss is the entropy of the labels plus their KL from sigma(S_i - S_j), so it
is least where S_i - S_j = score_i - score_j on all pairs: sum_t gamma^t d(s_t, a_t) = c for every segment, with
d = alpha log pi - A*. Pairs say no more: A* and A* + k give equal labels, as all segments have L steps. What fixes k is
that exp(log pi) and exp(A* / alpha) both sum to one. Where every action has a chance, the last action of a segment can
be replaced, so d of the last state is the same for all actions, that is 0; with the last step left out the same holds of
the one before, and so on: d = 0 in every state that a segment visits, and c = 0. It takes alpha = temperature, gamma = the
labeller's discount and all actions: without one of them, d may be any constant that the missing action has mass for.

**Regret labels, bias < 1: between pi* and the behaviour.** Likelier segments lower the loss whatever their labels, so the
optimum is pulled to what the behaviour does: KL to pi* is 0.029, 0.116 and 0.246 at bias 0.75, 0.5 and 0.25, KL to the
uniform behaviour 0.316, 0.194 and 0.101 (of pi*: 0.448). Every start that was tried led to the same optimum.

**Return labels: not pi*, and not the myopic policy either.** With Z(s) = alpha log sum_a exp(r(s, a) / alpha),

    sum_t gamma^t r = sum_t gamma^t alpha log softmax(r / alpha) + sum_t gamma^t Z(s_t):

were Z the same everywhere, the myopic policy softmax(r / alpha) would be the optimum at bias 1, by the argument above. It is
not, and no policy can say that a state is worth more, since its probabilities sum to one there too. The optimum bends them to
say it: in a rich state it is flat, so that all actions score high; in a poor one it may favour one of two equal actions,
whichever, so that the state scores low on average. Hence several minima: here two at bias 1, mirrored mainly at one trap. The
lower one (loss 0.59814, where the labels' entropy is 0.558) is 0.417 from pi*, 0.187 from the myopic policy, and its regret is
1.70 (myopic 1.56, uniform 3.53); the other (0.59822) is 0.343 from pi*. Better behaviour makes it worse: on segments of
softmax(A* / (2 alpha)), whose own regret is 0.53, the optimum has 3.65.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prefopt.control.mdp import TabularMDP, action_probabilities, segment_start
from prefopt.errors import ConfigError, DataError

LARGEST_POPULATION = 50_000
"""Segments that are listed at most: their pairs, 2.5e9, take half a minute of a core for one value of the objective."""

# Pairs looked at together: a few blocks of float64 fit the cache of a core.
_BLOCK = 1 << 17
_ITERATIONS = 2000


@dataclass(frozen=True)
class Population:
    """Every segment of a behaviour: `states`, `actions` [C, L] int64, `probabilities` [C] float64, which sum to one.

    A segment ends with its last action; where that leads is not part of it.
    """

    states: Tensor
    actions: Tensor
    probabilities: Tensor

    def __len__(self) -> int:
        return len(self.probabilities)


def enumerate_segments(mdp: TabularMDP, behaviour_logps: Tensor, length: int, *, start: Tensor | None = None) -> Population:
    """All segments of `length` steps under a behaviour [S, A] that have a chance.

    Args:
        start: [S], where segments start; all states equally likely by default, as in `sample_steps`.

    Raises:
        ConfigError: fewer than one step, or more than `LARGEST_POPULATION` segments.
    """
    if length < 1:
        raise ConfigError(f"enumerate_segments: expected at least one step, got {length}.")
    begin, policy = segment_start(mdp, start), action_probabilities(mdp, behaviour_logps)
    count = _count(mdp, begin, policy, length)
    if count > LARGEST_POPULATION:
        raise ConfigError(
            f"enumerate_segments: {count:,} segments of {length} steps, expected at most {LARGEST_POPULATION:,}; shorten the "
            f"segments or take a smaller MDP."
        )
    states = begin.nonzero()
    actions = states.new_empty(len(states), 0)
    probabilities = begin[states[:, 0]]
    for step in range(length):
        if step:
            last, taken = states[:, -1], actions[:, -1]
            row, reached = mdp.transitions[last, taken].nonzero(as_tuple=True)
            probabilities = probabilities[row] * mdp.transitions[last[row], taken[row], reached]
            states, actions = torch.cat([states[row], reached[:, None]], dim=1), actions[row]
        row, action = policy[states[:, -1]].nonzero(as_tuple=True)
        probabilities = probabilities[row] * policy[states[row, -1], action]
        states, actions = states[row], torch.cat([actions[row], action[:, None]], dim=1)
    return Population(states, actions, probabilities)


def preference_scores(population: Population, per_step: Tensor, discount: float) -> Tensor:
    """sum_t discount^t per_step(s_t, a_t) [C], t from 0 at a segment's first step.

    Of the optimal advantages [S, A] it is minus the segment's regret, of the rewards its partial return; a labeller prefers
    segment i to j with probability sigma(score_i - score_j).
    """
    powers = discount ** torch.arange(population.states.shape[1], dtype=torch.float64)
    return per_step.double()[population.states, population.actions] @ powers


def population_loss(
    logps: Tensor, population: Population, scores: Tensor, *, alpha: float, bias: float, gamma: float
) -> Tensor:
    """E over pairs of p cpl(i, j) + (1 - p) cpl(j, i), p = sigma(score_i - score_j); a scalar.

    cpl(i, j) = -log sigma(S_i - bias S_j) with S = sum_t gamma^t alpha log pi(a_t | s_t), as `losses.cpl` has it.
    Differentiable in `logps` [S, A], once.
    """
    model_scores = alpha * preference_scores(population, logps, gamma)
    return _PairLoss.apply(model_scores, scores, population.probabilities, bias)


def population_optimum(
    population: Population,
    scores: Tensor,
    mdp: TabularMDP,
    *,
    alpha: float,
    bias: float,
    gamma: float,
    tolerance: float = 1e-8,
    initial: Tensor | None = None,
) -> Tensor:
    """The tabular policy at which `population_loss` is stationary, by L-BFGS from `initial` (uniform) -> logps [S, A].

    Args:
        tolerance: largest derivative in a logit that is left.
        initial: [S, A] log-probs to start from. A state of no segment keeps its row.

    Raises:
        DataError: it did not settle.
    """
    logits = (mdp.uniform_logps if initial is None else initial).detach().double().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=_ITERATIONS,
        max_eval=2 * _ITERATIONS,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = population_loss(logits.log_softmax(-1), population, scores, alpha=alpha, bias=bias, gamma=gamma)
        loss.backward()
        return loss

    optimizer.step(closure)
    closure()
    assert logits.grad is not None
    left = float(logits.grad.abs().max())
    if not left <= tolerance:
        raise DataError(
            f"population_optimum: a derivative of {left:.1e} is left, expected at most {tolerance:.1e}; raise the tolerance."
        )
    return logits.detach().log_softmax(-1)


class _PairLoss(torch.autograd.Function):
    """E over pairs as a function of the model's scores [C], with its gradient, in blocks of rows: no [C, C] exists."""

    @staticmethod
    def forward(ctx: Any, model_scores: Tensor, scores: Tensor, probabilities: Tensor, bias: float) -> Tensor:
        total = model_scores.new_zeros(())
        gradient = torch.zeros_like(model_scores)
        # (i, j) and (j, i) are equally likely, so both orders together are twice the order in which i is preferred.
        for block in torch.arange(len(scores)).split(max(1, _BLOCK // len(scores))):
            weight = torch.sigmoid(scores[block, None] - scores).mul_(probabilities)
            weight.mul_(2 * probabilities[block, None])
            deficit = bias * model_scores - model_scores[block, None]
            total += torch.dot(weight.view(-1), F.softplus(deficit).view(-1))
            pull = deficit.sigmoid_().mul_(weight)
            gradient[block] -= pull.sum(1)
            gradient += bias * pull.sum(0)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None, None, None


def _count(mdp: TabularMDP, start: Tensor, policy: Tensor, length: int) -> int:
    """How many segments have a chance."""
    choices = (policy > 0).double()
    successors = torch.einsum("sa,sat->st", choices, (mdp.transitions > 0).double())
    paths = (start > 0).double()
    for _ in range(length - 1):
        paths = paths @ successors
    return int((paths @ choices).sum())
