from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefopt.data.records import Record
from prefopt.data.roles import ROLES, Shares, Split, near_duplicates, role_of, split_roles, verify_disjoint
from prefopt.errors import ConfigError, DataError


def record(key: str, number: int = 0, *, source: str = "s", test: bool = False) -> Record:
    return Record(f"{source}:{key}:{number}:{test}", "p", ("a", "b"), key=key, source=source, official_test=test)


def role_by_id(split: Split) -> dict[str, str]:
    return {row.id: role for role in ROLES for row in getattr(split, role)}


@settings(max_examples=50, deadline=None)
@given(keys=st.lists(st.text(min_size=1, max_size=5), min_size=1, unique=True), seed=st.integers(0, 99))
def test_role_depends_neither_on_order_nor_on_other_rows(keys: list[str], seed: int) -> None:
    rows = [record(key) for key in keys]
    shuffled = random.Random(seed).sample(rows, len(rows))
    whole = role_by_id(split_roles(rows))
    assert role_by_id(split_roles(shuffled)) == whole
    assert role_by_id(split_roles(rows[:1])) == {rows[0].id: whole[rows[0].id]}


def test_shares_are_met_within_four_standard_errors() -> None:
    n = 4000
    split = split_roles([record(f"key {i}") for i in range(n)])
    for role in ROLES:
        share = getattr(Shares(), role)
        assert abs(split.report.rows[role] / n - share) < 4 * math.sqrt(share * (1 - share) / n)


@pytest.mark.fault(25)
def test_rows_of_one_key_share_a_role() -> None:
    split = split_roles([record(f"key {i % 20}", i) for i in range(200)])
    assert sum(split.report.keys.values()) == 20
    assert split.report.shared_keys == 0


@pytest.mark.fault(25)
def test_official_test_rows_are_the_test_role_and_their_keys_leave_the_others() -> None:
    train = [record(f"key {i}") for i in range(300)]
    official = [record(f"key {i}", test=True) for i in range(290, 310)]
    split = split_roles([*train, *official])
    assert split.test == tuple(official)
    assert split.report.removed == 10
    assert sum(split.report.rows.values()) == 310
    assert split.report.official_test_sources == ("s",)


def test_a_source_with_a_test_split_draws_three_roles_and_keeps_the_shares_between_them() -> None:
    n = 4000
    roles = [role_of(f"key {i}", Shares(), official_test=True) for i in range(n)]
    assert "test" not in roles
    for role in ("policy", "tuning", "judge"):
        share = getattr(Shares(), role) / 0.9
        assert abs(roles.count(role) / n - share) < 4 * math.sqrt(share * (1 - share) / n)  # type: ignore[arg-type]


def test_a_test_split_moves_no_key_that_was_not_a_test_key() -> None:
    for i in range(500):
        plain = role_of(f"key {i}", Shares(), official_test=False)
        assert plain in ("test", role_of(f"key {i}", Shares(), official_test=True))


def test_sources_with_and_without_a_test_split_stay_disjoint() -> None:
    keys = [f"key {i}" for i in range(400)]
    rows = [record(key, source="one") for key in keys] + [record(key, source="two") for key in keys]
    split = split_roles([*rows, record("only here", source="one", test=True)])
    hashed = {row.key for row in split.test if row.source == "two"}
    assert len(hashed) > 20
    assert split.report.removed == len(hashed)
    assert split.report.shared_keys == 0


@pytest.mark.fault(25)
def test_a_key_in_two_roles_is_an_error_that_names_rows() -> None:
    with pytest.raises(DataError, match=r"1 first turns .* s:k:1:False \(policy\) and s:k:2:False \(judge\)"):
        verify_disjoint({"policy": [record("k", 1)], "judge": [record("k", 2), record("k", 3)]})


@pytest.mark.fault(25)
def test_near_duplicates_ignore_case_punctuation_and_spacing() -> None:
    found = near_duplicates(
        {"policy": [record("What's up?"), record("...")], "test": [record("whats  UP"), record("!!!")], "judge": []}
    )
    assert found == {"policy/test": 1, "policy/judge": 0, "test/judge": 0}


@pytest.mark.parametrize("shares", [(0.5, 0.5, 0.5, 0.5), (1.2, -0.2, 0, 0), (0, 0.5, 0.5, 0), (math.nan, 0, 0, 1)])
def test_shares_that_make_no_split_are_refused(shares: tuple[float, float, float, float]) -> None:
    with pytest.raises(ConfigError, match="add up to 1"):
        Shares(*shares)


def test_a_role_with_share_zero_stays_empty() -> None:
    split = split_roles([record(f"key {i}") for i in range(200)], Shares(0.5, 0, 0, 0.5))
    assert split.tuning == split.judge == ()
    assert split.policy
    assert split.test


def test_a_record_without_a_key_is_an_error() -> None:
    with pytest.raises(DataError, match="no key"):
        split_roles([record("")])
