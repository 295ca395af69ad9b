"""Sampling from the live policy and scoring what was sampled: the half that all on-policy streams share.

Scorers take text, so that a reward model may have a tokenizer of its own. N rollouts, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from losses.types import Metric
from prefopt.data.records import Example, Text
from prefopt.engines import Engine
from prefopt.errors import ConfigError, DataError
from prefopt.generate import Decoding, Sample
from prefopt.models.causal_lm import CausalLMPolicy, FrozenReference
from prefopt.packing import Sampling, flat_roles, pack, split_by_tokens
from prefopt.parallel.strategy import Strategy
from prefopt.rewards import Scorer, score
from prefopt.rollouts.share import Share
from prefopt.streams import Budget, epoch_order

# Draws of a stream's generator must not repeat those of the data's order, which has the same seed.
_SEED_OFFSET = 1_000_000_007


@dataclass(frozen=True)
class Workshop:
    """What an on-policy stream works with.

    Args:
        policy: the live policy.
        reference: frozen.
        scorer: the reward.
        examples: prompts (their completions are not used).
        texts: each example's prompt as text, by id, for the scorer.
        budget: `batch_size` rollouts (or prompts, where a row is a prompt with its completions) make an update; `epochs`
            passes over the prompts.
        eos_ids: tokens that end a completion.
        max_new_tokens: limit where the flag of that name is 0.
        needs: tensors that the loss names.
        advantage: from `rewards` (and more) to `advantages` and `returns`, hyper-parameters set; None for losses without.
        dtype: of masks and row tensors.
        strategy: the processes that rollouts are shared out between.
    """

    policy: CausalLMPolicy
    reference: FrozenReference
    scorer: Scorer
    examples: Sequence[Example]
    texts: Mapping[str, Text]
    budget: Budget
    eos_ids: Sequence[int]
    max_new_tokens: int
    needs: frozenset[str]
    advantage: Callable[..., Mapping[str, Tensor]] | None
    dtype: torch.dtype = torch.float32
    strategy: Strategy = field(default_factory=Strategy)

    def share(self, groups: int, per_group: int = 1) -> Share:
        """How rows are shared out between processes."""
        return Share(self.strategy.communicator, groups, per_group)

    def samples(self, asked: int, default: int, rollout_size: int) -> int:
        """Samples of one prompt: as asked, or `default` for 0.

        Raises:
            ConfigError: they do not divide `rollout_size`.
        """
        samples = asked or default
        if samples < 1 or rollout_size < 1 or rollout_size % samples:
            raise ConfigError(
                "rollouts: rollout_size must be a multiple of samples_per_prompt, both at least 1; got "
                f"{rollout_size} rollouts of {samples} samples a prompt."
            )
        return samples


@dataclass(frozen=True)
class Rollouts:
    """Rollouts of some prompts, all samples of the first, then those of the second, ...

    Args:
        examples: N, one completion each; ids are unique.
        texts: N completions, as the scorer saw them.
        prompts: N prompts, likewise.
        samples: N, with nuclei.
        scores: [N], missing-EOS penalty included, before any scaling.
        finished: [N] bool, ended by themselves.
        per_prompt: samples of a prompt.
        score_spread: [N] disagreement of the scorer with itself, where it has one (an ensemble).
    """

    examples: Sequence[Example]
    texts: Sequence[str]
    prompts: Sequence[Text]
    samples: Sequence[Sample]
    scores: Tensor
    finished: Tensor
    per_prompt: int
    score_spread: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """[N] tokens, EOS included."""
        return torch.tensor([len(sample.ids) for sample in self.samples])

    def metrics(self) -> dict[str, Metric]:
        """What people watch: scores and their spread, lengths, and how many end by themselves."""
        ones = torch.ones(len(self.samples))
        centred = self.scores - self.scores.mean()
        within = self.scores.view(-1, self.per_prompt)
        found: dict[str, Metric] = {
            "score": (self.scores, ones),
            "score/spread": (centred.square().mean().sqrt()[None], ones[:1]),
            "completion_length": (self.lengths.float(), ones),
            "eos_share": (self.finished.float(), ones),
        }
        if self.per_prompt > 1:
            # A prompt whose samples all score the same teaches a group-relative method nothing.
            flat = (within == within[:, :1]).all(-1).float()
            found["score/flat_groups"] = (flat, torch.ones_like(flat))
        if self.score_spread is not None:
            found["score/disagreement"] = (self.score_spread, ones)
        return found


class Collector:
    """Draws prompts in the data's order and samples, decodes and scores completions.

    Args:
        shop: what it works with.
        decoding: temperature, nucleus, limit.
        prompts: of one collection.
        samples: rollouts of each prompt.
        missing_eos_penalty: subtracted from the score of a rollout that does not end by itself.
        engine: draws the completions; it is synced with the policy before every collection.
    """

    def __init__(
        self, shop: Workshop, decoding: Decoding, prompts: int, samples: int, missing_eos_penalty: float, engine: Engine
    ) -> None:
        if not shop.examples:
            raise DataError(
                "there is no prompt to sample from: the data set is empty after dropping rows. See the data report."
            )
        self.decoding, self.prompts, self.samples = decoding, prompts, samples
        self._shop, self._penalty, self._engine = shop, missing_eos_penalty, engine
        self._generator = torch.Generator().manual_seed(shop.budget.seed + _SEED_OFFSET)
        self.sampled = 0
        self.generated_tokens = 0
        self.reference_tokens = 0

    @torch.no_grad()
    def collect(self, iteration: int) -> Rollouts:
        """The rollouts of one iteration, from the policy as it is now, which every rank must hold whole."""
        shop = self._shop
        shop.policy.train(False)
        asked = [self._prompt(iteration * self.prompts + offset) for offset in range(self.prompts)]
        self._engine.sync(shop.policy)
        seed = int(torch.randint(2**62, (), generator=self._generator))
        share = shop.share(self.prompts, self.samples)
        samples = share.join_samples(
            self._engine.generate([e.prompt_ids for e in asked], self.decoding, seed, self.samples, share.own_groups)
        )
        prompts = [e for e in asked for _ in range(self.samples)]
        self.sampled += len(samples)
        self.generated_tokens += sum(len(sample.ids) for sample in samples)
        texts = [shop.policy.tokenizer.decode(sample.ids, skip_special_tokens=True) for sample in samples]
        scores, spread = self._score(share, [e.id for e in prompts], texts)
        finished = torch.tensor([sample.finished for sample in samples])
        # The same prompt may come twice in one collection: the draw's number makes ids unique.
        examples = [
            Example(f"{e.id}#{iteration}.{i}", e.prompt_ids, (s.ids,))
            for i, (e, s) in enumerate(zip(prompts, samples, strict=True))
        ]
        return Rollouts(
            examples, texts, [shop.texts[e.id] for e in prompts], samples,
            scores - self._penalty * (~finished).to(shop.dtype), finished, self.samples, spread,
        )  # fmt: skip

    def _score(self, share: Share, ids: Sequence[str], texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """[N] scores and, where the scorer has one, its disagreement with itself."""
        shop, own = self._shop, share.own(ids)
        nothing = torch.zeros(0, dtype=shop.dtype)
        scores = score(shop.scorer, [shop.texts[i] for i in own], share.own(texts), own).to(nothing) if own else nothing
        if not hasattr(shop.scorer, "last_std"):
            return share.join(scores), None
        spread = shop.scorer.last_std.to(nothing) if own else nothing
        return share.join(scores), share.join(spread)

    def _prompt(self, position: int) -> Example:
        epoch, index = divmod(position, len(self._shop.examples))
        return self._shop.examples[epoch_order(len(self._shop.examples), self._shop.budget.seed, epoch)[index]]

    def iterations(self) -> int:
        """Collections that pass over the prompts as often as the budget says."""
        return max(1, math.ceil(len(self._shop.examples) * self._shop.budget.epochs / self.prompts))

    @torch.no_grad()
    def token_logps(self, found: Rollouts) -> tuple[dict[str, Tensor], Tensor]:
        """[N, T] log-probs of policy and reference (and values) under the sampling distribution, as the shared forward
        computes them, on the CPU; and the mask."""
        shop = self._shop
        share = shop.share(len(found.examples) // found.per_prompt, found.per_prompt)
        quantities = ["token_logps"] + (["values"] if "values" in shop.needs else [])
        width = int(found.lengths.max())
        names = ["old_token_logps", "reference_token_logps", "mask"] + (["old_values"] if "values" in shop.needs else [])
        tensors = {name: [torch.zeros(0, width)] for name in names}
        self.reference_tokens += sum(example.tokens for example in found.examples)
        samples, done = share.own(found.samples), 0
        for part in split_by_tokens(share.own(found.examples), shop.budget.micro_batch_tokens):
            own = [s.support for s in samples[done : done + len(part)] if s.support is not None]
            sampling = Sampling(self.decoding.temperature, torch.cat(own) if own else None)
            batch = pack(part, roles=flat_roles, dtype=shop.dtype, sampling=sampling)
            rows = shop.policy.rows(batch, quantities)
            parts = {
                "old_token_logps": rows["token_logps"],
                "reference_token_logps": shop.reference.token_logps(batch),
                "mask": batch.mask,
            }
            if "values" in rows:
                parts["old_values"] = rows["values"]
            for name, value in parts.items():
                value = value.detach().cpu()
                tensors[name].append(torch.nn.functional.pad(value, (0, width - value.shape[1])))
            done += len(part)
        joined = {name: share.join(torch.cat(values).to(shop.dtype)) for name, values in tensors.items()}
        return joined, joined.pop("mask")

    def state_dict(self) -> Any:
        return {
            "generator": self._generator.get_state(),
            "spent": [self.sampled, self.generated_tokens, self.reference_tokens],
        }

    def load_state_dict(self, state: Any) -> None:
        self._generator.set_state(state["generator"])
        self.sampled, self.generated_tokens, self.reference_tokens = state["spent"]
