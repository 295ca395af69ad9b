"""Contrastive preference learning as plainly as it can be written: what `benchmarks.control_speed` measures against.

The algorithm of Hejna et al. 2023 [hejna2023cpl] by torch alone: segments stand in arrays, a batch is an index into them, the
network is an `nn.Sequential` with `nn.Dropout`, and the loss is written out. Nothing of this project is used, and nothing is
slowed down or sped up. P pairs, B of a batch, L steps of a segment, O numbers of an observation, A of an action.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class PairData:
    """Labelled pairs of segments, their observations and actions stacked once, as the authors' data set holds them.

    Args:
        chosen_observations, rejected_observations: [P, L, O].
        chosen_actions, rejected_actions: [P, L, A].
    """

    chosen_observations: Tensor
    chosen_actions: Tensor
    rejected_observations: Tensor
    rejected_actions: Tensor

    def __len__(self) -> int:
        return len(self.chosen_actions)

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """[2B, L, O] observations and [2B, L, A] actions: the chosen segments, then the rejected ones."""
        index = torch.tensor(rows)
        observations = torch.cat([self.chosen_observations[index], self.rejected_observations[index]], dim=0)
        actions = torch.cat([self.chosen_actions[index], self.rejected_actions[index]], dim=0)
        return observations, actions


def stack_pairs(observations: Tensor, actions: Tensor, chosen: Tensor, rejected: Tensor, length: int) -> PairData:
    """Cuts the segments out of a table of steps.

    Args:
        observations, actions: [M, O] and [M, A].
        chosen, rejected: [P] first step of each segment.
        length: L.
    """

    def cut(values: Tensor, starts: Tensor) -> Tensor:
        return torch.stack([values[start : start + length] for start in starts.tolist()])

    return PairData(cut(observations, chosen), cut(actions, chosen), cut(observations, rejected), cut(actions, rejected))


def build_network(observation_size: int, action_size: int, hidden: Sequence[int], dropout: float) -> nn.Sequential:
    """The mean of the actions: hidden layers with ReLU and dropout, then tanh."""
    layers: list[nn.Module] = []
    width = observation_size
    for following in hidden:
        layers += [nn.Linear(width, following), nn.ReLU(), nn.Dropout(dropout)]
        width = following
    return nn.Sequential(*layers, nn.Linear(width, action_size), nn.Tanh())


def cpl_objective(network: nn.Module, observations: Tensor, actions: Tensor, *, alpha: float, bias: float) -> Tensor:
    """-log sigma(S_w - bias*S_l), S = sum_t alpha*log pi(a_t|s_t), log pi = -||a - mean||^2; mean over pairs, scalar."""
    logps = -torch.square(network(observations) - actions).sum(dim=-1)  # [2B, L]
    chosen, rejected = (alpha * logps).sum(dim=-1).chunk(2, dim=0)
    return -F.logsigmoid(chosen - bias * rejected).mean()


def train(
    network: nn.Module, data: PairData, batches: Iterable[Sequence[int]], *, learning_rate: float, alpha: float, bias: float
) -> list[float]:
    """Adam, one update a batch, in place; the loss of each."""
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    network.train()
    values: list[float] = []
    for rows in batches:
        observations, actions = data.batch(rows)
        loss = cpl_objective(network, observations, actions, alpha=alpha, bias=bias)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values
