"""Registration: what a signature declares, what is refused, and what the messages say."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import losses
from losses import Coefficient, LossOutput, RegistrationError, UnknownName, compose, get, names, register
from losses.advantages import gae
from losses.declaration import HyperParameter
from losses.sampling import sample_tensors

BUILT_IN = names()
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("fresh_registry")


def output(tensor: Tensor) -> LossOutput:
    return LossOutput(tensor, torch.ones_like(tensor))


def test_a_signature_is_the_declaration() -> None:
    dpo = get("dpo")
    assert dpo.terms[0].signature.required == (
        "policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps", "reference_rejected_logps",
    )  # fmt: skip
    assert dpo.terms[0].signature.optional == ("soft_labels",)
    assert {name: (p.default, p.annotation) for name, p in dpo.hyper.items()} == {
        "beta": (0.1, float), "label_smoothing": (0.0, float),
    }  # fmt: skip
    assert dpo.hyper["beta"].help.startswith("strength against the reference")


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_option_has_help_and_every_loss_a_reference(name: str) -> None:
    loss = get(name)
    assert [flag for flag, parameter in loss.hyper.items() if not parameter.help] == []
    keys = re.findall(r"\[([a-z]+\d{4}\w+)\]", loss.doc)
    known = re.findall(r"^@\w+\{(\w+),", (ROOT / "references.bib").read_text(), re.MULTILINE)
    assert keys, f"the docstring of {name} names no key of references.bib"
    assert set(keys) <= set(known)


@pytest.mark.parametrize("name", BUILT_IN)
def test_name_file_and_function_agree(name: str) -> None:
    loss = get(name)
    for term in loss.terms:
        assert term.function.__name__ == f"{term.name}_loss"
        module = sys.modules[term.function.__module__]
        family = [other for other in BUILT_IN if get(other).terms[0].function.__module__ == module.__name__]
        # A file that holds more than one loss is a tight family.
        assert module.__name__ == f"losses.{term.name}" or len(family) > 1
        assert getattr(losses, term.function.__name__) is term.function


def test_unknown_tensor_names_the_nearest_and_the_vocabulary() -> None:
    with pytest.raises(
        RegistrationError, match=r"'policy_chosen_logp' is not a tensor .*\(did you mean 'policy_chosen_logps'\?\)"
    ) as error:

        @register("typo")
        def typo_loss(policy_chosen_logp: Tensor) -> LossOutput:
            return output(policy_chosen_logp)

    assert "reference_rejected_token_logps" in str(error.value)


def test_hyper_parameter_without_default_is_refused() -> None:
    with pytest.raises(RegistrationError, match=r"'beta' needs an annotation and a default"):

        @register("no_default")
        def no_default_loss(policy_logps: Tensor, *, beta: float) -> LossOutput:
            return output(beta * policy_logps)


def test_tensor_with_another_default_than_none_is_refused() -> None:
    with pytest.raises(RegistrationError, match=r"tensor 'margins' has default 0; only None"):

        @register("bad_default")
        def bad_default_loss(policy_chosen_logps: Tensor, margins: Any = 0) -> LossOutput:
            return output(policy_chosen_logps - margins)


def test_hidden_arguments_are_refused() -> None:
    with pytest.raises(RegistrationError, match=r"\*\*tensors.* hides what the function needs"):

        @register("hidden")
        def hidden_loss(**tensors: Tensor) -> LossOutput:
            return output(tensors["policy_logps"])


def test_a_taken_name_is_refused_but_the_same_file_may_be_imported_twice() -> None:
    with pytest.raises(RegistrationError, match=r"'dpo' is already registered by .*dpo.py; choose another name"):

        @register("dpo")
        def dpo_loss(policy_logps: Tensor) -> LossOutput:
            return output(policy_logps)

    again = get("ipo").terms[0].function
    register("ipo")(again)
    compose("cpl_bc", cpl=1.0, sft=Coefficient("bc_coef", 1.5))
    with pytest.raises(RegistrationError, match=r"'cpl_bc' is already registered"):
        compose("cpl_bc", cpl=1.0, sft=Coefficient("bc_coef", 0.5))


def test_flags_that_clash_are_refused_unless_prefixed() -> None:
    @register("other")
    def other_loss(policy_logps: Tensor, *, beta: float = 1.0) -> LossOutput:
        return output(beta * policy_logps)

    with pytest.raises(RegistrationError, match=r"'dpo' and 'other' both have a flag 'beta'; use prefix_flags=True"):
        compose("clash", dpo=1.0, other=1.0)
    assert set(compose("prefixed", prefix_flags=True, dpo=1.0, other=1.0).hyper) == {
        "dpo_beta", "dpo_label_smoothing", "other_beta",
    }  # fmt: skip


def test_a_flag_of_the_advantage_function_may_not_clash() -> None:
    with pytest.raises(RegistrationError, match=r"both have a flag 'discount'"):

        @register("with_discount", advantage=gae)
        def with_discount_loss(policy_logps: Tensor, *, discount: float = 1.0) -> LossOutput:
            return output(discount * policy_logps)

    assert "with_discount" not in names()


def test_a_term_may_not_appear_twice() -> None:
    with pytest.raises(RegistrationError, match=r"the term 'sft' appears twice"):
        compose("twice", cpl_bc=1.0, sft=1.0)


def test_sums_of_sums_keep_the_weights() -> None:
    mixed = compose("ppo_sft", ppo=1.0, sft=Coefficient("sft_coef", 0.5))
    assert mixed.advantage is gae, "a sum takes its terms' advantage function"
    weights = {term.name: term.coefficient for term in mixed.bind(vf_coef=0.3).terms}
    assert weights == {"ppo_policy": 1.0, "value": 0.3, "sft": 0.5}
    compose("doubled", dpo=2.0)
    assert compose("quadrupled", doubled=2.0).bind().terms[0].coefficient == 4.0


def test_the_weight_of_a_sum_multiplies_those_it_has_of_its_own() -> None:
    halved = compose("halved", cpl_bc=0.5)
    assert [(t.name, t.coefficient) for t in halved.bind(bc_coef=3.0).terms] == [("cpl", 0.5), ("sft", 1.5)]
    flagged = compose("flagged", cpl_bc=Coefficient("weight", 2.0))
    assert list(flagged.hyper) == ["weight", "alpha", "bias", "gamma", "bc_coef"]
    assert [t.coefficient for t in flagged.bind(bc_coef=3.0).terms] == [2.0, 6.0]
    assert [t.coefficient for t in flagged.bind(weight=0.5).terms] == [0.5, 0.75]
    with pytest.raises(ValueError, match="every term has coefficient 0"):
        flagged.bind(weight=0.0)


def test_the_weight_of_a_term_is_a_flag() -> None:
    assert get("cpl_bc").hyper["bc_coef"] == HyperParameter(
        "bc_coef", float, 1.5, "weight of the sft term; 0 removes it and what it needs."
    )


def test_rows_interact_only_where_a_term_says_so() -> None:
    @register("alone")
    def alone_loss(policy_logps: Tensor) -> LossOutput:
        return output(policy_logps)

    @register("together", coupled=True)
    def together_loss(policy_logps: Tensor) -> LossOutput:
        return output(policy_logps - policy_logps.mean())

    assert not get("alone").coupled
    assert get("together").coupled
    assert compose("sum", alone=1.0, together=1.0).coupled
    assert [term.coupled for term in get("sum").bind().terms] == [False, True]


def test_what_one_term_needs_is_not_optional_in_a_sum() -> None:
    @register("may")
    def may_loss(policy_logps: Tensor, margins: Tensor | None = None, desirable: Tensor | None = None) -> LossOutput:
        return output(policy_logps)

    @register("must")
    def must_loss(policy_logps: Tensor, margins: Tensor) -> LossOutput:
        return output(policy_logps)

    assert get("may").bind().optional == {"margins", "desirable"}
    bound = compose("both", may=1.0, must=1.0).bind()
    assert bound.needs == {"policy_logps", "margins"}
    assert bound.optional == {"desirable"}


def test_a_sum_is_spelled_by_its_name() -> None:
    """Flags carry the name of the loss that they come from, and coefficients multiply."""
    spelled = get("dpo:1.0+cpl_bc:2+value:1e-1")
    assert [(t.name, t.coefficient) for t in spelled.bind(cpl_bc_bc_coef=0.5).terms] == [
        ("dpo", 1.0), ("cpl", 2.0), ("sft", 1.0), ("value", 0.1),
    ]  # fmt: skip
    assert spelled.advantage is gae
    assert list(spelled.hyper) == [
        "dpo_beta", "dpo_label_smoothing", "cpl_bc_alpha", "cpl_bc_bias", "cpl_bc_gamma", "cpl_bc_bc_coef", "value_value_clip",
    ]  # fmt: skip
    assert spelled.hyper["dpo_beta"].help == get("dpo").hyper["beta"].help
    assert spelled.hyper["dpo_beta"].name == "dpo_beta"
    assert spelled.bind(dpo_beta=0.7).terms[0].keywords["beta"] == 0.7
    assert [t.coefficient for t in get("dpo:1e+2+sft").bind().terms] == [100.0, 1.0]
    assert "dpo:1.0+sft" not in names(), "it is made on the spot, not registered"
    assert spelled.doc.startswith("L = 1*dpo + 2*cpl_bc + 0.1*value")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("dpo:x+sft", UnknownName, r"'dpo:x' should be NAME:NUMBER"),
        ("dpo:nan", UnknownName, r"'dpo:nan' should be NAME:NUMBER"),
        ("dpo:1+", UnknownName, r"'' should be NAME:NUMBER"),
        ("dpo:1+ipoo:2", UnknownName, r"unknown algorithm 'ipoo' \(did you mean 'ipo'"),
        ("dpo:1+dpo:2", RegistrationError, r"the term 'dpo' appears twice"),
        ("rpo:1+sft:2", RegistrationError, r"the term 'sft' appears twice"),
    ],
)
def test_a_sum_that_cannot_be_read_says_why(name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        get(name)


def test_defaults_of_stream_and_advantage_are_inherited_or_must_be_given() -> None:
    assert get("grpo").defaults == {"kl_coef": 0.0}
    assert get("dr_grpo").defaults == {"scale": "none"}
    assert compose("grpo_sft", grpo=1.0, sft=1.0, prefix_flags=True).defaults == {"kl_coef": 0.0}
    with pytest.raises(RegistrationError, match=r"^loss 'mixed': its terms name different defaults"):
        compose("mixed", grpo=1.0, dr_grpo=1.0, prefix_flags=True)
    assert compose("given", grpo=1.0, dr_grpo=1.0, prefix_flags=True, defaults={"scale": "batch"}).defaults == {
        "scale": "batch"
    }


def test_half_precision_is_widened() -> None:
    """A difference of -300.5 and -300 has no digits left in bf16."""
    loss = get("dpo").bind(beta=1.0)
    names_in_order = ["policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps", "reference_rejected_logps"]
    values = [torch.tensor([value], dtype=torch.bfloat16) for value in (-300.0, -2.0, -300.0, -2.125)]
    got = loss(dict(zip(names_in_order, values, strict=True)))["dpo"].loss
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.nn.functional.softplus(torch.tensor([0.125])))


def test_terms_with_different_advantage_functions_are_refused() -> None:
    @register("generalised", advantage=gae)
    def generalised_loss(policy_token_logps: Tensor, advantages: Tensor) -> LossOutput:
        return output(-policy_token_logps * advantages)

    with pytest.raises(
        RegistrationError,
        match=r"^loss 'both': .* different advantage function \(ppo_policy: discounted_returns, generalised: gae\)",
    ):
        compose("both", ppo_policy=1.0, generalised=1.0)
    assert compose("chosen", ppo_policy=1.0, generalised=1.0, advantage=gae).advantage is gae


def test_coefficient_0_takes_the_needs_away() -> None:
    assert "chosen_mask" in get("cpl_bc").bind().needs
    bound = compose("dpo_sft", dpo=1.0, sft=Coefficient("nll_coef", 1.0)).bind(nll_coef=0)
    assert bound.needs == frozenset(get("dpo").bind().needs)
    assert [term.name for term in bound.terms] == ["dpo"]
    with pytest.raises(ValueError, match="every term has coefficient 0"):
        compose("nothing", sft=Coefficient("nll_coef", 0.0)).bind()


@pytest.mark.parametrize(
    ("loss", "option", "message"),
    [
        ("dpo", "betta", r"dpo has no option 'betta' \(did you mean 'beta'\?\)\. Its options: beta, label_smoothing"),
        ("dpo", "loss_type", "an algorithm is chosen by its own name"),
        ("ipo", "beta", "peers' 'beta' is 'tau' here"),
        ("cpl", "contrastive_bias", "peers' 'contrastive_bias' is 'bias' here"),
        ("ppo", "epsilon", "peers' 'epsilon' is 'clip_low' here"),
        ("sft", "zzz", r"sft has no option 'zzz'\. Its options: none"),
    ],
)
def test_unknown_options_suggest(loss: str, option: str, message: str) -> None:
    with pytest.raises(UnknownName, match=message):
        get(loss).bind(**{option: 1.0})


@pytest.mark.parametrize(
    ("name", "message"),
    [("sigmoid", "peers' 'sigmoid' is 'dpo' here"), ("ippo", r"did you mean '\w+'\?"), ("xyzzy", r"'xyzzy'\. Known: .*dpo")],
)
def test_unknown_losses_suggest(name: str, message: str) -> None:
    with pytest.raises(UnknownName, match=message):
        get(name)


def test_missing_tensors_are_named() -> None:
    with pytest.raises(KeyError, match="dpo: needs policy_rejected_logps, reference_rejected_logps, got policy_chosen_logps"):
        get("dpo").bind()({"policy_chosen_logps": torch.zeros(1), "reference_chosen_logps": torch.zeros(1)})


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4,), r"policy_chosen_logps is \[6\], policy_rejected_logps is \[4\]; P of \[P\] must be the same"),
        ((6, 1), r"is \[6, 1\]; it must be \[P\]"),
    ],
)
def test_shapes_that_would_broadcast_are_errors(shape: tuple[int, ...], message: str) -> None:
    loss = get("dpo").bind()
    tensors = sample_tensors(loss, torch.Generator().manual_seed(0), optional=False)
    order = ["policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps", "reference_rejected_logps"]
    tensors["policy_rejected_logps"] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        loss({name: tensors[name] for name in order})
