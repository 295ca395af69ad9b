"""What tokenising found: counts and lengths in tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from prefopt.data.read_report import Dropped, LengthBaseline


@dataclass(frozen=True)
class Lengths:
    """Quantiles of a length in tokens."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Lengths:
        p50, p90, p99 = np.quantile(lengths, (0.5, 0.9, 0.99)).tolist()
        return cls(float(np.mean(lengths)), p50, p90, p99, max(lengths))


@dataclass(frozen=True)
class TokenReport:
    """What tokenising found.

    Args:
        rows: records that came in.
        kept: examples that came out.
        dropped: the difference, by reason.
        prompts_truncated, prompt_tokens_cut: prompts cut on the left, and the tokens that went.
        completions_truncated, completion_tokens_cut: completions cut on the right (their EOS goes too), and the tokens.
        boundary_merges: records where the tokenizer merges the end of the prompt with the beginning of a completion, so
            that the end of the prompt is scored with the completions.
        lengths: of what came out, EOS included, by part: prompt; chosen and rejected; completion; completion 0, 1, … of
            rankings.
        length_baseline: in tokens, over pairs; None without pairs.
    """

    rows: int
    kept: int
    dropped: tuple[Dropped, ...]
    prompts_truncated: int
    prompt_tokens_cut: int
    completions_truncated: int
    completion_tokens_cut: int
    boundary_merges: int
    lengths: Mapping[str, Lengths]
    length_baseline: LengthBaseline | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TokenReport:
        """The inverse of `as_dict`, also after JSON has turned tuples into lists."""
        baseline = values["length_baseline"]
        parts = {
            "dropped": tuple(map(Dropped.from_dict, values["dropped"])),
            "lengths": {name: Lengths(**lengths) for name, lengths in values["lengths"].items()},
            "length_baseline": LengthBaseline(**baseline) if baseline else None,
        }
        return cls(**{**values, **parts})
