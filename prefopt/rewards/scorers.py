"""Scorers of completions, ensembles of them, and the check of what they return. N completions, M members."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from prefopt.data.records import Example, Message, Record, Text
from prefopt.errors import TrainingError
from prefopt.models.causal_lm import CausalLMPolicy
from prefopt.packing import PackedBatch, flat_roles, pack, split_by_tokens
from prefopt.tokenize import tokenize

Scorer = Callable[[Sequence[Text], Sequence[str]], Tensor]
"""(prompts, completions) -> [N] scores."""


class RewardError(TrainingError):
    """A scorer failed on one completion: `index` is its place among those that were asked for, `failure` what happened."""

    def __init__(self, index: int, failure: str, prompt_id: str = "") -> None:
        self.index, self.failure = index, failure
        where = f"prompt {prompt_id} (index {index} of its batch)" if prompt_id else f"the prompt at index {index} of its batch"
        super().__init__(f"the reward failed at {where}: {failure}")


def score(scorer: Scorer, prompts: Sequence[Text], completions: Sequence[str], ids: Sequence[str]) -> Tensor:
    """[N] checked scores; errors name the prompt.

    Args:
        ids: of the prompts, N.

    Raises:
        RewardError: the scorer failed on one completion.
        TrainingError: as `check_scores`.
    """
    try:
        scores = scorer(prompts, completions)
    except RewardError as error:
        raise RewardError(error.index, error.failure, ids[error.index]) from error.__cause__
    check_scores(scores, ids)
    return scores


def check_scores(scores: Tensor, ids: Sequence[str]) -> None:
    """Raises TrainingError when a scorer returns the wrong number of scores, or one that is not finite."""
    if scores.shape != (len(ids),):
        first = f", the first of which is of prompt {ids[0]}" if ids else ""
        raise TrainingError(
            f"the scorer returned a tensor of shape {list(scores.shape)} for {len(ids)} completions{first}; expected "
            f"[{len(ids)}]: one number for each completion, in their order."
        )
    bad = (~torch.isfinite(scores)).nonzero().squeeze(-1).tolist()
    if bad:
        more = f" (and {len(bad) - 1} more are not finite)" if len(bad) > 1 else ""
        failure = (
            f"the scorer returned {float(scores[bad[0]])}{more}; scores must be finite. Return a finite number for every text."
        )
        raise RewardError(bad[0], failure, ids[bad[0]])


class RewardModelScorer:
    """A causal LM with a reward head as a scorer, with its own tokenizer.

    Args:
        policy: the reward model.
        max_length: prompt plus completion, in its own tokens.
        max_completion_length: completions are cut to it; None leaves them.
        offset: subtracted from every score, so that the training completions' mean is zero.
        micro_batch_tokens: packed tokens of a forward pass.
        adapter: of the policy; None scores with its base, adapters off (`--hydra`).
        pad_id: trailing tokens of this id are not read, because the model was trained to score the token before them:
            transformers' sequence classifiers score the last token that is not padding, and the padding may be the EOS.
    """

    def __init__(
        self,
        policy: CausalLMPolicy,
        *,
        max_length: int,
        max_completion_length: int | None = None,
        offset: float = 0.0,
        micro_batch_tokens: int = 8192,
        adapter: str | None = "policy",
        pad_id: int | None = None,
    ) -> None:
        self.policy = policy
        self.limits: dict[str, Any] = {"max_length": max_length, "max_completion_length": max_completion_length}
        self.offset = offset
        self.adapter = adapter
        self.pad_id = pad_id
        self._budget = micro_batch_tokens
        self.tokens = 0

    def __call__(self, prompts: Sequence[Text], completions: Sequence[str]) -> Tensor:
        return self.score(self.tokenized(prompts, completions))[:, 0]

    def tokenized(self, prompts: Sequence[Text], completions: Sequence[str]) -> Sequence[Example]:
        """N examples of one completion each, in this model's tokens."""
        records = [
            Record(f"sample:{i}", prompt, (as_reply(prompt, completion),))
            for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        examples = tokenize(records, self.policy.tokenizer, **self.limits).examples
        if len(examples) != len(records):
            raise TrainingError(
                f"the reward model's tokenizer dropped {len(records) - len(examples)} of {len(records)} samples; "
                "raise max_length."
            )
        return examples

    def score(self, examples: Sequence[Example]) -> Tensor:
        """[N, K] scores of tokenised examples with K completions each."""
        return self._flat(examples).view(len(examples), -1)

    def lists(self, examples: Sequence[Example]) -> tuple[Tensor, ...]:
        """[K] scores of each tokenised example; K may differ."""
        return self._flat(examples).split([len(example.completion_ids) for example in examples])

    def _flat(self, examples: Sequence[Example]) -> Tensor:
        return torch.cat([rows["rewards"].cpu() for _, rows in self.passes(examples, ["rewards"])]) - self.offset

    @torch.no_grad()
    def passes(
        self, examples: Sequence[Example], quantities: Collection[str]
    ) -> Iterator[tuple[PackedBatch, dict[str, Tensor]]]:
        """Forward passes over tokenised examples without padding: each batch with its row tensors (`CausalLMPolicy.rows`)."""
        self.policy.train(False)
        for part in split_by_tokens([self._without_padding(example) for example in examples], self._budget):
            batch = pack(part, roles=flat_roles)
            with self.policy.adapter(self.adapter):
                rows = self.policy.rows(batch, quantities)
            self.tokens += batch.tokens
            yield batch, rows

    def centre(self, examples: Sequence[Example]) -> None:
        """Sets `offset` so that the mean score of these completions is zero."""
        self.offset += float(self._flat(examples).mean())

    def _without_padding(self, example: Example) -> Example:
        """The example without trailing tokens that the model takes for padding; a completion keeps one token."""
        if self.pad_id is None:
            return example
        kept = []
        for ids in example.completion_ids:
            end = len(ids)
            while end > 1 and ids[end - 1] == self.pad_id:
                end -= 1
            kept.append(ids[:end])
        return Example(example.id, example.prompt_ids, tuple(kept), example.labels)


class EnsembleScorer:
    """Several scorers as one (Coste et al. 2023 [coste2023ensembles]).

    Args:
        members: M scorers on one scale.
        aggregate: "mean", or "min": the worst case over members, which a policy cannot please by what one of them gets wrong.

    Attributes:
        last_std: [N] standard deviation over the members (divided by M) at the last call: where they disagree.
    """

    def __init__(self, members: Sequence[Scorer], aggregate: Literal["mean", "min"] = "mean") -> None:
        self.members = tuple(members)
        self.aggregate = aggregate
        self.last_std: Tensor | None = None

    def __call__(self, prompts: Sequence[Text], completions: Sequence[str]) -> Tensor:
        scores = torch.stack([member(prompts, completions) for member in self.members])  # [M, N]
        self.last_std = scores.std(0, correction=0)
        return scores.mean(0) if self.aggregate == "mean" else scores.amin(0)


def as_reply(prompt: Text, completion: str) -> Text:
    """A completion in the form of its prompt: text for text, an assistant turn for a conversation."""
    return completion if isinstance(prompt, str) else (Message(role="assistant", content=completion),)
