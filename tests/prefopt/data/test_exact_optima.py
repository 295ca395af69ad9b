"""Losses on the tabular exact world end where theory says: DPO, IPO and CPL against their closed forms."""

from __future__ import annotations

import pytest
import torch

from losses.cpl import cpl_loss
from losses.dpo import dpo_loss
from losses.ipo import ipo_loss
from prefopt.data.exact_world import ExactWorld, WorldConfig, kl, optimal_logps


@pytest.fixture(scope="module")
def tabular() -> ExactWorld:
    return ExactWorld(WorldConfig.tabular())


@pytest.fixture(scope="module")
def reference(tabular: ExactWorld) -> torch.Tensor:
    """A reference for the tabular world: its source [G, C]."""
    return tabular.sequence_logps(tabular.source_next_logps)


def minimise(objective, shape: torch.Size, iterations: int) -> torch.Tensor:
    """The table at which LBFGS leaves `objective`, from zeros."""
    table = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [table],
        max_iter=iterations,
        history_size=50,
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = objective(table)
        loss.backward()
        return loss

    optimizer.step(step)
    return table.detach()


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_dpo_on_the_population_ends_at_the_closed_form(tabular: ExactWorld, reference: torch.Tensor, beta: float) -> None:
    pairs = tabular.exact_soft_pairs(reference)
    first, second = (pairs.prompt, pairs.chosen), (pairs.prompt, pairs.rejected)

    def policy(table: torch.Tensor) -> torch.Tensor:
        return tabular.layout.path_sums((tabular.source_next_logps + table).log_softmax(-1))

    def loss(table: torch.Tensor) -> torch.Tensor:
        logps = policy(table)
        output = dpo_loss(logps[first], logps[second], reference[first], reference[second], pairs.soft_labels, beta=beta)
        return (output.loss * pairs.weight).sum()

    best = optimal_logps(reference, tabular.rewards, beta)
    assert float(kl(reference, best).mean()) > 0.5
    trained = policy(minimise(loss, tabular.source_next_logps.shape, 500))
    assert float(kl(trained, best).max()) < 0.02


def test_dpo_nears_the_optimum_as_pairs_grow(tabular: ExactWorld, reference: torch.Tensor) -> None:
    best = optimal_logps(reference, tabular.rewards, 1.0)

    def distance(n: int, seed: int) -> float:
        pairs = tabular.sample_pairs(reference, n, seed=seed)
        chosen, rejected = (pairs.prompt, pairs.chosen), (pairs.prompt, pairs.rejected)

        def loss(table: torch.Tensor) -> torch.Tensor:
            logps = tabular.layout.path_sums((tabular.source_next_logps + table).log_softmax(-1))
            return dpo_loss(logps[chosen], logps[rejected], reference[chosen], reference[rejected], beta=1.0).mean()

        # Few iterations: on few noisy pairs the loss has no finite minimum.
        table = minimise(loss, tabular.source_next_logps.shape, 20)
        return float(kl(tabular.layout.path_sums((tabular.source_next_logps + table).log_softmax(-1)), best).mean())

    few, more, many = (sum(distance(n, seed) for seed in range(3)) / 3 for n in (300, 3_000, 30_000))
    assert many < more / 2
    assert more < few / 2
    assert many < 0.1


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_cpl_nears_the_maximum_entropy_optimum(tabular: ExactWorld, reference: torch.Tensor, alpha: float) -> None:
    """CPL with bias 1 fits alpha log pi = A*: pi = exp(r / alpha) / Z, whatever policy the pairs came from."""
    layout = tabular.layout
    pairs = tabular.exact_soft_pairs(reference, labels="shifted:3")
    best = (tabular.rewards / alpha).log_softmax(-1)

    def loss(table: torch.Tensor) -> torch.Tensor:
        tokens = layout.path_values(table.log_softmax(-1))
        output = cpl_loss(
            tokens[pairs.prompt, pairs.chosen], tokens[pairs.prompt, pairs.rejected], layout.mask[pairs.chosen],
            layout.mask[pairs.rejected], pairs.soft_labels, alpha=alpha, bias=1.0, gamma=1.0,
        )  # fmt: skip
        return (output.loss * pairs.weight).sum()

    distances = [
        float(kl(layout.path_sums(minimise(loss, tabular.source_next_logps.shape, n).log_softmax(-1)), best).mean())
        for n in (3, 20, 300)
    ]
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 0.01


def test_ipo_of_sums_has_the_papers_optimum_and_ipo_of_means_another(tabular: ExactWorld, reference: torch.Tensor) -> None:
    """The sum form ends at pi ~ ref exp(p(y > ref) / tau) (Azar et al. 2023, eq. 7 with Psi the identity); where lengths
    vary, the mean form of the libraries is another objective with another optimum."""
    tau = 0.5
    pairs = tabular.exact_soft_pairs(reference)
    first, second = (pairs.prompt, pairs.chosen), (pairs.prompt, pairs.rejected)
    lengths = tabular.layout.lengths.double()
    assert lengths.unique().numel() > 1

    def policy(table: torch.Tensor) -> torch.Tensor:
        return tabular.layout.path_sums((tabular.source_next_logps + table).log_softmax(-1))

    def train(average_log_prob: bool) -> torch.Tensor:
        def loss(table: torch.Tensor) -> torch.Tensor:
            logps = policy(table)
            output = ipo_loss(
                logps[first], logps[second], reference[first], reference[second],
                lengths[pairs.chosen], lengths[pairs.rejected],
                pairs.soft_labels, tau=tau, average_log_prob=average_log_prob,
            )  # fmt: skip
            return (output.loss * pairs.weight).sum()

        return policy(minimise(loss, tabular.source_next_logps.shape, 500))

    gaps = tabular.rewards.unsqueeze(2) - tabular.rewards.unsqueeze(1)  # [G, C, C]
    preferred = (reference.exp().unsqueeze(1) * gaps.sigmoid()).sum(-1)  # p(y > ref)
    best = (reference + preferred / tau).log_softmax(-1)
    assert float(kl(reference, best).mean()) > 0.05
    assert float(kl(train(average_log_prob=False), best).max()) < 1e-4
    assert float(kl(train(average_log_prob=True), best).mean()) > 0.05
