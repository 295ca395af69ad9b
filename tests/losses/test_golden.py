"""Agreement with values computed by other projects' own code (golden/peers.json; each case names project, commit, lines).

Every case is compared in value, in per-example values and extras where the peer returns them, and in gradients. The second half
says what ours is where a peer's number is a defect; docs/peers.md lists them all.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from losses import (
    bradley_terry_loss,
    cpl_loss,
    cpl_rank_loss,
    f_dpo_loss,
    get,
    grpo_loss,
    ipo_loss,
    odds_ratio_loss,
)
from losses.advantages import gae
from losses.ops import masked_mean, whiten
from tests.losses.golden_adapters import (
    BY_NAME,
    CASES,
    FAMILIES,
    LENGTHS,
    MASKS,
    PAIR,
    Adapter,
    pair_tensors,
    tdpo,
    tensor_of,
)

NOT_OURS = {"ratio_mean": "ratio/max is logged instead", "ppo_kl": "the k1 estimate; approx_kl is k3"}
"""Extras that nothing here returns."""
COUNTED = {"accuracy", "clipfrac", "clip_ratio"}
"""Shares, which some peers count in float32."""
FLOAT32_CONSTANTS = {
    "trl_dpo/exo_pair/beta0.1/ls0.1": "the label smoothing",
    "liger_dpo/exo_pair/beta0.1/ls0.001": "the label smoothing",
    "trl_rloo/advantages/normalizeTrue": "n/(n-1) in the variance",
    "trl_grpo/advantages/group": "n/(n-1) in the variance",
    "trl_grpo/advantages/batch": "n/(n-1) in the variance",
}
"""What the peer keeps in float32 while its tensors are float64: with that, its numbers are reproduced to the last digit."""
PADDING = {"whiten": tensor_of("pg.mask"), "ld-dpo": torch.cat(list(MASKS.values()))}
"""Families whose peer leaves numbers in padding, with the mask; ours are 0 there."""

CONSTANTS = {"KL_logps", "ref_KL_logps", "kl", "old", "ref", "rp", "adv", "oldv", "ret"}
"""Inputs that no peer sends a gradient to: baselines, sampling policy, reference of a rollout, advantages, targets."""


def adapter_of(name: str) -> Adapter:
    return BY_NAME.get(name) or FAMILIES[CASES[name]["family"]]


def with_our_name(name: str) -> Any:
    return pytest.param(name, id=f"{adapter_of(name).ours}: {name}")


def tolerance(name: str) -> dict[str, float]:
    case = CASES[name]
    if case["dtype"] == "float32" or case["rtol"] > 1e-9:
        return {"rtol": 2e-6, "atol": 2e-6}
    return {"rtol": 5e-8, "atol": 5e-8} if name in FLOAT32_CONSTANTS else {"rtol": 1e-10, "atol": 1e-9}


@pytest.mark.parametrize("name", [with_our_name(name) for name in CASES])
def test_agrees_with_peer(name: str) -> None:
    case = CASES[name]
    dtype = getattr(torch, case["dtype"])
    inputs = {key: tensor_of(reference).to(dtype) for key, reference in case["inputs"].items()}
    leaves = {key: inputs[key].requires_grad_() for key in case.get("grads", {})}
    constants = {key: inputs[key].requires_grad_() for key in inputs.keys() & CONSTANTS if leaves}
    made = adapter_of(name).compare(inputs, case["kwargs"])

    outputs = {**case["outputs"], **case["outputs"].get("extra", {})}
    compared = outputs.keys() - NOT_OURS.keys() - {"extra"}
    if "per_example" in outputs and "loss" not in made:
        compared -= {"loss"}  # no loss of the peer's: the mean of its values, padding included
    for key in sorted(compared):
        theirs = torch.tensor(outputs[key], dtype=dtype)
        if case["family"] in PADDING and theirs.ndim == 2:
            theirs = theirs * PADDING[case["family"]]
        near = {"rtol": 0.0, "atol": 1e-7} if key in COUNTED else tolerance(name)
        torch.testing.assert_close(made[key].detach().to(dtype), theirs, **near, msg=lambda text, key=key: f"{key}: {text}")
    if leaves:
        made["loss"].backward()
    for key, leaf in leaves.items():
        theirs = torch.tensor(case["grads"][key], dtype=dtype)
        if case["family"] in PADDING:
            theirs = theirs * PADDING[case["family"]]
        torch.testing.assert_close(leaf.grad, theirs, **tolerance(name), msg=lambda text, key=key: f"gradient, {key}: {text}")
    for key, constant in constants.items():
        assert constant.grad is None or not constant.grad.any(), f"a gradient reaches {key}"


def test_every_case_is_compared() -> None:
    adapters = {name: adapter_of(name) for name in CASES}  # KeyError: a case that nobody reads
    assert len(adapters) == 102
    assert all(reason.strip() for reason in NOT_OURS.values())
    # Nothing stale: what the tables name is there.
    assert (BY_NAME.keys() | FLOAT32_CONSTANTS.keys()) <= CASES.keys()
    assert FAMILIES.keys() <= {CASES[name]["family"] for name in adapters if name not in BY_NAME}
    assert NOT_OURS.keys() <= {key for case in CASES.values() for key in case["outputs"].get("extra", {})}


def test_cpl_on_log_ratios_agrees_with_dpo_peers() -> None:
    """CPL with bias 1 on log-ratios is DPO: the peers' DPO values are CPL's too."""
    ratios = [tensor_of(f"tok.policy_{side}") - tensor_of(f"tok.ref_{side}") for side in ("chosen", "rejected")]
    masked = [ratio * mask for ratio, mask in zip(ratios, MASKS.values(), strict=True)]
    loss = cpl_loss(*masked, *MASKS.values(), alpha=0.1, bias=1.0).mean()
    assert loss.item() == pytest.approx(CASES["trl_dpo/sigmoid/beta0.1"]["outputs"]["loss"], abs=1e-12)


def test_ipo_counts_tokens_by_the_mask() -> None:
    """HALOs counts the tokens whose log-ratio is not 0: NaN where the policy is the reference, too few where it nearly is."""
    same = tensor_of("sum.ref_chosen"), tensor_of("sum.ref_rejected")
    chosen = (same[0] + 0.3).requires_grad_()  # one token's log-ratio
    at_start = ipo_loss(*same, *same, *LENGTHS.values(), tau=0.1)
    torch.testing.assert_close(at_start.loss, torch.full((6,), 25.0, dtype=torch.float64))
    out = ipo_loss(chosen, same[1], *same, *LENGTHS.values(), tau=0.1)
    torch.testing.assert_close(out.loss.detach(), (0.3 / LENGTHS["chosen_lengths"] - 5).square())
    out.mean().backward()
    assert chosen.grad is not None
    assert chosen.grad.isfinite().all()


def test_whitened_advantages_have_mean_0_over_tokens_alone() -> None:
    """torchtune adds the mean back; trlx takes mean and variance over padding too."""
    rewards, values, mask = (tensor_of(f"pg.{name}") for name in ("rewards", "values", "mask"))
    advantages = gae(rewards, values, mask, gae_lambda=1.0)["advantages"]
    assert abs(masked_mean(advantages, mask).item()) < 1e-12
    assert (advantages[mask == 0] == 0).all()
    theirs = torch.tensor(CASES["torchtune/estimate_advantages/g1.0_l1.0"]["outputs"]["per_example"])
    assert masked_mean(theirs, mask).item() < -0.1
    trlx = torch.tensor(CASES["trlx/gae/whitenTrue"]["outputs"]["per_example"], dtype=torch.float64)
    ours = whiten(gae(rewards, values, mask, whiten_advantages=False)["advantages"], mask, bessel=True)
    assert (trlx[mask == 0] != 0).all()
    assert ((trlx - ours) * mask).abs().max() > 0.01


def test_bradley_terry_does_not_overflow() -> None:
    """OpenRLHF's LogExpLoss is log(1 + exp(-x)): infinite in float32 from x = -89 on."""
    chosen, rejected = torch.tensor([-500.0], requires_grad=True), torch.tensor([500.0])
    assert torch.log(1 + torch.exp(rejected - chosen)).isinf()
    loss = bradley_terry_loss(chosen, rejected).mean()
    loss.backward()
    assert loss.item() == 1000.0
    assert chosen.grad == -1.0


def test_cpl_rank_counts_pairs_by_ranks_without_ties() -> None:
    """The authors' code counts pairs whose loss is not 0, and orders ties by chance."""
    logps, valid = torch.tensor([[3000.0, 0.0, 1.0]]), torch.ones(1, 3)
    # Pairs (0, 1) and (0, 2) lose nothing in any precision; (1, 2) is a nat on the wrong side. Three pairs, not one.
    loss = cpl_rank_loss(logps, torch.tensor([[0, 1, 2]]), valid, alpha=1.0, bias=1.0).mean()
    assert loss.item() == pytest.approx(torch.nn.functional.softplus(torch.tensor(1.0)).item() / 3)
    tied = [cpl_rank_loss(order, torch.tensor([[0, 1, 1]]), valid).mean() for order in (logps, logps[:, [0, 2, 1]])]
    assert tied[0] == tied[1]


def test_f_dpo_has_the_alpha_divergence_in_float64() -> None:
    """TRL's branch has no float64 (KeyError). At alpha 0 it is the forward KL, whose value TRL gives."""
    inputs = {name: tensor_of(f"sum.{name}") for name in ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")}
    sums = [pair_tensors(inputs)[name] for name in PAIR]
    forward = f_dpo_loss(*sums, divergence="alpha", alpha=0.0).mean().item()
    assert forward == pytest.approx(CASES["trl_dpo/f-forward_kl/sigmoid/beta0.1"]["outputs"]["loss"], abs=1e-12)
    half = f_dpo_loss(*sums, divergence="alpha", alpha=0.5).mean().item()
    assert forward < half < CASES["trl_dpo/sigmoid/beta0.1"]["outputs"]["loss"]


def test_slic_adds_two_means() -> None:
    """HALOs adds [P] and [P, T] tensors, which fails unless P = T. Ours: the hinge's mean plus 0.1 of the tokens' mean NLL."""
    tokens = {f"policy_{side}_token_logps": tensor_of(f"tok.policy_{side}") for side in ("chosen", "rejected")}
    sums = {name.replace("token_", ""): logps.sum(-1) for name, logps in tokens.items()}
    bound = get("slic").bind()
    outputs = bound({**tokens, **sums, **MASKS})
    total = sum(term.coefficient * outputs[term.name].mean() for term in bound.terms)
    hinge = torch.relu(1 - sums["policy_chosen_logps"] + sums["policy_rejected_logps"]).mean()
    assert total.item() == pytest.approx(hinge.item() + 0.1 * CASES["openrlhf/SFTLoss"]["outputs"]["loss"], abs=1e-12)


def test_tdpo_survives_a_certain_vocabulary() -> None:
    """The authors take softmax().log() of the reference: -inf where a probability underflows, and NaN in the KL."""
    logits, reference = (tensor_of(f"vocab.{name}").float() * 300 for name in ("logits", "ref_logits"))
    assert reference.softmax(-1).log().isinf().any()
    inputs = {"logits": logits.requires_grad_(), "ref_logits": reference, "labels": tensor_of("vocab.labels")}
    loss = tdpo(inputs, CASES["tdpo/1/alpha0.5"]["kwargs"])["loss"]
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_orpo_keeps_its_digits_near_certainty_and_a_finite_gradient_at_it() -> None:
    """ORPO's code and Liger's take log1p(-exp(x)), which loses its digits near 0; the gradient at 0 is infinite."""
    one = torch.ones(1)
    near = torch.tensor([-1e-5])
    exact = odds_ratio_loss(near.double(), -one.double(), one, one).loss.item()
    assert odds_ratio_loss(near, -one, one, one).loss.item() == pytest.approx(exact, rel=1e-6)
    certain = torch.zeros(1, requires_grad=True)
    odds_ratio_loss(certain, -one, one, one).mean().backward()
    assert certain.grad is not None
    assert certain.grad.isfinite().all()


def test_grpo_takes_the_ratio_to_the_sampling_policy() -> None:
    """HALOs takes it to the reference. The golden case compares with the reference as `old`; this is what that changes."""
    logps, old, reference, mask = (tensor_of(f"pg.{name}") for name in ("logprobs", "old_logprobs", "ref_logprobs", "mask"))
    advantages = tensor_of("pg.advantages_seq")[:, None].expand_as(logps)
    tokens = [tensor.reshape(-1, 1) for tensor in (logps, old, advantages, mask, reference)]
    ours = grpo_loss(*tokens, beta=0.01).mean().item()
    assert abs(ours - CASES["halos/GRPO/beta0.01_eps0.2"]["outputs"]["loss"]) > 0.01
