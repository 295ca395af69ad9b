"""Any offline loss on fresh samples of the policy: K completions of a prompt, ordered by the reward.

`online_dpo` is DPO on such pairs, `online_sft` imitates the best of K (rejection sampling), `online_kto` takes
the better half for desirable: the stream that a loss calls for is filled from the policy instead of from a data set.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from losses.types import Metric
from prefopt.data.records import Example, Labels
from prefopt.engines import EngineName, build_engine
from prefopt.errors import ConfigError
from prefopt.generate import Decoding
from prefopt.packing import PackedBatch, flat_roles, pack, split_by_tokens
from prefopt.parallel.split import build_parts, own_parts
from prefopt.rollouts.collect import Collector, Rollouts, Workshop
from prefopt.streams import WithMismatched, build_batch

Ranking = Literal["bt", "hard"]
# The order of the labels' draws must not repeat the order of the samples' draws.
_RANKING_SEED_OFFSET = 2_000_000_011


def online(
    workshop: Workshop,
    kind: str,
    *,
    rollout_size: int = 64,
    samples_per_prompt: int = 0,
    ranking: Ranking = "bt",
    ranking_temperature: float = 1.0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 0,
    missing_eos_penalty: float = 0.0,
    engine: EngineName = "own",
) -> OnlineStream:
    """Completions of the live policy, ordered by the reward: fresh rows for an offline loss.

    On pairs it is online DPO, Guo et al. 2024 [guo2024oaif], for any loss; on single completions it imitates the best of K, the
    rejection sampling of Touvron et al. 2023, section 3.2.3 [touvron2023llama2].

    Args:
        rollout_size: Completions sampled between updates of the sampling policy.
        samples_per_prompt: Completions of one prompt; 0 takes 2 for pairs, else 4. Of more than two, a pair is the first and
            the last of the order, and imitation takes the first.
        ranking: bt draws each order from the Bradley-Terry (Plackett-Luce) model on the scores, as people's labels are
            modelled: then online DPO's optimum is that of E[score] - beta KL. hard sorts by score, which has no finite optimum.
        ranking_temperature: Scores are divided by it before an order is drawn.
        temperature: Of sampling. Log-probs of the loss are always those at temperature 1.
        top_p: Nucleus of sampling.
        max_new_tokens: Limit of a completion's length; 0 takes the data's limit on completions.
        missing_eos_penalty: Subtracted from the score of a completion that does not end by itself.
        engine: What samples: own, or vllm (an extra; top_p must be 1).
    """
    if temperature <= 0 or not 0 < top_p <= 1 or ranking_temperature <= 0 or ranking not in get_args(Ranking):
        raise ConfigError(
            f"online: temperature and ranking_temperature must be positive, top_p in (0, 1] and ranking one of "
            f"{', '.join(get_args(Ranking))}; got {temperature}, {ranking_temperature}, {top_p} and {ranking!r}."
        )
    if ranking == "hard" and ranking_temperature != 1:
        raise ConfigError(
            f"online: ranking_temperature is {ranking_temperature}, but a hard ranking sorts; leave one of them out."
        )
    samples = workshop.samples(samples_per_prompt, 2 if kind == "pairs" else 4, rollout_size)
    if samples < 2:
        raise ConfigError("online: an order needs at least 2 samples a prompt; raise samples_per_prompt.")
    decoding = Decoding(max_new_tokens or workshop.max_new_tokens, temperature, top_p)
    prompts = min(rollout_size // samples, max(1, len(workshop.examples)))
    source = build_engine(engine, workshop.eos_ids, decoding)
    collector = Collector(workshop, decoding, prompts, samples, missing_eos_penalty, source)
    return OnlineStream(workshop, collector, kind, ranking, ranking_temperature)


class OnlineStream:
    """Steps over ordered fresh completions, each used once; its state holds the rows that are left and the generators.

    Args:
        workshop: what it works with.
        collector: samples and scores.
        kind: "pairs", "completions", "labelled" or "groups", as for `OfflineStream`.
        ranking, ranking_temperature: see `online`.
    """

    def __init__(
        self, workshop: Workshop, collector: Collector, kind: str, ranking: Ranking, ranking_temperature: float
    ) -> None:
        self._shop, self.collector, self._kind = workshop, collector, kind
        self._ranking, self._temperature = ranking, ranking_temperature
        self._mismatched = any("mismatched" in name for name in workshop.needs)
        self._referenced = any(name.startswith("reference_") for name in workshop.needs)
        self._generator = torch.Generator().manual_seed(workshop.budget.seed + _RANKING_SEED_OFFSET)
        self._rows: list[Example] = []
        # Reference log-probs of this collection's completions, where its sampling distribution is the plain one.
        self._known: dict[tuple[tuple[int, ...], tuple[int, ...]], Tensor] = {}
        self._step = 0
        self._metrics: dict[str, Metric] = {}

    @property
    def _steps_per_iteration(self) -> int:
        return math.ceil(self.collector.prompts / self._shop.budget.batch_size)

    @property
    def total_steps(self) -> int:
        steps = self.collector.iterations() * self._steps_per_iteration
        limit = self._shop.budget.max_steps
        return min(steps, limit) if limit else steps

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        size = self._shop.budget.batch_size
        while self._step < self.total_steps:
            iteration, part = divmod(self._step, self._steps_per_iteration)
            if part == 0:
                with self._shop.strategy.whole(self._shop.policy):
                    self._fill(iteration)
            chosen = self._rows[part * size : (part + 1) * size]
            self._step += 1
            if self._referenced and any(key not in self._known for row in chosen for key in _keys(row)):
                with self._shop.strategy.whole(self._shop.policy):
                    self._learn(chosen)
            parts = own_parts(chosen, self._shop.budget, self._shop.strategy.communicator)
            yield build_parts(parts, chosen, self._build)

    def metrics(self) -> Mapping[str, Metric]:
        """Facts about the completions collected since the last call."""
        found, self._metrics = self._metrics, {}
        return found

    def after_update(self, metrics: Mapping[str, Sequence[Metric]]) -> None:
        """Rows are used once, so nothing is left to be stopped."""

    @torch.no_grad()
    def _fill(self, iteration: int) -> None:
        found = self.collector.collect(iteration)
        count = found.per_prompt
        rows = []
        order = rank(found.scores.view(-1, count), self._ranking, self._temperature, self._generator).tolist()
        for first, own in zip(range(0, len(found.examples), count), order, strict=True):
            rows.append(_row(found, [first + k for k in own], self._kind))
        self._rows = list(WithMismatched(rows)) if self._mismatched else rows
        self._metrics = {**found.metrics(), **self._prices(found)}

    def _prices(self, found: Rollouts) -> dict[str, Metric]:
        """KL of the samples and their entropy: what the policy-gradient streams report too."""
        tensors, mask = self.collector.token_logps(found)
        reference = tensors["reference_token_logps"]
        decoding = self.collector.decoding
        plain = decoding.temperature == 1 and decoding.top_p == 1
        self._known = {
            (example.prompt_ids, sample.ids): row[: len(sample.ids)]
            for example, sample, row in zip(found.examples, found.samples, reference, strict=True)
        } if plain else {}  # fmt: skip
        kl = (tensors["old_token_logps"] - reference).mul(mask).sum(-1)
        return {"kl": (kl, torch.ones_like(kl)), "entropy/sampled": (-tensors["old_token_logps"], mask)}

    def _build(self, rows: Sequence[Example]) -> PackedBatch:
        reference = [self._known[key] for row in rows for key in _keys(row)] if self._referenced else None
        return build_batch(rows, kind=self._kind, reference=reference, dtype=self._shop.dtype, mismatched=self._mismatched)

    @torch.no_grad()
    def _learn(self, rows: Sequence[Example]) -> None:
        """Reference log-probs [length] of each completion, at temperature 1, shared out between processes."""
        share = self._shop.share(len(rows))
        self.collector.reference_tokens += sum(row.tokens for row in rows)
        found = [torch.zeros(0, 0, dtype=self._shop.dtype)]
        for part in split_by_tokens(share.own(rows), self._shop.budget.micro_batch_tokens):
            found.append(self._shop.reference.token_logps(pack(part, roles=flat_roles, dtype=self._shop.dtype)).cpu())
        own = iter(logps for part in found for logps in part)
        padded = [pad_sequence(list(islice(own, len(row.completion_ids))), batch_first=True) for row in share.own(rows)]
        width = max((part.shape[1] for part in padded), default=0)
        height = max((part.shape[0] for part in padded), default=0)
        blocks = [F.pad(part, (0, width - part.shape[1], 0, height - part.shape[0])) for part in padded]
        joined = share.join(torch.stack(blocks) if blocks else torch.zeros(0, 0, 0, dtype=found[0].dtype))
        for row, logps in zip(rows, joined, strict=True):
            for key, logp in zip(_keys(row), logps, strict=False):
                self._known[key] = logp[: len(key[1])].clone()

    def state_dict(self) -> Any:
        return {
            "step": self._step,
            "collector": self.collector.state_dict(),
            "ranking": self._generator.get_state(),
            "metrics": {name: list(pair) for name, pair in self._metrics.items() if isinstance(pair, tuple)},
            "rows": [
                {
                    "id": row.id,
                    "prompt": list(row.prompt_ids),
                    "completions": [list(ids) for ids in row.completion_ids],
                    "labels": row.labels.as_list(),
                }
                for row in self._rows
            ],
        }

    def load_state_dict(self, state: Any) -> None:
        self._step = state["step"]
        self.collector.load_state_dict(state["collector"])
        self._generator.set_state(state["ranking"])
        self._metrics = {name: (pair[0], pair[1]) for name, pair in state["metrics"].items()}
        self._rows = [
            Example(row["id"], tuple(row["prompt"]), tuple(map(tuple, row["completions"])), Labels.from_list(row["labels"]))
            for row in state["rows"]
        ]


def _keys(row: Example) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """What the log-probs of a row's completions are known by."""
    return [(row.prompt_ids, ids) for ids in row.completion_ids]


def rank(scores: Tensor, ranking: Ranking, temperature: float, generator: torch.Generator) -> Tensor:
    """[G, K] indices of completions from best to worst by [G, K] scores.

    "bt" draws an order from the Plackett-Luce model with utilities scores / temperature, by adding Gumbel noise and sorting
    (Yellott 1977); for K = 2 that is Bradley-Terry. "hard" sorts; ties keep the order of sampling, which is random.
    """
    if ranking == "bt":
        uniform = torch.rand(scores.shape, generator=generator, dtype=torch.float64).clamp(min=1e-300)
        scores = scores.double() / temperature - torch.log(-torch.log(uniform))
    return scores.argsort(dim=-1, descending=True, stable=True)


def _row(found: Rollouts, order: Sequence[int], kind: str) -> Example:
    """One prompt with its completions, best first, as many as the kind learns from."""
    if kind == "pairs":
        order = [order[0], order[-1]]
    elif kind == "completions":
        order = order[:1]
    first = found.examples[order[0]]
    completions = tuple(found.examples[k].completion_ids[0] for k in order)
    if kind == "completions":
        return Example(first.id, first.prompt_ids, completions)
    scores = tuple(float(found.scores[k]) for k in order)
    return Example(first.id, first.prompt_ids, completions, Labels(ranks=tuple(range(len(order))), scores=scores))
