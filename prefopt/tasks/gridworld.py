"""The gridworld as a task: every metric is exact, and the soft-optimal policy is known."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from prefopt.control.gridworld import draw_layout, gridworld, render
from prefopt.control.mdp import TabularMDP, policy_kl, regret, sample_steps, soft_optimal, value
from prefopt.control.policies import Actor, ActorConfig, ControlPolicy
from prefopt.errors import ConfigError
from prefopt.models.packed import Reference
from prefopt.options import ControlOptions
from prefopt.report.schema import Metric
from prefopt.tasks.control import ControlTask, Offline
from prefopt.tasks.protocol import Measured

TABULAR, CATEGORICAL = "tabular", "categorical"


class GridworldTask(ControlTask):
    """See `ControlTask`. Segments follow a uniform policy from every cell equally often, each an episode of its own."""

    own_metrics = (
        Metric("regret", "regret", "down", primary=True, note="soft value of the optimal policy minus that of this one, exact"),
        Metric("return", "return", "up", note="discounted, without the entropy bonus, exact"),
        Metric("kl_optimal", "KL to optimum", "down", ".4f", note="KL(policy || soft-optimal), nats a step, mean over states"),
        Metric("kl", "KL to reference", None, ".4f", note="nats a step, mean over states, exact"),
    )

    @property
    def mdp(self) -> TabularMDP:
        """The decision process of `--world`."""
        return _world(self._options.data.world)

    @property
    def discount(self) -> float:
        return self.mdp.discount

    @cache  # noqa: B019
    def offline(self, seed: int) -> Offline:
        pairs, control = self._options.data.pairs, self._options.control
        train, test = control.segments or 2 * pairs, 2 * self._options.evaluation.eval_pairs
        steps = sample_steps(self.mdp, self.mdp.uniform_logps, train + test, control.segment_length, seed)
        return Offline(steps, range(test, train + test), range(test))

    def actor(self) -> Actor:
        asked, mdp = self._options.model.model or TABULAR, self.mdp
        if asked not in (TABULAR, CATEGORICAL):
            raise ConfigError(f"--model {asked}: the gridworld's policies are {TABULAR} or {CATEGORICAL}.")
        control, default = self._options.control, ControlOptions()
        hidden, dropout = control.hidden, control.dropout
        if asked == TABULAR:
            if (hidden, dropout) != (default.hidden, default.dropout):
                raise ConfigError(f"a table has no hidden layers: --hidden and --dropout are for --model {CATEGORICAL}.")
            hidden, dropout = (), 0.0
        actor = Actor(ActorConfig(CATEGORICAL, mdp.states, mdp.actions, hidden, dropout)).double()
        if asked == TABULAR:  # a table has no symmetry to break: it starts at the behaviour that made the data
            for weights in actor.parameters():
                nn.init.zeros_(weights)
        return actor

    def logps(self, policy: ControlPolicy) -> Tensor:
        """[S, A] float64 log-probs in every state."""
        with torch.no_grad():
            output = policy.actor(torch.eye(self.mdp.states, dtype=policy.dtype, device=policy.device))
        return output.double().log_softmax(-1).cpu()

    def measure(self, policy: ControlPolicy, reference: Reference, seed: int) -> Measured:
        logps, mdp = self.logps(policy), self.mdp
        with reference.frozen() as frozen:
            start = self.logps(frozen)
        optimum = soft_optimal(mdp).logps
        return Measured(
            {
                "regret": float(regret(mdp, logps)),
                "return": float(mdp.start @ value(mdp, logps)),
                "kl_optimal": float(policy_kl(logps, optimum, mdp.uniform_states)),
                "kl": float(policy_kl(logps, start, mdp.uniform_states)),
            }
        )

    def notes(self) -> Sequence[str]:
        layout = draw_layout(seed=self._options.data.world)
        picture = render(layout, soft_optimal(self.mdp).logps).replace("\n", " / ")
        return (
            f"Gridworld {self._options.data.world}: {self.mdp.states} states, {self.mdp.actions} actions, discount "
            f"{self.mdp.discount:g}, temperature {self.mdp.temperature:g}; its optimal policy, row by row: {picture}. What CPL "
            f"assumes holds with alpha {self.mdp.temperature:g}, gamma {self.mdp.discount:g}, bias 1 and labels bt by regret.",
        )


@cache
def _world(seed: int) -> TabularMDP:
    return gridworld(seed=seed)
