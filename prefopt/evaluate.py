"""What is measured on a trained policy of text: implicit rewards on held-out pairs; samples, scored and priced in KL; decay."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from losses.registry import BoundLoss
from losses.types import VOCABULARY
from prefopt.communicator import SingleProcess
from prefopt.data.records import Example, Text
from prefopt.generate import Decoding, generate
from prefopt.metrics import Meter
from prefopt.models.causal_lm import CausalLMPolicy, FrozenReference
from prefopt.models.packed import PackedPolicy
from prefopt.packing import flat_roles, pack, split_by_tokens
from prefopt.reference import ReferenceCache
from prefopt.report.schema import PairRow, PromptRow
from prefopt.rewards import Scorer
from prefopt.streams import Budget, OfflineStream


@dataclass(frozen=True)
class PairMeasures:
    """Means by metric key, and a row for every pair in its order; the caller labels the rows."""

    metrics: Mapping[str, float]
    rows: tuple[PairRow, ...]


@torch.no_grad()
def measure_pairs(
    policy: PackedPolicy, reference: ReferenceCache, pairs: Sequence[Example], loss: BoundLoss | None, micro_batch_tokens: int
) -> PairMeasures:
    """Accuracy and margins of implicit rewards on held-out pairs: diagnostics, not results.

    Args:
        loss: the algorithm's own; its `rewards/accuracies` is the algorithm's own score. None, or a loss that a pair by itself
            does not determine (on rollouts, lists or labelled completions), leaves that column out.

    Returns:
        `accuracy` and `margin` by the common log-ratio sum, `own_accuracy` by the algorithm's score, and the mean log-ratio
        of chosen and rejected; and the log-ratios of every pair.
    """
    budget = Budget(batch_size=len(pairs), micro_batch_tokens=micro_batch_tokens, epochs=1.0)
    (micro_batches,) = OfflineStream(pairs, kind="pairs", budget=budget, reference=reference, dtype=policy.dtype)
    names = ("policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps", "reference_rejected_logps")
    own = loss if loss is not None and _follows_from_pairs(loss) else None
    needs = {*names, *(own.needs | own.optional if own is not None else ())}
    meter, ratios = Meter(), dict[str, tuple[float, float]]()
    for batch in micro_batches:
        from_policy = {name for name in needs if VOCABULARY[name].source == "policy"}
        given = {name: value.to(policy.device) for name, value in batch.tensors(needs - from_policy).items()}
        tensors = {**given, **policy.evaluate(batch, from_policy)}
        chosen, rejected = (
            tensors[f"policy_{side}_logps"] - tensors[f"reference_{side}_logps"] for side in ("chosen", "rejected")
        )
        ratios |= dict(zip(batch.ids, zip(chosen.tolist(), rejected.tolist(), strict=True), strict=True))
        ones = torch.ones_like(chosen)
        # Half a point for a tie, up to the rounding of float32 sums: at the start every margin is zero.
        right = torch.where((chosen - rejected).abs() < 1e-3, 0.5, (chosen > rejected).to(chosen))
        meter.add("accuracy", (right, ones))
        meter.add("margin", (chosen - rejected, ones))
        meter.add("chosen_log_ratio", (chosen, ones))
        meter.add("rejected_log_ratio", (rejected, ones))
        if own is not None:
            for output in own(tensors).values():
                if "rewards/accuracies" in output.metrics:
                    meter.add("own_accuracy", output.metrics["rewards/accuracies"])
    rows = tuple(PairRow("", 0, pair.id, *ratios[pair.id], *map(len, pair.completion_ids)) for pair in pairs)
    return PairMeasures(meter.read(SingleProcess()), rows)


def _follows_from_pairs(loss: BoundLoss) -> bool:
    """True when all that a loss needs is known of a pair by itself: no rollout, no other completion, no earlier step."""
    specs = [VOCABULARY[name] for name in loss.needs]
    return all({*spec.shape} <= {*"PT"} and spec.source not in ("old", "rollout", "state") for spec in specs)


@dataclass(frozen=True)
class Samples:
    """Completions of a policy on test prompts, one each; tensors are [N].

    Args:
        ids: of the prompts.
        completions: token ids, EOS included.
        texts: the same as text, without EOS.
        kl: sum over tokens of KL(policy || reference) over the whole vocabulary, nats.
        k1: log(policy / reference) of the drawn tokens, nats: an unbiased check of `kl`.
        finished: ended by themselves before the limit.
        scores: by the name of the judge.
    """

    ids: tuple[str, ...]
    completions: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    kl: Tensor
    k1: Tensor
    finished: Tensor
    scores: Mapping[str, Tensor]

    @property
    def lengths(self) -> Tensor:
        """Tokens, EOS included."""
        return torch.tensor([len(ids) for ids in self.completions])

    def metrics(self) -> dict[str, float]:
        """Means by metric key; a judge's are `score/<judge>`."""
        lengths = self.lengths
        found: dict[str, Tensor | float] = {
            "kl": self.kl.mean(),
            "kl_k1": self.k1.mean(),
            "nats_per_token": self.kl.sum() / lengths.sum(),
            "length": lengths.float().mean(),
            "truncated": 1 - self.finished.float().mean(),
            "distinct_2": distinct_n(self.completions, 2),
            "repetition": repetition(self.completions),
            **{f"score/{judge}": scores.mean() for judge, scores in self.scores.items()},
        }
        return {name: float(value) for name, value in found.items()}

    def rows(self, seed: int) -> list[PromptRow]:
        """One row for every judge and prompt; the caller labels them."""
        columns = (self.ids, self.kl.tolist(), self.k1.tolist(), self.lengths.tolist())
        return [
            PromptRow("", seed, id, judge, score, kl, k1, length)
            for judge, scores in self.scores.items()
            for score, id, kl, k1, length in zip(scores.tolist(), *columns, strict=True)
        ]


@torch.no_grad()
def sample_and_measure(
    policy: CausalLMPolicy,
    reference: FrozenReference,
    prompts: Sequence[Example],
    texts: Mapping[str, Text],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    seed: int,
    judges: Mapping[str, Scorer],
    micro_batch_tokens: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Samples:
    """Samples whole completions at temperature 1 without top-p up to a limit, and measures their KL exactly per token.

    The sum of per-token KLs over the vocabulary has the expectation of k1 with less variance; both are reported.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = generate(
        policy, [p.prompt_ids for p in prompts], Decoding(max_new_tokens), generator, eos_ids=eos_ids, on_progress=on_progress
    )
    examples = [Example(p.id, p.prompt_ids, (s.ids,)) for p, s in zip(prompts, drawn, strict=True)]
    kls, k1s = [], []
    for part in split_by_tokens(examples, micro_batch_tokens):
        batch = pack(part, roles=flat_roles, dtype=policy.dtype)
        rows = policy.rows(batch, ["token_logps", "reference_token_logps", "policy_kls"], reference=reference)
        kls.append(rows["policy_kls"].sum(-1).cpu())
        k1s.append((rows["token_logps"] - rows["reference_token_logps"]).sum(-1).cpu())
    completions = tuple(policy.tokenizer.decode(sample.ids, skip_special_tokens=True) for sample in drawn)
    asked = [texts[p.id] for p in prompts]
    return Samples(
        tuple(p.id for p in prompts),
        tuple(s.ids for s in drawn),
        completions,
        torch.cat(kls),
        torch.cat(k1s),
        torch.tensor([s.finished for s in drawn]),
        {name: judge(asked, completions) for name, judge in judges.items()},
    )


@torch.no_grad()
def perplexity(policy: CausalLMPolicy, examples: Sequence[Example], micro_batch_tokens: int) -> float:
    """exp of the mean negative log-prob of the completions' tokens: on neutral text, what a policy has kept of its language."""
    total, tokens = 0.0, 0
    for part in split_by_tokens(examples, micro_batch_tokens):
        rows = policy.rows(pack(part, roles=flat_roles, dtype=policy.dtype), ["token_logps"])["token_logps"]
        total += float(rows.sum(dtype=torch.float64))
        tokens += sum(len(ids) for example in part for ids in example.completion_ids)
    return math.exp(-total / tokens)


def distinct_n(completions: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams over all n-grams of all completions (Li et al. 2016 [li2016diversity]), in tokens; 1 without any.

    It falls with the number of completions: compare equal numbers.
    """
    grams = [gram for ids in completions for gram in _ngrams(ids, n)]
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition(completions: Sequence[Sequence[int]], n: int = 4) -> float:
    """Share of a completion's n-grams that stand earlier in it, averaged over completions of at least n tokens.

    seq-rep-n of Welleck et al. 2019 [welleck2019unlikelihood]: 1 - different n-grams / n-grams. 0 without such completions.
    """
    shares = [1 - len({*grams}) / len(grams) for grams in (_ngrams(ids, n) for ids in completions) if grams]
    return sum(shares) / len(shares) if shares else 0.0


def _ngrams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def wilson_interval(right: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a proportion (Wilson 1927), which stays inside [0, 1] at small n."""
    if n == 0:
        return 0.0, 1.0
    p = right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Pearson's correlation; None when one side is constant or there are fewer than three values."""
    if len(one) < 3:
        return None
    a, b = torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    a, b = a - a.mean(), b - b.mean()
    norm = a.norm() * b.norm()
    return float((a * b).sum() / norm) if norm > 0 else None
