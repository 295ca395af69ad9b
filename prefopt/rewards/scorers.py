"""Scorers of completions, and the check of what they return. N completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from prefopt.data.records import Example, Message, Record, Text
from prefopt.errors import TrainingError
from prefopt.models.causal_lm import CausalLMPolicy
from prefopt.packing import flat_roles, pack, split_by_tokens
from prefopt.tokenize import tokenize

Scorer = Callable[[Sequence[Text], Sequence[str]], Tensor]
"""(prompts, completions) -> [N] scores."""


def check_scores(scores: Tensor, ids: Sequence[str]) -> None:
    """Raises TrainingError when a scorer returns the wrong number of scores, or one that is not finite."""
    if scores.shape != (len(ids),):
        raise TrainingError(
            f"the scorer returned a tensor of shape {list(scores.shape)} for {len(ids)} completions; expected [{len(ids)}]."
        )
    bad = (~torch.isfinite(scores)).nonzero().squeeze(-1).tolist()
    if bad:
        raise TrainingError(
            f"the scorer returned {float(scores[bad[0]])} for the completion of prompt {ids[bad[0]]}; scores must be finite."
        )


class RewardModelScorer:
    """A causal LM with a reward head as a scorer, with its own tokenizer.

    Args:
        policy: the reward model.
        max_length: prompt plus completion, in its own tokens.
        max_completion_length: completions are cut to it; None leaves them.
        offset: subtracted from every score, so that the training completions' mean is zero.
        micro_batch_tokens: packed tokens of a forward pass.
    """

    def __init__(
        self,
        policy: CausalLMPolicy,
        *,
        max_length: int,
        max_completion_length: int | None = None,
        offset: float = 0.0,
        micro_batch_tokens: int = 8192,
    ) -> None:
        self.policy = policy
        self._tokenize = partial(
            tokenize, tokenizer=policy.tokenizer, max_length=max_length, max_completion_length=max_completion_length
        )
        self.offset = offset
        self._budget = micro_batch_tokens
        self.tokens = 0

    def __call__(self, prompts: Sequence[Text], completions: Sequence[str]) -> Tensor:
        records = [
            Record(f"sample:{i}", prompt, (as_reply(prompt, completion),))
            for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        examples = self._tokenize(records).examples
        if len(examples) != len(records):
            raise TrainingError(
                f"the reward model's tokenizer dropped {len(records) - len(examples)} of {len(records)} samples; "
                "raise max_length."
            )
        return self.score(examples)[:, 0]

    @torch.no_grad()
    def score(self, examples: Sequence[Example]) -> Tensor:
        """[N, K] scores of tokenised examples with K completions each."""
        self.policy.train(False)
        parts = []
        for part in split_by_tokens(examples, self._budget):
            batch = pack(part, roles=flat_roles)
            parts.append(self.policy.rows(batch, ["rewards"])["rewards"].cpu())
            self.tokens += batch.tokens
        return (torch.cat(parts) - self.offset).view(len(examples), -1)


def as_reply(prompt: Text, completion: str) -> Text:
    """A completion in the form of its prompt: text for text, an assistant turn for a conversation."""
    return completion if isinstance(prompt, str) else (Message(role="assistant", content=completion),)
