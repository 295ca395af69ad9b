"""The points of benchmarks.scaling, and the lines that are laid through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Point:
    """One configuration that is measured in a process of its own.

    Args:
        pairs: prompts of a step.
        prompt, completion: their tokens.
        completions: of a prompt.
        vocabulary, hidden, layers: of the random model.
        steps: measured ones, after a warm-up.
        model: a real model instead; its vocabulary and widths count.
    """

    pairs: int = 8
    prompt: int = 128
    completion: int = 64
    completions: int = 2
    vocabulary: int = 4096
    hidden: int = 256
    layers: int = 4
    steps: int = 3
    model: str = ""

    @property
    def tokens(self) -> int:
        """Packed tokens: the prompt once."""
        return self.pairs * self.prompt + self.scored

    @property
    def scored(self) -> int:
        """Tokens of all completions."""
        return self.pairs * self.completions * self.completion


@dataclass(frozen=True)
class Measured:
    """What a point took.

    Args:
        x: the swept quantity.
        point: the configuration.
        seconds: median of a step.
        mb: peak memory of the process; of the device where there is one.
        others: share of the machine that other processes used meanwhile; None where the system does not tell.
    """

    x: float
    point: Point
    seconds: float
    mb: float
    others: float | None


@dataclass(frozen=True)
class Fit:
    """y = intercept + slope * x by least squares; `r2` is the explained share of the variance, NaN where y is constant."""

    slope: float
    intercept: float
    r2: float

    @classmethod
    def of(cls, x: Sequence[float], y: Sequence[float]) -> Fit:
        slope, intercept = np.polyfit(x, y, 1)
        return cls(float(slope), float(intercept), _explained(np.asarray(y), intercept + slope * np.asarray(x)))


def _explained(y: np.ndarray, predicted: np.ndarray) -> float:
    total = float(((y - y.mean()) ** 2).sum())
    return 1 - float(((y - predicted) ** 2).sum()) / total if total else float("nan")


@dataclass(frozen=True)
class TokenCost:
    """seconds = intercept + prompt * (prompt tokens) + completion * (completion tokens), over several sweeps.

    Args:
        prompt, completion: seconds of a token.
        intercept: seconds of a step without tokens.
        r2: explained share of the variance.
    """

    prompt: float
    completion: float
    intercept: float
    r2: float


def token_cost(points: Sequence[Measured], *, once: bool) -> TokenCost:
    """The line through all points with the prompt counted once, or once for each completion."""
    prompts = [m.point.pairs * m.point.prompt * (1 if once else m.point.completions) for m in points]
    columns = np.array([[1.0, prompt, m.point.scored] for prompt, m in zip(prompts, points, strict=True)])
    seconds = np.array([m.seconds for m in points])
    (intercept, prompt, completion), *_ = np.linalg.lstsq(columns, seconds, rcond=None)
    r2 = _explained(seconds, columns @ np.array([intercept, prompt, completion]))
    return TokenCost(float(prompt), float(completion), float(intercept), r2)


def bytes_per_logit(points: Sequence[Measured]) -> float:
    """Bytes of peak memory for each (scored token, vocabulary entry): the last factor of
    MB = a + b * vocabulary + c * tokens + d * vocabulary * tokens, by least squares."""
    sizes = [(m.point.vocabulary, m.point.scored) for m in points]
    # In thousands, so that the columns are of similar size.
    columns = np.array([[1.0, v / 1e3, t / 1e3, v * t / 1e6] for v, t in sizes])
    factors, *_ = np.linalg.lstsq(columns, np.array([m.mb for m in points]), rcond=None)
    return float(factors[3]) * 2**20 / 1e6
