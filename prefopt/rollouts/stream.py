"""Rollouts for policy gradients: sample, score, shape rewards, advantages -> batches. N rollouts, T tokens."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from losses.shaping import KLEstimator, explained_variance
from losses.types import Metric
from prefopt.data.records import Example
from prefopt.engines import EngineName, build_engine
from prefopt.errors import ConfigError
from prefopt.generate import Decoding
from prefopt.packing import PackedBatch, Sampling, flat_roles, pack
from prefopt.parallel.split import build_parts, own_parts
from prefopt.rollouts.collect import Collector, Rollouts, Workshop
from prefopt.rollouts.shaping import Credit, ScoreScale, Shaper, ShapingOptions, credit_source
from prefopt.streams import epoch_order

# How far an update's policy is from the one that sampled: k3 of KL(old || policy), nats per token.
_MOVED = "approx_kl"
KL_HORIZON = 10_000.0
"""Of the adaptive controller of the price of KL, as Ziegler et al. and trlx have it."""


def rollouts(
    workshop: Workshop,
    *,
    rollout_size: int = 64,
    samples_per_prompt: int = 0,
    ppo_epochs: int = 2,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 0,
    kl_coef: float = 0.05,
    kl_estimator: KLEstimator = "k1",
    kl_target: float = 0.0,
    kl_horizon: float = KL_HORIZON,
    stop_kl: float = 0.0,
    missing_eos_penalty: float = 0.0,
    scale_scores: ScoreScale = "none",
    clip_scores: float = 0.0,
    credit: Credit = "sparse",
    credit_beta: float = 1.0,
    engine: EngineName = "own",
) -> RolloutStream:
    """Rollouts from the live policy with a per-token KL penalty in the reward (Ziegler 2019; Ouyang 2022).

    Args:
        rollout_size: Rollouts sampled between updates of the sampling policy.
        samples_per_prompt: Rollouts of one prompt; 0 takes 4 where advantages compare them with one another, else 1.
        ppo_epochs: Passes over each batch of rollouts.
        temperature: Of sampling; log-probs of policy and reference are taken at the same temperature.
        top_p: Nucleus of sampling; log-probs are renormalised inside it.
        max_new_tokens: Limit of a rollout's length; 0 takes the data's limit on completions.
        kl_coef: Price of one nat of KL to the reference.
        kl_estimator: The penalty per token: k1 log(policy/reference), k2 its square / 2, k3 ratio - 1 - log ratio. Only k1
            makes the objective E[score] - kl_coef KL.
        kl_target: KL per completion, in nats, that an adaptive controller steers kl_coef to; 0 leaves kl_coef fixed.
        kl_horizon: Rollouts over which that controller may change kl_coef by a fifth.
        stop_kl: Leave a batch of rollouts when the policy has moved this far from the one that sampled it (approx_kl of an
            update, nats per token); 0 never does.
        missing_eos_penalty: Subtracted from the score of a rollout that does not end by itself.
        scale_scores: none; running: divided by the standard deviation of all scores so far; batch: shifted and scaled to mean 0
            and standard deviation 1.
        clip_scores: Scores (after scaling) are cut to [-clip_scores, clip_scores]; 0 leaves them.
        credit: Where the score goes: sparse, to the last token; uniform, to all tokens alike; attention, to where the reward
            model looks as it scores (Chan 2024, who spread 0.8 of it); generator, to where the policy looked as it wrote.
        credit_beta: Share of the score that `credit` spreads; the rest stays at the last token.
        engine: What samples: own, or vllm (an extra; top_p must be 1).
    """
    if rollout_size < 1 or ppo_epochs < 1 or temperature <= 0 or not 0 < top_p <= 1 or stop_kl < 0:
        raise ConfigError(
            f"rollouts: rollout_size and ppo_epochs must be at least 1, temperature positive, top_p in (0, 1] and stop_kl not "
            f"negative; got {rollout_size}, {ppo_epochs}, {temperature}, {top_p} and {stop_kl}."
        )
    workshop, weights = credit_source(credit, workshop)
    samples = workshop.samples(samples_per_prompt, 4 if "group_ids" in _inputs(workshop.advantage) else 1, rollout_size)
    _check_advantage(workshop)
    shaping = ShapingOptions(kl_coef, kl_estimator, kl_target, kl_horizon, scale_scores, clip_scores, credit_beta)
    if weights is None and credit_beta != 1:
        raise ConfigError(
            f"rollouts: credit_beta is {credit_beta}, but credit {credit!r} spreads nothing; leave one of them out."
        )
    if not kl_target and kl_horizon != KL_HORIZON:
        raise ConfigError(
            "rollouts: kl_horizon is of the controller that kl_target switches on; leave it out, or set kl_target."
        )
    decoding = Decoding(max_new_tokens or workshop.max_new_tokens, temperature, top_p)
    prompts = min(rollout_size // samples, max(1, len(workshop.examples)))
    source = build_engine(engine, workshop.eos_ids, decoding)
    collector = Collector(workshop, decoding, prompts, samples, missing_eos_penalty, source)
    return RolloutStream(workshop, collector, Shaper(shaping, weights), ppo_epochs, stop_kl)


def _check_advantage(workshop: Workshop) -> None:
    provided = {"old_token_logps", "rewards", "mask", "group_ids"} | ({"old_values"} if "values" in workshop.needs else set())
    missing = sorted(set(_inputs(workshop.advantage)) - provided)
    if missing:
        raise ConfigError(
            f"rollouts: the advantage function needs {', '.join(missing)}, but no term of the loss trains a value head. Keep "
            "the value term (vf_coef above 0), or use an advantage function without values."
        )


def _inputs(advantage: Callable[..., Any] | None) -> list[str]:
    """The tensors that an advantage function names."""
    parameters = {} if advantage is None else inspect.signature(advantage).parameters
    return [name for name, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]


@dataclass(frozen=True)
class Rollout:
    """One finished rollout; tensors are [length]."""

    example: Example
    tensors: Mapping[str, Tensor]
    support: Tensor | None


class RolloutStream:
    """Steps over fresh rollouts; its state holds the buffer, the position in it, the shaper and the generator.

    Args:
        workshop: what it works with.
        collector: samples and scores.
        shaper: from scores to token rewards.
        ppo_epochs: passes over a buffer.
        stop_kl: leaves a buffer early; 0 never does.
    """

    def __init__(self, workshop: Workshop, collector: Collector, shaper: Shaper, ppo_epochs: int, stop_kl: float) -> None:
        self._shop, self.collector, self._shaper = workshop, collector, shaper
        self._epochs, self._stop_kl = ppo_epochs, stop_kl
        self._buffer: list[Rollout] = []
        self._step = 0
        self._iteration, self._within = -1, self._per_buffer  # before the first buffer: its predecessor is used up
        self._skipped = 0
        self._metrics: dict[str, Metric] = {}

    @property
    def _steps_per_epoch(self) -> int:
        """Updates of one pass over a buffer."""
        return math.ceil(self.collector.prompts * self.collector.samples / self._shop.budget.batch_size)

    @property
    def _per_buffer(self) -> int:
        return self._epochs * self._steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Updates of the run. What `stop_kl` leaves out is not made up for: the budget is one of samples."""
        steps = self.collector.iterations() * self._per_buffer - self._skipped
        limit = self._shop.budget.max_steps
        return min(steps, limit) if limit else steps

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        while self._step < self.total_steps:
            if self._within == self._per_buffer:
                self._iteration += 1
                self._within = 0
                with self._shop.strategy.whole(self._shop.policy):
                    self._fill()
            epoch, part = divmod(self._within, self._steps_per_epoch)
            order = epoch_order(len(self._buffer), self._shop.budget.seed, self._iteration * self._epochs + epoch)
            size = self._shop.budget.batch_size
            chosen = [self._buffer[i] for i in order[part * size : (part + 1) * size]]
            self._step += 1
            self._within += 1
            yield self._batches(chosen)

    def metrics(self) -> Mapping[str, Metric]:
        """Facts about the rollouts collected since the last call."""
        found, self._metrics = self._metrics, {}
        return found

    def after_update(self, metrics: Mapping[str, Sequence[Metric]]) -> None:
        """Leaves the buffer when the update's metrics say that the policy has moved too far from the sampling policy."""
        if not self._stop_kl or self._within == self._per_buffer:
            return
        pairs = [metric for metric in metrics.get(_MOVED, ()) if isinstance(metric, tuple)]
        own = [sum(float((value * weight).sum()) for value, weight in pairs), sum(float(weight.sum()) for _, weight in pairs)]
        moved, count = self._shop.strategy.communicator.sum(torch.tensor(own, dtype=torch.float64)).tolist()
        if not count:
            raise ConfigError(
                "stop_kl: this loss reports no approx_kl, so nothing says how far the policy has moved; leave it 0."
            )
        if moved / count > self._stop_kl:
            left = self._per_buffer - self._within
            self._skipped += left
            self._within = self._per_buffer
            self._metrics = {**self._metrics, "stopped_updates": (torch.tensor([float(left)]), torch.ones(1))}

    def _batches(self, chosen: Sequence[Rollout]) -> list[PackedBatch]:
        """This rank's micro-batches of a step."""
        by_id = {rollout.example.id: rollout for rollout in chosen}
        examples = [rollout.example for rollout in chosen]
        parts = own_parts(examples, self._shop.budget, self._shop.strategy.communicator)
        return build_parts(parts, examples, lambda part: self._build(part, [by_id[example.id] for example in part]))

    def _build(self, part: Sequence[Example], members: Sequence[Rollout]) -> PackedBatch:
        decoding = self.collector.decoding
        supports = [m.support for m in members if m.support is not None]
        return pack(
            part,
            roles=flat_roles,
            rows={name: [m.tensors[name] for m in members] for name in members[0].tensors},
            data={"max_completion_length": torch.tensor(float(decoding.max_new_tokens))},
            dtype=self._shop.dtype,
            sampling=Sampling(decoding.temperature, torch.cat(supports) if supports else None),
        )

    @torch.no_grad()
    def _fill(self) -> None:
        """Samples, scores and turns rewards into advantages; fills the buffer."""
        shop = self._shop
        found = self.collector.collect(self._iteration)
        tensors, mask = self.collector.token_logps(found)
        rewards, metrics = self._shaper.rewards(found, tensors, mask)
        tensors["rewards"] = rewards
        prompts = len(found.examples) // found.per_prompt
        more = {"mask": mask, "group_ids": torch.arange(prompts).repeat_interleave(found.per_prompt)}
        if shop.advantage is not None:
            tensors |= shop.advantage(**{name: {**tensors, **more}[name] for name in _inputs(shop.advantage)})
        if {"old_values", "returns"} <= tensors.keys():
            metrics["value/explained_variance"] = (
                explained_variance(tensors["old_values"], tensors["returns"], mask)[None], torch.ones(1),
            )  # fmt: skip
        self._metrics = {**self._metrics, **found.metrics(), **metrics}
        self._buffer = self._kept(found, tensors)

    def _kept(self, found: Rollouts, tensors: Mapping[str, Tensor]) -> list[Rollout]:
        """What the loss names of each rollout; one that names a sum over tokens needs the tokens."""
        needs = self._shop.needs
        kept = [name for name in tensors if name in needs or name.replace("token_logps", "logps") in needs]
        return [
            Rollout(example, {name: tensors[name][row, : len(sample.ids)].cpu() for name in kept}, sample.support)
            for row, (example, sample) in enumerate(zip(found.examples, found.samples, strict=True))
        ]

    def state_dict(self) -> Any:
        return {
            "step": self._step,
            "position": [self._iteration, self._within, self._skipped],
            "collector": self.collector.state_dict(),
            "shaper": self._shaper.state_dict(),
            "metrics": {name: list(pair) for name, pair in self._metrics.items() if isinstance(pair, tuple)},
            "buffer": [
                {
                    "id": rollout.example.id,
                    "prompt": list(rollout.example.prompt_ids),
                    "completion": list(rollout.example.completion_ids[0]),
                    "tensors": dict(rollout.tensors),
                    "support": rollout.support,
                }
                for rollout in self._buffer
            ],
        }

    def load_state_dict(self, state: Any) -> None:
        self._step = state["step"]
        self._iteration, self._within, self._skipped = state["position"]
        self.collector.load_state_dict(state["collector"])
        self._shaper.load_state_dict(state["shaper"])
        self._metrics = {name: (pair[0], pair[1]) for name, pair in state["metrics"].items()}
        self._buffer = [
            Rollout(Example(item["id"], tuple(item["prompt"]), (tuple(item["completion"]),)), item["tensors"], item["support"])
            for item in state["buffer"]
        ]
