"""PPO's gradient against the truth: the surrogate's on 100,000 samples and by enumeration, and REINFORCE as its first step.

The GAE, whitening and value loss of other projects are compared in tests/losses/test_golden.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from losses import get
from losses.advantages import discounted_returns
from losses.shaping import token_kls
from prefopt import algorithms
from prefopt.data.exact_world import ExactWorld, WorldConfig
from prefopt.data.records import Example
from prefopt.engines import OwnEngine
from prefopt.generate import Decoding
from prefopt.models.tabular import TabularPolicy, build_tabular
from prefopt.optimization import Optimization
from prefopt.packing import flat_roles, pack
from prefopt.rollouts import Workshop, rollouts
from prefopt.streams import Budget
from prefopt.trainer import fit

WORLD = ExactWorld(WorldConfig(seed=5, prompts=2, symbols=3, max_completion_length=3))
LAYOUT = WORLD.layout
REFERENCE_NEXT = WORLD.source_next_logps
KL_COEF = 0.3
SAMPLES = 100_000


def moved(logits: Tensor, size: float, seed: int) -> Tensor:
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (logits + size * noise).log_softmax(-1)


# Away from the reference, so that the penalty counts; and the policy away from the one that samples, so that ratios do.
OLD_NEXT = moved(REFERENCE_NEXT, 0.5, 1)
POLICY_NEXT = moved(OLD_NEXT, 0.15, 2)


def rewards_to_go() -> Tensor:
    """[C, T] advantages of each completion's tokens: hidden reward at the end, less kl_coef times k1 of each token."""
    old, reference = LAYOUT.path_values(OLD_NEXT)[0], LAYOUT.path_values(REFERENCE_NEXT)[0]
    rewards = -KL_COEF * token_kls(old, reference, LAYOUT.mask)
    rewards[torch.arange(LAYOUT.completions), LAYOUT.lengths - 1] += WORLD.rewards[0]
    return discounted_returns(rewards, LAYOUT.mask)["advantages"]


def surrogate(tokens: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> Tensor:
    """[N] the registered loss of each sequence, summed over its tokens."""
    loss = get("ppo_policy").bind(clip_low=min(clip, 1.0), clip_high=clip, length_norm="seq_sum")
    (term,) = loss.terms
    given = {"policy_token_logps": tokens, "old_token_logps": old, "advantages": advantages, "mask": mask}
    return term(given).loss


def gradient_by_enumeration(clip: float) -> Tensor:
    """[N*V] of the expected surrogate, every completion with its probability under the sampling policy."""
    logits = POLICY_NEXT.clone().requires_grad_()
    tokens, old = LAYOUT.path_values(logits.log_softmax(-1))[0], LAYOUT.path_values(OLD_NEXT)[0]
    probability = LAYOUT.path_sums(OLD_NEXT)[0].exp()
    total = (surrogate(tokens, old, rewards_to_go(), LAYOUT.mask, clip) * probability).sum()
    (gradient,) = torch.autograd.grad(total, logits)
    return gradient[0].flatten()


@cache
def sampled_completions() -> Tensor:
    """[SAMPLES] indices, drawn by the engine from the policy that samples, of the first prompt."""
    engine = OwnEngine((LAYOUT.eos,))
    engine.sync(build_tabular(WORLD, OLD_NEXT)[0])
    drawn = engine.generate(WORLD.prompt_ids[:1], Decoding(LAYOUT.limit, batch_size=SAMPLES), 7, SAMPLES)
    index = {
        tuple(row[:length]): i for i, (row, length) in enumerate(zip(LAYOUT.ids.tolist(), LAYOUT.lengths.tolist(), strict=True))
    }
    return torch.tensor([index[sample.ids] for sample in drawn])


def gradient_by_sampling(clip: float) -> tuple[Tensor, Tensor]:
    """Mean [N*V] over samples and the covariance of that mean, through the shared forward.

    Samples of one completion have one gradient, so each is taken once and counted.
    """
    policy, _ = build_tabular(WORLD, POLICY_NEXT)
    old_policy, _ = build_tabular(WORLD, OLD_NEXT)
    seen, counts = sampled_completions().unique(return_counts=True)
    ids = tuple(tuple(LAYOUT.ids[c, : LAYOUT.lengths[c]].tolist()) for c in seen.tolist())
    batch = pack([Example("", WORLD.prompt_ids[0], ids)], roles=flat_roles, dtype=torch.float64)
    old = old_policy.rows(batch, ["token_logps"])["token_logps"].detach()
    tokens = policy.rows(batch, ["token_logps"])["token_logps"]
    values = surrogate(tokens, old, rewards_to_go()[seen, : tokens.shape[1]], batch.mask, clip)
    each = [torch.autograd.grad(value, policy.logits, retain_graph=True)[0] for value in values]
    gradients, share = torch.stack(each)[:, : LAYOUT.prefixes].flatten(1), counts.double() / SAMPLES
    mean = share @ gradients
    centred = gradients - mean
    return mean, (centred * share[:, None]).T @ centred / (SAMPLES - 1)


@pytest.mark.parametrize("clip", [0.2, 1e6])
def test_the_sampled_gradient_is_the_enumerated_one(clip: float) -> None:
    """Three statements about the error of the mean, each within 4 standard errors, at a fixed seed.

    (1) Along 64 random directions and the enumerated gradient itself: one number each, so one standard error each.
    (2) Of every component: the largest of 50 normal variables exceeds 4 in 0.3% of seeds.
    (3) All together: the squared length of the error. With eigenvalues l of the covariance it is a weighted sum of chi-squares
        with mean sum(l) and variance 2 sum(l^2).
    """
    exact = gradient_by_enumeration(clip)
    mean, covariance = gradient_by_sampling(clip)
    error = mean - exact
    directions = torch.randn(64, len(exact), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    along = torch.cat([directions, exact[None]])
    spread = torch.einsum("di,ij,dj->d", along, covariance, along).sqrt()
    assert ((along @ error).abs() < 4 * spread).all()
    deviations = covariance.diagonal().sqrt()
    visited = deviations > 0
    assert (error[visited].abs() < 4 * deviations[visited]).all()
    assert visited.sum() > 40
    eigenvalues = torch.linalg.eigvalsh(covariance)
    assert (error.square().sum() - eigenvalues.sum()).abs() < 4 * (2 * eigenvalues.square().sum()).sqrt()
    # What this can tell: the gradient is many standard errors long, and that without the clip is another one.
    assert exact @ exact > 20 * spread[-1]
    other = gradient_by_enumeration(1e6 if clip == 0.2 else 0.2)
    assert (error - (other - exact)).square().sum() > 10 * eigenvalues.sum()


def hidden_reward(prompts: Sequence[Any], completions: Sequence[str]) -> Tensor:
    return torch.tensor([WORLD.reward_text(p, text) for p, text in zip(prompts, completions, strict=True)], dtype=torch.float64)


def trained(name: str, hyper: dict[str, Any], *, steps: int, heads: tuple[str, ...] = ()) -> TabularPolicy:
    """A table after some updates by `fit` on its own rollouts, one update to a buffer."""
    policy, reference = build_tabular(WORLD, REFERENCE_NEXT, heads=heads)
    setting = algorithms.get(name).setting(rollout_size=32, samples_per_prompt=4, ppo_epochs=1, kl_coef=KL_COEF, **hyper)
    advantage = setting.algorithm.loss.advantage
    assert advantage is not None
    examples = [Example(f"p{i}", WORLD.prompt_ids[i % 2], ()) for i in range(8)]
    workshop = Workshop(
        policy, reference, hidden_reward, examples, {e.id: WORLD.prompts[i % 2] for i, e in enumerate(examples)},
        Budget(batch_size=32, epochs=1e6, max_steps=steps), (LAYOUT.eos,), LAYOUT.limit, setting.loss.needs,
        partial(advantage, **setting.advantage_options), policy.dtype,
    )  # fmt: skip
    fit(policy, setting.loss, rollouts(workshop, **setting.stream_options), Optimization(learning_rate=0.1, clip_norm=0.0))
    return policy


@pytest.mark.parametrize(
    "hyper", [{"whiten_advantages": False}, {"whiten_advantages": True}, {"length_norm": "seq_sum"}], ids=str
)
def test_one_epoch_without_clipping_is_reinforce(hyper: dict[str, Any]) -> None:
    """At ratio 1 the surrogate's gradient is A grad log pi: same rollouts, same advantages, same updates to rounding.

    Each update changes what is sampled next, so three of them also say that the samples stayed the same.
    """
    ppo = trained("ppo_policy", {"clip_low": 1.0, "clip_high": 1e6, **hyper}, steps=3)
    reinforce = trained("reinforce", hyper, steps=3)
    assert torch.allclose(ppo.logits, reinforce.logits, rtol=0, atol=1e-12)
    assert (ppo.logits - REFERENCE_NEXT.flatten(0, 1)).abs().max() > 0.1


def test_with_values_one_epoch_of_ppo_without_clipping_is_a2c() -> None:
    options = {"vf_coef": 0.5, "value_clip": None, "gae_lambda": 0.9}
    ppo = trained("ppo", {"clip_low": 1.0, "clip_high": 1e6, **options}, steps=3, heads=("value",))
    a2c = trained("a2c", options, steps=3, heads=("value",))
    assert torch.allclose(ppo.logits, a2c.logits, rtol=0, atol=1e-12)
    assert ppo.values is not None
    assert a2c.values is not None
    assert torch.allclose(ppo.values, a2c.values, rtol=0, atol=1e-12)
    assert ppo.values.abs().max() > 0.1
