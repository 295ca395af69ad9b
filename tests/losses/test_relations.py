"""The relations between losses as a graph: each edge says when two losses are one, in value and in gradient.

An edge names two registered losses with their options, the condition under which they agree, how the tensors of one follow
from those of the other, and the factor between them. Both are measured on sampled tensors as a step measures them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from losses import BoundLoss, get, names
from losses.laws import measure
from losses.ops import log1mexp, masked_sum
from losses.sampling import mask_of, sample_tensors
from losses.types import VOCABULARY

Tensors = dict[str, Tensor]
Change = Callable[[Tensors], Mapping[str, Tensor]]
SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Relation:
    """left = factor * right.

    Args:
        left: a registered name, `right` another (or the same, under other options).
        left_options: hyper-parameters; those not named keep their defaults.
        when: the condition, for people.
        given: tensors that the condition changes, for both losses.
        mapped: tensors that only the right loss sees.
        factor: of the right loss.
        compare: a constant between the two leaves the gradient; another gradient, the value.
        sizes: number of rows, completions or tokens.
        ragged: whether completions differ in length.
        rtol: for limits, how near they are.
    """

    left: str
    right: str
    left_options: Mapping[str, Any] = field(default_factory=dict)
    right_options: Mapping[str, Any] = field(default_factory=dict)
    when: str = ""
    given: Change = lambda t: {}
    mapped: Change = lambda t: {}
    factor: float = 1.0
    compare: Literal["both", "value", "gradient"] = "both"
    sizes: Mapping[str, int] = field(default_factory=dict)
    ragged: bool = True
    rtol: float = 1e-9

    def __str__(self) -> str:
        def side(name: str, options: Mapping[str, Any]) -> str:
            return f"{name}({', '.join(f'{key} {value}' for key, value in options.items())})" if options else name

        return f"{side(self.left, self.left_options)} = {side(self.right, self.right_options)} {self.when}".strip()


def log_ratios(t: Tensors) -> tuple[Tensor, Tensor]:
    """log pi/ref of the chosen and of the rejected completions, [P]."""
    chosen, rejected = (t[f"policy_{side}_logps"] - t[f"reference_{side}_logps"] for side in SIDES)
    return chosen, rejected


def at(t: Tensors, source: Literal["reference", "old"]) -> Tensors:
    """The policy's log-probs at the values of the reference or of the sampling policy, with the policy's gradient."""
    there = {name: name.replace("policy", source, 1) for name in t if name.startswith("policy")}
    return {name: t[name] - t[name].detach() + t[other] for name, other in there.items() if other in t}


def zero_reference(t: Tensors) -> Tensors:
    return {name: torch.zeros_like(tensor) for name, tensor in t.items() if name.startswith("reference")}


def unit_lengths(t: Tensors) -> Tensors:
    return {f"{side}_lengths": torch.ones_like(t[f"{side}_lengths"]) for side in SIDES}


def ranked_pair(t: Tensors) -> Tensors:
    """Of lists of two, the better one as chosen and the other as rejected."""
    found = {}
    for rank, side in enumerate(SIDES):
        place = (t["ranks"] == rank).long().argmax(-1, keepdim=True)
        for name, tensor in t.items():
            if name in ("policy_group_logps", "reference_group_logps", "group_rewards"):
                own = name.replace("group_", f"{side}_")
                found[own] = tensor.gather(-1, place)[:, 0]
    return found


def ratios_as_one_token(t: Tensors) -> Tensors:
    """Log-ratios as the log-probs of completions of one token."""
    tokens = {f"policy_{side}_token_logps": ratio[:, None] for side, ratio in zip(SIDES, log_ratios(t), strict=True)}
    return {**tokens, **{f"{side}_mask": torch.ones_like(t["reference_chosen_logps"])[:, None] for side in SIDES}}


def ranked_pair_of_one_token(t: Tensors) -> Tensors:
    pair = ranked_pair(t)
    tokens = {f"policy_{side}_token_logps": pair[f"policy_{side}_logps"][:, None] for side in SIDES}
    return {**tokens, **{f"{side}_mask": torch.ones_like(t["ranks"][:, :1]) for side in SIDES}}


def both_sides(t: Tensors) -> Tensors:
    """Unpaired completions out of pairs: the chosen ones are desirable, the rejected ones are not; no shift of rewards."""
    joined = {f"{who}_logps": torch.cat([t[f"{who}_{side}_logps"] for side in SIDES]) for who in ("policy", "reference")}
    count = len(t["policy_chosen_logps"])
    return {**joined, "desirable": torch.arange(2 * count) < count, "reward_shift": torch.zeros(())}


def both_sides_of_tokens(t: Tensors) -> Tensors:
    """Rollouts out of pairs, the reference being the sampling policy, with advantages +1 and -1."""
    policy, old = (torch.cat([t[f"{who}_{side}_token_logps"] for side in SIDES]) for who in ("policy", "reference"))
    mask = torch.cat([t[f"{side}_mask"] for side in SIDES])
    sign = torch.cat([torch.ones_like(t["chosen_mask"]), -torch.ones_like(t["rejected_mask"])])
    return {"policy_token_logps": policy, "old_token_logps": old, "mask": mask, "advantages": sign}


def equal_kls(t: Tensors) -> Tensors:
    return {"rejected_mask": t["chosen_mask"], "rejected_token_kls": t["chosen_token_kls"]}


def unit_weights(t: Tensors) -> Tensors:
    """Tokens as likely as the policy's own draws are on average."""
    return {f"{side}_token_log_sum_sq": t[f"policy_{side}_token_logps"] for side in SIDES}


def likelier_chosen(t: Tensors) -> Tensors:
    return {"policy_chosen_logps": t["reference_chosen_logps"] + log_ratios(t)[0].abs()}


def wrong_order(t: Tensors) -> Tensors:
    """Chosen completions less likely than under the reference, rejected ones likelier: every margin is under -0.1."""
    chosen, rejected = log_ratios(t)
    return {
        "policy_chosen_logps": t["reference_chosen_logps"] - chosen.abs() - 0.1,
        "policy_rejected_logps": t["reference_rejected_logps"] + rejected.abs(),
    }


def mirrored(t: Tensors) -> Tensors:
    return {"policy_rejected_logps": t["reference_rejected_logps"] - log_ratios(t)[0]}


def equal_rewards(t: Tensors) -> Tensors:
    return {"policy_rejected_logps": t["reference_rejected_logps"] + log_ratios(t)[0]}


def rejected_at_reference(t: Tensors) -> Tensors:
    return {"policy_rejected_logps": t["reference_rejected_logps"]}


def near_smoothed_optimum(t: Tensors) -> Tensors:
    """Margins that miss logit(1 - e)/beta, e = 0.2 and beta = 0.5, by a hundred-thousandth of what they are."""
    chosen, rejected = log_ratios(t)
    wanted = math.log(4) / 0.5 + 1e-5 * (chosen - rejected) + rejected
    return {"policy_chosen_logps": t["policy_chosen_logps"] + (wanted - chosen).detach()}


def margin_and_chosen(t: Tensors) -> Tensors:
    """The margin in place of the chosen log-ratio, and the chosen one in place of the rejected."""
    chosen, rejected = log_ratios(t)
    policy = {"policy_chosen_logps": chosen - rejected, "policy_rejected_logps": chosen}
    return {**policy, **zero_reference(t)}


def unlikely(t: Tensors) -> Tensors:
    """Tokens of probability e^-40 or less, whose odds are their probabilities."""
    return {f"policy_{side}_logps": t[f"policy_{side}_logps"] - 40 * t[f"{side}_lengths"] for side in SIDES}


def complementary(t: Tensors) -> Tensors:
    """Rejected tokens as likely as the chosen ones are not."""
    kept = t["chosen_mask"].bool()
    other = log1mexp(torch.where(kept, t["policy_chosen_token_logps"], -1.0))
    return {"rejected_mask": t["chosen_mask"], "policy_rejected_token_logps": torch.where(kept, other, 0.0)}


def implicit_rewards(beta: float) -> Change:
    def change(t: Tensors) -> Tensors:
        if "policy_group_logps" in t:
            return {"group_rewards": beta * (t["policy_group_logps"] - t.get("reference_group_logps", 0))}
        return {f"{side}_rewards": beta * ratio for side, ratio in zip(SIDES, log_ratios(t), strict=True)}

    return change


def soft_labels_of_4_in_5(t: Tensors) -> Tensors:
    return {"soft_labels": torch.full_like(t["policy_chosen_logps"], 0.8)}


def no_advantage(t: Tensors) -> Tensors:
    return {"advantages": torch.zeros_like(t["advantages"])}


def chosen_as_rollouts(t: Tensors) -> Tensors:
    """Demonstrations as rollouts of advantage 1."""
    logps, mask = t["policy_chosen_token_logps"], t["chosen_mask"]
    return {"policy_token_logps": logps, "mask": mask, "advantages": torch.ones_like(logps)}


def near_values(t: Tensors) -> Tensors:
    return {"old_values": t["values"].detach() + 0.19 * t["old_values"].sin()}


def on_policy(t: Tensors) -> Tensors:
    return at(t, "old")


def on_policy_by_sequence(t: Tensors) -> Tensors:
    """One advantage for all tokens of a sequence."""
    return {**on_policy(t), "advantages": t["advantages"][:, :1].expand_as(t["advantages"])}


def no_baseline(t: Tensors) -> Tensors:
    return {"policy_mismatched_logps": t["reference_mismatched_logps"]}


def first_step(t: Tensors) -> Tensors:
    return at(t, "reference")


R = Relation
B = {"beta": 0.3}
SMOOTHED = {"label_smoothing": 0.2, "beta": 0.5}
CLIPS = {"clip_low": 0.1, "clip_high": 0.15}
PAIR_IN_A_LIST = {"K": 2}

PAIRS = [
    R("robust_dpo", "dpo", {"label_smoothing": 0.0, **B}, B),
    R("dpo", "dpo", SMOOTHED, {"beta": 0.5}, "soft labels of 0.8", mapped=soft_labels_of_4_in_5),
    R("cpl_kl", "dpo", {"bias": 1.0, "alpha": 0.3}, B),
    R("tdpo", "dpo", B, B, "equal KLs", equal_kls, compare="value"),
    R("tdpo", "dpo", {"version": 1, **B}, B, "equal KLs", equal_kls),
    R("tdpo", "dpo", {"alpha": 0.0, **B}, B),
    R("tdpo", "tdpo", {"version": 1, **B}, {"alpha": 1.0, **B}, compare="value"),
    R("f_dpo", "dpo", {"divergence": "reverse_kl", **B}, B),
    R("f_dpo", "f_dpo", {"divergence": "alpha", "alpha": 1 - 1e-7}, {"divergence": "reverse_kl"}, "the limit", rtol=1e-5),
    R("f_dpo", "f_dpo", {"divergence": "alpha", "alpha": 1.0}, {"divergence": "reverse_kl"}),
    R("f_dpo", "f_dpo", {"divergence": "alpha", "alpha": 0.0}, {"divergence": "forward_kl"}),
    R("ld_dpo", "dpo", {"ld_alpha": 1.0, **B}, B),
    R("ld_dpo", "dpo", {"ld_alpha": 0.2, **B}, B, "equal lengths", ragged=False),
    R("dpop", "dpo", {"penalty": 0.0, **B}, B),
    R("dpop", "dpo", {"penalty": 7.0, **B}, B, "chosen likelier than under the reference", likelier_chosen),
    R("aot", "dpo", SMOOTHED, SMOOTHED, "one pair", sizes={"P": 1}),
    R("aot_unpaired", "dpo", SMOOTHED, SMOOTHED, "one pair", sizes={"P": 1}),
    R("wpo", "dpo", SMOOTHED, SMOOTHED, "weights of 1", unit_weights),
    R("rpo", "dpo", {"nll_coef": 0.0, **B}, B),
    R("dpo_norm", "dpo", {"beta": 3.0}, {"beta": 0.5}, "six tokens each", ragged=False),
    R("discopop", "dpo", {"tau": 1e-4, **B}, B, "pairs in the wrong order", wrong_order),
    R("exo", "dpo", SMOOTHED, SMOOTHED, "near their minimum", near_smoothed_optimum, compare="gradient", rtol=1e-3),
    R("nca", "bco_pair", B, B, "equal rewards", equal_rewards),
    R("bco_pair", "dpo", B, B, "rejected at the reference", rejected_at_reference, compare="gradient"),
    R("hinge", "dpo", B, B, "first step", first_step, factor=2.0, compare="gradient"),
    R("apo_zero", "dpo", B, B, "first step", first_step, factor=0.5, compare="gradient"),
    R("apo_down", "apo_zero", B, B, "on margin and chosen reward", mapped=margin_and_chosen),
    R("ipo", "ipo", {"tau": 0.6}, {"tau": 0.1, "average_log_prob": False}, "six tokens each", factor=1 / 36, ragged=False),
    R("ipo", "dpo", {"tau": 0.3, "average_log_prob": False}, {"beta": 2.0}, "first step", first_step,
      factor=1 / 0.3, compare="gradient"),
    R("sppo", "ipo", {"beta": 0.2}, {"tau": 0.1, "average_log_prob": False}, "mirrored log-ratios", mirrored, factor=0.5),
]  # fmt: skip
WITHOUT_REFERENCE = [
    R("cpo_preference", "dpo", B, B, "no reference", zero_reference),
    R("cpl", "cpo_preference", {"bias": 1.0, "alpha": 0.3}, B),
    R("cpl_kl", "cpl", {"bias": 0.7, "alpha": 0.3}, {"bias": 0.7, "alpha": 0.3}, "no reference", zero_reference),
    R("dpo", "cpl", B, {"bias": 1.0, "alpha": 0.3}, "on log-ratios", mapped=ratios_as_one_token),
    R("cpl_bc", "cpl", {"bc_coef": 0.0, "bias": 0.7}, {"bias": 0.7}),
    R("cpo", "cpo_preference", {"nll_coef": 0.0, **B}, B),
    R("cpo", "sft", {"beta": 0.0, "nll_coef": 0.7}, factor=0.7, compare="gradient"),
    R("simpo", "cpo_preference", {"gamma": 0.0, **SMOOTHED}, SMOOTHED, "unit lengths", unit_lengths),
    R("dpo_norm", "simpo", {"beta": 1.5}, {"beta": 1.5, "gamma": 0.0}, "no reference", zero_reference),
    R("alphapo", "simpo", {"alpha": 0.0, "gamma": 0.4, **B}, {"gamma": 0.4, **B}),
    R("alphapo", "simpo", {"alpha": 1e-7}, {}, "the limit", rtol=1e-5),
    R("odds_ratio", "simpo", {}, {"beta": 1.0, "gamma": 0.0}, "unlikely tokens", unlikely),
    R("orpo", "sft", {"lam": 0.0}),
    R("hinge", "slic_calibration", {"beta": 1.0}, {"delta": 1.0}, "no reference", zero_reference),
    R("slic", "slic_calibration", {"nll_coef": 0.0, "delta": 2.0}, {"delta": 2.0}),
    R("unlikelihood", "sft", {"coef": 0.0}),
    R("sft", "unlikelihood_rejected", when="of the complement", mapped=complementary),
    R("sft", "reinforce", when="advantages of 1", mapped=chosen_as_rollouts),
]
UNPAIRED = [
    R("kto", "apo_zero_unpaired", B, B, "no baseline", no_baseline),
    R("apo_zero", "apo_zero_unpaired", B, B, "both sides", mapped=both_sides, factor=2.0),
    R("bco_pair", "bco", B, B, "both sides", mapped=both_sides, factor=2.0),
]
LISTS_AND_REWARDS = [
    R("pl_dpo", "dpo", B, B, "K 2", mapped=ranked_pair, sizes=PAIR_IN_A_LIST),
    R("pl_dpo", "plackett_luce", B, when="implicit rewards", mapped=implicit_rewards(0.3)),
    R("dpo", "bradley_terry", B, when="implicit rewards", mapped=implicit_rewards(0.3)),
    R("plackett_luce", "bradley_terry", when="K 2", mapped=ranked_pair, sizes=PAIR_IN_A_LIST),
    R("plackett_luce", "pairwise_ranking", when="K 2", sizes=PAIR_IN_A_LIST),
    R("rank_utility", "pairwise_ranking", {"utility": "log_sigmoid", "bounded": False}),
    R("cpl_rank", "cpl", {"bias": 0.7}, {"bias": 0.7}, "K 2", mapped=ranked_pair_of_one_token, sizes=PAIR_IN_A_LIST),
    R("cpl_rank", "pairwise_ranking", {"alpha": 0.3, "bias": 1.0}, {}, "lists of one length",
      mapped=implicit_rewards(0.3), ragged=False),
]  # fmt: skip
POLICY_GRADIENT = [
    R("bnpo", "dapo", {}, {"clip_high": 0.2}),
    R("bnpo", "ppo_policy", CLIPS, CLIPS),
    R("dr_grpo", "ppo_policy", CLIPS, {"length_norm": "constant", **CLIPS}),
    R("grpo", "ppo_policy", {"beta": 0.0, **CLIPS}, {"length_norm": "seq_mean", **CLIPS}),
    R("grpo", "dapo", {"beta": 0.0, **CLIPS}, CLIPS, "equal lengths", ragged=False),
    R("gspo", "luspo", CLIPS, CLIPS, "one token", sizes={"T": 1}, ragged=False),
    R("luspo", "gspo", CLIPS, CLIPS, "six tokens each", factor=6.0, ragged=False),
    R("gspo", "grpo", CLIPS, {"beta": 0.0, **CLIPS}, "one token", sizes={"T": 1}, ragged=False),
    R("gspo", "grpo", {}, {"beta": 0.0}, "ratio 1", on_policy_by_sequence),
    R("rloo", "ppo_policy", CLIPS, CLIPS, "one token", sizes={"T": 1}, ragged=False),
    R("rloo", "reinforce", {}, {"length_norm": "seq_sum"}, "ratio 1", on_policy_by_sequence, compare="gradient"),
    R("luspo", "reinforce", {}, {"length_norm": "seq_sum"}, "ratio 1", on_policy_by_sequence, compare="gradient"),
    R("reinforce", "ppo_policy", when="ratio 1", given=on_policy, compare="gradient"),
    R("cispo", "reinforce", when="ratio 1", given=on_policy),
    R("sapo", "ppo_policy", {}, {"length_norm": "seq_mean"}, "ratio 1", on_policy, compare="gradient"),
    R("ppo_offline", "ppo_policy", {"length_norm": "token", "dual_clip": 1.1, **CLIPS}, {"dual_clip": 1.1, **CLIPS},
      "both sides", mapped=both_sides_of_tokens),
    R("ppo", "ppo_policy", {"vf_coef": 0.0, **CLIPS}, CLIPS),
    R("a2c", "ppo", {"entropy_coef": 0.2}, {"entropy_coef": 0.2}, "ratio 1", on_policy, compare="gradient"),
    R("a2c", "value", {"vf_coef": 0.7, "value_clip": 0.1}, {"value_clip": 0.1}, "no advantage", no_advantage, factor=0.7),
    R("a2c", "entropy", {"vf_coef": 0.0, "entropy_coef": 0.6}, {}, "no advantage", no_advantage, factor=0.6),
    R("value", "value", {}, {"value_clip": None}, "values near the old ones", near_values),
]  # fmt: skip
RELATIONS = [*PAIRS, *WITHOUT_REFERENCE, *UNPAIRED, *LISTS_AND_REWARDS, *POLICY_GRADIENT]
REGISTERED = frozenset(names())  # when tests are collected, before some of them register losses of their own


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("relation", RELATIONS, ids=str)
def test_relation(relation: Relation, seed: int) -> None:
    left, right = get(relation.left).bind(**relation.left_options), get(relation.right).bind(**relation.right_options)
    union = BoundLoss("union", (*left.terms, *right.terms), {})
    drawn = sample_tensors(
        union, torch.Generator().manual_seed(seed), sizes=relation.sizes, optional=False, ragged=relation.ragged
    )  # fmt: skip
    leaves = {name: tensor.requires_grad_(VOCABULARY[name].source == "policy") for name, tensor in drawn.items()}
    got = measure(left, [changed(leaves, relation.given)], leaves)
    expected = measure(right, [changed(leaves, relation.given, relation.mapped)], leaves)
    if relation.compare != "gradient":
        torch.testing.assert_close(got.objective, relation.factor * expected.objective, rtol=relation.rtol, atol=1e-11)
    if relation.compare != "value":
        assert any(gradient.any() for gradient in got.gradients.values()), "nothing is compared"
        for name, gradient in got.gradients.items():
            torch.testing.assert_close(
                gradient, relation.factor * expected.gradients[name], rtol=relation.rtol, atol=1e-11,
                msg=lambda text, name=name: f"the gradient of {name}: {text}",
            )  # fmt: skip


def changed(t: Tensors, *changes: Change) -> Tensors:
    """`t` after each of the changes, in a graph of its own."""
    t = with_sums(t)
    for change in changes:
        t = with_sums({**t, **change(t)})
    return t


def with_sums(t: Tensors) -> Tensors:
    """Log-probs of completions as the sums of those of their tokens, where both are there."""
    sums = {}
    for name in t:
        tokens = name.removesuffix("logps") + "token_logps"
        if name.endswith("_logps") and tokens in t and (mask := mask_of(tokens, t)) is not None:
            sums[name] = masked_sum(t[tokens], mask, dim=-1)
    return {**t, **sums}


def test_nearly_every_loss_is_reached_from_dpo() -> None:
    """A loss that is in no relation hangs in the air: nothing says what its options mean beside those of the others."""
    reached, before = {"dpo"}, 0
    while len(reached) > before:
        before = len(reached)
        for relation in RELATIONS:
            if {relation.left, relation.right} & reached:
                reached |= {relation.left, relation.right}
    # Not all: a loss may have a relation in its own test file only, or none.
    assert len(reached) >= 0.9 * len(REGISTERED), f"no relation leads to {sorted(REGISTERED - reached)}"
