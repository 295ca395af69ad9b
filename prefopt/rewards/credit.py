"""Which tokens earned the score: attention as a dense reward (Chan et al. 2024 [chan2024abc]). N completions, T policy tokens.

ABC reads the reward model's last layer, mean over heads, at the token that its score is read at: the completion's last one, EOS
included. ABC-D reads the policy's own last layer, averaged over the steps that drew the completion. Weights have any scale:
`losses.shaping.redistribute` makes shares of them.

Differences from the authors' code: (1) completions end by EOS, and EOS is one of the tokens; theirs have a drawn length; (2) a
reward model with another tokenizer is aligned by characters; theirs is cut or padded on the left; (3) theirs gives a token's
ABC-D weight to the token after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from prefopt.data.records import Example, Text
from prefopt.errors import ConfigError
from prefopt.models.attention_weights import SCORE_ATTENTION, STEP_ATTENTION
from prefopt.models.causal_lm import CausalLMPolicy
from prefopt.packing import flat_roles, pack, split_by_tokens
from prefopt.rewards.scorers import EnsembleScorer, RewardModelScorer, Scorer

Ids = tuple[int, ...]


class AttentiveScorer:
    """A reward model as a scorer that keeps its attention: scores and weights come of one pass.

    Args:
        model: scores as it does alone.

    Attributes:
        last: for each completion of the last call, its ids in the model's own tokens, and their weights [length].
    """

    def __init__(self, model: RewardModelScorer) -> None:
        self._model = model
        self.tokenizer = model.policy.tokenizer
        self.last: list[tuple[Ids, Tensor]] = []

    def __call__(self, prompts: Sequence[Text], completions: Sequence[str]) -> Tensor:
        self.last, scores = [], []
        examples = self._model.tokenized(prompts, completions)
        for batch, rows in self._model.passes(examples, ["rewards", SCORE_ATTENTION]):
            lengths = batch.mask.sum(-1).long().tolist()
            ids = batch.targets.split(lengths)
            weights = rows[SCORE_ATTENTION].cpu()
            self.last += [(tuple(own.tolist()), row[:length]) for own, row, length in zip(ids, weights, lengths, strict=True)]
            scores.append(rows["rewards"].cpu())
        return torch.cat(scores) - self._model.offset


class AttentionCredit:
    """The attention of reward models, in the policy's tokens.

    Args:
        scorer: a reward model, or an ensemble of them.
        tokenizer: the policy's.

    Attributes:
        scorer: what scores in its stead, with equal scores.

    Raises:
        ConfigError: a reward without attention.
    """

    def __init__(self, scorer: Scorer, tokenizer: Any) -> None:
        ensemble = scorer if isinstance(scorer, EnsembleScorer) else None
        members = (scorer,) if ensemble is None else ensemble.members
        models = [member for member in members if isinstance(member, RewardModelScorer)]
        if len(models) < len(members):
            raise ConfigError(
                "credit 'attention' reads a reward model's attention, and this reward, a function or the task's own, has none. "
                "Leave --reward out (a model trained on the rows), name a reward model's folder or hub id, or take credit "
                "'generator' (the policy's own attention), 'uniform' or 'sparse'."
            )
        self._models = [AttentiveScorer(model) for model in models]
        self._aligners = [Aligner(model.tokenizer, tokenizer) for model in self._models]
        self.scorer: Scorer = self._models[0] if ensemble is None else EnsembleScorer(self._models, ensemble.aggregate)

    def weights(self, completions: Sequence[Ids], width: int) -> Tensor:
        """[N, width] weights of what `scorer` was last asked to score, each row summing to 1; members count alike.

        Args:
            completions: N, in the policy's tokens.
            width: T.
        """
        found = torch.zeros(len(completions), width)
        for model, aligner in zip(self._models, self._aligners, strict=True):
            for row, (ids, (own, weights)) in enumerate(zip(completions, model.last, strict=True)):
                found[row, : len(ids)] += aligner.moved(weights / weights.sum(), own, ids)
        return found / len(self._models)


class GeneratorCredit:
    """The policy's own attention (ABC-D), from a forward pass over what it drew.

    Args:
        policy: that draws the completions.
        micro_batch_tokens: packed tokens of a forward pass.

    Raises:
        ConfigError: the policy has no attention.
    """

    def __init__(self, policy: CausalLMPolicy, micro_batch_tokens: int) -> None:
        if not isinstance(policy.base, PreTrainedModel):
            raise ConfigError(
                f"credit 'generator' reads the policy's attention, and a {type(policy).__name__} has none: take credit "
                "'uniform' or 'sparse'."
            )
        self._policy, self._budget = policy, micro_batch_tokens

    @torch.no_grad()
    def weights(self, examples: Sequence[Example], width: int) -> Tensor:
        """[N, width] weights of prompts with a completion each. A completion's last token has none: no step looks at it."""
        parts = [torch.zeros(0, width)]
        for part in split_by_tokens(examples, self._budget):
            parts.append(self._policy.rows(pack(part, roles=flat_roles), [STEP_ATTENTION])[STEP_ATTENTION].cpu())
        return torch.cat([F.pad(part, (0, width - part.shape[1])) for part in parts])


class Aligner:
    """Moves weights from one tokenizer's tokens to another's.

    Equal tokens keep their weights. Otherwise a token's weight goes to the tokens that share its characters, in proportion to
    how many they share; what stands for no character of the text (EOS, an end of turn) goes to the last token.

    Args:
        source: the tokenizer of the weights.
        target: the tokenizer that they are moved to.
    """

    def __init__(self, source: Any, target: Any) -> None:
        self._same = source is target or source.get_vocab() == target.get_vocab()
        self._source, self._target = _Speller(source), _Speller(target)

    def moved(self, weights: Tensor, source: Ids, target: Ids) -> Tensor:
        """[length of target], with the sum of `weights` [length of source]."""
        shared = min(len(source), len(target))
        if self._same and source[:shared] == target[:shared]:
            kept = F.pad(weights[:shared], (0, len(target) - shared))
            kept[-1] += weights[shared:].sum()
            return kept
        wanted = self._target.spell(target)
        overlap = _overlap(self._source.spell(source).within(wanted.text).spans, wanted.spans)
        overlap[overlap.sum(-1) == 0, -1] = 1.0
        return (weights.double() @ torch.from_numpy(overlap / overlap.sum(-1, keepdims=True))).to(weights.dtype)


@dataclass(frozen=True)
class _Spelled:
    """A completion's text, and the characters [begin, end) of each token; (0, 0) for one that stands for none."""

    text: str
    spans: NDArray[np.float64]  # [length, 2]

    def within(self, text: str) -> _Spelled:
        """The same tokens at the characters of `text`, what another tokenizer says of the same completion.

        It may hold more (a token that begins in the prompt, a template's blanks) or less (cut, stripped) than `text`; where
        neither holds the other, as with a tokenizer that changes letters, characters are matched in proportion.
        """
        spans = self.spans
        if self.text in text:
            spans = spans + text.index(self.text)
        elif text in self.text:
            spans = spans - self.text.rindex(text)
        else:
            spans = spans * (len(text) / len(self.text))
        return _Spelled(text, np.where(self.spans[:, 1:] > self.spans[:, :1], spans, 0.0))


class _Speller:
    """Token ids -> characters, for any tokenizer: by what single tokens say, or else by what prefixes say."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._pieces: dict[int, str | None] = {}

    def _piece(self, token: int) -> str | None:
        """What a token says alone; None for a special one."""
        if token not in self._pieces:
            alone = self._tokenizer.decode([token], skip_special_tokens=True)
            special = not alone and bool(self._tokenizer.decode([token], skip_special_tokens=False))
            self._pieces[token] = None if special else alone
        return self._pieces[token]

    def spell(self, ids: Sequence[int]) -> _Spelled:
        pieces: Mapping[int, str] = {i: piece for i, token in enumerate(ids) if (piece := self._piece(token)) is not None}
        kept = [ids[i] for i in pieces]
        text = self._tokenizer.decode(kept, skip_special_tokens=True)
        if "".join(pieces.values()) == text:
            ends = list(accumulate(map(len, pieces.values())))
        else:  # parts of a character say nothing alone, and blanks depend on what stands before them
            ends = [len(self._tokenizer.decode(kept[: i + 1], skip_special_tokens=True)) for i in range(len(kept))]
            # An unfinished character may be spelled longer than it turns out to be.
            ends = list(accumulate(reversed(ends), min))[::-1]
        spans = np.zeros((len(ids), 2))
        for place, (begin, end) in zip(pieces, pairwise([0, *ends]), strict=True):
            spans[place] = min(begin, max(end - 1, 0)), end  # later parts of a character stand at that character
        return _Spelled(text, spans)


def _overlap(source: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """[source, target] characters in common."""
    begin = np.maximum(source[:, None, 0], target[None, :, 0])
    return np.clip(np.minimum(source[:, None, 1], target[None, :, 1]) - begin, 0.0, None)
