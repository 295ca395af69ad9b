"""Judges of samples: win rates with intervals, raw and at equal lengths, under models, functions and people.

`judge_samples(judges, prompts, ours, theirs)` asks them all; the `JudgedPairs` it gives have every number and every row.
"""

from __future__ import annotations

from prefopt.judges.judged import JudgedPairs, JudgeSummary, judge_samples
from prefopt.judges.lengths import LengthControlled, length_controlled
from prefopt.judges.verdicts import BothOrders, PairJudge, Verdicts, from_scorer
from prefopt.judges.winrate import WinRate, agreement, win_rate

__all__ = [
    "BothOrders", "JudgeSummary", "JudgedPairs", "LengthControlled", "PairJudge", "Verdicts", "WinRate", "agreement",
    "from_scorer", "judge_samples", "length_controlled", "win_rate",
]  # fmt: skip
