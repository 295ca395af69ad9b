"""How each golden case is asked of this package: an adapter for every family of golden/peers.json.

An adapter takes a case's inputs and keywords under the peer's names and returns our `loss`, `per_example` values and extras,
connected to the inputs, so that gradients compare too. It renames, sums, averages and repeats; the maths is the package's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from losses import get
from losses.advantages import gae, group_baseline, leave_one_out
from losses.f_dpo import f_derivative
from losses.ops import kl_k1, kl_k3, masked_mean, masked_sum, whiten
from losses.shaping import redistribute, token_kls, token_rewards
from prefopt.forward import token_quantities
from prefopt.packing import Sampling

GOLDEN = json.loads((Path(__file__).parent / "golden" / "peers.json").read_text())
CASES: dict[str, dict[str, Any]] = {case["name"]: case for case in GOLDEN["cases"]}
Inputs = Mapping[str, Tensor]
Keywords = Mapping[str, Any]
Made = dict[str, Tensor]


class Adapter(NamedTuple):
    """`ours` names what is compared, as `dpo` or `ops.whiten`; it stands in the test's id, where -k finds it."""

    ours: str
    compare: Callable[[Inputs, Keywords], Made]


def tensor_of(reference: str) -> Tensor:
    group, name = reference.split(".")
    return torch.tensor(GOLDEN["inputs"][group][name]["data"], dtype=torch.float64)


MASKS = {"chosen_mask": tensor_of("tok.chosen_mask"), "rejected_mask": tensor_of("tok.rejected_mask")}
LENGTHS = {"chosen_lengths": MASKS["chosen_mask"].sum(-1), "rejected_lengths": MASKS["rejected_mask"].sum(-1)}
SIDES = ("chosen", "rejected")
PAIR = ("policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps", "reference_rejected_logps")
EXTRAS = {"rewards/accuracies": ("accuracy",), "clip_frac": ("clipfrac", "clip_ratio"), "kl/mismatched": ("kl",)}
"""The peers' names of our metrics that are means."""
OPTIONS = {
    "label_smoothing": ("label_smoothing", "ls", "epsilon"),
    "clip_low": ("epsilon_low", "clip_eps_low", "clip_eps_lo", "epsilon"),
    "clip_high": ("epsilon_high", "clip_eps_high", "clip_eps_hi", "epsilon"),
    "max_ratio": ("epsilon_high",),
    "beta": ("beta", "kl_coeff"),
    "value_clip": ("value_clip_range",),
    "vf_coef": ("value_coeff",),
}
"""The peers' names of our options that mean the same."""
VALUES = {"values": "v", "old_values": "oldv", "returns": "ret"}


def run(name: str, tensors: Inputs, **hyper: Any) -> Made:
    """The registered loss as a trainer runs it: every term over its own weight, times its coefficient."""
    bound = get(name).bind(**hyper)
    outputs = bound(tensors)
    made = {"loss": torch.stack([term.coefficient * outputs[term.name].mean() for term in bound.terms]).sum()}
    for term, out in outputs.items():
        made[f"{term}_loss"], made["per_example"] = out.mean(), out.loss
        for metric, theirs in EXTRAS.items():
            if metric in out.metrics:
                values, weight = out.metrics[metric]  # type: ignore[misc]
                made |= dict.fromkeys(theirs, (values * weight).sum() / weight.sum())
        for side in SIDES:
            if f"rewards/{side}" in out.metrics:
                made[f"{side}_rewards"] = out.metrics[f"rewards/{side}"][0]  # type: ignore[index]
    return made


def options(name: str, keywords: Keywords) -> dict[str, Any]:
    """The keywords that the loss has, under our names."""
    theirs = {ours: [key for key in OPTIONS.get(ours, (ours,)) if key in keywords] for ours in get(name).hyper}
    return {ours: keywords[found[0]] for ours, found in theirs.items() if found}


def pair_tensors(inputs: Inputs, *, averaged: bool = False) -> Made:
    """Chosen, rejected, reference chosen and rejected in the peer's order; without a reference, one of zeros.

    Token log-probs are summed over their tokens. `averaged` log-probs are the sums of completions of one token.
    """
    sums = [tensor.sum(-1) if tensor.ndim == 2 else tensor for tensor in list(inputs.values())[:4]]
    sums += [torch.zeros_like(sums[0])] * (4 - len(sums))
    lengths = {key: torch.ones_like(sums[0]) for key in LENGTHS} if averaged else LENGTHS
    return {**dict(zip(PAIR, sums, strict=True)), **lengths, **MASKS}


def pairs(name: str) -> Adapter:
    return Adapter(name, lambda inputs, keywords: run(name, pair_tensors(inputs), **options(name, keywords)))


def ipo(inputs: Inputs, keywords: Keywords, average_log_prob: bool) -> Made:
    tau = keywords.get("tau", keywords.get("beta"))
    return run("ipo", pair_tensors(inputs), tau=tau, average_log_prob=average_log_prob)


def apo_without_constant(inputs: Inputs, keywords: Keywords) -> Made:
    """rlhf-book leaves out the 1."""
    made = pairs("apo_zero").compare(inputs, keywords)
    return {**made, "loss": made["loss"] - 1}


def simpo(inputs: Inputs, keywords: Keywords, ratio: str = "gamma_beta_ratio") -> Made:
    """Means, or HALOs' token log-probs. Some take gamma / beta, under the name `ratio`."""
    gamma = keywords[ratio] * keywords["beta"] if ratio in keywords else keywords["gamma"]
    tensors = pair_tensors(inputs, averaged=next(iter(inputs.values())).ndim == 1)
    return run("simpo", tensors, **options("simpo", {**keywords, "gamma": gamma}))


def odds_ratio(inputs: Inputs, keywords: Keywords) -> Made:
    """ORPO's second term alone, times its coefficient."""
    made = run("odds_ratio", pair_tensors(inputs, averaged=True))
    return {key: keywords["beta"] * made[key] for key in ("loss", "per_example")}


def f_dpo(inputs: Inputs, keywords: Keywords, loss: str) -> Made:
    """f' of each log-ratio, then another loss on its difference: the log-ratio under a reference of zeros."""
    divergence = keywords["f_divergence_type"].removesuffix("_divergence")
    tensors, strength = pair_tensors(inputs), keywords["beta"]
    if loss == "f_dpo":
        return run(loss, tensors, beta=strength, divergence=divergence)
    for side in SIDES:
        policy, reference = f"policy_{side}_logps", f"reference_{side}_logps"
        tensors[policy] = f_derivative(tensors[policy] - tensors[reference], divergence, 0.5)
        tensors[reference] = torch.zeros_like(tensors[policy])
    return run(loss, tensors, **({"tau": strength} if loss == "ipo" else {"beta": strength}))


def halves(tensor: Tensor, name: str, *prefixes: str) -> Made:
    """Rows that hold the chosen completions, then the rejected ones."""
    return {f"{prefix}{side}_{name}": half for prefix in prefixes for side, half in zip(SIDES, tensor.chunk(2), strict=True)}


def ld_dpo(inputs: Inputs, keywords: Keywords) -> Made:
    policy, reference = inputs["policy_both"], inputs["ref_both"]
    tokens = {**halves(policy, "token_logps", "policy_"), **halves(reference, "token_logps", "reference_")}
    return run("ld_dpo", {**tokens, **MASKS}, **keywords)


def likelihood(inputs: Inputs, keywords: Keywords, name: str, **options: float) -> Made:
    """SFT, alone or as RPO's second term."""
    tokens = inputs["lp"] if "lp" in inputs else inputs["per_token_logps"].chunk(2)[0]
    tensors = {**(pair_tensors(inputs) if name == "rpo" else MASKS), "policy_chosen_token_logps": tokens}
    return run(name, tensors, **options)


def kto(inputs: Inputs, keywords: Keywords) -> Made:
    tensors = labelled(inputs)
    if "kl" in inputs:
        kl = {"policy_mismatched_logps": inputs["kl"][None], "reference_mismatched_logps": torch.zeros(1).double()}
    else:
        kl = {"policy_mismatched_logps": inputs["KL_logps"], "reference_mismatched_logps": inputs["ref_KL_logps"]}
    return run("kto", {**tensors, **kl}, **keywords)


def bco(inputs: Inputs, keywords: Keywords) -> Made:
    shift = torch.tensor(keywords["delta"], dtype=torch.float64)
    return run("bco", {**labelled(inputs), "reward_shift": shift}, beta=keywords["beta"])


def labelled(inputs: Inputs) -> Made:
    """The chosen completions are the desirable ones; the rejected ones follow."""
    if "logps" in inputs:
        policy, reference = inputs["logps"], inputs["ref_logps"]
    else:
        ordered = list(inputs.values())
        policy, reference = torch.cat(ordered[:2]), torch.cat(ordered[2:4])
    desirable = torch.arange(len(policy)) < len(policy) // 2
    return {"policy_logps": policy, "reference_logps": reference, "desirable": desirable}


def cpl(inputs: Inputs, keywords: Keywords) -> Made:
    """Their label is 1 where segment 2 is preferred, 0 where segment 1 is, and 1/2 for a tie, which they score as a 0."""
    second = (inputs["label"] > 0.5)[:, None]
    chosen = torch.where(second, inputs["logp2"], inputs["logp1"])
    rejected = torch.where(second, inputs["logp1"], inputs["logp2"])
    tensors = {"policy_chosen_token_logps": chosen, "policy_rejected_token_logps": rejected}
    masks = {key: torch.ones_like(chosen) for key in MASKS}
    return run("cpl", {**tensors, **masks, "soft_labels": torch.maximum(inputs["label"], 1 - inputs["label"])}, **keywords)


def cpl_rank(inputs: Inputs, keywords: Keywords) -> Made:
    """Their batch is one group; a higher score is better."""
    ranks = (-inputs["s"]).argsort().argsort()[None]
    tensors = {"policy_group_logps": inputs["lp"].sum(-1)[None], "ranks": ranks, "group_mask": torch.ones_like(ranks)}
    return run("cpl_rank", tensors, **keywords)


def vocabulary(inputs: Inputs, *names: str) -> Made:
    """Token quantities [N, T] from logits, by the forward pass's own function; its head changes nothing."""
    logits = inputs["logits"]
    head = nn.Linear(logits.shape[-1], logits.shape[-1], bias=False, dtype=logits.dtype)
    head.requires_grad_(False).weight.copy_(torch.eye(logits.shape[-1]))
    reference = (inputs["ref_logits"].flatten(0, -2), head) if "ref_logits" in inputs else None
    targets = inputs["labels"].clamp(min=0).long() if "labels" in inputs else torch.zeros(logits.shape[:-1]).long()
    made = token_quantities(
        logits.flatten(0, -2), targets.flatten(), head, names=names, sampling=Sampling(), reference=reference
    )
    return {name: values.view(logits.shape[:-1]) for name, values in made.items()}


def shifted(inputs: Inputs) -> tuple[Made, Tensor]:
    """Logits before each label, which -100 masks, and the mask."""
    before = {key: value[:, :-1] for key, value in inputs.items() if key != "labels"}
    return {**before, "labels": inputs["labels"][:, 1:]}, (inputs["labels"][:, 1:] != -100).double()


def tdpo(inputs: Inputs, keywords: Keywords) -> Made:
    before, mask = shifted(inputs)
    made = vocabulary(before, "token_logps", "reference_token_logps", "token_kls")
    tensors = {
        **halves(masked_sum(made["token_logps"], mask, -1), "logps", "policy_"),
        **halves(masked_sum(made["reference_token_logps"], mask, -1), "logps", "reference_"),
        **halves(made["token_kls"], "token_kls", ""),
        **halves(mask, "mask", ""),
    }
    beta, version = keywords["beta"], 2 if keywords["if_tdpo2"] else 1
    out = run("tdpo", tensors, beta=beta, alpha=keywords["alpha"], version=version)
    # Their rewards hold the KL up to here; ours are the log-ratios, with the KL beside them.
    kls = masked_sum(made["token_kls"], mask, -1).detach().chunk(2)
    return {**out, **{f"{side}_rewards": out[f"{side}_rewards"] + beta * kl for side, kl in zip(SIDES, kls, strict=True)}}


def mean_logps(inputs: Inputs, keywords: Keywords) -> Made:
    before, mask = shifted(inputs)
    means = masked_mean(vocabulary(before, "token_logps")["token_logps"], mask, -1)
    return {"loss": means.mean(), "per_example": means}


def entropy(inputs: Inputs, keywords: Keywords) -> Made:
    """The entropy itself; ours is its negative, which a trainer minimises."""
    entropies = vocabulary(inputs, "entropies")["entropies"]
    made = run("entropy", {"entropies": entropies, "mask": inputs.get("mask", torch.ones_like(entropies))})
    return {"loss": -made["loss"], "per_example": -made["per_example"]}


def rollouts(name: str, *, old: str = "old", each_token: bool = False, **fixed: float | str) -> Adapter:
    """A policy-gradient loss; one advantage a sequence goes to all of its tokens.

    `each_token` makes every token a sequence of its own: a mean over sequences is then one over all tokens. `fixed` are
    options that the peer has in its code.
    """

    def compare(inputs: Inputs, keywords: Keywords) -> Made:
        logps, advantages = inputs["lp"], inputs["adv"]
        tokens = {
            "policy_token_logps": logps,
            "old_token_logps": inputs[old] if old in inputs else logps.detach(),
            "reference_token_logps": inputs["rp"] if "rp" in inputs else inputs.get("ref", torch.zeros_like(logps)),
            "advantages": advantages if advantages.ndim == 2 else advantages[:, None].expand_as(logps),
            "mask": inputs["mask"],
        }
        tokens |= {ours: inputs[theirs] for ours, theirs in VALUES.items() if theirs in inputs}
        if each_token:
            tokens = {key: value.reshape(-1, 1) for key, value in tokens.items()}
        limit = torch.tensor(float(keywords.get("max_completion_length", 0)), dtype=logps.dtype)
        made = run(name, {**tokens, "max_completion_length": limit}, **options(name, keywords), **fixed)
        return {**made, "policy_loss": made.get("ppo_policy_loss", made["loss"])}

    return Adapter(name, compare)


def group_advantages(inputs: Inputs, keywords: Keywords, function: Callable[..., Made], **ours: str) -> Made:
    """Three prompts of four samples; a sequence's reward stands at its only token."""
    rewards = inputs["rewards"][:, None]
    groups = torch.arange(len(rewards)) // 4
    named = {name: keywords[theirs] for name, theirs in ours.items()}
    return {"per_example": function(rewards, torch.ones_like(rewards), groups, **named)["advantages"][:, 0]}


def generalised_advantage(inputs: Inputs, keywords: Keywords, **whitening: bool) -> Made:
    """`whitening` are the options that give the peer's; without any, it does not whiten. Their lambda is 0.95 unless named."""
    mask = inputs.get("mask", torch.ones_like(inputs["rewards"]))
    made = gae(
        inputs["rewards"], inputs["values"], mask, whiten_advantages=False,
        discount=keywords.get("gamma", 1.0), gae_lambda=keywords.get("lmbda", keywords.get("lambd", 0.95)),
    )  # fmt: skip
    advantages = whiten(made["advantages"], mask, **whitening) if whitening else made["advantages"]
    return {"per_example": advantages, "returns": made["returns"]}


def whitening(inputs: Inputs, keywords: Keywords) -> Made:
    return {"per_example": whiten(inputs["v"], inputs["mask"], shift_mean=keywords["shift_mean"], bessel=True)}


def estimator(function: Callable[[Tensor, Tensor], Tensor], first: str, second: str) -> Adapter:
    """The arguments in the peer's order: rlhf-book's log-ratio has the opposite sign."""
    return Adapter(f"ops.{function.__name__}", lambda inputs, _: {"per_example": function(inputs[first], inputs[second])})


def penalised_rewards(inputs: Inputs, keywords: Keywords) -> Made:
    """Scores at the last token, a KL penalty on every token."""
    mask = (torch.arange(inputs["lp"].shape[-1]) < inputs["lens"][:, None]).double()
    given, price = (inputs["lp"], inputs["rp"], mask), keywords["kl_coeff"]
    rewards = token_rewards(inputs["scores"], *given, kl_coef=price)
    penalty = token_rewards(torch.zeros_like(inputs["scores"]), *given, kl_coef=price)
    return {"loss": rewards.mean(), "per_example": rewards, "kl": token_kls(*given), "kl_reward": penalty}


def attention_credit(inputs: Inputs, keywords: Keywords) -> Made:
    """The last token's attention to the response."""
    length = inputs["response"].shape[-1]
    weights = inputs["attention"].view(-1, *inputs["attention"].shape[-2:])[:, -1, -length:]
    mask = torch.ones_like(weights)
    spread = redistribute(inputs["score"].view(-1), weights, mask, credit_beta=keywords["beta"])[0]
    return {"loss": spread.mean(), "per_example": spread}


def bradley_terry(inputs: Inputs, keywords: Keywords) -> Made:
    tensors = {"chosen_rewards": inputs["c"], "rejected_rewards": inputs["r"]}
    margins = [inputs[name] for name in ("margin", "mgn") if name in inputs]
    return run("bradley_terry", {**tensors, **({"margins": margins[0]} if margins else {})})


inverted_whitening = partial(generalised_advantage, shift_mean=False, bessel=True)  # torchtune adds the mean back
FAMILIES: dict[str, Adapter] = {
    **{name: pairs(name) for name in ("hinge", "bco_pair", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop")},
    **{name: rollouts(name) for name in ("grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo")},
    **{function.__name__: Adapter(function.__name__, function) for function in (simpo, tdpo, kto, bco, cpl, entropy)},
    "sigmoid": pairs("dpo"),
    "cdpo": pairs("dpo"),
    "robust": pairs("robust_dpo"),
    "ipo": Adapter("ipo", partial(ipo, average_log_prob=True)),
    "ipo-sum": Adapter("ipo", partial(ipo, average_log_prob=False)),
    "exo_pair": pairs("exo"),
    "nca_pair": pairs("nca"),
    "sppo_hard": pairs("sppo"),
    "ld-dpo": Adapter("ld_dpo", ld_dpo),
    "cpo": pairs("cpo_preference"),
    "orpo": Adapter("odds_ratio", odds_ratio),
    "sft": Adapter("sft", partial(likelihood, name="sft")),
    "rpo": Adapter("rpo", partial(likelihood, name="rpo", beta=0.1, nll_coef=0.5)),
    "cpl-rank": Adapter("cpl_rank", cpl_rank),
    "ppo": rollouts("ppo_policy"),
    "sapo": rollouts("sapo", tau_positive=1.0, tau_negative=torch.tensor(1.05).item()),  # TRL's is in float32
    "rloo-adv": Adapter("advantages.leave_one_out", partial(group_advantages, function=leave_one_out, normalise="normalize")),
    "grpo-adv": Adapter("advantages.group_baseline", partial(group_advantages, function=group_baseline, scale="scale")),
    "gae": Adapter("advantages.gae", generalised_advantage),
    "whiten": Adapter("ops.whiten", whitening),
    "kl-reward": Adapter("shaping.token_rewards", penalised_rewards),
    "abc": Adapter("shaping.redistribute", attention_credit),
    "bt": Adapter("bradley_terry", bradley_terry),
    "bt-margin": Adapter("bradley_terry", bradley_terry),
    "logps": Adapter("ops.masked_mean", mean_logps),
}
BY_NAME: dict[str, Adapter] = {
    "trl_dpo/f-forward_kl/sigmoid/beta0.1": Adapter("f_dpo", partial(f_dpo, loss="f_dpo")),
    "trl_dpo/f-forward_kl/hinge/beta0.1": Adapter("f_dpo hinge", partial(f_dpo, loss="hinge")),
    "trl_dpo/f-js_divergence/ipo/beta0.1": Adapter("f_dpo ipo", partial(f_dpo, loss="ipo")),
    "trl_cpo/hinge/beta0.1": pairs("hinge"),
    "trl_cpo/ipo/beta0.1": Adapter("ipo", partial(ipo, average_log_prob=False)),  # of log-probs averaged before
    "rlhfbook/SimPOLoss/beta2.0_gamma0.5": Adapter("simpo", partial(simpo, ratio="gamma")),
    "rlhfbook/APOZeroLoss/beta0.1": Adapter("apo_zero", apo_without_constant),
    "halos/GRPO/beta0.01_eps0.2": rollouts("grpo", old="rp", each_token=True),
    "torchtune/GRPOLoss/eps0.2_kl0.1": rollouts("grpo", each_token=True),
    "torchtune/PPOLoss/eps0.2_vclip0.2_vcoef0.1": rollouts("ppo"),
    "liger_grpo/sapo/token/beta0.0": rollouts("sapo", tau_positive=1.0, tau_negative=1.05),
    "rlhfbook/ReinforceLoss": rollouts("reinforce", length_norm="seq_mean"),
    "torchtune/estimate_advantages/g1.0_l1.0": Adapter("advantages.gae", inverted_whitening),
    "torchtune/estimate_advantages/g0.9_l0.0": Adapter("advantages.gae", inverted_whitening),
    "trlx/gae/whitenTrue": Adapter("advantages.gae", partial(generalised_advantage, bessel=True)),
    "rlhfbook/approx_kl1": estimator(kl_k1, "ref", "lp"),
    "rlhfbook/approx_kl3": estimator(kl_k3, "ref", "lp"),
    "openrlhf/approx_kl/k3": estimator(kl_k3, "lp", "ref"),
}
"""Cases whose peer means something else by a name than the rest of its family."""
