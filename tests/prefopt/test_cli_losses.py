"""`prefopt losses`: the list by family, one loss whole, and what both are drawn from."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import losses
from losses.registry import Coefficient, compose
from prefopt import algorithms
from prefopt.cli import catalogue


def test_the_list_has_every_loss_under_its_family_with_equation_paper_and_defaults(cli: Any) -> None:
    done = cli("losses")
    assert done.code == 0, done.err
    headings = re.findall(r"^([a-z ]+) \((\d+)\); needs ", done.out, re.MULTILINE)
    found = Counter(map(catalogue.family, map(losses.get, losses.names())))
    assert dict(headings) == {family: str(count) for family, count in found.items()}
    blocks = re.split(r"^(?=[a-z ]+ \(\d+\); needs )", done.out, flags=re.MULTILINE)[1:]
    for block in blocks:
        family = block.partition(" (")[0]
        for name in re.findall(r"^  (\w+)  ", block, re.MULTILINE):
            assert catalogue.family(losses.get(name)) == family
    assert {*losses.names()} == {*re.findall(r"^  (\w+)  ", done.out, re.MULTILINE)}
    for part in ("L = (h - 1/(2 tau))^2", "Azar et al. 2023; tau 0.1, average_log_prob True", "rollout_size 64", "kl_coef 0.0"):
        assert part in done.flat
    assert "coupled" in done.out[done.out.index("  aot  ") : done.out.index("  aot_unpaired  ")]


@pytest.mark.parametrize("name", ["dpo", "tdpo", "rpo", "grpo", "kto", "bradley_terry"])
def test_one_loss_is_shown_whole(cli: Any, name: str) -> None:
    done, loss, algorithm = cli("losses", name), losses.get(name), algorithms.get(name)
    assert done.code == 0, done.err
    for paragraph in (catalogue.equation(loss), *catalogue.paragraphs(loss.doc)):
        assert paragraph in done.flat
    for tensor in catalogue.tensors(loss):
        spec = losses.VOCABULARY[tensor]
        assert re.search(rf"^ +{tensor} +\[{', '.join(spec.shape)}\] +{spec.source} ", done.out, re.MULTILINE)
    for flag in algorithm.flags.values():
        assert re.search(rf"^ +--{flag.name.replace('_', '-')} .* {re.escape(str(flag.default))} ", done.out, re.MULTILINE)
        assert " ".join(flag.help.split()[:5]) in done.flat
    assert f"Stream: {algorithm.stream}." in done.flat
    assert ("Coupled:" in done.flat) == loss.coupled
    assert ("Advantage function: group_baseline." in done.flat) == (name == "grpo")
    assert ("Sum of" in done.out) == (len(loss.terms) > 1)


def test_several_are_shown_and_so_is_a_sum(cli: Any) -> None:
    done = cli("losses", "sft", "dpo:2+sft:0.5")
    assert done.out.startswith("sft\n")
    assert re.search(r"^ +2 +dpo +L = -log sigma", done.out, re.MULTILINE)
    assert re.search(r"^ +0\.5 +sft +L = -sum_t log pi", done.out, re.MULTILINE)
    assert re.search(r"^ +--dpo-beta +float +0\.1 +strength against the reference", done.out, re.MULTILINE)
    unknown = cli("losses", "ipoo")
    assert unknown.code == 2
    assert "did you mean 'ipo'?" in unknown.err


def test_a_loss_that_cannot_be_trained_is_listed_as_a_part_of_others(cli: Any, new_losses: None, tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "from torch import Tensor\n"
        "from losses.registry import register\n"
        "from losses.types import LossOutput\n\n\n"
        "@register('drift')\n"
        "def drift_loss(policy_token_logps: Tensor, advantages: Tensor, mask: Tensor) -> LossOutput:\n"
        '    """L_t = -A_t log pi [not markup]."""\n'
        "    return LossOutput(-advantages * policy_token_logps, mask)\n"
    )
    listed = cli("losses", "--import", own)
    assert listed.code == 0, listed.err
    assert f"{catalogue.PARTS} (1); needs advantages, mask, policy_token_logps" in listed.out
    assert "L_t = -A_t log pi [not markup]" in listed.out
    shown = cli("losses", "drift", "--import", own)
    assert "Cannot be trained alone" in shown.flat


def test_families_come_in_reading_order() -> None:
    found = {catalogue.family(losses.get(name)) for name in losses.names()} - {catalogue.PARTS}
    assert {*catalogue._READING_ORDER} == found
    assert [*catalogue.by_family(map(losses.get, ["bradley_terry", "simpo", "sft", "ppo", "dpo"]))] == [
        "pairs with a reference", "pairs without a reference", "completions", "policy gradient", "rewards",
    ]  # fmt: skip


def test_citations_are_author_and_year_before_a_key() -> None:
    doc = """L = x.

    D'One et al. 2023, eq. 7 [done2023x]; it is cDPO (Two and Three 1999
    [two1999y]), for i in [0, 1). D'One et al. 2023 [done2023x] again, and A. Four 2020 [four2020z].
    """
    assert catalogue.citations(doc) == [
        ("D'One et al. 2023", "done2023x"), ("Two and Three 1999", "two1999y"), ("A. Four 2020", "four2020z"),
    ]  # fmt: skip


def test_paragraphs_leave_out_sections_by_name() -> None:
    doc = (
        "L = x.\n\nOne\nline.\n\nArgs:\n    a: is\n        long.\n\n    b: c.\n\nRaises:\n    ValueError: d.\n\nDifferences: e."
    )
    assert catalogue.paragraphs(doc) == ["One line.", "Raises: ValueError: d.", "Differences: e."]
    assert catalogue.paragraphs(doc, without=("Args", "Raises")) == ["One line.", "Differences: e."]
    assert catalogue.paragraphs("L = x.") == []


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps", "reference_rejected_logps"],
         "{policy,reference}_{chosen,rejected}_logps"),
        (["mask", "old_token_logps", "policy_token_logps", "reference_token_logps"],
         "mask, {policy,reference,old}_token_logps"),
        (["chosen_mask", "policy_chosen_logps", "policy_rejected_logps"], "chosen_mask, policy_{chosen,rejected}_logps"),
        (["old_values", "values"], "old_values, values"),
    ],
)  # fmt: skip
def test_names_of_tensors_are_folded(names: list[str], short: str) -> None:
    assert catalogue.compact(names) == short


def test_weights_of_terms_are_numbers_and_flags(new_losses: None) -> None:
    inner = compose("inner", sft=2.0, dpo=Coefficient("share", 0.3))
    outer = compose("outer", inner=0.5, ipo=Coefficient("push", 1.0))
    assert [catalogue.term_weight(term) for term in inner.terms] == ["2", "share"]
    assert [catalogue.term_weight(term) for term in outer.terms] == ["1", "0.5*share", "push"]
    assert {"inner", "outer", "rpo"} <= {*catalogue.sums_with(losses.get("dpo"))}
    assert "outer" in catalogue.sums_with(inner)
    assert "inner" not in catalogue.sums_with(inner)
