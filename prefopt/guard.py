"""The guard before every update: what is not finite is named, kept for a look, and never applied."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import singledispatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from prefopt.errors import TrainingError
from prefopt.models.protocol import Batch
from prefopt.packing import PackedBatch

# Steps without a log line after which a deferred guard looks all the same: one wait in a hundred costs nothing.
_MOST_PENDING = 100


@dataclass(frozen=True)
class _Watched:
    """One step's numbers, on the device."""

    step: int
    micro_batches: Sequence[Batch]
    terms: tuple[str, ...]
    values: Tensor  # [2 + terms]: loss, gradient norm, each term's weight


class UpdateGuard:
    """Keeps an update whose loss or gradient is not finite away from the weights.

    Args:
        optimizer: a fused AdamW. When deferred it is given `found_inf`, a flag on the device that makes it skip updates.
        device: of the parameters.
        deferred: `watch` does not wait for the device. The first bad update and all after it are skipped, and `check` says
            so later; otherwise `watch` checks at once.
        folder: where a bad step's batch is kept (`keep_step`); None keeps none.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, device: torch.device, *, deferred: bool, folder: Path | None = None
    ) -> None:
        self._deferred = deferred
        self._folder = folder
        self._pending: list[_Watched] = []
        self._bad = torch.zeros((), device=device)
        if deferred:
            optimizer.found_inf = self._bad  # type: ignore[attr-defined]

    def watch(
        self, step: int, micro_batches: Sequence[Batch], loss: Tensor, norm: Tensor, weights: Mapping[str, Tensor]
    ) -> None:
        """Looks at one step before its update.

        Args:
            step: 1-based.
            micro_batches: of the step.
            loss: scalar, the step's objective.
            norm: scalar, the gradient's norm.
            weights: of the terms, summed over the step; each must be positive.

        Raises:
            TrainingError: as `check`, when not deferred.
        """
        values = torch.stack([value.detach().double() for value in (loss, norm, *weights.values())])
        self._pending.append(_Watched(step, micro_batches, tuple(weights), values))
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
            NotFiniteError: a loss or gradient was not finite; it names the first such step, its rows, and where its batch is.
            TrainingError: nothing counted in a step; the same.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        for watched, (loss, norm, *weights) in zip(pending, torch.stack([w.values for w in pending]).tolist(), strict=True):
            rows = some_ids([row for batch in watched.micro_batches for row in batch.ids])
            for name, weight in zip(watched.terms, weights, strict=True):
                if not weight > 0:
                    raise TrainingError(
                        f"step {watched.step}: the weights of {name!r} sum to {weight}; no row of this step counts. "
                        f"Rows: {rows}."
                    )
            if not (math.isfinite(loss) and math.isfinite(norm)):
                what = f"the {'gradient' if math.isfinite(loss) else 'loss'} is not finite"
                numbers = {"loss": loss, "gradient norm": norm, **dict(zip(watched.terms, weights, strict=True))}
                kept = f"Rows: {rows}.{self._keep(watched, numbers)}"
                raise NotFiniteError(watched.step, f"{what} (loss {loss:.6g}, gradient norm {norm:.6g})", kept)

    def _keep(self, watched: _Watched, numbers: Mapping[str, float]) -> str:
        """Keeps a bad step's batch; a sentence that says where it is."""
        if self._folder is None:
            return ""
        try:
            return f" The batch is in {keep_step(self._folder, watched.step, watched.micro_batches, numbers)}."
        except (OSError, SafetensorError) as error:
            return f" The batch could not be written ({error})."


class NotFiniteError(TrainingError):
    """A step whose loss or gradient is not finite.

    Args:
        step: 1-based.
        what: is not finite.
        where: its rows, and the folder that its batch is kept in.
    """

    def __init__(self, step: int, what: str, where: str) -> None:
        self.step, self.what, self.where = step, what, where
        super().__init__(step, what, where)

    def __str__(self) -> str:
        return (
            f"step {self.step}: {self.what}; neither this update nor a later one was made. {self.where} Lower the learning "
            "rate, look at these rows, or leave out such steps by --skip-bad-steps."
        )


def keep_step(folder: Path, step: int, micro_batches: Sequence[Batch], numbers: Mapping[str, float]) -> Path:
    """Writes a step's batch as folder/bad-step-<step>, to be looked at: batch.json (row ids, token ids, numbers) and
    batch.safetensors (all tensors). A folder of that name is replaced.

    Args:
        folder: of the run.
        step: 1-based.
        micro_batches: of the step.
        numbers: loss, gradient norm and weights; what is not finite is written as text, for JSON has no NaN.
    """
    target = folder / f"bad-step-{step}"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    for number, batch in enumerate(micro_batches):
        tensors |= {f"{number}.{name}": value.detach().cpu().clone().contiguous() for name, value in _tensors(batch).items()}
    save_file(tensors, target / "batch.safetensors")
    plain = {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}
    text = {"step": step, **plain, "micro_batches": [_contents(batch) for batch in micro_batches]}
    (target / "batch.json").write_text(json.dumps(text, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return target


def _tensors(value: Any, prefix: str = "") -> dict[str, Tensor]:
    """All tensors of a batch by their dotted names; other kinds of batches than dataclasses have none."""
    if isinstance(value, Tensor):
        return {prefix: value}
    parts: Mapping[str, Any] = {}
    if is_dataclass(value):
        parts = {item.name: getattr(value, item.name) for item in fields(value)}
    elif isinstance(value, Mapping):
        parts = value
    found: dict[str, Tensor] = {}
    for name, part in parts.items():
        found |= _tensors(part, f"{prefix}.{name}" if prefix else str(name))
    return found


@singledispatch
def _contents(batch: Any) -> dict[str, Any]:
    """What of a micro-batch is readable as text."""
    return {"ids": list(batch.ids), "sizes": batch.sizes}


@_contents.register
def _(batch: PackedBatch) -> dict[str, Any]:
    ids, rows = batch.input_ids.tolist(), []
    for name, group in zip(batch.ids, batch.groups, strict=True):
        packed = ids[group.start : group.start + group.length]
        branches = [packed[begin:end] for begin, end in zip(group.starts, group.starts[1:], strict=False)]
        rows.append({"id": name, "prompt_ids": packed[: group.starts[0]], "completion_ids": branches})
    return {"rows": rows, "sizes": batch.sizes, "sampling": {"temperature": batch.sampling.temperature}}


def some_ids(ids: Sequence[str], most: int = 8) -> str:
    """Record ids for a message."""
    return ", ".join(ids[:most]) + (f" and {len(ids) - most} more" if len(ids) > most else "")
