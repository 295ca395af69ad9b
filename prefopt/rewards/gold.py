"""Rewards of controlled sentiment that are known, not learned from preferences: the gold reward and an independent witness.

Both need the extra `sentiment`. N completions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prefopt.data.records import Text
from prefopt.data.rows import content
from prefopt.errors import ConfigError, DataError

_EXTRA = "needs the 'sentiment' extra: pip install -e '.[sentiment]'."
# Weakly regularised: held-out likelihood on sentences and on whole reviews is best near it.
_INVERSE_PENALTY = 10.0
# Words of one letter count, and so do exclamation and question marks.
_TOKENS = r"(?u)\b\w+\b|[!?]"


class GoldReward:
    """Log-odds of "positive" by a logistic regression on TF-IDF weights of words and pairs of words.

    It stands for the truth that the gold classifier of Rafailov et al. 2023 [rafailov2023dpo], section 6.1, stands for: labels
    and the reported reward both come from it. The fit is deterministic and takes seconds, so nothing is stored.

    Args:
        texts: reviews to fit on.
        positive: their labels.

    Raises:
        ConfigError: the extra is not installed.
        DataError: reviews of one label only.
    """

    def __init__(self, texts: Sequence[str], positive: Sequence[bool]) -> None:
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
            from sklearn.linear_model import LogisticRegression
        except ImportError as error:
            raise ConfigError(f"the gold sentiment reward {_EXTRA}") from error
        if len(set(positive)) < 2:
            raise DataError(
                f"the gold reward is fitted on {len(texts)} reviews, {sum(positive)} of them positive; it needs both labels."
            )
        self._vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, token_pattern=_TOKENS)
        features = self._vectorizer.fit_transform(texts)
        self._model = LogisticRegression(C=_INVERSE_PENALTY, max_iter=1000).fit(features, list(positive))

    def __call__(self, prompts: Sequence[Text], completions: Sequence[str]) -> Tensor:
        """[N] log-odds of prompt and completion together."""
        return self.scores(join(prompts, completions))

    def scores(self, texts: Sequence[str]) -> Tensor:
        """[N] log-odds that texts are positive; 0 is undecided."""
        return torch.from_numpy(self._model.decision_function(self._vectorizer.transform(texts))).float()


class LexiconJudge:
    """The compound score of VADER (Hutto and Gilbert 2014 [hutto2014vader]), from -1 to 1: rules and a lexicon, no fit.

    It shares nothing with the gold reward, so a policy that has only learned the gold reward's weaknesses does not move it.

    Raises:
        ConfigError: the extra is not installed.
    """

    def __init__(self) -> None:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError as error:
            raise ConfigError(f"the lexicon judge {_EXTRA}") from error
        self._analyzer = SentimentIntensityAnalyzer()

    def __call__(self, prompts: Sequence[Text], completions: Sequence[str]) -> Tensor:
        """[N] compound scores of prompt and completion together."""
        return self.scores(join(prompts, completions))

    def scores(self, texts: Sequence[str]) -> Tensor:
        """[N] compound scores; 0 where no word is in the lexicon."""
        return torch.tensor([self._analyzer.polarity_scores(text)["compound"] for text in texts], dtype=torch.float32)


def join(prompts: Sequence[Text], completions: Sequence[str]) -> list[str]:
    """Prompts and completions as one text each."""
    return [content(prompt) + completion for prompt, completion in zip(prompts, completions, strict=True)]
