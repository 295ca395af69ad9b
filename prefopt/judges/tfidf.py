"""A TF-IDF Bradley-Terry judge: a second opinion that shares no network with the policies or their reward models.

It needs the extra `sentiment`, which has scikit-learn. N completions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from prefopt.data.records import Text
from prefopt.data.roles import split_roles
from prefopt.data.sources import load
from prefopt.errors import ConfigError, DataError
from prefopt.judges.record import LabelledPairs, labelled_pairs

# Words of one letter count, and so do exclamation and question marks.
_TOKENS = r"(?u)\b\w+\b|[!?]"
# Of 0.1, 1 and 10 the best held-out likelihood on HH, harmless and helpful alike; character n-grams added nothing there.
_INVERSE_PENALTY = 1.0


class TfidfJudge:
    """score(y) = w . v(y), v the TF-IDF weights of words and pairs of words, scaled to length 1; P(y > y') = sigma(difference).

    Bradley-Terry (Bradley and Terry 1952 [bradley1952rank]) by logistic regression without intercept on differences of the
    vectors. It reads completions alone, never prompts. A scorer: `from_scorer` makes it a judge. The fit is deterministic.

    Args:
        pairs: to fit on: judge rows, which no policy and none of its reward models has seen.

    Raises:
        ConfigError: the extra is not installed.
        DataError: no word stands in two of the texts, or the labels are all ties.
    """

    def __init__(self, pairs: LabelledPairs) -> None:
        try:
            from scipy.sparse import diags, vstack
            from sklearn.feature_extraction.text import TfidfVectorizer
            from sklearn.linear_model import LogisticRegression
        except ImportError as error:
            raise ConfigError(
                "the TF-IDF judge needs scikit-learn, which the 'sentiment' extra has: pip install -e '.[sentiment]'."
            ) from error
        self._vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, token_pattern=_TOKENS)
        try:
            self._vectorizer.fit([*pairs.chosen, *pairs.rejected])
        except ValueError as error:
            raise DataError(
                f"the TF-IDF judge is fitted on {len(pairs)} pairs in which no word occurs twice; give it more."
            ) from error
        soft = np.array(pairs.soft_labels)
        if (soft == 0.5).all():
            raise DataError(f"all {len(pairs)} labels are ties: there is nothing for the TF-IDF judge to learn.")
        gaps = self._vectorizer.transform(pairs.chosen) - self._vectorizer.transform(pairs.rejected)
        # The classifier wants both labels: every other pair is turned round, which without an intercept changes nothing.
        sides = np.where(np.arange(len(pairs)) % 2, 1, -1)
        turned = diags(sides.astype(float)) @ gaps
        features, labels, weights = vstack([turned, turned]), np.concatenate([sides, -sides]), np.concatenate([soft, 1 - soft])
        kept = np.flatnonzero(weights)
        self._model = LogisticRegression(C=_INVERSE_PENALTY, fit_intercept=False, max_iter=1000).fit(
            features.tocsr()[kept], labels[kept], sample_weight=weights[kept]
        )

    def __call__(self, prompts: Sequence[Text], completions: Sequence[str]) -> Tensor:
        """[N] scores of completions; prompts are not read."""
        return torch.from_numpy(self._vectorizer.transform(completions) @ self._model.coef_[0]).float()


def read_judge_rows(source: str) -> tuple[LabelledPairs, LabelledPairs]:
    """Pairs of a data source to fit a judge on and to measure it on: its judge rows and its test rows.

    The split is that of every training here, so that the judge has seen nothing of what policies were trained on.

    Raises:
        DataError: one of them has no pair, or `load` cannot read the source.
    """
    split = split_roles(load([source]).records)
    found = []
    for role, records in (("judge", split.judge), ("test", split.test)):
        try:
            found.append(labelled_pairs(records))
        except DataError as error:
            raise DataError(
                f"{source}: none of its {len(records)} {role} rows is a pair in an order; give more rows."
            ) from error
    return found[0], found[1]
