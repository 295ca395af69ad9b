"""On-policy data: sample, score, and turn scores into batches, for policy gradients or for offline losses on fresh samples.

For the trainer these are streams like any other.
"""

from __future__ import annotations

from prefopt.rollouts.collect import Rollouts, Workshop
from prefopt.rollouts.online import OnlineStream, online
from prefopt.rollouts.stream import RolloutStream, rollouts

__all__ = ["OnlineStream", "RolloutStream", "Rollouts", "Workshop", "online", "rollouts"]
