"""Rewards: what scores completions. Scorers take text, so that a reward model may have a tokenizer of its own."""

from __future__ import annotations

from prefopt.rewards.scorers import EnsembleScorer, RewardError, RewardModelScorer, Scorer, as_reply, check_scores, score

__all__ = ["EnsembleScorer", "RewardError", "RewardModelScorer", "Scorer", "as_reply", "check_scores", "score"]
