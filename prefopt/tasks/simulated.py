"""Simulated manipulation as a task: pairs of segments from a folder of offline data, success measured in the simulator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from prefopt.control.families import FAMILIES
from prefopt.control.folder import OfflineData, load_folder
from prefopt.control.policies import Actor, ActorConfig, ControlPolicy
from prefopt.control.segments import admissible_starts
from prefopt.control.simulate import Environment, Outcomes, make_environments, success_rate
from prefopt.errors import ConfigError
from prefopt.models.packed import Reference
from prefopt.options import Options
from prefopt.report.schema import Metric, PromptRow
from prefopt.tasks.control import ControlTask, Offline, kl_at_data
from prefopt.tasks.protocol import Measured

DEFAULT_FAMILY = "mean_squared"
# Every tenth episode is for test pairs, whatever the study's seed: no cell learns from it.
_TEST_EVERY = 10
# Episodes side by side in an evaluation: enough that the network's calls cost little beside the simulator.
_SIDE_BY_SIDE = 10
# KL is averaged over so many states of test episodes.
_KL_STATES = 4096
# Starts of an evaluation that no study seed shifts: all cells of a seed, and all seeds, meet the same episodes.
_EVALUATION_SEED = 7_919


class SimulatedTask(ControlTask):
    """See `ControlTask`. The policy acts by its likeliest action; an episode succeeds if any of its steps does."""

    own_metrics = (
        Metric("success", "success", "up", ".1%", primary=True, note="share of episodes, the same starts for all policies"),
        Metric("return", "return", "up", ".0f", note="sum of the simulator's rewards, undiscounted"),
        Metric("kl", "KL to reference", None, ".3f", note="nats a step, mean over states of test episodes"),
    )

    discount = 1.0

    def __init__(self, options: Options, cache: Path, console: Console | None = None) -> None:
        super().__init__(options, cache, console)
        self.data: OfflineData = load_folder(Path(options.data.source))

    @cached_property
    def _environments(self) -> list[Environment]:
        return make_environments(self._recipe["task"], min(_SIDE_BY_SIDE, self._options.evaluation.eval_prompts))

    @cached_property
    def _offline(self) -> Offline:
        episodes = range(len(self.data.steps.ends))
        test = episodes[_TEST_EVERY - 1 :: _TEST_EVERY]
        return Offline(self.data.steps, [episode for episode in episodes if episode not in test], test)

    @property
    def _recipe(self) -> Mapping[str, Any]:
        recipe: Mapping[str, Any] = self.data.facts["recipe"]
        return recipe

    def offline(self, seed: int) -> Offline:
        return self._offline

    def actor(self) -> Actor:
        asked, steps, control = self._options.model.model or DEFAULT_FAMILY, self.data.steps, self._options.control
        possible = [name for name, family in FAMILIES.items() if not family.discrete]
        if asked not in possible:
            raise ConfigError(f"--model {asked}: for actions that are vectors there are {', '.join(possible)}.")
        sizes = steps.observations.shape[1], steps.actions.shape[1]
        return Actor(ActorConfig(asked, *sizes, control.hidden, control.dropout))

    @cached_property
    def _states(self) -> Tensor:
        """[at most twice _KL_STATES, O] observations of test episodes, evenly spaced."""
        rows = admissible_starts(self._offline.steps, 1, self._offline.test)
        return self._offline.steps.observations[rows[:: max(1, len(rows) // _KL_STATES)]]

    def outcomes(self, actor: Actor) -> Outcomes:
        """What a policy comes to on the evaluation's episodes, which are the same for all policies and seeds."""
        episodes = self._options.evaluation.eval_prompts
        return success_rate(actor.act, self._environments, episodes=episodes, seed=_EVALUATION_SEED)

    def measure(self, policy: ControlPolicy, reference: Reference, seed: int) -> Measured:
        found = self.outcomes(policy.actor)
        assert found.returns is not None
        rows = tuple(
            PromptRow("", seed, f"episode {i}", "success", float(success)) for i, success in enumerate(found.successes)
        )
        kl = kl_at_data(policy, reference, self._states)
        return Measured({"success": found.rate, "return": float(found.returns.mean()), "kl": kl}, rows)

    def notes(self) -> Sequence[str]:
        return (
            f"{self._recipe['task']}: {len(self.data.steps.ends)} episodes of scripted policies with graded noise, "
            f"{float(self.data.successes.double().mean()):.0%} of them successful (seed {self._recipe['seed']}); success over "
            f"{self._options.evaluation.eval_prompts} episodes. Regret is a proxy: squared distance from the scripted action.",
        )
