"""A gridworld with slippery moves, small enough to solve exactly. S = size^2 states, row after row; 4 actions.

Entering the goal is worth a lot, entering a trap costs, every move costs a little. From the goal any action leads to an
ordinary cell at random, so the process never ends and segments of a fixed length may start and end anywhere. A segment that
starts near the goal earns much whatever it does, and one that makes the best of a far corner earns nothing: returns and
regrets rank segments differently.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prefopt.control.mdp import TabularMDP
from prefopt.data.exact_world.nature import generator
from prefopt.errors import ConfigError

ACTIONS = ("up", "right", "down", "left")
ARROWS = "↑→↓←"
GOAL, TRAP = "G", "x"

# Rows and columns of one move of each action; neighbours in this list are the sides that a move slips to.
_MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))
_CELLS = 1
"""Purpose of the stream of random numbers that cells are drawn from."""


@dataclass(frozen=True)
class Layout:
    """What stands where: `goal` and `traps` are states, that is row * size + column."""

    size: int
    goal: int
    traps: tuple[int, ...]

    @property
    def ordinary(self) -> tuple[int, ...]:
        """Cells that are neither goal nor trap, where episodes start."""
        return tuple(cell for cell in range(self.size**2) if cell != self.goal and cell not in self.traps)


def draw_layout(size: int = 5, *, traps: int = 3, seed: int = 0) -> Layout:
    """Goal and traps in different cells, drawn from the seed.

    Raises:
        ConfigError: fewer than 2 cells a side, or no ordinary cell left.
    """
    if size < 2 or not 0 <= traps <= size**2 - 2:
        raise ConfigError(f"gridworld: expected size >= 2 and traps in 0 … size^2 - 2, got size {size} and {traps} traps.")
    goal, *rest = generator(seed, _CELLS).permutation(size**2)[: traps + 1].tolist()
    return Layout(size, goal, tuple(sorted(rest)))


def gridworld(
    size: int = 5,
    *,
    traps: int = 3,
    slip: float = 0.2,
    goal_reward: float = 4.0,
    trap_reward: float = -2.0,
    step_reward: float = -0.1,
    discount: float = 0.9,
    temperature: float = 0.5,
    seed: int = 0,
) -> TabularMDP:
    """The MDP of `draw_layout(size, traps=traps, seed=seed)`.

    Args:
        slip: probability that a move goes to one of its two sides instead; a move into the wall stays.
        goal_reward, trap_reward: of entering the cell, added to `step_reward`. Leaving the goal earns nothing.
        temperature: of the soft-optimal policy, in units of reward.

    Raises:
        ConfigError: a slip outside [0, 1], or an error of `draw_layout` or `TabularMDP`.
    """
    if not 0 <= slip <= 1:
        raise ConfigError(f"gridworld: expected a slip in [0, 1], got {slip}.")
    layout = draw_layout(size, traps=traps, seed=seed)
    transitions = torch.zeros(size**2, len(ACTIONS), size**2, dtype=torch.float64)
    for cell in range(size**2):
        for action in range(len(ACTIONS)):
            for turn, probability in ((0, 1 - slip), (1, slip / 2), (-1, slip / 2)):
                transitions[cell, action, _neighbour(cell, (action + turn) % len(ACTIONS), size)] += probability
    start = torch.zeros(size**2, dtype=torch.float64)
    start[list(layout.ordinary)] = 1 / len(layout.ordinary)
    transitions[layout.goal] = start

    entering = torch.full((size**2,), step_reward, dtype=torch.float64)
    entering[layout.goal] += goal_reward
    entering[list(layout.traps)] += trap_reward
    rewards = transitions @ entering
    rewards[layout.goal] = 0.0
    return TabularMDP(transitions, rewards, discount, temperature, start)


def render(layout: Layout, logps: Tensor) -> str:
    """The likeliest action of each cell under a policy [S, A] as arrows, the goal as G, and an x behind a trap's arrow."""
    best = logps.argmax(-1).tolist()
    rows = []
    for row in range(layout.size):
        cells = range(row * layout.size, (row + 1) * layout.size)
        rows.append(
            " ".join(GOAL + " " if c == layout.goal else ARROWS[best[c]] + (TRAP if c in layout.traps else " ") for c in cells)
        )
    return "\n".join(line.rstrip() for line in rows)


def _neighbour(cell: int, action: int, size: int) -> int:
    """The cell that a move leads to; the same one at a wall."""
    row, column = divmod(cell, size)
    row, column = row + _MOVES[action][0], column + _MOVES[action][1]
    return row * size + column if 0 <= row < size and 0 <= column < size else cell
