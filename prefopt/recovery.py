"""What a run does about trouble. None of it changes the numbers of a run that meets none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from prefopt.errors import ConfigError

OnFailedSave = Literal["stop", "continue"]
OnOutOfMemory = Literal["stop", "halve"]


@dataclass(frozen=True)
class Recovery:
    """What a run does about trouble. A run may be resumed with other values of these.

    Args:
        on_failed_save: When a checkpoint cannot be written, as on a full disk: stop ends the run; continue says so and goes on
            without that checkpoint, and holds lines of metrics.jsonl that cannot be written back for later.
        skip_bad_steps: Updates whose loss or gradient is not finite and that are left out, with a message, before the run
            stops for one; 0 stops at the first. A GPU then waits for every step's numbers.
        on_out_of_memory: When a step does not fit into memory: stop says what to lower; halve makes its micro-batches, and
            later ones of that size, again in halves. The update is the same up to rounding. Of one process only.
        reward_timeout: Seconds that a call of a reward function of your own may take; 0 waits for ever.
    """

    on_failed_save: OnFailedSave = "stop"
    skip_bad_steps: int = 0
    on_out_of_memory: OnOutOfMemory = "stop"
    reward_timeout: float = 0.0

    def __post_init__(self) -> None:
        if self.skip_bad_steps < 0 or not self.reward_timeout >= 0:
            raise ConfigError(f"skip_bad_steps and reward_timeout must not be negative; got {self}.")
        for name, allowed in (("on_failed_save", get_args(OnFailedSave)), ("on_out_of_memory", get_args(OnOutOfMemory))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be {' or '.join(allowed)}, got {getattr(self, name)!r}.")
