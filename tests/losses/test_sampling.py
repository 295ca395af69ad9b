"""Random tensors for any loss: reproducible, and what the vocabulary says of every name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from losses.registry import BoundLoss, BoundTerm
from losses.sampling import SIZES, draw_garbage, mask_of, sample_tensors
from losses.types import VOCABULARY, Kind, LossOutput

FLOATS = ("logps", "token_logps", "mask", "lengths", "probability", "real", "nonnegative")
EXTREME = 1000.0

# At seed 0, each tensor alone: sum of value * position (from 1), as a rule and at extremes.
PINNED = {
    "chosen_mask": (348, 348),
    "group_mask": (66, 66),
    "group_token_mask": (1117, 1117),
    "group_lengths": (206, 206),
    "lengths": (84, 84),
    "max_completion_length": (6, 6),
    "policy_chosen_logps": (-116.9355703, -35022),
    "policy_token_logps": (-784.3341045, -240119),
    "reference_group_logps": (-350.0782903, -101064),
    "reference_mismatched_logps": (-79.68503163, -19010),
    "chosen_token_log_sum_sq": (-382.9338668, -184105),
    "rejected_token_kls": (1392.358011, 249365.8541),
    "values": (-363.0436497, 133397.4894),
    "entropies": (1855.953781, 493222.6321),
    "group_rewards": (0.6606723571, -13977.61312),
    "chosen_scores": (-17.12268882, -1000),
    "margins": (24.75213126, 9000),
    "soft_labels": (15.41884025, 6.5),
    "desirable": (11, 11),
    "ranks": (76, 76),
    "group_ids": (50, 50),
    "utility_ids": (7, 7),
    "reward_shift": (1.540996108, 1000),
}


def draw(needs: Iterable[str], seed: int = 0, may_have: Iterable[str] = (), **how: Any) -> dict[str, Tensor]:
    """What a loss with these tensors is given."""

    def never(**tensors: Tensor) -> LossOutput:
        raise AssertionError("drawing does not call the loss")

    term = BoundTerm("drawn", 1.0, False, frozenset(needs), frozenset(may_have), never, {})
    return sample_tensors(BoundLoss("drawn", (term,), {}), torch.Generator().manual_seed(seed), **how)


def position_sum(tensor: Tensor) -> float:
    flat = tensor.double().flatten()
    return float((flat * torch.arange(1, len(flat) + 1)).sum())


@pytest.mark.parametrize("name", PINNED)
def test_a_seed_gives_the_same_tensors_in_every_release(name: str) -> None:
    """So that a violated law is reported by its seed."""
    usual, extreme = PINNED[name]
    assert position_sum(draw([name])[name]) == pytest.approx(usual, rel=1e-8)
    assert position_sum(draw([name], extreme=EXTREME)[name]) == pytest.approx(extreme, rel=1e-8)


def test_other_seeds_give_other_tensors() -> None:
    for name in VOCABULARY.keys() - {"max_completion_length", "group_ids", "utility_ids"}:
        others = [draw([name], seed=seed)[name] for seed in range(1, 9)]
        assert any(not torch.equal(draw([name])[name], other) for other in others), name


@given(seed=st.integers(0, 2**31))
def test_sampled_tensors_are_consistent(seed: int) -> None:
    """Shapes, sums, lengths, zeros at padding, ranks: what the vocabulary says of every name."""
    drawn = draw(VOCABULARY, seed)
    sizes: dict[str, int] = {}
    for name, tensor in drawn.items():
        spec = VOCABULARY[name]
        assert tensor.isfinite().all()
        assert all(sizes.setdefault(letter, size) == size for letter, size in zip(spec.shape, tensor.shape, strict=True)), name
        token_name = name.removesuffix("logps") + "token_logps"
        if spec.kind == "logps" and token_name in drawn:
            torch.testing.assert_close(tensor, drawn[token_name].sum(-1))
        if spec.kind in ("logps", "token_logps"):
            assert (tensor <= 0).all()
        if spec.kind == "nonnegative":
            assert (tensor >= 0).all()
        if spec.kind == "probability":
            assert ((tensor >= 0) & (tensor <= 1)).all()
    assert sizes == SIZES
    for side in ("chosen_", "rejected_", "", "group_"):
        mask = drawn[f"{side}mask" if side != "group_" else "group_token_mask"]
        assert not drawn[f"policy_{side}token_logps"][mask == 0].any()
        assert (drawn[f"policy_{side}token_logps"][mask == 1] < 0).all()
        assert (mask.diff(dim=-1) <= 0).all(), "ones stand left of zeros"
        torch.testing.assert_close(drawn[f"{side}lengths"], mask.sum(-1))
    assert not drawn["chosen_token_log_sum_sq"][drawn["chosen_mask"] == 0].any()
    assert (drawn["lengths"] >= 1).all()
    for ranks, valid in zip(drawn["ranks"], drawn["group_mask"], strict=True):
        count = int(valid.sum())
        assert count >= 2, "one completion has nothing to be ranked against"
        assert sorted(ranks[:count].tolist()) == list(range(count))
        assert sorted(ranks.tolist()) == list(range(len(ranks)))
    assert torch.equal(drawn["group_token_mask"].any(-1), drawn["group_mask"].bool())
    assert 0 < drawn["desirable"].sum() < len(drawn["desirable"])


def test_policy_reference_and_sampling_policy_are_near_but_not_equal() -> None:
    """Each token is within 0.3 of a base that the three share, so margins are not saturated."""
    for side in ("chosen_", "rejected_", "", "group_"):
        drawn = draw([f"{model}_{side}token_logps" for model in ("policy", "reference", "old")])
        policy, reference, old = (drawn[f"{model}_{side}token_logps"] for model in ("policy", "reference", "old"))
        for one, other in ((policy, reference), (policy, old), (reference, old)):
            assert (one - other).abs().max() < 0.6
            assert (one - other)[one < 0].abs().min() > 0


def test_all_row_counts_differ() -> None:
    """Else a loss that mixes up pairs, sequences, prompts and completions would pass."""
    assert SIZES == {"P": 6, "N": 7, "M": 5, "G": 4, "K": 3, "T": 6}
    rows = [size for letter, size in SIZES.items() if letter != "T"]
    assert len(set(rows)) == len(rows)


def test_sizes_not_named_keep_their_default() -> None:
    drawn = draw(["chosen_mask", "mask", "group_ids"], sizes={"P": 2, "T": 9})
    assert [list(drawn[name].shape) for name in ("chosen_mask", "mask", "group_ids")] == [[2, 9], [7, 9], [7]]


def test_optional_tensors_are_drawn_unless_refused() -> None:
    assert list(draw(["margins"], may_have=["soft_labels"])) == ["margins", "soft_labels"]
    assert list(draw(["margins"], may_have=["soft_labels"], optional=False)) == ["margins"]


def test_nothing_is_masked_unless_ragged() -> None:
    masks = [name for name, spec in VOCABULARY.items() if spec.kind == "mask"]
    assert all(mask.all() for mask in draw(masks, ragged=False).values())
    assert not draw(["mask"])["mask"].all(), "by default, completions are ragged"
    drawn = draw(["group_lengths", "policy_token_logps"], ragged=False)
    assert (drawn["group_lengths"] == SIZES["T"]).all()
    assert (drawn["policy_token_logps"] < 0).all()


@pytest.mark.parametrize("name", [name for name, spec in VOCABULARY.items() if spec.kind == "mask"])
def test_the_first_row_is_as_long_as_the_tensor(name: str) -> None:
    """So that a batch has no column of padding alone."""
    for seed in range(20):
        assert draw([name], seed, sizes={"K": 9, "T": 11})[name].flatten(0, -2)[0].all()


@pytest.mark.parametrize("name", ["mask", "group_mask", "group_token_mask"])
def test_every_length_occurs(name: str) -> None:
    seen = {int(length) for seed in range(30) for length in draw([name], seed)[name].sum(-1).flatten()}
    least, most = {"mask": (1, 6), "group_mask": (2, 3), "group_token_mask": (0, 6)}[name]
    assert seen == set(range(least, most + 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("extreme", [None, 1e4])
def test_the_dtype_is_that_of_all_but_booleans_and_indices(dtype: torch.dtype, extreme: float | None) -> None:
    for name, tensor in draw(VOCABULARY, dtype=dtype, extreme=extreme).items():
        kind = VOCABULARY[name].kind
        assert tensor.dtype == {"boolean": torch.bool, "index": torch.int64}.get(kind, dtype), name


def test_a_label_of_exactly_one_half_is_undesirable() -> None:
    """As in bf16, where 0.5 is drawn now and then: here for the fifth."""
    labels = draw(["desirable"], seed=20, dtype=torch.bfloat16)["desirable"]
    assert labels.tolist() == [True, False, False, False, False, False, False]


def test_extreme_values_are_the_ends_of_their_ranges() -> None:
    drawn = draw(VOCABULARY, extreme=EXTREME, sizes={"P": 40, "N": 40, "G": 20})
    ends = {
        "policy_token_logps": {0.0, -1.0, -EXTREME},
        "old_chosen_token_logps": {0.0, -1.0, -EXTREME},
        "chosen_token_log_sum_sq": {0.0, -1.0, -EXTREME},
        "chosen_scores": {0.0, -EXTREME, EXTREME},
        "margins": {0.0, EXTREME},
        "soft_labels": {0.0, 0.5, 1.0},
    }
    for name, expected in ends.items():
        assert set(drawn[name].flatten().tolist()) == expected, name
    valid = {"values": drawn["mask"], "entropies": drawn["mask"], "group_scores": drawn["group_mask"]}
    for name, mask in valid.items():
        signs = (0.0, 1.0) if VOCABULARY[name].kind == "nonnegative" else (-1.0, 0.0, 1.0)
        assert set(drawn[name][mask.bool()].tolist()) == {sign * EXTREME for sign in signs}, name
        assert EXTREME not in drawn[name][~mask.bool()].abs()


def test_garbage_stands_in_masked_positions_only() -> None:
    """Extreme values tell one from the other: a valid one is 0 or +-1000, garbage is neither."""
    drawn = draw(VOCABULARY, extreme=EXTREME)
    for name, tensor in drawn.items():
        mask = mask_of(name, drawn)
        if mask is not None and VOCABULARY[name].kind in ("real", "nonnegative"):
            is_garbage = (tensor != 0) & (tensor.abs() != EXTREME)
            assert torch.equal(is_garbage, mask == 0), name


def test_indices_are_of_neighbours() -> None:
    drawn = draw(["group_ids", "utility_ids"], sizes={"N": 7, "G": 7})
    assert drawn["group_ids"].tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert drawn["utility_ids"].tolist() == [0, 0, 1, 1, 0, 0, 1]


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("policy_chosen_token_logps", "chosen_mask"),
        ("rejected_token_kls", "rejected_mask"),
        ("policy_group_token_logps", "group_token_mask"),
        ("values", "mask"),
        ("mismatched_mask", "mismatched_mask"),
        ("policy_group_logps", "group_mask"),
        ("ranks", "group_mask"),
        ("policy_chosen_logps", None),
        ("desirable", None),
        ("utility_ids", None),
        ("reward_shift", None),
    ],
)
def test_the_mask_of_a_tensor(name: str, mask: str | None) -> None:
    tensors = draw([name for name, spec in VOCABULARY.items() if spec.kind == "mask"])
    assert mask_of(name, tensors) is (tensors[mask] if mask else None)
    assert mask_of(name, {}) is None


@pytest.mark.parametrize("kind", [*FLOATS, "boolean", "index"])
def test_garbage_is_what_a_kind_allows(kind: Kind) -> None:
    garbage = draw_garbage(kind, [50, 40], torch.Generator().manual_seed(0))
    assert garbage.shape == (50, 40)
    assert garbage.dtype == torch.float64
    if kind in ("real", "nonnegative"):
        noise = 5 * torch.randn(50, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert torch.equal(garbage, noise if kind == "real" else noise.abs())
    else:
        assert not garbage.any()
