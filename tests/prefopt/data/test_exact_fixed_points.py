"""Points of rest of on-policy algorithms: the registered losses' own expected gradient, by enumeration, vanishes there and only
there. The world has 13 completions, so all 169 groups of two are listed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import losses
from losses.advantages import group_baseline
from prefopt.data.exact_world import ExactWorld, WorldConfig, best_of_n_logps, kl, objective, optimal_logps
from prefopt.data.exact_world.fixed_points import best_completion, k3_in_loss
from prefopt.errors import ConfigError

BETA = 0.5
WORLD = ExactWorld(WorldConfig(seed=4, prompts=2, symbols=3, max_completion_length=2))
LAYOUT, REWARDS, REFERENCE_NEXT = WORLD.layout, WORLD.rewards, WORLD.source_next_logps
REFERENCE = LAYOUT.path_sums(REFERENCE_NEXT)
OPTIMUM = optimal_logps(REFERENCE, REWARDS, BETA)


def token_logps(next_logps: Tensor) -> Tensor:
    """[G, C, T] log-prob of every token of every completion."""
    return LAYOUT.path_values(next_logps)


def gradient(logps: Tensor, objective_of: Callable[[int, Tensor, Tensor], Tensor]) -> Tensor:
    """[G, N, V] derivative in the logits at a policy [G, C]; `objective_of(prompt, [C, T] logps, [C] probabilities)`."""
    logits = LAYOUT.next_logps(logps).requires_grad_()
    per_token = token_logps(logits.log_softmax(-1))
    probabilities = per_token.sum(-1).exp().detach()
    total = sum(objective_of(g, per_token[g], probabilities[g]) for g in range(len(logps)))
    assert isinstance(total, Tensor)
    (found,) = torch.autograd.grad(total, logits)
    return found


def grpo(hyper: Mapping[str, Any], scale: str, *, loss: str = "grpo", kl_coef: float = 0.0) -> Callable[[Tensor], Tensor]:
    """The gradient of a group-relative loss on all groups of two completions, each with its probability."""
    bound = losses.get(loss).bind(**hyper)
    first, second = (index.flatten() for index in torch.meshgrid(*[torch.arange(LAYOUT.completions)] * 2, indexing="ij"))
    rows = torch.stack([first, second], dim=1).flatten()
    mask = LAYOUT.mask[rows]
    group_ids = torch.arange(len(first)).repeat_interleave(2)
    reference_tokens = token_logps(REFERENCE_NEXT)

    def objective_of(g: int, tokens: Tensor, probabilities: Tensor) -> Tensor:
        log_ratio = (tokens - reference_tokens[g]).sum(-1).detach()
        score = REWARDS[g] - kl_coef * log_ratio
        rewards = torch.zeros_like(mask)
        rewards[:, 0] = score[rows]
        made = group_baseline(rewards, mask, group_ids, scale=scale)  # type: ignore[arg-type]
        given = {
            "policy_token_logps": tokens[rows],
            "old_token_logps": tokens[rows].detach(),
            "reference_token_logps": reference_tokens[g][rows],
            "advantages": made["advantages"],
            "mask": mask,
            "max_completion_length": torch.tensor(float(LAYOUT.limit)),
        }
        (term,) = bound.terms
        output = term({name: given[name] for name in term.needs | term.optional if name in given})
        per_row = (output.loss * output.weight).flatten(1).sum(-1) if output.loss.dim() > 1 else output.loss * output.weight
        return ((probabilities[first] * probabilities[second])[:, None] * per_row.view(-1, 2)).sum()

    return lambda logps: gradient(logps, objective_of)


def online_dpo(labels: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The gradient of DPO on all pairs of the policy's samples; `labels`: reward gaps -> P(first preferred)."""

    def objective_of(g: int, tokens: Tensor, probabilities: Tensor) -> Tensor:
        ratios = tokens.sum(-1) - REFERENCE[g]
        wins = labels(REWARDS[g][:, None] - REWARDS[g])
        dpo = losses.get("dpo").bind(beta=BETA)
        rows = [side.flatten() for side in torch.meshgrid(ratios, ratios, indexing="ij")]
        (term,) = dpo.terms
        zeros = torch.zeros_like(rows[0])
        given = {
            "policy_chosen_logps": rows[0], "policy_rejected_logps": rows[1],
            "reference_chosen_logps": zeros, "reference_rejected_logps": zeros,
        }  # fmt: skip
        pair = probabilities[:, None] * probabilities
        return (term(given).loss.view_as(wins) * wins * pair).sum()

    return lambda logps: gradient(logps, objective_of)


def largest(values: Tensor) -> float:
    return float(values.abs().max())


@pytest.mark.parametrize(
    ("scale", "length_mean", "tolerance"),
    # The closed form of group scaling leaves out the 1e-4 beside the standard deviation.
    [("none", True, 1e-9), ("none", False, 1e-9), ("group", True, 1e-4)],
)
def test_k3_in_the_loss_rests_where_its_gradient_vanishes(scale: Any, length_mean: bool, tolerance: float) -> None:
    found = k3_in_loss(LAYOUT, REFERENCE_NEXT, REWARDS, BETA, samples=2, scale=scale, length_mean=length_mean)
    pull = grpo({"beta": BETA}, scale) if length_mean else summed_k3(scale)
    elsewhere = min(largest(pull(REFERENCE)), largest(pull(OPTIMUM)))
    assert largest(pull(found)) < tolerance < 1e-2 < elsewhere
    # Not the optimum of E[r] - beta KL: it gives up a part of what could be had.
    best = objective(OPTIMUM, REFERENCE, REWARDS, BETA)
    assert ((best - objective(found, REFERENCE, REWARDS, BETA)) > 0.005).all()


def summed_k3(scale: str) -> Callable[[Tensor], Tensor]:
    """GRPO's loss times the completion's length: sums in place of means."""
    inner = losses.get("grpo").bind(beta=BETA)
    reference_tokens = token_logps(REFERENCE_NEXT)

    def objective_of(g: int, tokens: Tensor, probabilities: Tensor) -> Tensor:
        (term,) = inner.terms
        expected_reward = (probabilities * REWARDS[g]).sum()
        # For K = 2 and no scaling, half of r - E[r] is what is left of the group's mean in expectation.
        advantages = 0.5 * (REWARDS[g] - expected_reward)[:, None] * LAYOUT.mask
        given = {
            "policy_token_logps": tokens, "old_token_logps": tokens.detach(), "advantages": advantages, "mask": LAYOUT.mask,
            "reference_token_logps": reference_tokens[g],
        }  # fmt: skip
        return (term(given).loss * LAYOUT.lengths * probabilities).sum()

    assert scale == "none"
    return lambda logps: gradient(logps, objective_of)


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_with_the_kl_in_the_reward_every_scaling_rests_at_the_optimum(scale: str) -> None:
    """All rewards less beta log-ratio are equal there, so no advantage is left to be scaled."""
    pull = grpo({"beta": 0.0}, scale, kl_coef=BETA)
    assert largest(pull(OPTIMUM)) < 1e-9 < 1e-2 < largest(pull(REFERENCE))


def test_online_dpo_with_bradley_terry_labels_rests_at_the_optimum() -> None:
    pull = online_dpo(torch.sigmoid)
    assert largest(pull(OPTIMUM)) < 1e-12 < 1e-3 < largest(pull(REFERENCE))


def test_hard_ranked_online_dpo_pulls_at_the_best_completion_wherever_it_is() -> None:
    """The derivative of the loss in the logit of the first step towards the best completion is negative at any policy."""
    pull = online_dpo(lambda gap: 0.5 + 0.5 * gap.sign())
    best = REWARDS.argmax(-1)
    for policy in (REFERENCE, OPTIMUM, optimal_logps(REFERENCE, REWARDS, 0.05), best_of_n_logps(REFERENCE, REWARDS, 8)):
        slope = pull(policy)
        for g, completion in enumerate(best.tolist()):
            length = int(LAYOUT.lengths[completion])
            steps = [slope[g, LAYOUT.prefix_of_token[completion, t], LAYOUT.ids[completion, t]] for t in range(length)]
            assert sum(steps) < 0


def test_the_best_completion_shares_ties() -> None:
    logps = best_completion(torch.tensor([[1.0, 3.0, 3.0], [2.0, 0.0, -1.0]], dtype=torch.float64))
    assert logps.exp().tolist() == [[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]]
    assert float(kl(logps, torch.full_like(logps, -math.log(3)))[1]) == pytest.approx(math.log(3))


def test_equal_rewards_leave_the_reference() -> None:
    found = k3_in_loss(LAYOUT, REFERENCE_NEXT, torch.ones_like(REWARDS), BETA, samples=4)
    assert torch.allclose(found, REFERENCE, atol=1e-12)


def test_one_step_by_hand() -> None:
    """Completions of one token: pi = beta ref / (lambda - kappa r). With ref = 1/2 each (a third symbol impossible), beta = 1,
    kappa = 1 - 1/2 and r = (3, 0): x/2 / (l - 1.5) + 1/2 / l = 1 at l = (2.5 + sqrt(3.25)) / 2."""
    world = ExactWorld(WorldConfig(prompts=1, symbols=2, max_completion_length=1, prompt_lengths=(1,)))
    reference = torch.tensor([[[math.log(0.5), math.log(0.5), -100.0]]], dtype=torch.float64)
    rewards = torch.zeros(1, world.layout.completions, dtype=torch.float64)
    rewards[0, world.layout.index([0])] = 3.0
    found = k3_in_loss(world.layout, reference, rewards, 1.0, samples=2)
    level = (2.5 + math.sqrt(3.25)) / 2
    assert float(found[0, world.layout.index([0])].exp()) == pytest.approx(0.5 / (level - 1.5))
    assert float(found[0, world.layout.index([1])].exp()) == pytest.approx(0.5 / level)


@pytest.mark.parametrize("changes", [{"beta": 0.0}, {"samples": 1}, {"scale": "group", "samples": 4}])
def test_what_has_no_closed_form_is_refused(changes: dict[str, Any]) -> None:
    given: dict[str, Any] = {"beta": 0.5, "samples": 2, **changes}
    with pytest.raises(ConfigError, match="expected beta > 0"):
        k3_in_loss(LAYOUT, REFERENCE_NEXT, REWARDS, given.pop("beta"), **given)
