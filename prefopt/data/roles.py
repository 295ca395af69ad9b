"""Roles of rows: policy, tuning, judge and test, by a hash of each row's key (its first human turn).

A row's role depends on its own key only, so it does not change with the order of the rows or with other rows. The one
exception: rows whose key stands in a test split are removed from the other roles.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal

from prefopt.data.records import Record
from prefopt.errors import ConfigError, DataError

Role = Literal["policy", "tuning", "judge", "test"]
ROLES: tuple[Role, ...] = ("policy", "tuning", "judge", "test")


@dataclass(frozen=True)
class Shares:
    """The expected share of keys in each role; they add up to one."""

    policy: float = 0.70
    tuning: float = 0.05
    judge: float = 0.15
    test: float = 0.10

    def __post_init__(self) -> None:
        values = [getattr(self, role) for role in ROLES]
        if not (min(values) >= 0 and abs(sum(values) - 1) <= 1e-9 and self.policy > 0):  # so written, NaN fails too
            given = ", ".join(f"{role} {value:g}" for role, value in zip(ROLES, values, strict=True))
            raise ConfigError(f"shares are {given}; none may be negative, policy must be positive, and they must add up to 1.")


@dataclass(frozen=True)
class RoleReport:
    """What the split found.

    Args:
        rows: records in each role.
        keys: distinct keys in each role.
        official_test_sources: sources whose own test split is used.
        removed: records left out because their key stands in a test split.
        shared_keys: keys found in more than one role, counted over all sources after the split: 0, or it is an error.
        near_duplicates: for each pair of roles ("policy/test"), first turns found in both once case, punctuation and
            spacing are ignored.
    """

    rows: Mapping[str, int]
    keys: Mapping[str, int]
    official_test_sources: tuple[str, ...]
    removed: int
    shared_keys: int
    near_duplicates: Mapping[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Split:
    """Records by role, each in the order in which they were read."""

    policy: tuple[Record, ...]
    tuning: tuple[Record, ...]
    judge: tuple[Record, ...]
    test: tuple[Record, ...]
    report: RoleReport


def role_of(key: str, shares: Shares, *, official_test: bool) -> Role:
    """The role of a key. `official_test`: the key's source has a test split of its own, so that "test" is not drawn.

    Those keys that would have been test rows are then spread over the other roles by a second hash: all other keys have
    one role whether or not their source has a test split, and sources that share keys agree.
    """
    role = _draw(f"role:{key}", {role: getattr(shares, role) for role in ROLES})
    if official_test and role == "test":
        return _draw(f"instead:{key}", {role: getattr(shares, role) for role in ROLES if role != "test"})
    return role


def _draw(text: str, weights: Mapping[Role, float]) -> Role:
    point = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64 * sum(weights.values())
    for role, weight in weights.items():
        point -= weight
        if point < 0 and weight > 0:
            return role
    return max(weights, key=lambda role: weights[role])  # rounding left the point on the upper end


def split_roles(records: Sequence[Record], shares: Shares | None = None) -> Split:
    """Gives every record its role.

    A source with an official test split has exactly those rows as test rows; the rows of other sources are hashed over
    all four roles. Rows of other roles whose key stands among the test rows are removed and counted.

    Raises:
        DataError: a record without a key, or a key in two roles.
    """
    shares = shares or Shares()
    for record in records:
        if not record.key:
            raise DataError(f"{record.id}: the record has no key to split by; `prefopt.data.hh.record_key` makes one.")
    with_test = {record.source for record in records if record.official_test}
    roles: dict[Role, list[Record]] = {role: [] for role in ROLES}
    for record in records:
        role = "test" if record.official_test else role_of(record.key, shares, official_test=record.source in with_test)
        roles[role].append(record)
    test_keys = {record.key for record in roles["test"]}
    kept = {role: tuple(r for r in rows if role == "test" or r.key not in test_keys) for role, rows in roles.items()}
    report = RoleReport(
        rows={role: len(rows) for role, rows in kept.items()},
        keys={role: len({record.key for record in rows}) for role, rows in kept.items()},
        official_test_sources=tuple(sorted(with_test)),
        removed=len(records) - sum(len(rows) for rows in kept.values()),
        shared_keys=verify_disjoint(kept),
        near_duplicates=near_duplicates(kept),
    )
    return Split(**kept, report=report)


def verify_disjoint(roles: Mapping[Role, Sequence[Record]]) -> int:
    """Counts the keys that stand in more than one role, from the records themselves.

    Raises:
        DataError: there are some; the message names rows.
    """
    first: dict[str, tuple[Role, str]] = {}
    shared: dict[str, str] = {}
    for role, rows in roles.items():
        for record in rows:
            other, row_id = first.setdefault(record.key, (role, record.id))
            if other != role:
                shared.setdefault(record.key, f"{row_id} ({other}) and {record.id} ({role})")
    if shared:
        raise DataError(f"{len(shared)} first turns stand in more than one role, for example {next(iter(shared.values()))}.")
    return len(shared)


def near_duplicates(roles: Mapping[Role, Iterable[Record]]) -> dict[str, int]:
    """First turns that two roles share when only lower-cased letters and digits count, by pair of roles."""
    forms = {role: {form for record in rows if (form := _letters(record.key))} for role, rows in roles.items()}
    return {f"{one}/{other}": len(forms[one] & forms[other]) for one, other in combinations(forms, 2)}


def _letters(key: str) -> str:
    return "".join(char for char in key.lower() if char.isalnum())
