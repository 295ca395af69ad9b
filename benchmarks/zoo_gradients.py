"""What each offline loss pulls: the gradient of its objective by the log-prob of chosen and of rejected, over the margin.

The convention, for every loss alike: one pair. Both completions have `TOKENS` tokens, and the reference gives each token
log-prob `TOKEN_LOGP`. At margin m the policy's log-ratio to the reference is +m/2 for chosen and -m/2 for rejected, spread
evenly over the tokens. Unpaired losses see the two as a desirable and an undesirable row, list losses as a list of two.
Full-vocabulary quantities stay as at the reference (token KLs 0), mismatched completions too (KTO's baseline is 0), and so
does BCO's shift. Strengths are the middle of each grid of zoo.yaml, learning rates aside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.zoo_config import Zoo
from losses.registry import BoundLoss
from losses.types import VOCABULARY
from prefopt import algorithms
from prefopt.errors import ConfigError
from prefopt.report.plotting import DPI, INK, MUTED, styled, to_png

TOKENS, TOKEN_LOGP = 4, -1.5
# Up to 10 both log-probs stay below 0.
MARGINS = np.linspace(-10, 10, 161)
_CHOSEN, _REJECTED = "#0072B2", "#D55E00"
_COLUMNS = 6


@dataclass(frozen=True)
class Coefficients:
    """dL/dlogp of the chosen and of the rejected completion at each of `MARGINS` [M]; 0 where the loss does not see it."""

    chosen: np.ndarray
    rejected: np.ndarray


def coefficients(loss: BoundLoss) -> Coefficients:
    """A loss's gradient at every margin, by autograd."""
    found = [_gradient(loss, float(margin)) for margin in MARGINS]
    return Coefficients(*np.array(found).T)


def _gradient(loss: BoundLoss, margin: float) -> tuple[float, float]:
    """dL/dlogp of (chosen, rejected), whole completions, at one margin."""
    whole = TOKENS * TOKEN_LOGP
    sides = [torch.tensor(whole + sign * margin / 2, dtype=torch.float64, requires_grad=True) for sign in (1, -1)]
    tensors = {name: _tensor(name, sides) for name in loss.needs}
    terms = loss(tensors)
    objective = torch.stack([term.coefficient * terms[term.name].mean() for term in loss.terms]).sum()
    chosen, rejected = torch.autograd.grad(objective, sides, allow_unused=True, materialize_grads=True)
    return float(chosen), float(rejected)


def _tensor(name: str, sides: Sequence[Tensor]) -> Tensor:
    """The tensor of a name in the convention above; `sides` are the policy's sums of chosen and rejected.

    Raises:
        ConfigError: a tensor that the convention says nothing of.
    """
    spec = VOCABULARY[name]
    words = name.split("_")
    ones = torch.ones(2, TOKENS, dtype=torch.float64)
    # [2, T] of both completions, or the row of one side; a list has one more axis in front.
    match spec.kind:
        case "logps" | "token_logps" if name.endswith("logps"):
            live = spec.source == "policy" and "mismatched" not in words
            sums = torch.stack(list(sides)) if live else torch.full((2,), TOKENS * TOKEN_LOGP, dtype=torch.float64)
            both = ones * sums[:, None] / TOKENS
        case "token_logps":  # token_log_sum_sq: the weight exp(logp - log_sum_sq) is 1 at the reference
            both = ones * TOKEN_LOGP
        case "nonnegative" if "T" in spec.shape:
            both = ones * 0
        case "mask" | "lengths" if spec.shape:
            both = ones
        case "boolean":
            return torch.tensor([True, False])
        case "index":
            return torch.tensor([[0, 1]])
        case "real" if not spec.shape:
            return torch.zeros((), dtype=torch.float64)
        case _:
            raise ConfigError(
                f"the picture of gradients has no convention for {name!r}; say in benchmarks/zoo_gradients.py what it is."
            )
    if "T" not in spec.shape:
        both = both.amax(-1) if name == "group_mask" else both.sum(-1)
    rows = {"chosen": both[:1], "rejected": both[1:], "group": both[None]}
    return next((rows[side] for side in rows if side in words), both)


def draw_gradients(zoo: Zoo) -> bytes:
    """One panel a loss of the study; PNG."""
    found = {}
    for name, sweep in zoo.sweeps.items():
        trial = sweep.trials()[len(sweep.trials()) // 2]
        flag = commonprefix(sweep.strength.split("+")).rstrip("_") if sweep.strength else ""  # noqa: RUF071  of characters
        strength = f"{flag} {sweep.values[len(sweep.values) // 2]:g}" if flag else ""
        found[name] = (strength, coefficients(algorithms.get(name).setting(**trial.hyper).loss))
    return _draw(found)


def _draw(found: Mapping[str, tuple[str, Coefficients]]) -> bytes:
    """Panels in a grid; each has a scale of its own, whose largest value stands under its name."""
    rows = math.ceil(len(found) / _COLUMNS)
    with styled():
        figure = Figure(figsize=(9.4, 0.9 + 1.3 * rows), dpi=DPI, layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, _COLUMNS, sharex=True, sharey=True, squeeze=False).ravel()
        for axes in grid[len(found) :]:
            axes.set_visible(False)
        for place, (axes, (name, (strength, item))) in enumerate(zip(grid, found.items(), strict=False)):
            scale = float(np.max(np.abs([item.chosen, item.rejected])))
            axes.axhline(0, color=MUTED, linewidth=0.6)
            axes.axvline(0, color=MUTED, linewidth=0.6)
            axes.plot(MARGINS, item.chosen / scale, color=_CHOSEN, linewidth=1.6, label="chosen")
            axes.plot(MARGINS, item.rejected / scale, color=_REJECTED, linewidth=1.6, label="rejected", linestyle=(0, (4, 1)))
            axes.set_title(name, fontsize=8.5, pad=13)
            remark = ", ".join(filter(None, (strength, f"max {scale:.2g}")))
            label = axes.text(0, 1.04, remark, transform=axes.transAxes, va="bottom", fontsize=6.8, color=MUTED)
            label.set_in_layout(False)  # a long one would push the columns apart
            axes.set_ylim(-1.15, 1.15)
            axes.set_xticks([-10, 0, 10])
            axes.set_yticks([-1, 0, 1])
            axes.tick_params(labelsize=7, labelbottom=place + _COLUMNS >= len(found))
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False, fontsize=8.5)
        figure.supxlabel("margin: log-ratio of chosen less log-ratio of rejected, split evenly (nats)", fontsize=8.5, color=INK)
        figure.supylabel("dL / d log-prob, over its largest value", fontsize=8.5, color=INK)
        return to_png(figure)
