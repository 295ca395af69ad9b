"""Error messages that know the nearest name, and what the peers call ours."""

from __future__ import annotations

import difflib
from collections.abc import Collection

# What peers call our losses. It serves error messages only: nothing is looked up by a peer's name.
PEER_NAMES = {
    "sigmoid": "dpo", "cdpo": "dpo", "sigmoid_norm": "dpo_norm", "exo_pair": "exo", "nca_pair": "nca", "sppo_hard": "sppo",
    "robust": "robust_dpo", "ppo_clip": "ppo_policy", "nll": "sft", "cross_entropy": "sft", "rm": "bradley_terry",
    "reward": "bradley_terry", "kto_pair": "kto", "offline_ppo": "ppo_offline", "bc": "sft",
    "irpo": "rpo", "tdpo1": "tdpo", "tdpo2": "tdpo", "lrml": "discopop",
}  # fmt: skip

# What peers call our options; error messages only, like the names above. The first of ours that the loss has is suggested.
_PEER_OPTIONS = {
    "epsilon": ("clip_low", "label_smoothing"), "eps": ("clip_low",), "clip_eps": ("clip_low",), "cliprange": ("clip_low",),
    "epsilon_low": ("clip_low",), "epsilon_high": ("clip_high", "max_ratio"), "delta": ("dual_clip",),
    "cliprange_value": ("value_clip",),
    "beta": ("tau", "alpha"), "contrastive_bias": ("bias",), "bc_coeff": ("bc_coef",), "lam": ("gae_lambda",),
    "center_rewards_coefficient": ("center_coef",), "value_coeff": ("vf_coef",), "loss_agg_mode": ("length_norm",),
    "f_divergence_type": ("divergence",), "f_alpha_divergence_coef": ("alpha",), "discopop_tau": ("tau",),
    "rpo_alpha": ("nll_coef",), "cpo_alpha": ("nll_coef",), "simpo_gamma": ("gamma",), "lambda": ("lam",),
    "sapo_temperature_pos": ("tau_positive",), "sapo_temperature_neg": ("tau_negative",), "scale_rewards": ("scale",),
    "num_generations": ("samples_per_prompt",), "init_kl_coef": ("kl_coef",), "target": ("kl_target",),
    "adap_kl_ctrl": ("kl_target",), "horizon": ("kl_horizon",), "kl_penalty": ("kl_estimator",), "target_kl": ("stop_kl",),
    "cliprange_reward": ("clip_scores",), "scale_reward": ("scale_scores",), "use_score_scaling": ("scale_scores",),
    "num_ppo_epochs": ("ppo_epochs",),
}  # fmt: skip


def suggest_option(name: str, known: Collection[str]) -> str:
    """A remark for an error message: the nearest of the known options, or ours for a peer's name; "" when none is near."""
    if name in ("loss_type", "loss"):
        return " (an algorithm is chosen by its own name, not by an option)"
    ours = [option for option in _PEER_OPTIONS.get(name, ()) if option in known]
    return f" (peers' {name!r} is {ours[0]!r} here)" if ours else suggest(name, known)


def suggest(name: str, known: Collection[str]) -> str:
    """A remark with the nearest of the known names; "" when none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""
