"""Markov decision processes small enough to solve exactly, in the maximum-entropy convention.

Shapes: S states, A actions, M steps. `logps` are natural-log action probabilities [S, A] that sum to one in every state. The
convention is that of contrastive preference learning (Hejna et al. 2023, section 2 [hejna2023cpl]):

    Q(s, a) = r(s, a) + discount E[V(s') | s, a],    V(s) = temperature log sum_a exp(Q(s, a) / temperature),
    A*(s, a) = Q(s, a) - V(s) = temperature log pi*(a | s),

so the optimal advantage is a log-probability: sum_a exp(A*(s, a) / temperature) = 1, and A* <= 0. All is float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from prefopt.control.steps import Steps
from prefopt.data.exact_world.nature import generator
from prefopt.errors import ConfigError, DataError

SEGMENTS = 0
"""Purpose of the stream of random numbers that segments are sampled from."""

# Log-probs of a network come in float32; what is lost in adding up tens of them is far below this.
_SUM_TOLERANCE = 1e-5
# Of the largest value: rounding leaves less, and the bound on the error of V is this over 1 - discount.
_BELLMAN_TOLERANCE = 1e-14
_SOLVES = 200


@dataclass(frozen=True)
class TabularMDP:
    """A decision process without an end; a segment of it may start anywhere and have any length.

    Args:
        transitions: [S, A, S] float64, P(s' | s, a); rows sum to one.
        rewards: [S, A] float64, expected reward of an action.
        discount: in (0, 1).
        temperature: price of entropy, the alpha of CPL; > 0. Raising it flattens the optimal policy.
        start: [S] float64, where whole returns are measured from; sums to one.

    Raises:
        ConfigError: discount or temperature out of range.
        DataError: tables of other shapes or types, a number that is not finite, or probabilities that do not sum to one.
    """

    transitions: Tensor
    rewards: Tensor
    discount: float
    temperature: float
    start: Tensor

    def __post_init__(self) -> None:
        if not 0 < self.discount < 1 or not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ConfigError(
                f"MDP: expected a discount in (0, 1) and a temperature > 0, got {self.discount} and {self.temperature}."
            )
        shapes = [list(table.shape) for table in (self.transitions, self.rewards, self.start)]
        states, actions = self.rewards.shape if self.rewards.dim() == 2 else (0, 0)
        if not states * actions or shapes != [[states, actions, states], [states, actions], [states]]:
            raise DataError(f"MDP: expected transitions [S, A, S], rewards [S, A] and start [S], got {shapes}.")
        if any(table.dtype != torch.float64 for table in (self.transitions, self.rewards, self.start)):
            raise DataError("MDP: expected float64 tables; call .double() on them.")
        if not bool(torch.isfinite(self.rewards).all()):
            raise DataError("MDP: rewards must be finite.")
        _check_distribution("transitions", self.transitions)
        _check_distribution("start", self.start)

    @property
    def states(self) -> int:
        """S."""
        return self.rewards.shape[0]

    @property
    def actions(self) -> int:
        """A."""
        return self.rewards.shape[1]

    @cached_property
    def uniform_states(self) -> Tensor:
        """[S] every state equally likely: where segments start unless told otherwise."""
        return torch.full((self.states,), 1 / self.states, dtype=torch.float64)

    @cached_property
    def uniform_logps(self) -> Tensor:
        """[S, A] the policy that takes every action equally often."""
        return torch.full((self.states, self.actions), -math.log(self.actions), dtype=torch.float64)


@dataclass(frozen=True)
class Solution:
    """The soft-optimal policy and its values: `q`, `advantages`, `logps` [S, A], `v` [S]; advantages = temperature * logps."""

    q: Tensor
    v: Tensor
    advantages: Tensor
    logps: Tensor


def soft_optimal(mdp: TabularMDP) -> Solution:
    """V = temperature logsumexp(Q / temperature), Q = r + discount P V, to about 1e-12 relative to the largest value.

    By soft policy iteration: the softmax of Q is evaluated exactly, which is Newton's method on the equation above, so a
    handful of solves does what 20 / (1 - discount) sweeps of value iteration would.

    Raises:
        DataError: it did not settle.
    """
    v = mdp.rewards.new_zeros(mdp.states)
    for _ in range(_SOLVES):
        q = mdp.rewards + mdp.discount * mdp.transitions @ v
        backed_up = mdp.temperature * torch.logsumexp(q / mdp.temperature, dim=-1)
        logps = (q / mdp.temperature).log_softmax(-1)
        residual = float((backed_up - v).abs().max())
        if residual <= _BELLMAN_TOLERANCE * max(1.0, float(q.abs().max())):
            return Solution(q, backed_up, mdp.temperature * logps, logps)
        v = soft_value(mdp, logps)
    raise DataError(f"soft_optimal: V still misses its equation by {residual:.1e} after {_SOLVES} solves; lower the discount.")


def soft_value(mdp: TabularMDP, logps: Tensor) -> Tensor:
    """V^pi = E[sum_t discount^t (r_t + temperature * entropy of pi(. | s_t))] [S], what the soft-optimal policy maximises.

    Exact, by one linear solve; differentiable in `logps` [S, A].
    """
    policy = action_probabilities(mdp, logps)
    return _evaluate(mdp, policy, (policy * mdp.rewards + mdp.temperature * torch.special.entr(policy)).sum(-1))


def value(mdp: TabularMDP, logps: Tensor) -> Tensor:
    """E[sum_t discount^t r_t] [S] under a policy [S, A], without the entropy."""
    policy = action_probabilities(mdp, logps)
    return _evaluate(mdp, policy, (policy * mdp.rewards).sum(-1))


def regret(mdp: TabularMDP, logps: Tensor) -> Tensor:
    """Soft value of the optimal policy less that of `logps` [S, A], on average over `mdp.start`; >= 0, a scalar.

    It is temperature / (1 - discount) times `policy_kl(logps, optimal, visitation(mdp, logps))`: what a policy gives away is
    its divergence from the optimum in the states that it visits itself.
    """
    return (mdp.start * (soft_optimal(mdp).v - soft_value(mdp, logps))).sum()


def visitation(mdp: TabularMDP, logps: Tensor) -> Tensor:
    """(1 - discount) sum_t discount^t P(s_t = s) [S] from `mdp.start` under a policy [S, A]; sums to one."""
    moves = _moves(mdp, action_probabilities(mdp, logps))
    # mdp.start @ inverse: a solve with the transpose.
    system = torch.eye(mdp.states, dtype=torch.float64) - mdp.discount * moves.T
    return (1 - mdp.discount) * torch.linalg.solve(system, mdp.start)


def policy_kl(logps: Tensor, other: Tensor, weights: Tensor) -> Tensor:
    """KL(policy || other) of the actions [S, A], averaged over states by `weights` [S] (any positive sum); a scalar in nats."""
    log_ratio = torch.where(logps > -math.inf, logps - other, 0.0)
    divergence = (logps.exp() * log_ratio).sum(-1)
    return (weights * divergence).sum() / weights.sum()


def sample_steps(
    mdp: TabularMDP, behaviour_logps: Tensor, segments: int, length: int, seed: int, *, start: Tensor | None = None
) -> Steps:
    """`segments` episodes of `length` steps under a behaviour [S, A]; the first n of them are the n that `segments=n` gives.

    Observations are one-hot states [M, S], rewards r(s, a) and advantages A*(s, a) exact. The reward is the expected one of
    the action, so that luck enters a segment by where it leads and not twice.

    Args:
        start: [S], where episodes start; all states equally often by default, so that no state is missing from the data.

    Raises:
        ConfigError: fewer than one segment or step.
    """
    if segments < 1 or length < 1:
        raise ConfigError(f"sample_steps: expected at least one segment and one step, got {segments} and {length}.")
    begin = segment_start(mdp, start)
    # One row of numbers a segment, in the order of its draws: a longer draw goes on where a shorter one ends.
    uniforms = torch.from_numpy(generator(seed, SEGMENTS).random((segments, 2 * length)))
    cumulated_policy = action_probabilities(mdp, behaviour_logps).cumsum(-1)
    cumulated_moves = mdp.transitions.cumsum(-1)
    state = _draw(begin.cumsum(-1).expand(segments, -1), uniforms[:, 0])
    states, actions = [], []
    for step in range(length):
        action = _draw(cumulated_policy[state], uniforms[:, 2 * step + 1])
        states.append(state)
        actions.append(action)
        if step + 1 < length:
            state = _draw(cumulated_moves[state, action], uniforms[:, 2 * step + 2])
    visited, taken = torch.stack(states, dim=1).flatten(), torch.stack(actions, dim=1).flatten()
    return Steps(
        observations=torch.nn.functional.one_hot(visited, mdp.states).float(),
        actions=taken,
        rewards=mdp.rewards[visited, taken].float(),
        advantages=soft_optimal(mdp).advantages[visited, taken].float(),
        ends=length * torch.arange(1, segments + 1),
    )


def segment_start(mdp: TabularMDP, start: Tensor | None) -> Tensor:
    """[S] where segments start, uniform over states by default.

    Raises:
        DataError: no distribution over the states of the MDP.
    """
    if start is None:
        return mdp.uniform_states
    if start.shape != (mdp.states,) or start.dtype != torch.float64:
        raise DataError(f"start: expected [{mdp.states}] float64, got {list(start.shape)} {start.dtype}.")
    _check_distribution("start", start)
    return start


def _check_distribution(name: str, probabilities: Tensor) -> None:
    """Raises DataError unless every row of [..., S] is a distribution."""
    wrong = ~((probabilities >= 0).all(-1) & ((probabilities.sum(-1) - 1).abs() <= 1e-9)).reshape(-1)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        total = float(probabilities.reshape(len(wrong), -1)[row].sum())
        raise DataError(f"MDP: {name}, row {row}: expected probabilities >= 0 that sum to one, got a sum of {total:.9f}.")


def action_probabilities(mdp: TabularMDP, logps: Tensor) -> Tensor:
    """exp(logps) [S, A] in float64, scaled to sum to one to the last digit; -inf is an action never taken.

    Raises:
        DataError: another shape, or a state whose probabilities do not sum to one.
    """
    if logps.shape != mdp.rewards.shape:
        raise DataError(f"policy: expected log-probs [{mdp.states}, {mdp.actions}], got {list(logps.shape)}.")
    total = logps.double().logsumexp(-1, keepdim=True)
    wrong = ~(total.abs() <= _SUM_TOLERANCE)
    if bool(wrong.any()):
        row = int(wrong.flatten().nonzero()[0])
        raise DataError(
            f"policy: probabilities of state {row} sum to {math.exp(float(total[row])):.6f}, expected 1; pass "
            f"logits.log_softmax(-1)."
        )
    return (logps.double() - total).exp()


def _moves(mdp: TabularMDP, policy: Tensor) -> Tensor:
    """P(s' | s) [S, S] under action probabilities [S, A]."""
    return torch.einsum("sa,sat->st", policy, mdp.transitions)


def _evaluate(mdp: TabularMDP, policy: Tensor, income: Tensor) -> Tensor:
    """E[sum_t discount^t income(s_t)] [S]."""
    return torch.linalg.solve(torch.eye(mdp.states, dtype=torch.float64) - mdp.discount * _moves(mdp, policy), income)


def _draw(cumulated: Tensor, uniforms: Tensor) -> Tensor:
    """One index a row [N] from cumulated probabilities [N, K]; scaled by their last entry, which rounding moves off one."""
    return torch.searchsorted(cumulated.contiguous(), uniforms[:, None] * cumulated[:, -1:], right=True).squeeze(1)
