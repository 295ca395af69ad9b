"""Every registered loss obeys the laws, and every law can fail."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from losses import LossOutput, Max, get, names, register
from losses.laws import LAWS, check
from losses.sampling import sample_tensors
from losses.types import VOCABULARY

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in names()),
    ("dpo", {"label_smoothing": 0.2}),
    ("ipo", {"average_log_prob": False}),
    ("cpl", {"gamma": 0.9, "bias": 1.0}),
    ("ppo", {"entropy_coef": 0.1}),
    *(("ppo_policy", {"length_norm": norm, "dual_clip": 3.0}) for norm in ("seq_mean", "seq_sum", "constant")),
    *(("ppo_offline", {"length_norm": norm, "advantage": "score"}) for norm in ("token", "seq_sum", "constant")),
    ("value", {"value_clip": None}),
    ("bradley_terry", {"center_coef": 0.01}),
    *(("rank_utility", {"utility": name}) for name in ("power:0.5", "inverse_power:0.5", "log_sigmoid:4")),
    *(("f_dpo", {"divergence": name, "alpha": 0.3}) for name in ("reverse_kl", "js", "alpha")),
    ("ld_dpo", {"ld_alpha": 0.0}),
    ("wpo", {"aligned": False, "label_smoothing": 0.1}),
    ("tdpo", {"version": 1}),
    *(("alphapo", {"alpha": alpha}) for alpha in (0.0, -0.5)),
    ("simpo", {"label_smoothing": 0.1}),
    ("discopop", {"tau": 2.0}),
    ("aot", {"label_smoothing": 0.1}),
    *(("rank_utility", {"utility": name}) for name in ("linear", "inverse", "log_sigmoid", "linear,inverse")),
    ("rank_utility", {"bounded": False}),
    *(("reinforce", {"length_norm": norm}) for norm in ("seq_mean", "seq_sum", "constant")),
    ("dpo:1.0+kto:0.5+grpo:0.1", {}),
]


def failures(name: str, seed: int, **options: Any) -> list[str]:
    return [f"{result.law}: {result.detail}" for result in check(name, seed, **options) if result.outcome == "failed"]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=lambda value: str(value))
@settings(max_examples=5)
@given(seed=st.integers(0, 2**31))
def test_every_loss_obeys_the_laws(name: str, options: dict[str, Any], seed: int) -> None:
    assert failures(name, seed, **options) == []


@pytest.mark.parametrize("name", [name for name in names() if get(name).bind().optional])
def test_the_laws_hold_without_optional_tensors(name: str) -> None:
    assert failures(name, 0, optional=False) == []


@pytest.mark.parametrize("name", names())
def test_masks_may_be_boolean_and_lengths_integers(name: str) -> None:
    """A batch may hold masks as bool and lengths as int64; the loss is the same."""
    loss = get(name).bind()
    tensors = sample_tensors(loss, torch.Generator().manual_seed(0))
    casts = {"mask": torch.bool, "lengths": torch.int64}
    kinds = {key: VOCABULARY[key].kind for key in tensors}
    other = {key: tensor.to(casts[kinds[key]]) if kinds[key] in casts else tensor for key, tensor in tensors.items()}
    for term, out in loss(tensors).items():
        torch.testing.assert_close(loss(other)[term].mean(), out.mean())


def leaks_padding(policy_token_logps: Tensor, mask: Tensor) -> LossOutput:
    """Divides by the padded length."""
    loss = policy_token_logps.mean(-1)
    return LossOutput(loss, torch.ones_like(loss))


def trains_padding(values: Tensor, mask: Tensor) -> LossOutput:
    """Values at padding cancel in the objective, but not in the gradient."""
    loss = (values * mask).sum(-1) + values.sum(-1) - values.sum(-1).detach()
    return LossOutput(loss, mask.any(-1).to(loss.dtype))


def leaks_in_a_metric(policy_token_logps: Tensor, mask: Tensor) -> LossOutput:
    weight = mask.to(policy_token_logps.dtype)
    return LossOutput(-policy_token_logps, weight, {"worst": Max(policy_token_logps.detach() * mask)})


def counts_rows_by_position(policy_logps: Tensor) -> LossOutput:
    position = torch.arange(len(policy_logps)).to(policy_logps.dtype)
    return LossOutput(policy_logps * position, torch.ones_like(policy_logps))


def has_a_batch_baseline(policy_logps: Tensor) -> LossOutput:
    """Rows interact, without the flag."""
    loss = (policy_logps - policy_logps.mean().detach()).square()
    return LossOutput(loss, torch.ones_like(loss))


def averages_tokens_by_part(policy_token_logps: Tensor, mask: Tensor) -> LossOutput:
    """A token mean inside the loss and one weight a batch: a mean of means over micro-batches."""
    loss = -(policy_token_logps * mask).sum() / mask.sum()
    return LossOutput(loss, torch.ones_like(loss))


def weighs_by_policy(policy_logps: Tensor) -> LossOutput:
    return LossOutput(-policy_logps, policy_logps.detach().exp())


def reports_with_gradient(policy_logps: Tensor) -> LossOutput:
    return LossOutput(-policy_logps, torch.ones_like(policy_logps), {"nll": (-policy_logps, torch.ones_like(policy_logps))})


def overflows(policy_logps: Tensor, reference_logps: Tensor) -> LossOutput:
    loss = (reference_logps - policy_logps).exp()
    return LossOutput(loss, torch.ones_like(loss))


def has_infinite_gradient(policy_logps: Tensor, reference_logps: Tensor) -> LossOutput:
    """Finite in value everywhere; log(sigmoid) has 0/0 as its slope once the sigmoid is 0, masked or not."""
    margin = policy_logps - reference_logps
    loss = torch.where(margin > -80, -torch.sigmoid(margin).log(), -margin)
    return LossOutput(loss, torch.ones_like(loss))


def divides_by_the_log_ratio(policy_token_logps: Tensor, reference_token_logps: Tensor, mask: Tensor) -> LossOutput:
    """Counts tokens by what is not zero, so that a policy at its reference has none."""
    log_ratio = policy_token_logps - reference_token_logps
    loss = log_ratio.sum(-1) / (log_ratio != 0).sum(-1)
    return LossOutput(loss, mask.any(-1).to(loss.dtype))


def forgets_the_rejected(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor) -> LossOutput:
    loss = policy_rejected_logps.detach() - policy_chosen_logps
    return LossOutput(loss, torch.ones_like(loss))


@pytest.mark.usefixtures("fresh_registry")
@pytest.mark.parametrize(
    ("law", "broken"),
    [
        ("padding_invariant", leaks_padding),
        ("padding_invariant", trains_padding),
        ("padding_invariant", leaks_in_a_metric),
        ("permutation_invariant", counts_rows_by_position),
        ("split_equals_whole", has_a_batch_baseline),
        ("split_equals_whole", averages_tokens_by_part),
        ("weights_ignore_policy", weighs_by_policy),
        ("weights_ignore_policy", reports_with_gradient),
        ("finite_at_extremes", overflows),
        ("finite_at_extremes", has_infinite_gradient),
        ("finite_at_reference", divides_by_the_log_ratio),
        ("gradients_reach_policy", forgets_the_rejected),
    ],
)
def test_each_law_catches_a_loss_that_breaks_it(law: str, broken: Callable[..., LossOutput]) -> None:
    register("broken")(broken)
    outcomes = {result.law: result.outcome for result in check("broken")}
    assert outcomes[law] == "failed"


@pytest.mark.usefixtures("fresh_registry")
def test_broken_losses_cover_all_laws_and_coupled_ones_skip_splitting() -> None:
    register("coupled", coupled=True)(has_a_batch_baseline)
    outcomes = {result.law: result.outcome for result in check("coupled")}
    assert list(outcomes) == [law.__name__ for law in LAWS]
    assert outcomes == {**dict.fromkeys(outcomes, "passed"), "split_equals_whole": "skipped", "padding_invariant": "skipped"}


@pytest.mark.usefixtures("fresh_registry")
def test_the_laws_hold_for_groups_of_completions() -> None:
    """A listwise loss on [G, K] and a token loss on [G, K, T] pass; one that ignores the group's mask fails."""

    def listwise(policy_group_logps: Tensor, reference_group_logps: Tensor, ranks: Tensor, group_mask: Tensor) -> LossOutput:
        rewards = (policy_group_logps - reference_group_logps).masked_fill(~group_mask.bool(), -1e9)
        ranked = rewards.gather(-1, ranks.argsort(-1))
        loss = ((ranked.flip(-1).logcumsumexp(-1).flip(-1) - ranked) * (ranked > -1e8)).sum(-1)
        return LossOutput(loss, torch.ones_like(loss))

    def group_nll(policy_group_token_logps: Tensor, group_token_mask: Tensor) -> LossOutput:
        return LossOutput(-policy_group_token_logps, group_token_mask.to(policy_group_token_logps.dtype))

    def unmasked(group_rewards: Tensor, group_mask: Tensor) -> LossOutput:
        loss = group_rewards.logsumexp(-1)
        return LossOutput(loss, torch.ones_like(loss))

    for function in (listwise, group_nll, unmasked):
        register(function.__name__)(function)
    assert failures("listwise", 0) == []
    assert failures("group_nll", 0) == []
    assert failures("unmasked", 0)[0].startswith("padding_invariant")


@pytest.mark.slow
def test_a_users_file_enters_the_laws(tmp_path: Path) -> None:
    """`--import FILE` registers before collection; a file that is not there is an error."""
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from losses import LossOutput, register\n"
        "from torch import Tensor, ones_like\n"
        "@register('mine')\n"
        "def mine_loss(policy_logps: Tensor) -> LossOutput:\n"
        "    return LossOutput(-policy_logps, ones_like(policy_logps))\n"
    )

    def run(file: Path) -> str:
        command = [
            sys.executable,
            "-m",
            "pytest",
            __file__,
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            "obey and mine",
            "--import",
            str(file),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        return done.stdout + done.stderr

    assert "1 passed" in run(mine)
    assert "absent.py: no such file" in run(tmp_path / "absent.py")
