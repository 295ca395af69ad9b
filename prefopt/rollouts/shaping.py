"""What stands between scorer and advantages: scaling and clipping of scores, credit, the KL penalty and its controller."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from losses.shaping import KLEstimator, adapted_kl_coef, token_kls, token_rewards
from losses.types import Metric
from prefopt.errors import ConfigError
from prefopt.rewards.credit import AttentionCredit, GeneratorCredit
from prefopt.rollouts.collect import Rollouts, Workshop

ScoreScale = Literal["none", "running", "batch"]
Credit = Literal["sparse", "uniform", "attention", "generator"]
CreditSource = Callable[[Rollouts, Tensor], Tensor | None]
"""(rollouts, mask [N, T]) -> weights [N, T] over each completion's tokens, or None for the last token alone."""


@dataclass(frozen=True)
class ShapingOptions:
    """See `rollouts`, whose flags these are.

    Raises:
        ConfigError: a number out of range.
    """

    kl_coef: float
    kl_estimator: KLEstimator
    kl_target: float
    kl_horizon: float
    scale_scores: ScoreScale
    clip_scores: float
    credit_beta: float

    def __post_init__(self) -> None:
        if self.kl_estimator not in get_args(KLEstimator) or self.scale_scores not in get_args(ScoreScale):
            raise ConfigError(
                f"rollouts: kl_estimator is one of {', '.join(get_args(KLEstimator))} and scale_scores one of "
                f"{', '.join(get_args(ScoreScale))}; got {self.kl_estimator!r} and {self.scale_scores!r}."
            )
        if self.kl_coef < 0 or self.kl_target < 0 or self.kl_horizon <= 0 or self.clip_scores < 0:
            raise ConfigError(
                "rollouts: kl_coef, kl_target and clip_scores must not be negative and kl_horizon must be positive; got "
                f"{self.kl_coef}, {self.kl_target}, {self.clip_scores} and {self.kl_horizon}."
            )
        if self.kl_target > 0 and self.kl_coef == 0:
            raise ConfigError("rollouts: kl_target adapts kl_coef by factors, so kl_coef must start above 0.")
        if not 0 <= self.credit_beta <= 1:
            raise ConfigError(
                f"rollouts: credit_beta is the share of the score that is spread, in [0, 1]; got {self.credit_beta}."
            )


class Shaper:
    """Turns scores into token rewards; its state is the price of KL and the running moments of scores."""

    def __init__(self, options: ShapingOptions, credit: CreditSource | None = None) -> None:
        self._options, self._credit = options, credit
        self.kl_coef = options.kl_coef
        self._moments = torch.zeros(3, dtype=torch.float64)  # count, sum, sum of squares of all scores so far

    def rewards(self, found: Rollouts, tensors: Mapping[str, Tensor], mask: Tensor) -> tuple[Tensor, dict[str, Metric]]:
        """[N, T] rewards, and metrics of KL and shaping. Adapts the price for the next call.

        Args:
            found: with raw scores.
            tensors: `old_token_logps` and `reference_token_logps` [N, T].
            mask: [N, T].
        """
        options = self._options
        scores, scale = self._scaled(found.scores)
        weights = None if self._credit is None else self._credit(found, mask)
        rewards = token_rewards(
            scores, tensors["old_token_logps"], tensors["reference_token_logps"], mask, kl_coef=self.kl_coef,
            kl_estimator=options.kl_estimator, weights=weights, credit_beta=options.credit_beta,
        )  # fmt: skip
        # The KL that is reported and controlled is k1's, whatever the penalty is: it alone has the KL as its expectation.
        kl = token_kls(tensors["old_token_logps"], tensors["reference_token_logps"], mask).sum(-1)
        ones = torch.ones_like(kl)
        metrics: dict[str, Metric] = {"kl": (kl, ones), "kl_coef": _number(self.kl_coef)}
        metrics["reward"] = (rewards.sum(-1), ones)
        # Of the tokens drawn, an unbiased estimate of the sampling policy's entropy; no vocabulary is touched for it.
        metrics["entropy/sampled"] = (-tensors["old_token_logps"], mask)
        if options.scale_scores != "none":
            metrics["score/scale"] = _number(scale)
        if options.clip_scores:
            metrics["score/clip_frac"] = ((scores.abs() >= options.clip_scores).to(kl), ones)
        if options.kl_target > 0:
            self.kl_coef = adapted_kl_coef(
                self.kl_coef, float(kl.mean()), target=options.kl_target, horizon=options.kl_horizon, samples=len(kl)
            )
        return rewards, metrics

    def _scaled(self, scores: Tensor) -> tuple[Tensor, float]:
        """Scores as the rewards see them, and what they were divided by."""
        options = self._options
        wide = scores.double()
        self._moments += torch.stack([torch.tensor(float(len(scores)), dtype=torch.float64), wide.sum(), wide.square().sum()])
        scale = 1.0
        if options.scale_scores == "batch":
            scale = float(scores.std()) if len(scores) > 1 else 1.0
            scores = scores - scores.mean()
        elif options.scale_scores == "running":
            count, total, squares = self._moments.tolist()
            scale = math.sqrt(max(squares / count - (total / count) ** 2, 0.0))
        scale = scale if scale > 1e-8 else 1.0  # equal scores have no scale
        scores = scores / scale
        return (scores.clamp(-options.clip_scores, options.clip_scores) if options.clip_scores else scores), scale

    def state_dict(self) -> Any:
        return {"kl_coef": self.kl_coef, "moments": self._moments.clone()}

    def load_state_dict(self, state: Any) -> None:
        self.kl_coef = state["kl_coef"]
        self._moments = state["moments"].clone()


def credit_source(credit: str, workshop: Workshop) -> tuple[Workshop, CreditSource | None]:
    """Where the weights of a completion's tokens come from, and the workshop whose scorer knows them.

    Raises:
        ConfigError: an unknown name, or a reward or policy without attention.
    """
    if credit == "sparse":
        return workshop, None
    if credit == "uniform":
        return workshop, lambda found, mask: mask
    if credit == "attention":
        attention = AttentionCredit(workshop.scorer, workshop.policy.tokenizer)

        def attended(found: Rollouts, mask: Tensor) -> Tensor:
            share = workshop.share(len(mask) // found.per_prompt, found.per_prompt)
            own = [sample.ids for sample in share.own(found.samples)]
            return share.join(attention.weights(own, mask.shape[1]) if own else torch.zeros(0, mask.shape[1]))

        return replace(workshop, scorer=attention.scorer), attended
    if credit == "generator":
        generator = GeneratorCredit(workshop.policy, workshop.budget.micro_batch_tokens)

        def written(found: Rollouts, mask: Tensor) -> Tensor:
            share = workshop.share(len(mask) // found.per_prompt, found.per_prompt)
            return share.join(generator.weights(share.own(found.examples), mask.shape[1]))

        return workshop, written
    raise ConfigError(f"rollouts: unknown credit {credit!r}; expected {', '.join(get_args(Credit))}.")


def _number(value: float) -> Metric:
    return torch.tensor([value]), torch.ones(1)
