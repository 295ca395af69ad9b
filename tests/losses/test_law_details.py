"""What the laws draw, how they measure and what they say."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from losses import LossOutput, Max, register
from losses.laws import EXTREME, LAWS, LawResult, LawViolation, check
from losses.registry import BoundLoss, BoundTerm
from losses.sampling import mask_of, sample_tensors
from losses.types import VOCABULARY, Metric

Seen = list[dict[str, Tensor]]
PAIRS = ("policy_chosen_token_logps", "policy_rejected_token_logps", "chosen_mask", "rejected_mask")


def single(function: Callable[..., LossOutput], needs: Iterable[str], optional: Iterable[str] = ()) -> BoundLoss:
    term = BoundTerm("mine", 1.0, False, frozenset(needs), frozenset(optional), function, {})
    return BoundLoss("mine", (term,), {})


def law_named(name: str) -> Callable[..., None]:
    return next(law for law in LAWS if law.__name__ == name)


def shown(law: str, needs: Iterable[str], seed: int = 0) -> Seen:
    """The tensors that a law gives to a loss that obeys it: the mean of all that is the policy's and unmasked."""
    seen: Seen = []

    def mean_of_all(**tensors: Tensor) -> LossOutput:
        seen.append({name: tensor.detach() for name, tensor in tensors.items()})
        values = {name: tensor for name, tensor in tensors.items() if VOCABULARY[name].source == "policy"}
        masks = {name: mask_of(name, tensors) for name in values}
        weights = [torch.ones_like(value) if (mask := masks[name]) is None else mask for name, value in values.items()]
        loss, weight = (torch.cat([tensor.flatten() for tensor in part]) for part in (values.values(), weights))
        return LossOutput(loss, weight)

    law_named(law)(single(mean_of_all, needs), torch.Generator().manual_seed(seed))
    return seen


def violation(law: str, function: Callable[..., LossOutput]) -> str:
    """What the law says of a loss that breaks it."""
    with pytest.raises(LawViolation) as found:
        law_named(law)(single(function, inspect.signature(function).parameters), torch.Generator().manual_seed(0))
    return str(found.value)


def test_padding_adds_tokens_and_completions_to_a_full_batch_and_to_a_ragged_one() -> None:
    names = ("policy_group_token_logps", "group_token_mask", "group_mask", "ranks", "group_rewards")
    seen = shown("padding_invariant", names)
    full, _, ragged, padded = (seen[index] for index in (0, 1, 2, 3))
    assert [list(tensors["group_token_mask"].shape) for tensors in seen] == [[4, 3, 6], [4, 5, 9], [4, 3, 6], [4, 5, 9]]
    assert full["group_token_mask"].all()
    assert not ragged["group_token_mask"].all()
    assert torch.equal(padded["group_token_mask"][:, :3, :6], ragged["group_token_mask"])
    assert not padded["group_token_mask"][:, 3:].any()
    assert not padded["group_token_mask"][..., 6:].any()
    assert not padded["policy_group_token_logps"][..., 6:].any()
    assert padded["ranks"][:, 3:].tolist() == [[3, 4]] * 4
    assert padded["group_rewards"][:, 3:].all(), "garbage where the vocabulary promises no zeros"


def test_completions_are_not_added_where_no_mask_says_which_are_valid() -> None:
    seen = shown("padding_invariant", ("policy_chosen_token_logps", "chosen_mask", "group_rewards"))
    assert [list(tensors["group_rewards"].shape) for tensors in seen] == [[4, 3]] * 4


def test_permutation_reorders_each_kind_of_row_by_itself() -> None:
    permuted, whole = shown("permutation_invariant", ("policy_chosen_logps", "chosen_scores", "policy_logps", "reward_shift"))
    order = [whole["chosen_scores"].tolist().index(score) for score in permuted["chosen_scores"].tolist()]
    assert sorted(order) == list(range(6))
    assert order != list(range(6))
    assert torch.equal(permuted["policy_chosen_logps"], whole["policy_chosen_logps"][order])
    assert sorted(permuted["policy_logps"].tolist()) == sorted(whole["policy_logps"].tolist())
    assert torch.equal(permuted["reward_shift"], whole["reward_shift"])


def test_parts_are_a_third_and_the_rest_cut_to_the_longest_completion_of_either_side() -> None:
    first, rest, whole = shown("split_equals_whole", (*PAIRS, "reward_shift"), seed=1)
    for part, rows, longest in ((first, slice(0, 2), 6), (rest, slice(2, 6), 5)):
        lengths = [int(whole[name][rows].sum(-1).max()) for name in ("chosen_mask", "rejected_mask")]
        assert max(lengths) == longest
        assert longest == 6 or min(lengths) < longest, "one side alone would be cut shorter"
        for name in PAIRS:
            assert torch.equal(part[name], whole[name][rows, :longest])
        assert torch.equal(part["reward_shift"], whole["reward_shift"])


def test_extremes_are_drawn_thrice_in_float32_and_once_in_bf16() -> None:
    """Terms widen bf16, whose number nearest to -1e4 is -9984."""
    seen = shown("finite_at_extremes", (*PAIRS, "chosen_scores"))
    assert [float(tensors["policy_chosen_token_logps"].min()) for tensors in seen] == [-1e4, -1e4, -1e4, -9984.0]
    assert [float(tensors["chosen_scores"].abs().max()) for tensors in seen] == [1e4, 1e4, 1e4, 9984.0]
    assert all(tensors["policy_chosen_token_logps"].dtype == torch.float32 for tensors in seen)
    assert not torch.equal(seen[0]["policy_chosen_token_logps"], seen[1]["policy_chosen_token_logps"])


def test_a_run_starts_at_its_reference_with_one_token_full_or_ragged() -> None:
    names = ("policy_logps", "reference_logps", "old_logps", "mask", "group_rewards", "group_mask", "old_chosen_logps")
    seen = shown("finite_at_reference", names)
    assert [tensors["mask"].shape[-1] for tensors in seen] == [1, 4, 4]
    assert [bool(tensors["mask"].all()) for tensors in seen] == [True, True, False]
    assert [bool(tensors["group_mask"].all()) for tensors in seen] == [False, True, False]
    for tensors in seen:
        assert tensors["policy_logps"].dtype == torch.float32
        assert torch.equal(tensors["reference_logps"], tensors["policy_logps"])
        assert torch.equal(tensors["old_logps"], tensors["policy_logps"])
        assert tensors["old_chosen_logps"].any(), "without a twin it stays as it was drawn"


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_laws_give_optional_tensors_unless_refused(law: Callable[..., None]) -> None:
    seen: list[bool] = []

    def nll(policy_token_logps: Tensor, mask: Tensor, group_ids: Tensor | None = None) -> LossOutput:
        seen.append(group_ids is not None)
        return LossOutput(-policy_token_logps, mask)

    loss = single(nll, ("policy_token_logps", "mask"), ("group_ids",))
    for options, expected in (((), True), ((True,), True), ((False,), False)):
        seen.clear()
        law(loss, torch.Generator().manual_seed(0), *options)
        assert set(seen) == {expected}


@pytest.mark.usefixtures("fresh_registry")
def test_check_gives_optional_tensors_and_seed_0_unless_told() -> None:
    def half(policy_logps: Tensor, group_ids: Tensor | None = None, *, scale: float = 1.0) -> LossOutput:
        """Breaks the order of rows, and with `group_ids` their independence of the policy."""
        position = torch.arange(len(policy_logps), dtype=torch.float64)
        weight = torch.ones_like(policy_logps) if group_ids is None else policy_logps.detach().exp()
        return LossOutput(scale * policy_logps * position, weight)

    register("half")(half)

    def outcomes(**options: Any) -> dict[str, str]:
        return {result.law: result.outcome for result in check("half", **options)}

    assert outcomes()["weights_ignore_policy"] == "failed"
    assert outcomes(optional=False)["weights_ignore_policy"] == "passed"
    assert outcomes(optional=False)["permutation_invariant"] == "failed"
    assert outcomes(optional=False, scale=0.0)["permutation_invariant"] == "passed", "hyper-parameters are the loss's"
    assert check("half") == check("half", 0) == check("half", seed=0)
    assert check("half") != check("half", 1)


@pytest.mark.usefixtures("fresh_registry")
def test_results_name_the_law_and_the_reason() -> None:
    def baseline(policy_logps: Tensor) -> LossOutput:
        loss = policy_logps - policy_logps.mean().detach()
        return LossOutput(loss, torch.ones_like(loss))

    register("baseline", coupled=True)(baseline)
    assert check("baseline") == [
        LawResult("padding_invariant", "skipped", "no tensor of this loss has padding"),
        LawResult("permutation_invariant", "passed"),
        LawResult("split_equals_whole", "skipped", "the loss is registered as coupled: its rows interact"),
        LawResult("weights_ignore_policy", "passed"),
        LawResult("finite_at_extremes", "passed"),
        LawResult("finite_at_reference", "passed"),
        LawResult("gradients_reach_policy", "passed"),
    ]


def read(text: str) -> Tensor:
    return torch.tensor(ast.literal_eval(text), dtype=torch.float64)


@pytest.mark.parametrize(
    ("law", "how"),
    [
        ("padding_invariant", "with more padding"),
        ("permutation_invariant", "with rows permuted"),
        ("split_equals_whole", "split in two"),
    ],
)
def test_a_difference_is_reported_with_both_values(law: str, how: str) -> None:
    """What came of the change stands first, what it should have been last."""

    def by_place(policy_token_logps: Tensor, mask: Tensor) -> LossOutput:
        rows, tokens = policy_token_logps.shape
        loss = policy_token_logps * torch.arange(rows * tokens).reshape(rows, tokens)
        return LossOutput(loss, torch.ones_like(loss))

    text = violation(law, by_place)
    found = re.fullmatch(f"{how}, the objective differs by (.*): (.*) instead of (.*)\\.", text)
    assert found, text
    difference, got, expected = map(float, found.groups())
    loss = single(by_place, ("policy_token_logps", "mask"))
    tensors = sample_tensors(loss, torch.Generator().manual_seed(0), ragged=law != "padding_invariant")
    assert expected == pytest.approx(float(by_place(**tensors).mean()), rel=1e-12)
    assert difference == pytest.approx(abs(got - expected), rel=1e-2)


def test_of_a_gradient_the_largest_difference_is_reported() -> None:
    """An objective of 0 hides a gradient that depends on the order of rows."""

    def by_position(policy_logps: Tensor) -> LossOutput:
        loss = (policy_logps - policy_logps.detach()) * torch.arange(len(policy_logps), dtype=torch.float64)
        return LossOutput(loss, torch.ones_like(loss))

    text = violation("permutation_invariant", by_position)
    found = re.fullmatch(
        r"with rows permuted, the gradient of policy_logps differs by (.*): (\[.*\]) instead of (\[.*\])\.", text
    )
    assert found, text
    got, expected = read(found[2]), read(found[3])
    torch.testing.assert_close(expected, torch.arange(7, dtype=torch.float64) / 7)
    assert float(found[1]) == pytest.approx(float((got - expected).abs().max()), rel=1e-2)
    assert sorted(got.tolist()) == sorted(expected.tolist())


def test_a_gradient_at_any_masked_position_is_reported() -> None:
    def second_token(values: Tensor, mask: Tensor) -> LossOutput:
        """Of a row of one token, the second is padding; no other padding receives gradient."""
        return LossOutput(values[:, 0] + values[:, 1] - values[:, 1].detach(), mask[:, 0])

    assert violation("padding_invariant", second_token) == (
        "values receives gradient where its mask is 0; multiply by the mask or use it as weight."
    )


def test_what_is_reported_in_one_case_only_is_named() -> None:
    def sometimes(policy_token_logps: Tensor, mask: Tensor) -> LossOutput:
        long = {"long": (mask, mask)} if mask.shape[-1] > 6 else {}
        return LossOutput(policy_token_logps, mask, long)

    assert violation("padding_invariant", sometimes) == "with more padding, these are reported in one case only: mine: long."


@pytest.mark.parametrize(
    ("at", "off", "is_violation"),
    [
        (1e3, 1e-7, False),
        (1e3, 1e-5, True),
        (0.0, 1e-12, False),
        (0.0, 1e-10, True),
        (0.0, (1 + 5e-10) * 1e-11, True),  # of the value that it should have: 0 adds nothing
    ],
)
def test_rounding_is_no_violation(at: float, off: float, is_violation: bool) -> None:
    """Up to 1e-9 of a value, or 1e-11 near 0: the sums of a permuted batch differ by less."""

    def rounded(policy_token_logps: Tensor, mask: Tensor) -> LossOutput:
        error = off if mask.shape[-1] > 6 else 0.0
        return LossOutput(policy_token_logps * 0 + at + error, mask)

    if is_violation:
        assert violation("padding_invariant", rounded).startswith(f"with more padding, the objective differs by {off:.3g}")
    else:
        loss = single(rounded, ("policy_token_logps", "mask"))
        law_named("padding_invariant")(loss, torch.Generator().manual_seed(0))


def test_weights_that_follow_the_policy_and_tracked_reports_are_named() -> None:
    def weighted(policy_logps: Tensor) -> LossOutput:
        return LossOutput(-policy_logps, policy_logps.detach())

    def tracked(policy_logps: Tensor) -> LossOutput:
        ones = torch.ones_like(policy_logps)
        metrics: dict[str, Metric] = {
            "pair": (-policy_logps, ones),
            "max": Max(policy_logps),
            "fine": Max(policy_logps.detach()),
        }
        return LossOutput(-policy_logps, ones, metrics, {"sum": (policy_logps.sum(), ones.sum())})

    assert violation("weights_ignore_policy", weighted) == (
        "the weight of mine depends on the policy; make it of masks, labels and detached inputs."
    )
    assert violation("weights_ignore_policy", tracked) == "mine: pair, mine: max, mine: sum carries gradient; detach it."


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_overflow_in_one_precision_is_enough(dtype: str) -> None:
    """-1e4 itself is no number of bf16, -9984 is."""
    at = {"float32": -1e4, "bfloat16": -9984.0}[dtype]

    def overflowing(policy_token_logps: Tensor, mask: Tensor) -> LossOutput:
        infinite = (policy_token_logps == at) & mask.bool()
        return LossOutput(policy_token_logps, mask, {"some": Max(torch.where(infinite, float("inf"), 0.0))})

    assert violation("finite_at_extremes", overflowing) == (
        "mine: some is not finite at |log-prob| = 10000; clamp exponents or use logsigmoid, expm1."
    )
    assert EXTREME == 1e4


@pytest.mark.parametrize("law", ["finite_at_extremes", "finite_at_reference"])
def test_one_infinite_gradient_among_finite_ones_is_reported(law: str) -> None:
    def first_row(policy_logps: Tensor) -> LossOutput:
        """The root of 0 has an infinite slope, at the first row only."""
        at_zero = (policy_logps - policy_logps.detach())[:1].abs().sqrt()
        return LossOutput(torch.cat([at_zero, policy_logps[1:]]), torch.ones_like(policy_logps))

    assert violation(law, first_row).startswith("the gradient of policy_logps is not finite at")


@pytest.mark.parametrize(("tokens", "is_full"), [(1, True), (4, True), (4, False)])
def test_infinity_at_the_reference_is_reported_with_the_length(tokens: int, is_full: bool) -> None:
    def divides(policy_token_logps: Tensor, mask: Tensor) -> LossOutput:
        broken = mask.shape[-1] == tokens and bool(mask.all()) == is_full
        return LossOutput(policy_token_logps / (0.0 if broken else 1.0), mask)

    assert violation("finite_at_reference", divides) == (
        f"the objective is not finite at policy = reference with completions of {tokens} tokens."
    )


def test_a_side_without_gradient_is_named() -> None:
    def chosen_only(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor) -> LossOutput:
        loss = policy_rejected_logps.detach() - policy_chosen_logps
        return LossOutput(loss, torch.ones_like(loss))

    def weightless(policy_logps: Tensor) -> LossOutput:
        return LossOutput(policy_logps, torch.zeros_like(policy_logps))

    def cut(policy_logps: Tensor) -> LossOutput:
        return LossOutput(policy_logps.detach(), torch.ones_like(policy_logps))

    def mismatched_only(policy_mismatched_logps: Tensor) -> LossOutput:
        return LossOutput(policy_mismatched_logps, torch.ones_like(policy_mismatched_logps))

    for function, side in ((chosen_only, "rejected"), (weightless, "unpaired")):
        message = f"mine: no gradient reaches the policy's {side} tensors."
        assert violation("gradients_reach_policy", function) == message
    for unconnected in (cut, mismatched_only):
        message = "mine is not connected to any policy tensor; is something detached?"
        assert violation("gradients_reach_policy", unconnected) == message
