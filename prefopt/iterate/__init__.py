"""The feedback loop: sample from the policy, have the samples labelled, learn from the labels, and again."""

from __future__ import annotations

from prefopt.iterate.loop import iterate
from prefopt.iterate.options import LoopOptions
from prefopt.iterate.rounds import Outcome

__all__ = ["LoopOptions", "Outcome", "iterate"]
