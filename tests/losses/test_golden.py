"""Agreement with values computed by other projects' own code (golden/peers.json; each case names project, commit, lines).

Each case of a family that this package has is compared in value, in per-example values where the peer returns them, and in
gradients. A case is skipped only by name, with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from losses import (
    bradley_terry_loss,
    cpl_loss,
    dpo_loss,
    entropy_loss,
    ipo_loss,
    ppo_policy_loss,
    sft_loss,
    value_loss,
)
from losses.advantages import gae
from losses.ops import kl_k1, kl_k3, whiten

GOLDEN = json.loads((Path(__file__).parent / "golden" / "peers.json").read_text())
CASES: dict[str, dict[str, Any]] = {case["name"]: case for case in GOLDEN["cases"]}
Comparison = Callable[[dict[str, Tensor], dict[str, Any]], dict[str, Tensor]]
"""From a case's inputs and keywords to our `loss` and, where the peer has them, `per_example` and extra outputs."""


def tensor_of(reference: str) -> Tensor:
    group, name = reference.split(".")
    return torch.tensor(GOLDEN["inputs"][group][name]["data"], dtype=torch.float64)


MASKS = {"chosen_mask": tensor_of("tok.chosen_mask"), "rejected_mask": tensor_of("tok.rejected_mask")}


def dpo(inputs: dict[str, Tensor], keywords: dict[str, Any]) -> dict[str, Tensor]:
    smoothing = keywords.get("label_smoothing", keywords.get("epsilon", 0.0))
    out = dpo_loss(*sums(inputs), beta=keywords["beta"], label_smoothing=smoothing)
    rewards = {f"{side}_rewards": out.metrics[f"rewards/{side}"][0] for side in ("chosen", "rejected")}  # type: ignore[index]
    return {"loss": out.mean(), "per_example": out.loss, **rewards}


def ipo(inputs: dict[str, Tensor], keywords: dict[str, Any], average_log_prob: bool) -> dict[str, Tensor]:
    lengths = [mask.sum(-1) for mask in MASKS.values()]
    tau = keywords.get("tau", keywords.get("beta"))
    out = ipo_loss(*sums(inputs), *lengths, tau=tau, average_log_prob=average_log_prob)
    return {"loss": out.mean(), "per_example": out.loss}


def sums(inputs: dict[str, Tensor]) -> list[Tensor]:
    """Policy chosen, rejected, reference chosen, rejected, summed over tokens where the peer takes token log-probs."""
    ordered = [inputs[name] for name in list(inputs)[:4]]
    return [tensor.sum(-1) if tensor.ndim == 2 else tensor for tensor in ordered]


def rpo(inputs: dict[str, Tensor], keywords: dict[str, Any]) -> dict[str, Tensor]:
    return {"loss": dpo(inputs, keywords)["loss"] + 0.5 * sft(inputs, keywords)["loss"]}


def sft(inputs: dict[str, Tensor], keywords: dict[str, Any]) -> dict[str, Tensor]:
    logps = inputs["lp"] if "lp" in inputs else inputs["per_token_logps"][:6]  # rows: chosen, then rejected
    return {"loss": sft_loss(logps, MASKS["chosen_mask"]).mean()}


def cpl(inputs: dict[str, Tensor], keywords: dict[str, Any]) -> dict[str, Tensor]:
    """Their label is 1 where segment 2 is preferred, 1/2 for a tie."""
    logp1, logp2, label = inputs["logp1"], inputs["logp2"], inputs["label"]
    ones = torch.ones_like(logp1)
    return {"loss": cpl_loss(logp2, logp1, ones, ones, label, alpha=keywords["alpha"], bias=keywords["bias"]).mean()}


def surrogate(inputs: dict[str, Tensor], keywords: dict[str, Any], length_norm: str) -> dict[str, Tensor]:
    """PPO and, with one advantage a sequence, the GRPO family without KL."""
    advantages = inputs["adv"] if inputs["adv"].ndim == 2 else inputs["adv"][:, None].expand_as(inputs["lp"])
    names = {
        "clip_low": ("epsilon", "clip_eps_low", "epsilon_low", "clip_eps_lo"),
        "clip_high": ("epsilon", "clip_eps_high", "epsilon_high", "clip_eps_hi"),
    }
    clips = {ours: next(keywords[name] for name in theirs if name in keywords) for ours, theirs in names.items()}
    limit = torch.tensor(float(keywords.get("max_completion_length", 32)), dtype=torch.float64)
    out = ppo_policy_loss(inputs["lp"], inputs["old"], advantages, inputs["mask"], limit, **clips, length_norm=length_norm)
    values, weight = out.metrics["clip_frac"]  # type: ignore[misc]
    clip_frac = (values * weight).sum() / weight.sum()
    return {"loss": out.mean(), "policy_loss": out.mean(), "clipfrac": clip_frac, "clip_ratio": clip_frac}


def ppo(inputs: dict[str, Tensor], keywords: dict[str, Any]) -> dict[str, Tensor]:
    """Policy plus value loss, each a mean over tokens."""
    made = surrogate(inputs, keywords, "token")
    value = value_loss(inputs["v"], inputs["oldv"], inputs["ret"], inputs["mask"], value_clip=keywords["value_clip_range"])
    return {**made, "value_loss": value.mean(), "loss": made["loss"] + keywords["value_coeff"] * value.mean()}


def generalised_advantage(
    inputs: dict[str, Tensor], keywords: dict[str, Any], whitened: Callable[[Tensor, Tensor], Tensor] | None
) -> dict[str, Tensor]:
    mask = inputs.get("mask", torch.ones_like(inputs["rewards"]))
    gae_lambda = keywords.get("lmbda", keywords.get("lambd", 0.95))
    made = gae(
        inputs["rewards"], inputs["values"], mask,
        discount=keywords.get("gamma", 1.0), gae_lambda=gae_lambda, whiten_advantages=False,
    )  # fmt: skip
    advantages = whitened(made["advantages"], mask) if whitened else made["advantages"]
    return {"per_example": advantages, "returns": made["returns"]}


def whitening(inputs: dict[str, Tensor], keywords: dict[str, Any]) -> dict[str, Tensor]:
    made = whiten(inputs["v"], inputs["mask"], shift_mean=keywords["shift_mean"], bessel=True)
    return {"per_example": made}


def estimator(inputs: dict[str, Tensor], keywords: dict[str, Any], kl: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    return {"per_example": kl(inputs["lp"], inputs["ref"])}


def swapped(kl: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """rlhf-book's log-ratio has the opposite sign: the estimator of ours with its arguments exchanged."""
    return lambda logps, reference_logps: kl(reference_logps, logps)


def bradley_terry(inputs: dict[str, Tensor], keywords: dict[str, Any]) -> dict[str, Tensor]:
    return {"loss": bradley_terry_loss(inputs["c"], inputs["r"], inputs.get("margin", inputs.get("mgn"))).mean()}


def entropy(inputs: dict[str, Tensor], keywords: dict[str, Any]) -> dict[str, Tensor]:
    logps = inputs["logits"].log_softmax(-1)
    entropies = -(logps.exp() * logps).sum(-1)
    out = entropy_loss(entropies, inputs.get("mask", torch.ones_like(entropies)))
    return {"loss": -out.mean(), "per_example": -out.loss}


inverted = partial(whiten, shift_mean=False, bessel=True)  # torchtune's shift_mean=True adds the mean back
FAMILIES: dict[str, Comparison] = {
    "sigmoid": dpo,
    "cdpo": dpo,
    "ipo": partial(ipo, average_log_prob=True),
    "ipo-sum": partial(ipo, average_log_prob=False),
    "rpo": rpo,
    "sft": sft,
    "cpl": cpl,
    "bt": bradley_terry,
    "bt-margin": bradley_terry,
    "entropy": entropy,
    "whiten": whitening,
}
BY_NAME: dict[str, Comparison] = {
    "torchtune/PPOLoss/eps0.2_vclip0.2_vcoef0.1": ppo,
    "openrlhf/PolicyLoss/clip_eps_low0.2_clip_eps_high0.2": partial(surrogate, length_norm="token"),
    "openrlhf/PolicyLoss/clip_eps_low0.2_clip_eps_high0.28": partial(surrogate, length_norm="token"),
    "trl_grpo/grpo/token/beta0.0_eh0.2": partial(surrogate, length_norm="seq_mean"),
    "trl_grpo/bnpo/token/beta0.0_eh0.2": partial(surrogate, length_norm="token"),
    "trl_grpo/dapo/token/beta0.0_eh0.28": partial(surrogate, length_norm="token"),
    "liger_grpo/dr_grpo/token/beta0.0": partial(surrogate, length_norm="constant"),
    "rlhfbook/DAPOLoss": partial(surrogate, length_norm="token"),
    "torchtune/estimate_advantages/g1.0_l1.0": partial(generalised_advantage, whitened=inverted),
    "torchtune/estimate_advantages/g0.9_l0.0": partial(generalised_advantage, whitened=inverted),
    "openrlhf/gae/g1.0_l1.0": partial(generalised_advantage, whitened=None),
    "trlx/gae/whitenTrue": partial(generalised_advantage, whitened=partial(whiten, bessel=True)),
    "rlhfbook/approx_kl1": partial(estimator, kl=swapped(kl_k1)),
    "rlhfbook/approx_kl3": partial(estimator, kl=swapped(kl_k3)),
    "openrlhf/approx_kl/k3": partial(estimator, kl=kl_k3),
}
COMPARED = sorted({name for name, case in CASES.items() if case["family"] in FAMILIES} | BY_NAME.keys())
POLICY_GRADIENT_FAMILIES = {"ppo", "gae", "kl-estimator"}


@pytest.mark.parametrize("name", COMPARED)
def test_agrees_with_peer(name: str) -> None:
    case = CASES[name]
    inputs = {key: tensor_of(reference) for key, reference in case["inputs"].items()}
    leaves = {key: inputs[key].requires_grad_() for key in case.get("grads", {})}
    made = (BY_NAME.get(name) or FAMILIES[case["family"]])(inputs, case["kwargs"])
    tolerance = {"rtol": max(case["rtol"], 1e-9), "atol": 2e-6 if case["rtol"] > 1e-9 else 1e-9}
    outputs = {
        **{key: case["outputs"][key] for key in ("loss", "per_example") if key in case["outputs"]},
        **case["outputs"].get("extra", {}),
    }
    compared = [key for key in outputs if key in made]
    assert "loss" in compared or "per_example" in compared
    for key in compared:
        expected = torch.tensor(outputs[key], dtype=torch.float64)
        if "mask" in inputs and expected.shape == inputs["mask"].shape:
            expected = expected * inputs["mask"]  # peers leave their own numbers in padding; ours is 0 there
            made[key] = made[key] * inputs["mask"]
        # Ratios that a peer counts in float32 are right to that precision.
        loose = {"rtol": 1e-6, "atol": 1e-6} if key in ("clipfrac", "clip_ratio") else tolerance
        torch.testing.assert_close(made[key].detach(), expected, **loose, msg=lambda text, key=key: f"{key}: {text}")
    if leaves:
        (made["loss"] if "loss" in made else made["per_example"].mean()).backward()
    for key, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, torch.tensor(case["grads"][key], dtype=torch.float64), **tolerance)


def test_no_case_of_our_families_is_left_out() -> None:
    ours = {name for name, case in CASES.items() if case["family"] in FAMILIES.keys() | POLICY_GRADIENT_FAMILIES}
    assert ours <= set(COMPARED)


def test_cpl_on_log_ratios_agrees_with_dpo_peers() -> None:
    """CPL with bias 1 on log-ratios is DPO: the peers' DPO values are CPL's too."""
    ratios = [tensor_of(f"tok.policy_{side}") - tensor_of(f"tok.ref_{side}") for side in ("chosen", "rejected")]
    masked = [ratio * mask for ratio, mask in zip(ratios, MASKS.values(), strict=True)]
    loss = cpl_loss(*masked, *MASKS.values(), alpha=0.1, bias=1.0).mean()
    assert loss.item() == pytest.approx(CASES["trl_dpo/sigmoid/beta0.1"]["outputs"]["loss"], abs=1e-12)
