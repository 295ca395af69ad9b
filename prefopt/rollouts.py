"""On-policy data: sample, score, advantages -> batches. For the trainer it is a stream like any other.

Scorers take text, so that a reward model may have a tokenizer of its own. N rollouts, T tokens.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from losses.types import Metric
from prefopt.data.records import Example, Text
from prefopt.engines import Engine, EngineName, build_engine
from prefopt.errors import ConfigError, DataError
from prefopt.generate import Decoding
from prefopt.models.causal_lm import CausalLMPolicy, FrozenReference
from prefopt.packing import PackedBatch, Sampling, flat_roles, pack, split_by_tokens
from prefopt.rewards import Scorer, check_scores
from prefopt.streams import Budget, epoch_order


@dataclass(frozen=True)
class Workshop:
    """What a rollout stream works with.

    Args:
        policy: the live policy.
        reference: frozen.
        scorer: the reward.
        examples: prompts (their completions are not used).
        texts: each example's prompt as text, by id, for the scorer.
        budget: `batch_size` rollouts make an update; `epochs` passes over the prompts.
        eos_ids: tokens that end a completion.
        max_new_tokens: limit where the flag of that name is 0.
        needs: tensors that the loss names.
        advantage: from `rewards` (and more) to `advantages` and `returns`, hyper-parameters set; None for losses without.
        dtype: of masks and row tensors.
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
    missing_eos_penalty: float = 0.0,
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
        kl_coef: Price of one nat of log(policy/reference), k1 per token.
        missing_eos_penalty: Subtracted from the score of a rollout that does not end by itself.
        engine: What samples: own, or vllm (an extra; top_p must be 1).
    """
    if rollout_size < 1 or ppo_epochs < 1 or temperature <= 0 or not 0 < top_p <= 1:
        raise ConfigError(
            f"rollouts: rollout_size and ppo_epochs must be at least 1, temperature positive and top_p in (0, 1]; "
            f"got {rollout_size}, {ppo_epochs}, {temperature}, {top_p}."
        )
    samples = samples_per_prompt or (4 if "group_ids" in _inputs(workshop.advantage) else 1)
    if samples < 1 or rollout_size % samples:
        raise ConfigError(
            f"rollouts: rollout_size must be a multiple of samples_per_prompt, which must not be negative; got {rollout_size} "
            f"rollouts of {samples} samples a prompt."
        )
    _check_advantage(workshop)
    decoding = Decoding(max_new_tokens or workshop.max_new_tokens, temperature, top_p)
    prompts = min(rollout_size // samples, len(workshop.examples))
    source = build_engine(engine, workshop.eos_ids, decoding)
    return RolloutStream(workshop, decoding, prompts, samples, ppo_epochs, kl_coef, missing_eos_penalty, source)


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
    """Steps over fresh rollouts; its state holds the buffer, the position in it and the generator.

    Args:
        prompts: of one buffer.
        samples: rollouts of each prompt.
        engine: draws the completions; it is synced with the policy before every buffer.
    """

    def __init__(
        self,
        workshop: Workshop,
        decoding: Decoding,
        prompts: int,
        samples: int,
        ppo_epochs: int,
        kl_coef: float,
        missing_eos_penalty: float,
        engine: Engine,
    ) -> None:
        if not workshop.examples:
            raise DataError(
                "there is no prompt to sample from: the data set is empty after dropping rows. See the data report."
            )
        self._shop = workshop
        self._decoding = decoding
        self._prompts, self._samples = prompts, samples
        self._epochs = ppo_epochs
        self._kl_coef = kl_coef
        self._penalty = missing_eos_penalty
        self._engine = engine
        self._generator = torch.Generator().manual_seed(workshop.budget.seed + 1_000_000_007)
        self._buffer: list[Rollout] = []
        self._step = 0
        self._metrics: dict[str, Metric] = {}
        self.sampled = 0
        self.generated_tokens = 0
        self.reference_tokens = 0

    @property
    def _steps_per_epoch(self) -> int:
        """Updates of one pass over a buffer."""
        return math.ceil(self._prompts * self._samples / self._shop.budget.batch_size)

    @property
    def total_steps(self) -> int:
        iterations = max(1, math.ceil(len(self._shop.examples) * self._shop.budget.epochs / self._prompts))
        steps = iterations * self._epochs * self._steps_per_epoch
        limit = self._shop.budget.max_steps
        return min(steps, limit) if limit else steps

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        per_epoch = self._steps_per_epoch
        while self._step < self.total_steps:
            iteration, within = divmod(self._step, self._epochs * per_epoch)
            if within == 0:
                self._collect(iteration)
            epoch, part = divmod(within, per_epoch)
            order = epoch_order(len(self._buffer), self._shop.budget.seed, iteration * self._epochs + epoch)
            size = self._shop.budget.batch_size
            chosen = [self._buffer[i] for i in order[part * size : (part + 1) * size]]
            self._step += 1
            yield self._build(chosen)

    def metrics(self) -> Mapping[str, Metric]:
        """Facts about the rollouts collected since the last call."""
        found, self._metrics = self._metrics, {}
        return found

    def _build(self, chosen: Sequence[Rollout]) -> list[PackedBatch]:
        by_id = {rollout.example.id: rollout for rollout in chosen}
        batches = []
        for part in self._shop.budget.split([rollout.example for rollout in chosen]):
            members = [by_id[example.id] for example in part]
            supports = [m.support for m in members if m.support is not None]
            names = members[0].tensors
            padded = {name: [m.tensors[name] for m in members] for name in names}
            batch = pack(
                part,
                roles=flat_roles,
                rows=padded,
                data={"max_completion_length": torch.tensor(float(self._decoding.max_new_tokens))},
                dtype=self._shop.dtype,
                sampling=Sampling(self._decoding.temperature, torch.cat(supports) if supports else None),
            )
            batches.append(batch)
        return batches

    @torch.no_grad()
    def _collect(self, iteration: int) -> None:
        """Samples, scores and turns rewards into advantages; fills the buffer."""
        shop = self._shop
        shop.policy.train(False)
        asked = [self._prompt(iteration * self._prompts + offset) for offset in range(self._prompts)]
        self._engine.sync(shop.policy)
        seed = int(torch.randint(2**62, (), generator=self._generator))
        samples = self._engine.generate([e.prompt_ids for e in asked], self._decoding, seed, self._samples)
        prompts = [e for e in asked for _ in range(self._samples)]
        self.sampled += len(samples)
        self.generated_tokens += sum(len(sample.ids) for sample in samples)
        texts = [shop.policy.tokenizer.decode(sample.ids, skip_special_tokens=True) for sample in samples]
        scores = shop.scorer([shop.texts[e.id] for e in prompts], texts)
        check_scores(scores, [e.id for e in prompts])
        finished = torch.tensor([sample.finished for sample in samples])
        scores = scores.to("cpu", shop.dtype) - self._penalty * (~finished).to(shop.dtype)
        # The same prompt may come twice in one buffer: the draw's number makes ids unique.
        examples = [
            Example(f"{e.id}#{iteration}.{i}", e.prompt_ids, (s.ids,))
            for i, (e, s) in enumerate(zip(prompts, samples, strict=True))
        ]
        tensors, mask = self._score_tokens(examples, [s.support for s in samples])
        kl = tensors["old_token_logps"] - tensors["reference_token_logps"]
        last = mask.sum(-1).long() - 1
        rewards = -self._kl_coef * kl * mask
        rewards[torch.arange(len(examples)), last] += scores
        tensors["rewards"] = rewards
        more = {"mask": mask, "group_ids": torch.arange(len(asked)).repeat_interleave(self._samples)}
        if shop.advantage is not None:
            tensors |= shop.advantage(**{name: {**tensors, **more}[name] for name in _inputs(shop.advantage)})
        # A loss that names a sum over tokens needs the tokens.
        kept = [name for name in tensors if name in shop.needs or name.replace("token_logps", "logps") in shop.needs]
        lengths = mask.sum(-1).long().tolist()
        self._buffer = [
            Rollout(example, {name: tensors[name][row, :length].cpu() for name in kept}, sample.support)
            for row, (example, sample, length) in enumerate(zip(examples, samples, lengths, strict=True))
        ]
        ones = torch.ones(len(examples))
        self._metrics = {
            "score": (scores.cpu(), ones),
            "kl": ((kl * mask).sum(-1).cpu(), ones),
            "completion_length": (mask.sum(-1).cpu(), ones),
            "eos_share": (finished.float(), ones),
        }

    def _prompt(self, position: int) -> Example:
        epoch, index = divmod(position, len(self._shop.examples))
        return self._shop.examples[epoch_order(len(self._shop.examples), self._shop.budget.seed, epoch)[index]]

    def _score_tokens(self, examples: Sequence[Example], supports: Sequence[Tensor | None]) -> tuple[dict[str, Tensor], Tensor]:
        """[N, T] log-probs of policy and reference (and values) as the shared forward computes them, on the CPU."""
        quantities = ["token_logps"] + (["values"] if "values" in self._shop.needs else [])
        width = max(len(e.completion_ids[0]) for e in examples)
        tensors: dict[str, list[Tensor]] = {}
        done = 0
        for part in split_by_tokens(examples, self._shop.budget.micro_batch_tokens):
            own = [s for s in supports[done : done + len(part)] if s is not None]
            sampling = Sampling(self._decoding.temperature, torch.cat(own) if own else None)
            batch = pack(part, roles=flat_roles, dtype=self._shop.dtype, sampling=sampling)
            self.reference_tokens += batch.tokens
            rows = self._shop.policy.rows(batch, quantities)
            found = {
                "old_token_logps": rows["token_logps"],
                "reference_token_logps": self._shop.reference.token_logps(batch),
                "mask": batch.mask,
            }
            if "values" in rows:
                found["old_values"] = rows["values"]
            for name, value in found.items():
                value = value.detach().cpu()
                tensors.setdefault(name, []).append(torch.nn.functional.pad(value, (0, width - value.shape[1])))
            done += len(part)
        joined = {name: torch.cat(values).to(self._shop.dtype) for name, values in tensors.items()}
        return joined, joined.pop("mask")

    def state_dict(self) -> Any:
        return {
            "step": self._step,
            "generator": self._generator.get_state(),
            "spent": [self.sampled, self.generated_tokens, self.reference_tokens],
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
        self._generator.set_state(state["generator"])
        self.sampled, self.generated_tokens, self.reference_tokens = state["spent"]
        self._metrics = {name: (pair[0], pair[1]) for name, pair in state["metrics"].items()}
        self._buffer = [
            Rollout(Example(item["id"], tuple(item["prompt"]), (tuple(item["completion"]),)), item["tensors"], item["support"])
            for item in state["buffer"]
        ]
