"""How parameters move, and when a run writes: the optimizer, its schedule, the guard before it, and the intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prefopt.errors import ConfigError, TrainingError
from prefopt.models.protocol import Policy


@dataclass(frozen=True)
class Optimization:
    """How parameters move.

    Args:
        learning_rate: peak of the schedule.
        schedule: after warm-up, "linear" to zero, "cosine" to zero, or "constant".
        warmup: share of the steps in which the rate rises linearly.
        weight_decay: AdamW's, on matrices only.
        clip_norm: gradients are scaled down to this global norm; 0 switches it off.
        adam_beta1: AdamW's decay of the mean.
        adam_beta2: AdamW's decay of the square.
    """

    learning_rate: float = 1e-5
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or not 0 <= self.warmup <= 1 or self.clip_norm < 0:
            raise ConfigError(f"learning_rate must be positive, warmup in [0, 1] and clip_norm not negative; got {self}.")

    def rate(self, step: int, total: int) -> float:
        """The learning rate of update `step` (0-based) of `total`, as a share of the peak."""
        warm = math.ceil(self.warmup * total)
        if step < warm:
            return (step + 1) / warm
        if self.schedule == "constant":
            return 1.0
        left = (total - step) / max(1, total - warm)
        return left if self.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))


@dataclass(frozen=True)
class Logging:
    """What is written, and when.

    Args:
        log_every: steps between lines of metrics.jsonl.
        save_every: steps between checkpoints, the last step included; 0 writes none.
        keep: how many checkpoints stay.
    """

    log_every: int = 10
    save_every: int = 0
    keep: int = 2


def build_optimizer(policy: Policy, optimization: Optimization) -> torch.optim.AdamW:
    """AdamW over the policy's parameter groups, each with its own scale of the learning rate."""
    groups = [
        {
            "params": group["params"],
            "lr_scale": group["lr_scale"],
            "lr": optimization.learning_rate * group["lr_scale"],
            "weight_decay": optimization.weight_decay if group["decay"] else 0.0,
        }
        for group in policy.parameter_groups()
    ]
    betas = (optimization.adam_beta1, optimization.adam_beta2)
    # fused: one pass over memory; on a CPU it takes a fifth of the time of the foreach form.
    return torch.optim.AdamW(groups, betas=betas, fused=True)


# Steps without a log line after which a deferred guard looks all the same: one wait in a hundred costs nothing.
_MOST_PENDING = 100


@dataclass(frozen=True)
class _Watched:
    """One step's numbers, on the device."""

    step: int
    rows: Sequence[str]
    terms: tuple[str, ...]
    values: Tensor  # [2 + terms]: loss, gradient norm, each term's weight


class UpdateGuard:
    """Keeps an update whose loss or gradient is not finite away from the weights.

    Args:
        optimizer: a fused AdamW. When deferred it is given `found_inf`, a flag on the device that makes it skip updates.
        device: of the parameters.
        deferred: `watch` does not wait for the device. The first bad update and all after it are skipped, and `check` says
            so later; otherwise `watch` checks at once.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device, *, deferred: bool) -> None:
        self._deferred = deferred
        self._pending: list[_Watched] = []
        self._bad = torch.zeros((), device=device)
        if deferred:
            optimizer.found_inf = self._bad  # type: ignore[attr-defined]

    def watch(self, step: int, rows: Sequence[str], loss: Tensor, norm: Tensor, weights: Mapping[str, Tensor]) -> None:
        """Looks at one step before its update.

        Args:
            step: 1-based.
            rows: record ids of the step.
            loss: scalar, the step's objective.
            norm: scalar, the gradient's norm.
            weights: of the terms, summed over the step; each must be positive.

        Raises:
            TrainingError: as `check`, when not deferred.
        """
        values = torch.stack([value.detach().double() for value in (loss, norm, *weights.values())])
        self._pending.append(_Watched(step, rows, tuple(weights), values))
        if not self._deferred:
            self.check()
            return
        good = values.isfinite().all() & (values[2:] > 0).all()
        self._bad.masked_fill_(~good, 1.0)
        if len(self._pending) >= _MOST_PENDING:
            self.check()

    def check(self) -> None:
        """Waits for the device, and looks at all steps since the last check.

        Raises:
            TrainingError: a loss or gradient was not finite, or nothing counted; it names the first such step and its rows.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        for watched, (loss, norm, *weights) in zip(pending, torch.stack([w.values for w in pending]).tolist(), strict=True):
            for name, weight in zip(watched.terms, weights, strict=True):
                if not weight > 0:
                    raise TrainingError(
                        f"step {watched.step}: the weights of {name!r} sum to {weight}; no row of this step counts. "
                        f"Rows: {some_ids(watched.rows)}."
                    )
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise TrainingError(
                    f"step {watched.step}: the {'gradient' if math.isfinite(loss) else 'loss'} is not finite "
                    f"(loss {loss:.6g}, gradient norm {norm:.6g}); neither this update nor a later one was made. "
                    f"Rows: {some_ids(watched.rows)}. Lower the learning rate, or look at these rows."
                )


def some_ids(ids: Sequence[str], most: int = 8) -> str:
    """Record ids for a message."""
    return ", ".join(ids[:most]) + (f" and {len(ids) - most} more" if len(ids) > most else "")
