"""Best of n: of n samples of a prompt, the one that the reward likes best. A baseline by decoding alone.

G prompts, n samples of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prefopt.data.exact_world.solve import best_of_n_logps, kl
from prefopt.data.records import Text
from prefopt.engines import Engine
from prefopt.errors import ConfigError
from prefopt.generate import Decoding, Sample
from prefopt.rewards import Scorer, score


@dataclass(frozen=True)
class BestOfN:
    """What was drawn and what was kept.

    Args:
        samples: all G*n, prompt by prompt.
        texts: theirs, as the scorer saw them.
        scores: [G, n].
        best: [G] index of the kept sample of each prompt.
    """

    samples: Sequence[Sample]
    texts: Sequence[str]
    scores: Tensor
    best: Tensor

    @property
    def chosen(self) -> list[Sample]:
        """[G] kept samples."""
        return [self.samples[i] for i in self._places]

    @property
    def chosen_texts(self) -> list[str]:
        """[G] their texts."""
        return [self.texts[i] for i in self._places]

    @property
    def chosen_scores(self) -> Tensor:
        """[G]."""
        return self.scores.gather(1, self.best[:, None]).squeeze(1)

    @property
    def _places(self) -> list[int]:
        return (torch.arange(len(self.best)) * self.scores.shape[1] + self.best).tolist()

    def first(self, n: int) -> BestOfN:
        """Best of the first n of each prompt's samples: one set of draws serves every n up to its own."""
        if not 1 <= n <= self.scores.shape[1]:
            raise ConfigError(f"best of the first {n}: there are {self.scores.shape[1]} samples of each prompt.")
        kept = (torch.arange(len(self.best))[:, None] * self.scores.shape[1] + torch.arange(n)).flatten().tolist()
        scores = self.scores[:, :n]
        return BestOfN([self.samples[i] for i in kept], [self.texts[i] for i in kept], scores, scores.argmax(-1))


def best_of_n(
    engine: Engine,
    scorer: Scorer,
    tokenizer: object,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Text],
    n: int,
    *,
    decoding: Decoding,
    seed: int,
) -> BestOfN:
    """Draws n completions of each prompt and keeps the best by `scorer`; of equal scores the first, which is a fair draw.

    Args:
        engine: synced with the policy to draw from: the reference, for the baseline.
        scorer: the reward.
        tokenizer: decodes completions for the scorer.
        prompts: [G] token ids.
        texts: [G] the prompts as the scorer reads them.
        n: draws of each prompt.
        decoding: temperature 1 without top-p is the policy whose KL `kl_bound` bounds.
        seed: of the draws.

    Raises:
        ConfigError: n is below 1.
        TrainingError: a score is missing or not finite.
    """
    _check(n)
    samples = engine.generate(prompts, decoding, seed, n)
    decode = tokenizer.decode  # type: ignore[attr-defined]
    decoded = [decode(sample.ids, skip_special_tokens=True) for sample in samples]
    repeated = [text for text in texts for _ in range(n)]
    scores = score(scorer, repeated, decoded, [f"{number // n}, draw {number % n}" for number in range(len(samples))])
    scores = scores.cpu().view(len(prompts), n)
    return BestOfN(samples, decoded, scores, scores.argmax(-1))


def kl_bound(n: int) -> float:
    """log n - (n-1)/n, nats: what is commonly reported as the KL of best of n to the policy that it draws from.

    An upper bound of the KL, not its value (Beirami et al. 2024 [beirami2024bestofn], theorem 1): exact where no completion
    has much probability, so that the best of n is never a tie; too large where completions are few or equal in reward.
    """
    _check(n)
    return math.log(n) - (n - 1) / n


def kl_of_ranks(scores: Tensor, n: int) -> Tensor:
    """KL of best of n to the policy that it draws from, nats [G], from [G, M] scores of draws of that policy, M far above n.

    Which draw is kept depends on ranks alone, so the KL follows from the ties among scores: that of the M draws taken for the
    whole policy. It needs no log-probs, has much less noise than a mean of log-ratios, and is never above `kl_bound`; with M
    near n it is too small.
    """
    _check(n)
    uniform = torch.full(scores.shape, -math.log(scores.shape[1]), dtype=torch.float64)
    return kl(best_of_n_logps(uniform, scores.double(), n), uniform)


def _check(n: int) -> None:
    if n < 1:
        raise ConfigError(f"best of n needs n >= 1, got {n}.")
